"""One answer: what it is made from; its text, token by token, where it ends, and what of it may already be shown."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lfm_runtime.decode.guide import Guide
from lfm_runtime.decode.sampling import GenerationSettings, Odds
from lfm_runtime.images.opened import CutImage, OpenedImage
from lfm_runtime.report import WRITTEN, Report
from lfm_runtime.text.messages import ToolCall
from lfm_runtime.text.prompt import RenderedPrompt
from lfm_runtime.text.tokenizer import TextStream, Tokenizer
from lfm_runtime.text.tool_calls import CALL_END, CALL_START, parse_calls

Opened: TypeAlias = "OpenedImage | CutImage"


@dataclass(frozen=True)
class Job:
    """One answer to be made: its prompt, and the reply that grows."""

    prompt: RenderedPrompt
    images: Sequence[Opened]
    settings: GenerationSettings
    reply: Reply
    guide: Guide | None  # the grammar that it follows
    capacity: int  # of prompt and answer together
    started: float  # time.perf_counter()
    prepared: float  # as well

    def finish(self) -> float:
        """Complete the report with the times of the start, the first token and now; returns now."""
        now = time.perf_counter()
        self.reply.report.finish(self.started, self.reply.first_token, now)
        return now


class Answer:
    """An answer being made: iterate for the text, then read `report`. Closing the iterator early stops the work."""

    def __init__(self, pieces: Iterator[str], reply: Reply) -> None:
        self._pieces, self.reply = pieces, reply

    @property
    def report(self) -> Report:
        """What it cost; complete at the end."""
        return self.reply.report

    @property
    def odds(self) -> Sequence[Odds]:
        """With the setting `logprobs`, how likely each token of the text so far was."""
        return self.reply.odds

    @property
    def calls(self) -> Sequence[ToolCall]:
        """The calls of tools that it has made so far."""
        return self.reply.calls

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def text(self) -> str:
        """Run to the end and return the whole text."""
        for _ in self._pieces:
            pass
        return self.report.text


class Reply:
    """Takes tokens until `finished`; the text goes into the report as well."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos: Sequence[int],
        settings: GenerationSettings,
        room: int,
        report: Report,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        guide: Guide | None = None,
    ) -> None:
        """`room`: tokens that still fit the context; `tools`: what the answer may call; `guide`: its grammar."""
        self.report = report
        self.calls: list[ToolCall] = []
        self.odds: list[Odds] = []
        """With the setting `logprobs`, of each token of the text so far."""
        self._drawn: deque[tuple[int, Odds]] = deque()  # of tokens whose text is held back, and where that begins
        self._begin = self._shown = self._given = 0  # bytes of tokens, bytes of the text, odds that were asked for
        self._tokenizer, self._tools, self._guide = tokenizer, tools, guide
        self._call: bytearray | None = None  # what stands between a call's special tokens
        self.first_token: float | None = None
        self._stream, self._stops = TextStream(tokenizer), StopStrings(settings.stop)
        self._eos = () if settings.ignore_eos else tuple(eos)
        self._limit, self._room = settings.max_new_tokens, room

    @property
    def finished(self) -> bool:
        """Whether the answer is over, so that no more tokens are to be generated."""
        return bool(self.report.finish_reason)

    def add(self, token: int, odds: Odds | None = None) -> str:
        """Take a generated token; return the text that has become certain with it."""
        known = time.perf_counter()
        self.first_token = self.first_token or known
        report = self.report
        report.new_tokens += 1
        piece = ""
        if token in self._eos:
            report.finish_reason = "eos"
        else:
            piece = self._stops.pass_on(self._text(token))
            if odds and self._call is None and token not in self._tokenizer.special:
                self._drawn.append((self._begin, odds))
                self._begin += len(self._tokenizer.token_bytes(token))
            if self._stops.found:
                report.finish_reason = "stop"
            elif self._guide and self._guide.finished:
                report.finish_reason = "schema"
            elif report.new_tokens == self._limit:
                report.finish_reason = "length"
            elif report.new_tokens > self._room:  # the last token is never fed
                report.finish_reason = "context"
        if report.finish_reason:
            if report.finish_reason == "eos" and self._call is not None:  # its end token was left out
                piece = self._stops.pass_on(self._end_call())
            piece += self._stops.pass_on(self._stream.finish()) + self._stops.rest()
        report.text += piece
        if self._drawn:
            self._pass_on_odds(piece)
        report.spans.append((WRITTEN, known, time.perf_counter()))
        return piece

    def _pass_on_odds(self, piece: str) -> None:
        """A stop string and what comes after it are no part of the text."""
        self._shown += len(piece.encode())
        whole = self.report.finish_reason not in ("", "stop")
        while self._drawn and (whole or self._drawn[0][0] < self._shown):
            self.odds.append(self._drawn.popleft()[1])

    def new_odds(self) -> Sequence[Odds]:
        """Those of `odds` that this function has not given yet."""
        begin, self._given = self._given, len(self.odds)
        return self.odds[begin : self._given]

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for."""
        return self._tokenizer.token_bytes(token)

    def _text(self, token: int) -> str:
        """The text that a token completes; none of a call, which is not text."""
        if token == self._tokenizer.id_of.get(CALL_START):
            self._call = bytearray()
            return ""
        if self._call is None:
            return self._stream.add(token)
        if token != self._tokenizer.id_of.get(CALL_END):
            self._call += b"" if token in self._tokenizer.special else self._tokenizer.token_bytes(token)
            return ""
        return self._end_call()

    def _end_call(self) -> str:
        """Take the call that has been written; returns its text where it is none."""
        assert self._call is not None
        said, self._call = self._call.decode("utf-8", "replace"), None
        try:
            self.calls += parse_calls(said, self._tools)
        except ValueError:
            return said
        return ""


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
