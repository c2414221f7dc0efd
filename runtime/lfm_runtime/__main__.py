"""`python -m lfm_runtime`: the `lfm-edge` command where its script is not on the path."""

import sys

from lfm_runtime.commands import start

sys.exit(start())
