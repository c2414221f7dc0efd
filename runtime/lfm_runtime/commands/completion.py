"""`lfm-edge completion`: print a completion script for a shell."""

from __future__ import annotations

import argparse
from pathlib import Path

SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Print a script that completes commands, flags and file names. bash: lfm-edge completion bash > "
        "~/.local/share/bash-completion/completions/lfm-edge"
    )
    parser.add_argument("shell", choices=SHELLS)


def run(options: argparse.Namespace) -> int:
    """Print the script and return 0."""
    import shtab

    from lfm_runtime.commands.cli import every_command

    def complete(action: argparse.Action) -> None:
        if action.type is Path or action.dest in ("bundle", "images"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]

    print(shtab.complete(every_command(complete=complete), options.shell))
    return 0
