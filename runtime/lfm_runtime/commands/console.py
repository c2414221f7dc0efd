"""Standard streams as they are found: a terminal that cannot write every character, descriptors that are closed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from lfm_runtime.formats.files import to_json

_PAUSE_S = 10.0


def ready_streams() -> None:
    """Make standard input, output and error usable: what they cannot encode is replaced, and a closed one reads and
    writes nothing.

    Closed descriptors (`<&-`, `>&-`) are taken by the null device first: otherwise the next file that is opened, a
    bundle's data, would be standard output.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False, errors="replace"))  # noqa: SIM115  (open for good)
    for stream in (sys.stdin, sys.stdout):
        reconfigure = getattr(stream, "reconfigure", None)  # not there where a test or a notebook has put another
        if reconfigure:
            reconfigure(errors="replace")


def print_json(value: Any) -> None:
    """One line of JSON on standard output; characters that it, or UTF-8, cannot encode (names of files) are escaped."""
    encoding, text = getattr(sys.stdout, "encoding", None) or "ascii", to_json(value)
    print(text if encoding.lower().replace("-", "") == "utf8" else to_json(value, ascii_only=True))


def status_line(*, quiet: bool = False) -> Callable[[str], None]:
    """A function that says on stderr what is being done: on a terminal each text replaces the one before, and "" clears
    the line; elsewhere there is a line every ten seconds at most.
    """
    if quiet:
        return lambda _: None
    if sys.stderr.isatty():
        return lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    last = -_PAUSE_S

    def say(text: str) -> None:
        nonlocal last
        if text and time.monotonic() - last >= _PAUSE_S:
            print(text, file=sys.stderr, flush=True)
            last = time.monotonic()

    return say
