"""GET /metrics: what the server did, for Prometheus. No text and no image is in it."""

from __future__ import annotations

from lfm_profiles.sensors import Sensors
from lfm_runtime.report import Report, memory_mib
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from lfm_serve.engine import Engine

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """All of them, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("lfm_requests", "Responses, by status.", ["code"], registry=registry)
        self.cancelled = Counter("lfm_cancelled", "Requests whose client left before the end.", registry=registry)
        self._tokens = Counter("lfm_tokens", "Tokens processed.", ["kind"], registry=registry)
        self._stages = {
            name: Histogram(f"lfm_{name}_seconds", what, buckets=_SECONDS, registry=registry)
            for name, what in (
                ("vision", "Encoding of a request's images."),
                ("prefill", "Processing of its prompt."),
                ("ttft", "From the request to its first token."),
                ("decode_per_token", "Between its tokens."),
            )
        }
        for name, what, read in (
            ("lfm_queue_length", "Requests that wait for a row.", lambda: engine.waiting),
            ("lfm_running", "Requests that are being answered.", lambda: engine.running),
            ("lfm_resident_bytes", "Resident memory.", lambda: (memory_mib()["rss"] or 0) * 2**20),
        ):
            Gauge(name, what, registry=registry).set_function(read)
        sensors = Sensors()
        if sensors.read().temperature_c:
            hottest = Gauge("lfm_temperature_celsius", "Of the hottest thermal zone.", registry=registry)
            hottest.set_function(lambda: max(sensors.read().temperature_c.values(), default=float("nan")))
        if sensors.read().throttle_bits is not None:
            throttled = Gauge("lfm_throttled", "Whether the board is throttled or under-voltage.", registry=registry)
            throttled.set_function(lambda: float(sensors.read().throttled_now))

    def answered(self, report: Report) -> None:
        """Count an answer."""
        self._tokens.labels("prompt").inc(report.prompt_tokens)
        self._tokens.labels("cached").inc(report.cached_tokens)
        self._tokens.labels("image").inc(report.image_tokens)
        self._tokens.labels("completion").inc(report.new_tokens)
        for name, histogram in self._stages.items():
            if (ms := report.timing_ms[name]) is not None:
                histogram.observe(ms / 1e3)

    async def page(self, _: Request) -> Response:
        """Answer Prometheus."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)
