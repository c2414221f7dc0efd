"""What a client gets: the answer as one object, or as chunks of a stream; and what it cost."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from lfm_runtime.report import Report

_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


@dataclass(frozen=True)
class Shape:
    """What is the same in every chunk of an answer."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, report: Report) -> dict[str, Any]:
        """The answer as one object."""
        message = {"role": "assistant", "content": report.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _REASONS[report.finish_reason]}
        head = self._head("chat.completion")
        return {**head, "choices": [choice], "usage": usage(report), "timings": timings(report)}

    def first(self) -> bytes:
        """The chunk that a stream begins with."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def piece(self, text: str) -> bytes:
        """A chunk of text."""
        return self._chunk({"content": text}, None)

    def last(self, report: Report, *, with_usage: bool) -> bytes:
        """The chunk with the finish reason, that with the usage where it was asked for, and the end."""
        end = self._chunk({}, _REASONS[report.finish_reason], timings=timings(report))
        if with_usage:
            end += event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(report)})
        return end + b"data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], reason: str | None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **more})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


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
    }
