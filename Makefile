# ergo-rl: `make` lists what there is. Needs make, Python 3.11 or newer with pip, and a C++ compiler.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Without one, as under `env -i`, a shell still finds Python, but Python does not find itself (sys.executable is empty).
PATH ?= /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH

PYTHON ?= python3
DEVICE ?= auto
ARGS ?=

# The tests are a CPU's: their recipes give no role a GPU, and vLLM's GPU build cannot do without one. On a machine with
# a GPU, what runs on its CPU has an environment of its own, beside the one that trains.
test lint lint-only format setup-dev: DEVICE := cpu
NVIDIA := $(shell command -v nvidia-smi)
VENV = $(if $(and $(NVIDIA),$(filter cpu,$(DEVICE))),.venv-cpu,.venv)

SETUP = ERGO_RL_VENV=$(VENV) $(PYTHON) scripts/setup_env.py --device $(DEVICE)
# On PATH for every child process too: DeepSpeed looks for ninja there. Not for SETUP, which runs outside of it.
IN_VENV = PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: help train test gpu-check rehearse setup setup-dev lint format check-python

help:  ## This list
	@echo "usage: make TARGET [ARGS=...] [DEVICE=auto|cpu|gpu] [PYTHON=python3.12]"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

train: setup  ## Set up, then train (ARGS="seed=3" overrides the config)
	@$(IN_VENV) ergo-rl train $(ARGS)

test: setup-dev  ## Set up for the CPU, then lint, types, import contracts and all tests (ARGS go to pytest)
	@$(MAKE) lint-only
	@echo; echo "=== tests: pytest ==="
	@$(IN_VENV) pytest $(ARGS)

gpu-check: setup  ## Set up, then check and measure on one GPU, 8 to 20 minutes (DEVICE=cpu: a dry run; docs/gpu.md)
	@$(IN_VENV) python -m benchmarks.gpu_check --device $(DEVICE) $(ARGS)

# A copy, because the set-up installs into the .venv beside it. Tracked files only.
rehearse: check-python  ## Install the GPU environment under build/, without a GPU, and run the tests that can run there
	@mkdir -p build/rehearsal
	@git ls-files -z | xargs -0 cp -P --parents --target-directory=build/rehearsal
	@cd build/rehearsal && $(PYTHON) scripts/setup_env.py --device gpu --dev
	@cd build/rehearsal && ERGO_RL_REHEARSE=1 PATH="$$PWD/.venv/bin:$$PATH" PYTHONPATH= \
	  pytest $(or $(ARGS),tests/test_constraints.py tests/learners tests/cluster -m "not system")

setup: check-python  ## Make .venv with everything pinned (2 to 5 minutes the first time, then at once)
	@$(SETUP)

setup-dev: check-python
	@$(SETUP) --dev

lint: setup-dev  ## Lint, formatting, types and import contracts
	@$(MAKE) lint-only

.PHONY: lint-only
lint-only:
	@export $(IN_VENV); status=0; \
	check() { echo; echo "=== $$1: $${*:2} ==="; "$${@:2}" || status=1; }; \
	check "lint" ruff check; \
	check "formatting" ruff format --check; \
	check "types" mypy; \
	check "import contracts" lint-imports --no-logo; \
	exit $$status

format: setup-dev  ## Put the code into the house format
	$(IN_VENV) ruff check --fix
	$(IN_VENV) ruff format

check-python:
	@command -v $(PYTHON) > /dev/null || { \
	  echo "There is no '$(PYTHON)' on PATH. Install Python 3.11 or newer, or name one: make train PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; ergo-rl needs 3.11 or newer.\nInstall one, then name it: make train PYTHON=python3.12" % sys.version_info[:2])'
