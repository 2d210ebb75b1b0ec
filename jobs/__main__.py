"""`python -m ergo_rl.jobs COMMAND ...` is the same as `ergo-rl COMMAND ...`."""

import sys

from ergo_rl.jobs.cli import main

sys.exit(main())
