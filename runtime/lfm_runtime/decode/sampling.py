"""Which token comes next: greedy or sampled, from one row of logits. Pure functions on numpy arrays.

Order as in transformers and vLLM: repetition penalty, presence and frequency penalty, temperature, top_k, top_p, min_p.
"""

from __future__ import annotations

import json
import numbers
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from lfm_runtime.decode.guide import Guide
from lfm_runtime.errors import BundleError, SettingError
from lfm_runtime.formats.contract import MANY_TOKENS

Logits = NDArray[np.float32]
MOST_OTHERS = 20
"""Tokens whose odds are kept at a place, at most."""
_LEAST, _MOST = 1e-6, 1e6
_RANGE = "0.000001 to 1000000"
"""What logits are divided by; beyond it they are no numbers any more."""


_KINDS: dict[str, type] = {
    "temperature": float,
    "min_p": float,
    "top_k": int,
    "top_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_new_tokens": int,
    "seed": int,
    "speculate": int,
    "logprobs": int,
}
_WORDS = {float: "a number", int: "a whole number"}
_IN_FILES = ("temperature", "min_p", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": None,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
}
"""What transformers applies and this runtime does not, with the values that change nothing."""


def not_applied(raw: Mapping[str, Any]) -> list[str]:
    """Settings of a generation_config.json that would change answers and are not applied."""
    return [name for name, off in _NEUTRAL.items() if raw.get(name, off) not in (off, None, [], {})]


def _is(value: object, kind: type) -> bool:
    numbers_ = numbers.Integral if kind is int else numbers.Real  # numpy's as well
    return isinstance(value, numbers_) and not isinstance(value, bool)


