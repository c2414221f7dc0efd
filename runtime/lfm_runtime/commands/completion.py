"""`lfm-edge completion`: print a completion script for a shell, or the manual page."""

from __future__ import annotations

import argparse
from pathlib import Path

SHELLS = ("bash", "zsh", "tcsh")
EXIT_CODES = {
    "0": "done",
    "1": "a check failed (verify, doctor, selftest), a figure got worse (compare), a limit is broken (audit --limit), "
    "an answer did not come (watch --until)",
    "2": "an error that the message explains",
    "3": "quantize: the variant is not good enough. audit, compare: the measurement is not valid, or was interrupted. "
    "selftest: only a budget is exceeded, or the board is throttled. caption, watch: some images have an "
    "error, no picture came, or records or --sidecar texts were not delivered. run --schema: the JSON was cut off",
    "130": "interrupted",
    "141": "the program that reads the output ended before it, as head does",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Print a script that completes commands, flags and file names, or (man) the manual page. bash: "
        "lfm-edge completion bash > ~/.local/share/bash-completion/completions/lfm-edge; man: "
        "lfm-edge completion man > ~/.local/share/man/man1/lfm-edge.1"
    )
    parser.add_argument("shell", choices=(*SHELLS, "man"))


def run(options: argparse.Namespace) -> int:
    """Print the script or the page and return 0."""
    import shtab

    from lfm_runtime.commands.cli import every_command

    def complete(action: argparse.Action) -> None:
        if action.type is Path or action.dest in ("bundle", "images"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]

    parser = every_command(complete=complete)
    print(_manual(parser) if options.shell == "man" else shtab.complete(parser, options.shell))
    return 0


def _manual(parser: argparse.ArgumentParser) -> str:
    """Return the page in the format of man(7)."""
    from argparse_manpage.manpage import Manpage

    from lfm_runtime import __version__

    codes = "\n".join(f".TP\n.B {code}\n{meaning}" for code, meaning in EXIT_CODES.items())
    parser._manpage = [{"heading": "exit status", "content": codes}]  # type: ignore[attr-defined]  # noqa: SLF001
    about = "export, run and measure LFM2-VL vision-language models on small machines"
    page = {"project_name": "lfm-edge", "version": __version__, "manual_title": "lfm-edge", "description": about}
    return str(Manpage(parser, page)).rstrip()
