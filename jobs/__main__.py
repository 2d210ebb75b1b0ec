"""`python -m jobs COMMAND ...` is the same as `ergo-rl COMMAND ...`."""

import sys

from jobs.cli import main

sys.exit(main())