class Generation(TypedDict, total=False):
    """Generation settings as the user gives them, one by one: see GenerationSettings. None is not given."""

    temperature: float | None
    min_p: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    max_new_tokens: int | None
    seed: int | None
    stop: str | tuple[str, ...] | None
    ignore_eos: bool | None
    speculate: int | None
    schema: str | Mapping[str, Any] | None
    tool_choice: str | None
    logprobs: int | None


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is generated. The defaults are the model card's."""

    temperature: float = 0.1  # 0 is greedy
    min_p: float = 0.15  # keep tokens at least this fraction as likely as the likeliest; 0 off
    top_k: int = 0  # keep the k likeliest; 0 off
    top_p: float = 1.0  # keep the likeliest up to this probability; 1 off
    repetition_penalty: float = 1.05  # divides logits of tokens seen; 1 off
    presence_penalty: float = 0.0  # subtracted from logits of tokens generated, once; 0 off
    frequency_penalty: float = 0.0  # subtracted for each time that one was generated; 0 off
    max_new_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # go on to max_new_tokens: for measuring
    speculate: int = 0  # speculative tokens a step, from prompt lookup; 0 off
    schema: str | None = None  # JSON schema, as JSON, that the answer follows
    tool_choice: str = "auto"  # required, or a tool's name: the answer is a call
    logprobs: int | None = None  # keep each token's log probability, and those of so many of the likeliest

    def __post_init__(self) -> None:
        """Raise SettingError for a value of another kind or outside its range."""
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if not _is(value, kind) and not (value is None and name in ("seed", "logprobs")):
                raise SettingError(f"{name} is {repr(value)[:60]}; {_WORDS[kind]} is needed")
        for name, ok, allowed in (
            ("temperature", self.temperature == 0 or _LEAST <= self.temperature <= _MOST, f"0 (greedy), {_RANGE}"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("top_k", self.top_k >= 0, "0 (off) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1 (off)"),
            ("repetition_penalty", _LEAST <= self.repetition_penalty <= _MOST, f"{_RANGE}; 1 is off"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2; 0 is off"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2; 0 is off"),
            ("max_new_tokens", 1 <= self.max_new_tokens <= 1 << 20, "1 to 1048576"),
            ("seed", self.seed is None or self.seed >= 0, "0 or above"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MOST_OTHERS, f"0 to {MOST_OTHERS}"),
            ("speculate", 0 <= self.speculate <= MANY_TOKENS - 2, f"0 (off) to {MANY_TOKENS - 2}"),
        ):
            if not ok:
                raise SettingError(f"{name} {getattr(self, name)!r} is impossible; allowed: {allowed}")

    @staticmethod
    def from_config(raw: dict[str, Any], path: Path = Path("generation_config.json")) -> GenerationSettings:
        """From a parsed generation_config.json, which lies at `path`. Where it says nothing about sampling, sampling is
        the model card's; where it says anything, the rest is what transformers takes for it.

        Raises:
            SettingError: a value of another kind, or an impossible one; names the file.
        """
        found = {name: raw[name] for name in (*_IN_FILES, "do_sample") if raw.get(name) is not None}
        samples = found.pop("do_sample", None)
        if not isinstance(samples, bool | None):
            raise SettingError(f"{path}: do_sample is {repr(samples)[:60]}; true or false is needed")
        if samples is not None or found.keys() & {"temperature", "min_p", "top_k", "top_p"}:
            found = {"temperature": 1.0, "min_p": 0.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, **found}
        if samples is False:
            found["temperature"] = 0.0
        try:
            return GenerationSettings(**found)
        except SettingError as e:
            raise SettingError(f"{path}: {e}") from e

    def with_changes(self, changes: Mapping[str, Any]) -> GenerationSettings:
        """These settings with the user's changes.

        Raises:
            SettingError: unknown name, impossible value, or a sampling setting beside temperature 0.
        """
        changed = {name: value for name, value in changes.items() if value is not None}
        if isinstance(changed.get("stop"), str):
            changed["stop"] = (changed["stop"],)
        if isinstance(changed.get("schema"), Mapping | bool):
            changed["schema"] = json.dumps(changed["schema"])
        stops = changed.get("stop", ())
        if not isinstance(stops, tuple | list) or not all(isinstance(stop, str) for stop in stops):
            raise SettingError(f"stop is {repr(stops)[:60]}; a text, or several, are needed")
        if not isinstance(changed.get("schema", ""), str):
            raise SettingError(
                f"schema is {repr(changed['schema'])[:60]}; a JSON schema is needed, as a dict or as text"
            )
        try:
            settings = replace(self, **changed)
        except TypeError as e:
            raise SettingError(f"generation settings: {str(e).split('__init__() ')[-1]}") from e
        useless = [name for name in ("min_p", "top_k", "top_p", "seed") if name in changed]
        if settings.temperature == 0 and useless:
            raise SettingError(
                f"{', '.join(useless)} has no effect at temperature 0 (greedy); set a temperature or leave it out"
            )
        return settings


@dataclass(frozen=True)
class Odds:
    """A generated token, and the likeliest at its place, which may be others: natural logarithms of the probabilities
    that the model gives them, before settings and grammars change them.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()  # (id, its logarithm), falling


def odds_of(logprobs: NDArray[np.float64], token: int, count: int) -> Odds:
    """Of a token and the `count` likeliest, from `log_softmax` [vocabulary]."""
    top = np.argpartition(logprobs, -count)[-count:] if count else np.empty(0, np.int64)
    falling = sorted(((int(i), float(logprobs[i])) for i in top), key=lambda one: (-one[1], one[0]))
    return Odds(token, float(logprobs[token]), tuple(falling))


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Logits [vocabulary] as logarithms of probabilities."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


@dataclass(frozen=True)
class Top:
    """The likeliest tokens of a row of logits that lies elsewhere: ids [k] and their logits [k], falling."""

    logits: Logits
    ids: NDArray[np.int64]
    whole: Callable[[], Logits]  # fetches the row [vocabulary]


class Sampler:
    """Draws tokens for one answer; remembers which ids have occurred."""

    def __init__(
        self, settings: GenerationSettings, vocabulary: int, prompt: Iterable[int], guide: Guide | None = None
    ) -> None:
        """`guide`: the grammar that the answer follows."""
        self.settings, self._guide = settings, guide
        self.odds: deque[Odds] = deque()
        """With `logprobs`, of each token drawn, until somebody takes them."""
        # Importing numpy.random, or what np.unique imports, takes longer than a prompt of text: 50 ms each.
        self._random = random.Random(settings.seed)  # noqa: S311
        seen = np.array(sorted(set(prompt)), np.int64)
        self._seen = np.resize(seen, max(vocabulary, len(seen)))  # the first `_count`; room for all
        self._count = len(seen)
        self._is_seen = np.zeros(vocabulary, np.bool_)
        self._is_seen[seen] = True
        self._penalties = settings.presence_penalty, settings.frequency_penalty
        self._times: dict[int, int] = {}  # each id was generated; kept where there are penalties

    def next(self, logits: Logits | Top) -> int:
        """The next id for logits [vocabulary], which are changed, or for the top of them: the same token, the row is
        fetched if need be.
        """
        count, known = self.settings.logprobs, None
        if count is not None:
            logits = logits if isinstance(logits, np.ndarray) else logits.whole()
            known = log_softmax(logits)
        token = self._next_of(logits) if isinstance(logits, np.ndarray) else self._next_of_top(logits)
        if known is not None and count is not None:
            self.odds.append(odds_of(known, token, count))
        self._note(token)
        return token

    def forced(self) -> Iterator[int]:
        """The ids that come next for sure, each of them taken as if it had been drawn; none with `logprobs`, which have
        to be computed.
        """
        for token in self._guide.forced() if self._guide and self.settings.logprobs is None else ():
            self._note(token)
            yield token

    def _note(self, token: int) -> None:
        if self._guide:
            self._guide.accept(token)
        if any(self._penalties):
            self._times[token] = self._times.get(token, 0) + 1
        if not self._is_seen[token]:
            self._is_seen[token] = True
            self._seen[self._count] = token
            self._count += 1

    def _next_of(self, logits: Logits) -> int:
        if self.settings.repetition_penalty != 1:
            penalise(logits, self._seen[: self._count], self.settings.repetition_penalty)
        if self._times:
            ids = np.fromiter(self._times, np.int64, len(self._times))
            logits[ids] -= self._subtracted(ids)
        if self._guide:
            allowed = self._guide.allowed()
            logits[: len(allowed)][~allowed] = -np.inf
            logits[len(allowed) :] = -np.inf
            if np.count_nonzero(allowed) == 1:  # nothing to draw: a seed's draws are the same whoever feeds the tokens
                return int(allowed.argmax())
        return _likeliest(logits) if self.settings.temperature == 0 else self._draw(logits)

    def _next_of_top(self, top: Top) -> int:
        order = np.argsort(top.ids)  # as they lie in the row: a draw goes through them in this order
        ids, logits = top.ids[order], top.logits[order]
        if self.settings.repetition_penalty != 1:
            penalise(logits, np.flatnonzero(self._is_seen[ids]), self.settings.repetition_penalty)
        if self._times:
            logits -= self._subtracted(ids)
        if self._guide:
            allowed = self._guide.allowed()
            if np.count_nonzero(allowed) == 1:
                return int(allowed.argmax())
            logits[~np.append(allowed, False)[np.minimum(ids, len(allowed))]] = -np.inf
        # Such penalties only lower logits: what is not in the top is not above its last.
        lower = self.settings.repetition_penalty >= 1 and min(self._penalties) >= 0
        if not lower or not _all_above(logits, top.logits[-1], self.settings):
            return self._next_of(top.whole())
        return int(ids[_likeliest(logits) if self.settings.temperature == 0 else self._draw(logits)])

    def _subtracted(self, ids: NDArray[np.int64]) -> Logits:
        """What presence and frequency penalty take from the logits of `ids`, as OpenAI's API defines them."""
        presence, frequency = self._penalties
        times = np.array([self._times.get(int(i), 0) for i in ids], np.float32)
        return np.asarray(presence * (times > 0) + frequency * times, np.float32)

    def _draw(self, logits: Logits) -> int:
        ids, probabilities = distribution(logits, self.settings)
        if not len(ids):
            raise _no_numbers()
        at = np.searchsorted(np.cumsum(probabilities), self._random.random(), side="right")
        return int(ids[min(int(at), len(ids) - 1)])  # the sum of rounded probabilities can fall short of 1


def _likeliest(logits: Logits) -> int:
    at = int(logits.argmax())  # of a row with NaN, a NaN
    if not np.isfinite(logits[at]):
        raise _no_numbers()
    return at


def _no_numbers() -> BundleError:
    return BundleError("the decoder's logits are NaN or infinite; check the bundle with --verify, or export it again")


def penalise(logits: Logits, seen: NDArray[np.int64], penalty: float) -> None:
    """In place, for seen ids: positive logits divided by the penalty, negative ones multiplied (Keskar et al. 2019)."""
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / np.float32(penalty), values * np.float32(penalty))


