"""What a profile may say, read from TOML files. What the device is stands in device.py, which profile fits it in
choice.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lfm_profiles.variants import VARIANTS

AUTO = "auto"
"""The name of the profile detected, also in `extends`."""


class ProfileError(ValueError):
    """A profile cannot be read or used: which file, line and key, and what is allowed."""


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and low <= v <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda v: type(v) in (int, float) and low <= v <= high


def _one_of(*names: str) -> Callable[[Any], bool]:
    return lambda v: v in names and isinstance(v, str)


def _some_of(*names: str) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and bool(v) and len(set(map(str, v))) == len(v) and all(x in names for x in v)


def _texts(v: Any) -> bool:
    return isinstance(v, list) and bool(v) and all(isinstance(x, str) and x for x in v)


def _cores(v: Any) -> bool:
    return v in ("none", "cores") or (
        isinstance(v, list) and bool(v) and all(_whole(0, 4095)(x) for x in v) and len(set(v)) == len(v)
    )


def _is_bool(v: Any) -> bool:
    return type(v) is bool


def _setting(default: Any, meaning: str, allowed: str, check: Callable[[Any], bool], unit: str = "") -> Any:
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed, "check": check, "unit": unit})


@dataclass(frozen=True)
class Match:
    """When `auto` takes a profile: all that is given must hold. The profile with the weightiest reasons wins (see
    choice.py).
    """

    board: tuple[str, ...] = _setting(
        (),
        "one of these patterns matches the device tree's model or a compatible entry",
        "a list of strings, * matches anything",
        _texts,
    )
    machine: tuple[str, ...] = _setting((), "architecture as `uname -m` names it", "a list of strings", _texts)
    system: str = _setting(
        "", "operating system as `uname -s` names it", "a string", lambda v: isinstance(v, str) and bool(v)
    )
    cpu: tuple[str, ...] = _setting(
        (), "each of these patterns matches a feature in /proc/cpuinfo", "a list of strings, * matches anything", _texts
    )
    gpu: str = _setting(
        "", "a GPU of this kind is there, and onnxruntime has the profile's first provider", "cuda", _one_of("cuda")
    )
    min_ram_mib: int = _setting(
        0, "the memory that this process may use is at least this", "1 and above", _whole(1, 1 << 30), "MiB"
    )
    max_ram_mib: int = _setting(
        0, "the memory that this process may use is at most this", "1 and above", _whole(1, 1 << 30), "MiB"
    )


@dataclass(frozen=True)
class Budget:
    """What audits check; nothing is enforced while answering, but `run` refuses what cannot fit peak_rss_mib."""

    peak_rss_mib: int | None = _setting(
        None,
        "largest resident memory of the process, mapped weights included",
        "1 and above",
        _whole(1, 1 << 30),
        "MiB",
    )
    ttft_ms: float | None = _setting(
        None, "from the question to the first token, model loaded", "1 and above", _number(1, 1e9), "ms"
    )
    decode_tok_s: float | None = _setting(None, "lowest decode speed", "above 0", _number(1e-3, 1e6), "tok/s")


@dataclass(frozen=True)
class Board:
    """What a device can do at most, all cores together: for forecasts of time where nobody has measured."""

    fp32_gflops: float | None = _setting(None, "products of float32 matrices", "above 0", _number(1e-3, 1e6), "GFLOP/s")
    int8_gops: float | None = _setting(None, "products of int8 matrices", "above 0", _number(1e-3, 1e7), "GOP/s")
    read_gb_s: float | None = _setting(None, "reading memory", "above 0", _number(1e-3, 1e5), "GB/s")
    source: str = _setting(
        "", "where these figures come from", "a string", lambda v: isinstance(v, str) and bool(v.strip())
    )


@dataclass(frozen=True)
class Profile:
    """How to run on one device. None or empty: the checkpoint's own setting, or the runtime's."""

    name: str
    description: str = ""
    match: Match = Match()
    budget: Budget = Budget()
    board: Board = Board()
    origin: Mapping[str, str] = field(default_factory=dict)
    """Setting → the profile that gave it, or "flag". Settings that nobody gave are not in it."""
    automatic: bool = field(default=False, compare=False)
    """Nobody named it: where it turns out not to work, another may be taken."""

    variant: tuple[str, ...] = _setting(
        (),
        "the first of these that the bundle has; else the bundle's first",
        f"a list of {', '.join(VARIANTS)}, each once",
        _some_of(*VARIANTS),
    )
    prefill: str | None = _setting(
        None,
        "variant whose decoder does the prefill, if the bundle has it and memory allows",
        "none, " + ", ".join(VARIANTS),
        _one_of("none", *VARIANTS),
    )
    kv: str = _setting(
        "float",
        "KV cache format: int8 uses the variant's -kv8 form if the bundle has it",
        "float, int8",
        _one_of("float", "int8"),
    )
    providers: tuple[str, ...] = _setting(
        ("CPUExecutionProvider",),
        "onnxruntime's execution providers, in order of preference",
        "a list of provider names, CPUExecutionProvider last",
        lambda v: _texts(v) and v[-1] == "CPUExecutionProvider",
    )
    strict_placement: bool = _setting(
        False,
        "on a GPU, an operator of the decode loop that runs on the CPU is an error, not a warning",
        "true, false",
        _is_bool,
    )
    threads: int | None = _setting(
        None, "threads for each operator; the number of physical cores by default", "1 to 1024", _whole(1, 1024)
    )
    affinity: str | tuple[int, ...] = _setting(
        "none",
        "pin each thread to one processor: cores uses one processor of each physical core, the fastest first; or "
        "a list of processors",
        "none, cores, a list of processor numbers, each once",
        _cores,
    )
    spinning: bool | int = _setting(
        True,
        "how long threads spin while they wait for the next operator: true is onnxruntime's default, false is "
        "never, or a time",
        "true, false, 1 to 1000000",
        lambda v: _is_bool(v) or _whole(1, 1_000_000)(v),
        "µs",
    )
    arena: bool = _setting(
        True,
        "onnxruntime keeps freed memory for the next step; false takes less memory and more time",
        "true, false",
        _is_bool,
    )
    low_memory: bool = _setting(False, "one graph in memory at a time", "true, false", _is_bool)
    prepared: bool = _setting(True, "use what `lfm-edge prepare` wrote", "true, false", _is_bool)
    context: int | None = _setting(
        None, "maximum of prompt and answer together", "64 to 1048576", _whole(64, 1 << 20), "tokens"
    )
    min_image_tokens: int | None = _setting(
        None, "minimum of a whole image or thumbnail, which is enlarged", "1 to 65536", _whole(1, 1 << 16), "tokens"
    )
    max_image_tokens: int | None = _setting(
        None, "maximum of a whole image or thumbnail, which is reduced", "1 to 65536", _whole(1, 1 << 16), "tokens"
    )
    do_image_splitting: bool | None = _setting(None, "cut large images into tiles", "true, false", _is_bool)
    min_tiles: int | None = _setting(None, "minimum of a large image", "1 to 1024", _whole(1, 1024), "tiles")
    max_tiles: int | None = _setting(None, "maximum of a large image", "1 to 1024", _whole(1, 1024), "tiles")
    use_thumbnail: bool | None = _setting(None, "add the whole image to its tiles", "true, false", _is_bool)
    max_new_tokens: int | None = _setting(None, "maximum of an answer", "1 to 1048576", _whole(1, 1 << 20), "tokens")
    speculate: int | None = _setting(
        None,
        "propose up to this many tokens from the prompt and the answer so far",
        "0 (off) to 14",
        _whole(0, 14),
        "tokens",
    )

    def given(self, *names: str) -> dict[str, Any]:
        """Return the values of those `names` that a profile or flag has set."""
        return {name: getattr(self, name) for name in names if name in self.origin}

    def is_flag(self, name: str) -> bool:
        """Whether the setting was given as a flag, not by a profile."""
        return self.origin.get(name) == FLAG


FLAG = "flag"
STEP = "memory"
TILE_SETTINGS = ("min_tiles", "max_tiles", "use_thumbnail")
IMAGE_SETTINGS = ("min_image_tokens", "max_image_tokens", "do_image_splitting", *TILE_SETTINGS)
GENERATION_SETTINGS = ("max_new_tokens", "speculate")
SETTINGS = {f.name: f for f in fields(Profile) if f.metadata}


def with_flags(profile: Profile, flags: Mapping[str, Any]) -> Profile:
    """The profile with what the user gave beside it.

    Raises:
        ProfileError: an unknown setting, an impossible value, or one that could have no effect.
    """
    if unknown := next((name for name in flags if name not in SETTINGS), None):
        raise ProfileError(f"unknown setting {unknown!r}; allowed: {', '.join(SETTINGS)}")
    values = {
        name: _checked(name, list(v) if isinstance(v, tuple) else v, SETTINGS[name].metadata)
        for name, v in flags.items()
    }
    made = changed(profile, values, FLAG)
    useless = [name for name in TILE_SETTINGS if name in flags]
    if made.do_image_splitting is False and useless:
        raise ProfileError(
            f"{useless[0]} has no effect while do_image_splitting is off "
            f"({_said_by(made.origin['do_image_splitting'])}); leave it out or turn splitting on"
        )
    if made.low_memory and made.prefill not in (None, "none"):
        if made.is_flag("prefill") and made.is_flag("low_memory"):
            raise ProfileError("prefill needs a second decoder in memory, low_memory allows one; leave one out")
        loser = "low_memory" if made.is_flag("prefill") else "prefill"  # the profile's wish yields to the user's
        made = changed(made, {loser: False if loser == "low_memory" else "none"}, FLAG)
    return made


def stepped_down(profile: Profile, changes: Mapping[str, Any]) -> Profile:
    """The profile with settings that the memory there is makes necessary."""
    values = dict(changes)
    if values.get("low_memory"):
        values["prefill"] = "none"
    return changed(profile, values, STEP)


def _checked(key: str, value: Any, metadata: Mapping[str, Any], where: str = "") -> Any:
    if not metadata["check"](value):
        shown = {True: "true", False: "false"}.get(value, repr(value)) if isinstance(value, bool) else repr(value)
        unit = f" ({metadata['unit']})" if metadata["unit"] else ""
        said = f"{where}: {key} = {shown}" if where else f"{key} {shown}"
        number = metadata["allowed"][:1].isdigit() and isinstance(value, str)
        more = ", without quotes" * number + ", and finite" * (isinstance(value, float) and not math.isfinite(value))
        raise ProfileError(f"{said} is impossible; allowed: {metadata['allowed']}{unit}{more}")
    return tuple(value) if isinstance(value, list) else value


def changed(parent: Profile, values: Mapping[str, Any], who: str) -> Profile:
    """Return the profile with other values, whose origin is `who`."""
    origin = {**parent.origin, **dict.fromkeys(values, who)}
    return Profile(**{**{f.name: getattr(parent, f.name) for f in fields(Profile)}, **values, "origin": origin})


def _said_by(origin: str) -> str:
    return "as you said" if origin == FLAG else f"by the profile {origin}"
