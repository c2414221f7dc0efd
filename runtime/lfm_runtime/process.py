"""Our own programs in processes of their own, which find our packages where this process found them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def child_environment(**more: str) -> dict[str, str]:
    """This process's variables, with its import path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in sys.path if path)), **more}


def run_command(words: Sequence[str], *, first: str = "") -> subprocess.CompletedProcess[str]:
    """`lfm-edge WORDS`, to its end. `first`: Python that the process does before it."""
    code = f"{first}\nimport sys; from lfm_runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    program = [sys.executable, "-c", code, *words]
    return subprocess.run(program, env=child_environment(), capture_output=True, text=True, check=False)  # noqa: S603


def last_line(text: str) -> str:
    """What a command said at the end: its error."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it says nothing"
