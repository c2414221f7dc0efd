"""How a server will run: the rows and the context that fit the memory, decided before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lfm_runtime.bundle import Bundle
from lfm_runtime.setup.resolve import DoesNotFitError, resolve
from lfm_runtime.setup.setup import Ask, Setup

ROWS = (4, 2, 1)
CONTEXT = 4096
"""Tokens of prompt and answer for each row, where nobody says another number; the model's own where it has fewer."""


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
            return found, number
    assert failure is not None
    raise failure
