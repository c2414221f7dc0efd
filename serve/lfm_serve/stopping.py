"""Ending a long run: at once, or after what is being made."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or SIGHUP lets answers that are being made end; the second ends the process."""
    before: dict[Any, Any] = {}

    def handle(*_: object) -> None:
        for number, handler in before.items():
            signal.signal(number, handler if number == signal.SIGINT else signal.SIG_DFL)
        stop()
        with suppress(OSError):  # print may be at work, or nobody listen
            os.write(2, b"\nlfm-edge: ending after the answers that are being made; again: at once\n")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
