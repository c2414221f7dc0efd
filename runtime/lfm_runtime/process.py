"""Our own programs in processes of their own, which find our packages where this process found them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def child_environment(**more: str) -> dict[str, str]:
    """Return this process's environment variables with its import path as PYTHONPATH; `more` overrides."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in sys.path if path)), **more}


def python(code: str, *words: str) -> list[str]:
    """A command that runs Python code; what lies in the current folder is not imported."""
    return [sys.executable, "-c", f"import sys; sys.path[:] = [path for path in sys.path if path]\n{code}", *words]


def module(name: str, *words: str) -> list[str]:
    """Return a command that runs a module of ours, as `python -m` would."""
    return python(f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)", *words)


def run_command(words: Sequence[str], *, first: str = "") -> subprocess.CompletedProcess[str]:
    """`lfm-edge WORDS`, to its end. `first`: Python that the process does before it."""
    program = python(
        f"{first}\nimport sys; from lfm_runtime.commands.cli import main; sys.exit(main(sys.argv[1:]))", *words
    )
    return subprocess.run(program, env=child_environment(), capture_output=True, text=True, check=False)  # noqa: S603


def last_line(text: str) -> str:
    """Return the last line of `text`, a command's error; "it says nothing" where there is none."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it says nothing"
