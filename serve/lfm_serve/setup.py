"""How a server will run: the rows and the context that fit the memory, decided before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from lfm_runtime.bundle import Bundle
from lfm_runtime.engine.ort_release import onnxruntime_is
from lfm_runtime.errors import SettingError
from lfm_runtime.setup.resolve import DoesNotFitError, resolve
from lfm_runtime.setup.setup import Ask, Setup

ROWS = (4, 2, 1)
CONTEXT = 4096
"""Tokens of prompt and answer for each row, where nobody says another number; the model's own where it has fewer."""

_SPIN_US = 50


def choose(
    folder: str | Path,
    profile: str | os.PathLike[str] = "",
    *,
    rows: int | None = None,
    context: int | None = None,
    cache_mib: int = 0,
    **flags: Any,
) -> tuple[Setup, int]:
    """(setup, rows): the most rows whose keys and values fit without giving up anything else, else one with what
    `resolve` gives up.

    Raises:
        as `resolve`, and DoesNotFitError where not even one row fits.
    """
    bundle = Bundle.open(Path(folder))
    if context and context > bundle.context_length:
        raise SettingError(f"--context {context} is impossible: the model has {bundle.context_length}; lower it")
    context = min(context or CONTEXT, bundle.context_length)
    failure: DoesNotFitError | None = None
    for number in (rows,) if rows else ROWS:
        ask = Ask(((512, 512),), kv_tokens=number * context, cache_mib=cache_mib)
        try:
            found = resolve(bundle, profile, ask, context=context, low_memory=False, **flags)
        except DoesNotFitError as e:
            failure = e
            continue
        if not found.steps or number == (rows or ROWS[-1]):
            return (found if flags.get("spinning") is not None else spins_briefly(found)), number
    assert failure is not None
    raise failure


def spins_briefly(setup: Setup) -> Setup:
    """With threads that wait for more work for a moment only. Encoder, prefill and decoder take turns here, and the
    threads of one that has just ended would keep the next one's from the processors: on two cores 53 images a minute
    instead of 49 at four at once, and one alone as fast or faster (450M int4, 8 interleaved rounds, 2026-11-28).
    """
    if setup.execution.spinning is not True or not onnxruntime_is("1.26"):  # a profile's own, or it cannot be limited
        return setup
    return replace(setup, execution=replace(setup.execution, spinning=_SPIN_US))
