"""``ergo-rl export``: the policy of a run as a Hugging Face folder with a model card."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ergo_rl.jobs.cli import command
from ergo_rl.jobs.export import export


@command("export", also=(ValueError,))
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl export",
        description="Write the policy of a run as a Hugging Face folder with a model card (scores, data, prompts, "
        "configuration): the finished policy, or that of a checkpoint, LoRA merged.",
        epilog="example: ergo-rl export runs/panels --checkpoint best --out exported/panels-best",
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, help="folder to make (default: exported/NAME)")
    parser.add_argument(
        "--checkpoint",
        default="",
        help="latest, best or a name such as step-000050 (default: the finished policy, or else the newest checkpoint)",
    )
    options = parser.parse_args(argv)
    out = options.out or Path("exported") / "-".join(filter(None, (options.run.resolve().name, options.checkpoint)))
    step = export(options.run, out, options.checkpoint)
    print(f"{out}: the policy after {step} steps; serve it: vllm serve {out} (README.md there has the options)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
