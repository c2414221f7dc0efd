"""The text of one answer, token by token: where it ends, and what of it may already be shown."""

from __future__ import annotations

import time
from collections.abc import Sequence

from lfm_runtime.decode.sampling import GenerationSettings
from lfm_runtime.report import WRITTEN, Report
from lfm_runtime.text.tokenizer import TextStream, Tokenizer


class Reply:
    """Takes tokens until `finished`; the text goes into the report as well."""

    def __init__(
        self, tokenizer: Tokenizer, eos: Sequence[int], settings: GenerationSettings, room: int, report: Report
    ) -> None:
        """`room`: tokens that still fit the context."""
        self.report = report
        self.first_token: float | None = None
        self._stream, self._stops = TextStream(tokenizer), StopStrings(settings.stop)
        self._eos = () if settings.ignore_eos else tuple(eos)
        self._limit, self._room = settings.max_new_tokens, room

    @property
    def finished(self) -> bool:
        """Whether the answer is over, so that no more tokens are to be generated."""
        return bool(self.report.finish_reason)

    def add(self, token: int) -> str:
        """Take a generated token; return the text that has become certain with it."""
        known = time.perf_counter()
        self.first_token = self.first_token or known
        report = self.report
        report.new_tokens += 1
        piece = ""
        if token in self._eos:
            report.finish_reason = "eos"
        else:
            piece = self._stops.pass_on(self._stream.add(token))
            if self._stops.found:
                report.finish_reason = "stop"
            elif report.new_tokens == self._limit:
                report.finish_reason = "length"
            elif report.new_tokens > self._room:  # the last token is never fed
                report.finish_reason = "context"
        if report.finish_reason:
            piece += self._stops.pass_on(self._stream.finish()) + self._stops.rest()
        report.text += piece
        report.spans.append((WRITTEN, known, time.perf_counter()))
        return piece


class StopStrings:
    """Holds text back while it could be the start of a stop string; a stop string itself is never passed on."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found = False
        self._held = ""

    def pass_on(self, text: str) -> str:
        """What of the text so far is certain to be before any stop string."""
        if not self.stops or self.found:
            return "" if self.found else text
        text = self._held + text
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back when the answer ended for another reason."""
        held, self._held = self._held, ""
        return held
