"""What an answer cost: milliseconds per stage and megabytes of the process. Measured, never estimated."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

STAGES = ("load", "image", "prompt", "preprocess", "vision", "embed", "prefill", "ttft", "decode_per_token", "total")
T = TypeVar("T")
WRITTEN = "written"
"""The span of a token, from when it was known to when its text was."""


@dataclass
class Report:
    """Filled while an answer is made; complete when it ends. A time that did not occur stays None."""

    text: str = ""
    finish_reason: str = ""  # eos, length, context, stop, or schema: complete by its grammar
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, known from before and not computed again
    image_tokens: int = 0
    tiles: int = 0
    encoded_tiles: int = 0  # those that were not known from before
    new_tokens: int = 0
    speculative_tokens: int = 0  # with speculation
    accepted_tokens: int = 0
    timing_ms: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(STAGES))
    throughput: dict[str, float | None] = field(
        default_factory=lambda: dict.fromkeys(("prefill_tok_s", "decode_tok_s"))
    )
    memory_mib: dict[str, float | None] = field(default_factory=dict)
    waited: float = field(default=0.0, repr=False)
    """Seconds that the answer waited for graphs whose loading had begun before it, or for questions asked with it."""
    spans: list[tuple[str, float, float]] = field(default_factory=list, repr=False)
    """(stage, start, end) of every stretch of work and (WRITTEN, …) of every token; time.perf_counter() values."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self.spans.append((name, start, end))
        self.timing_ms[name] = (self.timing_ms[name] or 0.0) + (end - start) * 1e3

    @contextmanager
    def loading(self, *, begun: bool) -> Iterator[None]:
        """As stage("load"); `begun`: before the question, so that it is no part of the answer's time."""
        start = time.perf_counter()
        with self.stage("load"):
            yield
        self.waited += (time.perf_counter() - start) * begun

    def staged(self, name: str, steps: Generator[None, None, T]) -> Generator[None, None, T]:
        """Yield as `steps` does, and add the time of each step to a stage."""
        while True:
            with self.stage(name):
                try:
                    next(steps)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
            yield

    def finish(self, started: float, first_token: float | None, ended: float) -> None:
        """Derive what follows from the stages. Times are time.perf_counter() values.

        `ttft` runs from the question to the first token, the model being loaded: waiting for graphs that load meanwhile
        is part of `load` alone. `decode_per_token` is the mean over the tokens after the first: embedding, decoder,
        sampling and detokenising.
        """
        ms, started = self.timing_ms, started + self.waited
        ms["total"] = (ended - started) * 1e3
        if first_token is not None:
            ms["ttft"] = (first_token - started) * 1e3
            if self.new_tokens > 1:
                per_token = (ended - first_token) / (self.new_tokens - 1)
                ms["decode_per_token"] = per_token * 1e3
                self.throughput["decode_tok_s"] = 1 / per_token
        if ms["prefill"]:
            self.throughput["prefill_tok_s"] = (self.prompt_tokens - self.cached_tokens) / ms["prefill"] * 1e3
        self.memory_mib = memory_mib()

    def as_dict(self) -> dict[str, Any]:
        """The numbers as plain values, rounded to a thousandth: what --json prints. Single spans are left to audits."""
        hidden = ("spans", "waited")
        return {name: _rounded(value) for name, value in asdict(replace(self, spans=[])).items() if name not in hidden}

    def table(self) -> str:
        """The same numbers for a person: two lines of milliseconds, one of tokens, one of megabytes."""

        def show(value: float | None, digits: int = 0) -> str:
            return "–" if value is None else f"{value:,.{digits}f}"

        ms, memory = self.timing_ms, self.memory_mib
        digits = {"decode_per_token": 2}
        columns = [
            (name.replace("decode_per_token", "per token"), show(ms[name], digits.get(name, 0))) for name in STAGES
        ]
        widths = [max(len(a), len(b)) for a, b in columns]
        head = "  ".join(a.rjust(w) for (a, _), w in zip(columns, widths, strict=True))
        body = "  ".join(b.rjust(w) for (_, b), w in zip(columns, widths, strict=True))
        prompt = f"{self.image_tokens} image, {self.tiles} view{'s' if self.tiles != 1 else ''}"
        prompt += f"; {self.cached_tokens} cached" if self.cached_tokens else ""
        ended = self.finish_reason
        ended += (
            f"; {self.accepted_tokens} of {self.speculative_tokens} speculative tokens accepted"
            if self.speculative_tokens
            else ""
        )
        new = f"{self.new_tokens} new ({ended})" if ended else f"{self.new_tokens} new"  # choosing generates nothing
        return "\n".join(
            [
                f"ms    {head}",
                f"      {body}",
                f"tokens  {self.prompt_tokens} prompt ({prompt}), {new}; "
                f"prefill {show(self.throughput['prefill_tok_s'])} tok/s, decode "
                f"{show(self.throughput['decode_tok_s'])} tok/s",
                f"MiB   peak {show(memory.get('peak'))}, now {show(memory.get('rss'))} "
                f"({show(memory.get('rss_anon'))} anonymous, {show(memory.get('rss_file'))} mapped files)",
            ]
        )


def run_through(steps: Generator[None, None, T]) -> T:
    """Run a generator to its end and return what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:  # noqa: PERF203  (that is how a generator returns)
            return end.value  # type: ignore[no-any-return]


def memory_mib() -> dict[str, float | None]:
    """rss, rss_anon, rss_file and peak of this process. Mapped files can be evicted; anonymous memory cannot.

    From /proc/self/status; elsewhere psutil gives rss, the operating system the peak, and the others are None.
    """
    found: dict[str, float | None] = dict.fromkeys(("rss", "rss_anon", "rss_file", "peak"))
    found["rss"] = psutil.Process().memory_info().rss / 2**20
    status = Path("/proc/self/status")
    if not status.exists() and sys.platform != "win32":
        import resource  # there is none on Windows

        unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB elsewhere
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    elif status.exists():
        names = {"VmRSS": "rss", "RssAnon": "rss_anon", "RssFile": "rss_file", "VmHWM": "peak"}
        for line in status.read_text().splitlines():
            key, _, value = line.partition(":")
            if key in names:
                found[names[key]] = int(value.split()[0]) / 1024
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return value
