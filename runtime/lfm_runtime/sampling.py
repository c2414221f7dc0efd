"""Which token comes next: greedy or sampled, from one row of logits. Pure functions on numpy arrays.

Order as in transformers: repetition penalty, then temperature, top_k, top_p, min_p.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm_runtime.errors import BundleError, SettingError

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is generated. The defaults are the model card's."""

    temperature: float = 0.1  # 0 is greedy
    min_p: float = 0.15  # keep tokens at least this fraction as likely as the likeliest; 0 off
    top_k: int = 0  # keep the k likeliest; 0 off
    top_p: float = 1.0  # keep the likeliest up to this probability; 1 off
    repetition_penalty: float = 1.05  # divides logits of tokens seen; 1 off
    max_new_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        for name, ok, allowed in (
            ("temperature", self.temperature >= 0, "0 (greedy) or above"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("top_k", self.top_k >= 0, "0 (off) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1 (off)"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 is off"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or above"),
            ("seed", self.seed is None or self.seed >= 0, "0 or above"),
            ("stop", all(self.stop), "strings that are not empty"),
        ):
            if not ok:
                raise SettingError(f"{name} {getattr(self, name)!r} is impossible; allowed: {allowed}")

    @staticmethod
    def from_config(raw: dict[str, Any]) -> GenerationSettings:
        """From a parsed generation_config.json; what it leaves out stays the model card's."""
        names = ("temperature", "min_p", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
        found = {name: raw[name] for name in names if raw.get(name) is not None}
        if raw.get("do_sample") is False:
            found["temperature"] = 0.0
        try:
            return GenerationSettings(**found)
        except TypeError as e:
            raise SettingError(f"generation_config.json: a value has the wrong type ({e})") from e

    def with_changes(self, changes: dict[str, Any]) -> GenerationSettings:
        """These settings with the user's changes.

        Raises:
            SettingError: unknown name, impossible value, or a sampling setting beside temperature 0.
        """
        changed = {name: value for name, value in changes.items() if value is not None}
        if isinstance(changed.get("stop"), str):
            changed["stop"] = (changed["stop"],)
        try:
            settings = replace(self, **changed)
        except TypeError as e:
            raise SettingError(f"generation settings: {str(e).split('__init__() ')[-1]}") from e
        useless = [name for name in ("min_p", "top_k", "top_p", "seed") if name in changed]
        if settings.temperature == 0 and useless:
            raise SettingError(f"{', '.join(useless)} has no effect at temperature 0 (greedy); set a temperature or leave it out")
        return settings


class Sampler:
    """Draws tokens for one answer; remembers which ids have occurred."""

    def __init__(self, settings: GenerationSettings, vocabulary: int, prompt: Iterable[int]) -> None:
        self.settings = settings
        self.rng = np.random.default_rng(settings.seed)
        self.seen = np.zeros(vocabulary, np.bool_)
        self.seen[list(prompt)] = True

    def next(self, logits: Logits) -> int:
        """The next id for logits [vocabulary]; `logits` may be changed."""
        if self.settings.repetition_penalty != 1:
            logits = penalise(logits, self.seen, self.settings.repetition_penalty)
        token = int(logits.argmax()) if self.settings.temperature == 0 else self._draw(logits)
        self.seen[token] = True
        return token

    def _draw(self, logits: Logits) -> int:
        ids, probabilities = distribution(logits, self.settings)
        if not len(ids):
            raise BundleError("the decoder gave logits that are not numbers; check the bundle with --verify, or export it again")
        at = np.searchsorted(np.cumsum(probabilities), self.rng.random(), side="right")
        return int(ids[min(int(at), len(ids) - 1)])  # the sum of rounded probabilities can fall short of 1


def penalise(logits: Logits, seen: NDArray[np.bool_], penalty: float) -> Logits:
    """Seen ids: positive logits divided by the penalty, negative ones multiplied (Keskar et al. 2019)."""
    out: Logits = logits.copy()
    values = out[seen]
    out[seen] = np.where(values > 0, values / np.float32(penalty), values * np.float32(penalty))
    return out


def distribution(logits: Logits, settings: GenerationSettings) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(ids, probabilities) that remain after the filters, likeliest first; probabilities sum to 1."""
    scaled = logits.astype(np.float64) / settings.temperature
    scaled -= scaled.max()
    ids = np.arange(len(scaled))
    if 0 < settings.top_k < len(ids):
        smallest = np.partition(scaled, -settings.top_k)[-settings.top_k]
        ids = np.flatnonzero(scaled >= smallest)  # ties with the k-th stay, as in transformers
    # min_p is relative to the likeliest, so it can go first and spare the sorts below.
    candidates = ids[scaled[ids] >= np.log(settings.min_p)] if settings.min_p > 0 else ids
    if settings.top_p < 1:
        order = ids[np.argsort(-scaled[ids], kind="stable")]
        p = np.exp(scaled[order])
        before = np.cumsum(p) - p
        order = order[before < settings.top_p * p.sum()]  # the token that crosses the limit stays
        kept = order[np.isin(order, candidates)]
    else:
        kept = candidates[np.argsort(-scaled[candidates], kind="stable")]
    p = np.exp(scaled[kept])
    return kept, p / p.sum()
