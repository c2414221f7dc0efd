"""Rows and context are counted before anything is loaded; what the memory cannot hold is refused."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette")
from lfm_runtime.setup.memory import Shapes
from lfm_runtime.setup.resolve import DoesNotFitError
from lfm_serve import engine as module
from lfm_serve.api import app
from lfm_serve.api.errors import ApiError
from lfm_serve.engine import Engine
from lfm_serve.limits import Limits
from lfm_serve.setup import choose
from servers import PICTURES


def test_rows_times_context_is_in_the_forecast(demo_bundle, starts_empty) -> None:
    """One more row of 2,000 tokens costs its keys and values; the cache costs what it may hold."""
    peaks = {
        (rows, cache): choose(demo_bundle, "generic", rows=rows, context=2000, cache_mib=cache)[0].forecast.memory.peak
        for rows, cache in ((1, 0), (4, 0), (4, 64))
    }
    setup, rows = choose(demo_bundle, "generic", rows=4, context=2000)
    assert (setup.context_length, rows) == (2000, 4)
    kv_mib = 3 * 2000 * Shapes.of(setup.bundle).kv_bytes / 2**20
    assert peaks[4, 0] - peaks[1, 0] == pytest.approx(kv_mib, abs=0.1)
    assert peaks[4, 64] - peaks[4, 0] == pytest.approx(64, abs=0.1)


def test_too_many_rows_are_named_as_the_cause(demo_bundle) -> None:
    """Closing other programs would not help, nor a smaller model."""
    with pytest.raises(DoesNotFitError, match=r"\. Take fewer rows or a shorter context$"):
        choose(demo_bundle, "generic", rows=10**6)
    with pytest.raises(DoesNotFitError, match=r"\. Take fewer rows, a shorter context or a smaller cache$"):
        choose(demo_bundle, "generic", cache_mib=10**9)


def test_an_image_that_the_memory_cannot_open(demo_bundle, demo_model, monkeypatch) -> None:
    """503, and clients are told not to come again; the same image where there is memory is opened."""
    setup, rows = choose(demo_bundle, "generic")
    api = app.Api(Engine(setup, rows=rows, waiting=1, cache_mib=0), "m", Limits())
    data = PICTURES[0].read_bytes()
    monkeypatch.setattr(app, "free_mib", lambda: 0)
    with pytest.raises(ApiError, match="0 MiB are free on this device") as caught:
        api._open(demo_model, data, "auto")
    assert caught.value.status == 503
    assert caught.value.response("/v1/chat/completions").headers["x-should-retry"] == "false"
    monkeypatch.setattr(app, "free_mib", lambda: 1000)
    assert api._open(demo_model, data, "auto").pixels


def test_it_is_ready_when_its_rows_are(demo_bundle, monkeypatch) -> None:
    """What /health asks for is there only once requests can be answered."""
    setup, rows = choose(demo_bundle, "generic")
    engine, seen = Engine(setup, rows=rows, waiting=1, cache_mib=0), []
    make = module.Batch
    monkeypatch.setattr(module, "Batch", lambda *words: seen.append(engine.model) or make(*words))
    engine.start()
    engine.wait_until_loaded()
    engine.close()
    assert seen == [None]
    assert engine.model is not None
