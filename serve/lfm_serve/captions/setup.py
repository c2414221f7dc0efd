"""How a run over many images will be made: the rows that fit the memory, decided before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import SettingError
from lfm_runtime.setup.resolve import DoesNotFitError, resolve
from lfm_runtime.setup.setup import Setup

from lfm_serve.asking import Asking
from lfm_serve.setup import ROWS, spins_briefly


@dataclass(frozen=True)
class Plan:
    """A setup, answers at once, and the tokens of prompt and answer that each of them has room for."""

    setup: Setup
    rows: int
    capacity: int


def plan(
    bundle: Bundle, profile: str | os.PathLike[str], asking: Asking, *, rows: int | None = None, **flags: Any
) -> Plan:
    """The most rows whose keys and values fit beside the largest image without giving up anything else; else one. One
    too where only one is possible: on a GPU, with low_memory, with a decoder that does not share its past.

    Raises:
        as `resolve`, and SettingError for rows that are impossible.
    """
    if rows is not None and rows < 1:
        raise SettingError(f"--rows {rows} is impossible; allowed: 1 and above")
    brief = (lambda setup: setup) if flags.get("spinning") is not None else spins_briefly
    one = resolve(bundle, profile, **flags)
    one = resolve(bundle, profile, replace(one.ask, question=f"{asking.system} {asking.question}"), **flags)
    of = one.forecast
    capacity = of.prompt_tokens + of.new_tokens if of else one.context_length
    if rows == 1 or (alone := _alone(one)):
        if rows != 1 and rows:
            raise SettingError(f"--rows {rows} has no effect: {alone}; leave it out")
        return Plan(brief(one), 1, capacity)
    for number in (rows,) if rows else ROWS[:-1]:
        try:
            found = resolve(bundle, profile, replace(one.ask, kv_tokens=number * capacity), **flags)
        except DoesNotFitError:
            if rows:
                raise
            continue
        if rows or found.steps == one.steps:
            return Plan(brief(found), number, capacity)
    return Plan(brief(one), 1, capacity)


def _alone(setup: Setup) -> str:
    """Why several answers at once are impossible; "" where they are not."""
    if setup.execution.on_gpu:
        return "on a GPU answers are made one by one"
    if setup.execution.low_memory:
        return "with one graph in memory at a time answers are made one by one"
    return "" if setup.bundle.manifest else "of folders without a manifest answers are made one by one"
