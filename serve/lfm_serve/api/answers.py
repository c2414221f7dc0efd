"""OpenAI's chat completions: the answer as one object, or as chunks of a stream; and what it cost."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lfm_runtime.answer.reply import Reply
from lfm_runtime.boxes import parse_boxes
from lfm_runtime.decode.sampling import Odds
from lfm_runtime.report import Report
from lfm_runtime.text.messages import ToolCall

from lfm_serve.api.errors import ApiError, as_json
from lfm_serve.engine import Piece

_REASONS = {"eos": "stop", "stop": "stop", "schema": "stop", "length": "length", "context": "length"}


@dataclass(frozen=True)
class Completion:
    """What is the same in every chunk of an answer."""

    model: str
    sizes: Sequence[tuple[int, int]] = ()  # of the images, upright
    with_usage: bool = False
    with_timings: bool = False  # in every chunk
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    media_type = "text/event-stream"

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The answer as one object."""
        report = reply.report
        message: dict[str, Any] = {"role": "assistant", "content": report.text, "refusal": None}
        if reply.calls:
            message |= {"content": report.text or None, "tool_calls": [_call(call) for call in reply.calls]}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": _content(reply, reply.odds),
            "finish_reason": reason(reply),
        }
        head = self._head("chat.completion")
        return {**head, "choices": [choice], "usage": usage(report), "timings": timings(report), **self._boxes(report)}

    def first(self) -> bytes:
        """The chunk with the role."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def piece(self, piece: Piece, reply: Reply) -> bytes:
        """A chunk of text."""
        timings = {"timings": _so_far(reply)} if self.with_timings else {}
        return self._chunk({"content": piece.text}, None, _content(reply, piece.odds), **timings)

    def working(self) -> bytes:
        """A comment."""
        return b": working\n\n"

    def last(self, reply: Reply) -> bytes:
        """A chunk for each call, the one with the finish reason, the usage where it was asked for, the end."""
        report, end = reply.report, b""
        for n, call in enumerate(reply.calls):
            end += self._chunk({"tool_calls": [{"index": n, **_call(call)}]}, None)
        rest = _content(reply, reply.new_odds())
        end += self._chunk({}, reason(reply), rest, timings=timings(report), **self._boxes(report))
        if self.with_usage:
            end += event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(report)})
        return end + b"data: [DONE]\n\n"

    def failed(self, error: ApiError) -> bytes:
        """An event with the error, which clients raise."""
        return event(error.body())

    def _boxes(self, report: Report) -> dict[str, Any]:
        """The boxes that the answer is made of, in pixels; nothing where there are none."""
        boxes = parse_boxes(report.text, self.sizes) if self.sizes and "[" in report.text else []
        return {"boxes": [asdict(box) for box in boxes]} if boxes else {}

    def _chunk(
        self, delta: dict[str, Any], finish: str | None, logprobs: dict[str, Any] | None = None, **more: Any
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **more})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + as_json(value) + b"\n\n"


def reason(reply: Reply) -> str:
    """Why the answer ended; a cut one says length, whatever it has called before."""
    found = _REASONS[reply.report.finish_reason]
    return "tool_calls" if reply.calls and found == "stop" else found


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    identity = f"call_{secrets.token_hex(12)}"
    return {"id": identity, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _content(reply: Reply, odds: Sequence[Odds]) -> dict[str, Any] | None:
    return {"content": logprobs(reply, odds), "refusal": None} if odds else None


def logprobs(reply: Reply, odds: Sequence[Odds]) -> list[dict[str, Any]]:
    """How likely tokens of an answer were, as OpenAI and Ollama write it."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        text = reply.bytes_of(token)
        return {"token": text.decode("utf-8", "replace"), "logprob": round(logprob, 6), "bytes": list(text)}

    return [
        {**shown(one.token, one.logprob), "top_logprobs": [shown(*other) for other in one.likeliest]} for one in odds
    ]


def usage(report: Report) -> dict[str, Any]:
    """Tokens, those of images and of the template counted."""
    return {
        "prompt_tokens": report.prompt_tokens,
        "completion_tokens": report.new_tokens,
        "total_tokens": report.prompt_tokens + report.new_tokens,
        "prompt_tokens_details": {"cached_tokens": report.cached_tokens, "image_tokens": report.image_tokens},
    }


def timings(report: Report) -> dict[str, Any]:
    """Milliseconds by llama.cpp's names, and by ours where it has none."""
    ms = report.timing_ms
    after_first = (ms["total"] or 0.0) - (ms["ttft"] or 0.0)
    return {
        "cache_n": report.cached_tokens,
        "prompt_n": report.prompt_tokens - report.cached_tokens,
        "prompt_ms": round(ms["prefill"] or 0.0, 3),
        "predicted_n": report.new_tokens,
        "predicted_ms": round(after_first, 3),
        "predicted_per_second": round(report.throughput["decode_tok_s"] or 0.0, 3),
        "vision_ms": round(ms["vision"] or 0.0, 3),
        "ttft_ms": round(ms["ttft"] or 0.0, 3),
        "memory_mib": round(report.memory_mib.get("rss") or 0.0, 1),
    }


def _so_far(reply: Reply) -> dict[str, Any]:
    """The timings of an answer that goes on (llama.cpp's timings_per_token)."""
    report, began = reply.report, reply.first_token or time.perf_counter()
    taken = time.perf_counter() - began
    return {
        "cache_n": report.cached_tokens,
        "prompt_n": report.prompt_tokens - report.cached_tokens,
        "prompt_ms": round(report.timing_ms["prefill"] or 0.0, 3),
        "predicted_n": report.new_tokens,
        "predicted_ms": round(taken * 1e3, 3),
        "predicted_per_second": round((report.new_tokens - 1) / taken, 3) if taken else 0.0,
    }
