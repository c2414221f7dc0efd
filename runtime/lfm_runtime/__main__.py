"""`python -m lfm_runtime` is `lfm-edge`."""

import sys

from lfm_runtime.commands.cli import main

sys.exit(main())