def distribution(logits: Logits, settings: GenerationSettings) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(ids, probabilities) that remain after the filters; probabilities sum to 1."""
    scaled = (logits - logits.max()) / np.float32(settings.temperature)
    ids = np.flatnonzero((scaled >= _lowest(scaled, settings)) & (scaled > -np.inf))  # what may not come has none
    p = np.exp(scaled[ids], dtype=np.float64)
    return ids, p / p.sum()


def _all_above(logits: Logits, limit: np.float32, settings: GenerationSettings) -> bool:
    """Whether whatever could be drawn from a row, whose likeliest are these, is above a limit. Not where they are no
    numbers.
    """
    if settings.temperature == 0 or logits.max() == -np.inf:
        return bool(logits.max() > limit)
    if settings.top_p < 1:  # a share of all
        return False
    scaled = (np.append(logits, limit) - logits.max()) / np.float32(
        settings.temperature
    )  # rounded as the row's would be
    return bool(scaled[-1] < _lowest(scaled[:-1], settings))


def _lowest(scaled: Logits, settings: GenerationSettings) -> float:
    """The filters as one limit on the scaled logits, whose maximum is 0: each keeps what is likely enough, ties
    included.
    """
    lowest = float(np.log(settings.min_p)) if settings.min_p > 0 else -np.inf
    if settings.top_k == 0 and settings.top_p == 1:
        return lowest
    # What min_p drops may be left out of a search for the k likeliest, but not out of the sum that top_p is a share of.
    pool = scaled[scaled >= lowest] if settings.top_p == 1 else scaled
    if 0 < settings.top_k < len(pool):
        smallest = np.partition(pool, -settings.top_k)[-settings.top_k]
        pool, lowest = pool[pool >= smallest], max(lowest, float(smallest))
    return lowest if settings.top_p == 1 else max(lowest, _nucleus(pool, settings.top_p))


def _nucleus(scaled: Logits, top_p: float) -> float:
    """The limit above which the likeliest reach `top_p` of the probability; the one that crosses it stays."""
    wanted = top_p * float(np.exp(scaled).sum(dtype=np.float64))
    for depth in (4.0, 8.0, 16.0, np.inf):  # sorting all 65,536 would take longer than the decoder does
        likeliest = np.sort(scaled[scaled >= -depth])[::-1]
        reached = np.exp(likeliest, dtype=np.float64).cumsum()
        if reached[-1] >= wanted or depth == np.inf:
            break
    return float(likeliest[min(int(np.searchsorted(reached, wanted)), len(likeliest) - 1)])
