"""How far a run is: a line that is replaced on a terminal, else a line a minute."""

from __future__ import annotations

import sys
import time

from lfm_runtime.commands.console import status_line
from lfm_runtime.errors import counted

from lfm_serve.captions.making import Counts

_EVERY_S, _BAR = 60.0, 20


class Progress:
    """Says how many images are done, how fast, and how long it will take."""

    def __init__(self, counts: Counts, total: int | None, *, quiet: bool) -> None:
        """`total`: images to be done; None where more may come."""
        self.counts, self._total, self._quiet = counts, total, quiet
        self._terminal = sys.stderr.isatty()
        self._say = status_line(quiet=quiet or not self._terminal)
        self._last = time.monotonic()

    def told(self) -> None:
        """One more is done."""
        if self._terminal:
            self._say(self.line())
        elif not self._quiet and time.monotonic() - self._last >= _EVERY_S:
            print(self.line(), file=sys.stderr, flush=True)
            self._last = time.monotonic()

    def warn(self, text: str) -> None:
        """A line that stays."""
        self._say("")
        plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)  # a stranger's names may hold anything
        print(f"lfm-edge: {plain}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clear the line."""
        self._say("")

    def line(self) -> str:
        """Images done, a minute, time left."""
        counts = self.counts
        seconds = time.monotonic() - counts.started
        rate = counts.done / seconds if seconds > 0 else 0.0
        full = round(_BAR * counts.done / self._total) if self._total else 0
        bar = f"[{'#' * full:.<{_BAR}}] " if self._total and self._terminal else ""
        errors = f", {counted(counts.errors, 'error')}" if counts.errors else ""
        left = ""
        if self._total and rate and counts.done < self._total:
            left = f", {_duration((self._total - counts.done) / rate)} left"
        images = (
            counted(counts.done, "image")
            if self._total is None
            else f"{counts.done:,} of {counted(self._total, 'image')}"
        )
        speed = f"{rate * 60:,.0f}" if rate * 60 >= 100 else f"{rate * 60:.3g}"
        return f"{bar}{images}{errors}, {speed} a minute{left}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h"
