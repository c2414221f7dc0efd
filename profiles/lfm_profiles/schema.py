"""What a profile may say, read from TOML files. What the device is stands in device.py, which profile fits it in
choice.py.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

from lfm_profiles.variants import VARIANTS

SHIPPED = Path(__file__).parent
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
        "any of these patterns fits the device tree's model or a compatible entry",
        "a list of texts, * fits anything",
        _texts,
    )
    machine: tuple[str, ...] = _setting((), "architecture as `uname -m` names it", "a list of texts", _texts)
    system: str = _setting(
        "", "operating system as `uname -s` names it", "a text", lambda v: isinstance(v, str) and bool(v)
    )
    cpu: tuple[str, ...] = _setting(
        (), "every one of these patterns fits a feature in /proc/cpuinfo", "a list of texts, * fits anything", _texts
    )
    gpu: str = _setting(
        "", "a GPU of this kind is there, and onnxruntime has the profile's first provider", "cuda", _one_of("cuda")
    )
    min_ram_mib: int = _setting(
        0, "memory this process may use at most, at least so much", "1 and above", _whole(1, 1 << 30), "MiB"
    )
    max_ram_mib: int = _setting(0, "the same, at most so much", "1 and above", _whole(1, 1 << 30), "MiB")


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
    decode_tok_s: float | None = _setting(
        None, "tokens written a second, at least", "above 0", _number(1e-3, 1e6), "tok/s"
    )


@dataclass(frozen=True)
class Profile:
    """How to run on one device. None or empty: the checkpoint's own setting, or the runtime's."""

    name: str
    description: str = ""
    match: Match = Match()
    budget: Budget = Budget()
    origin: Mapping[str, str] = field(default_factory=dict)
    """Setting → the profile that gave it, or "flag". Settings that nobody gave are not in it."""
    automatic: bool = field(default=False, compare=False)
    """Nobody named it: where it turns out not to work, another may be taken."""

    variant: tuple[str, ...] = _setting(
        (),
        "the first of these that the bundle has; else the bundle's first",
        f"a list of {', '.join(VARIANTS)}",
        _some_of(*VARIANTS),
    )
    prefill: str | None = _setting(
        None,
        "variant whose decoder reads prompts, where the bundle has it and memory allows",
        "none, " + ", ".join(VARIANTS),
        _one_of("none", *VARIANTS),
    )
    kv: str = _setting(
        "float",
        "how keys and values are remembered: int8 takes the variant's -kv8 form where the bundle has it",
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
        "an operator of the decode loop that the GPU's provider leaves to the CPU is an error, not a warning",
        "true, false",
        _is_bool,
    )
    threads: int | None = _setting(
        None, "of each operator; the physical cores by default", "1 to 1024", _whole(1, 1024)
    )
    affinity: str | tuple[int, ...] = _setting(
        "none",
        "keep each thread on one core: cores takes one processor of each physical core, the fastest first; or a "
        "list of processors",
        "none, cores, a list of processor numbers",
        _cores,
    )
    spinning: bool | int = _setting(
        True,
        "threads wait for the next operator spinning: true as onnxruntime does, false never, or so long",
        "true, false, 1 to 1000000",
        lambda v: _is_bool(v) or _whole(1, 1_000_000)(v),
        "µs",
    )
    arena: bool = _setting(
        True,
        "onnxruntime keeps freed memory for the next step; off takes less of it and more time",
        "true, false",
        _is_bool,
    )
    low_memory: bool = _setting(False, "one graph in memory at a time", "true, false", _is_bool)
    prepared: bool = _setting(True, "use what `lfm-edge prepare` wrote", "true, false", _is_bool)
    context: int | None = _setting(
        None, "prompt and answer together, at most", "64 to 1048576", _whole(64, 1 << 20), "tokens"
    )
    min_image_tokens: int | None = _setting(
        None, "of one view, at least: smaller images are enlarged", "1 to 65536", _whole(1, 1 << 16), "tokens"
    )
    max_image_tokens: int | None = _setting(None, "of one view, at most", "1 to 65536", _whole(1, 1 << 16), "tokens")
    do_image_splitting: bool | None = _setting(None, "cut large images into tiles", "true, false", _is_bool)
    min_tiles: int | None = _setting(None, "of a large image", "1 to 1024", _whole(1, 1024), "tiles")
    max_tiles: int | None = _setting(None, "of a large image", "1 to 1024", _whole(1, 1024), "tiles")
    use_thumbnail: bool | None = _setting(None, "add the whole image to its tiles", "true, false", _is_bool)
    max_new_tokens: int | None = _setting(None, "of an answer", "1 to 1048576", _whole(1, 1 << 20), "tokens")
    speculate: int | None = _setting(
        None, "guess up to so many tokens from what was said", "0 (off) to 14", _whole(0, 14), "tokens"
    )

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the settings that somebody gave."""
        return {name: getattr(self, name) for name in names if name in self.origin}

    def is_flag(self, name: str) -> bool:
        """Whether the user gave a setting beside the profile."""
        return self.origin.get(name) == FLAG


FLAG = "flag"
STEP = "memory"
TILE_SETTINGS = ("min_tiles", "max_tiles", "use_thumbnail")
IMAGE_SETTINGS = ("min_image_tokens", "max_image_tokens", "do_image_splitting", *TILE_SETTINGS)
GENERATION_SETTINGS = ("max_new_tokens", "speculate")
SETTINGS = {f.name: f for f in fields(Profile) if f.metadata}
_SECTIONS: dict[str, Any] = {"match": Match, "budget": Budget}
_TEXTS = ("description", "extends")


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


def to_toml(profile: Profile) -> str:
    """A file that gives all that this profile gives, by itself. The rules of `auto` are left out."""
    useless = {
        *(TILE_SETTINGS if profile.do_image_splitting is False else ()),
        *(("prefill",) if profile.low_memory else ()),
    }
    lines = [f"description = {json.dumps(profile.description, ensure_ascii=False)}", ""]
    lines += [
        f"{name} = {_toml(getattr(profile, name))}"
        for name in SETTINGS
        if name in profile.origin and name not in useless
    ]
    budget = {f.name: getattr(profile.budget, f.name) for f in fields(Budget)}
    if any(budget.values()):
        lines += ["", "[budget]", *(f"{name} = {value}" for name, value in budget.items() if value)]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """Texts, numbers, booleans and lists of them are the same in JSON."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _said_by(origin: str) -> str:
    return "as you said" if origin == FLAG else f"by the profile {origin}"


def names() -> list[str]:
    """The profiles shipped."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def path_of(name: str) -> Path:
    """The file of a shipped profile's name, or the file named.

    Raises:
        ProfileError: neither.
    """
    if name in names():
        return SHIPPED / f"{name}.toml"
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        return path
    raise ProfileError(f"there is no profile {name!r}; shipped: {AUTO}, {', '.join(names())}; or name a .toml file")


def read(name: str, *, detected: Callable[[], Profile] | None = None, _below: tuple[Path, ...] = ()) -> Profile:
    """A profile with what it extends resolved.

    Args:
        name: of a shipped profile, or a file.
        detected: gives the profile that `extends = "auto"` means; without it such a profile stands alone.

    Raises:
        ProfileError: missing, malformed, an unknown key, a wrong type, an impossible value, or a cycle.
    """
    path = path_of(name)
    if path.resolve() in (p.resolve() for p in _below):
        raise ProfileError(f"{path}: extends goes in a circle: {' → '.join(p.stem for p in (*_below, path))}")
    text, raw = _parsed(path)
    raw = dict(raw)
    parent = Profile(path.stem)
    extends = raw.pop("extends", None)
    if extends == AUTO:
        parent = detected() if detected else parent
    elif extends is not None:
        beside = path.parent / f"{extends}.toml"  # a file of one's own may extend the shipped profile of the same name
        own = beside.is_file() and beside.resolve() != path.resolve()
        parent = read(str(beside) if own else extends, detected=detected, _below=(*_below, path))
    sections = {
        section: _section(path, text, raw.pop(section, {}), section, kind) for section, kind in _SECTIONS.items()
    }
    description = raw.pop("description", "")
    values = {k: _value(path, text, k, v, {n: f.metadata for n, f in SETTINGS.items()}) for k, v in raw.items()}
    _check_together(path, text, values)
    budget = {f.name: getattr(parent.budget, f.name) for f in fields(Budget)} | sections["budget"]
    made = changed(parent, values, path.stem)
    return Profile(
        **{
            **{f.name: getattr(made, f.name) for f in fields(Profile)},
            "name": path.stem,
            "description": description,
            "match": Match(**sections["match"]),
            "budget": Budget(**budget),
        }
    )


@functools.cache  # of every profile shipped, choosing one reads the rules
def _parsed(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except OSError as e:
        raise ProfileError(f"{path} cannot be read: {e.strerror}") from e
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ProfileError(f"{path} is not TOML ({e}); see profiles/README.md") from e
    for key in _TEXTS:
        if not isinstance(raw.get(key, ""), str):
            raise ProfileError(f"{_where(path, text, key)}: {key} is a text in quotes")
    return text, raw


def read_match(name: str) -> Match:
    """When a shipped profile is taken; nothing else of it is looked at."""
    path = path_of(name)
    text, raw = _parsed(path)
    return Match(**_section(path, text, raw.get("match", {}), "match", Match))


def _section(path: Path, text: str, table: Any, section: str, kind: Any) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ProfileError(f"{_where(path, text, section)}: {section} is a table: [{section}]")
    metadata = {f.name: f.metadata for f in fields(kind)}
    return {key: _value(path, text, key, value, metadata, section) for key, value in table.items()}


def _value(
    path: Path, text: str, key: str, value: Any, known: Mapping[str, Mapping[str, Any]], section: str = ""
) -> Any:
    if key not in known:
        raise ProfileError(f"{_where(path, text, key, section)}: unknown key {key!r}; allowed: {', '.join(known)}")
    return _checked(key, value, known[key], _where(path, text, key, section))


def _checked(key: str, value: Any, metadata: Mapping[str, Any], where: str = "") -> Any:
    if not metadata["check"](value):
        shown = {True: "true", False: "false"}.get(value, repr(value)) if isinstance(value, bool) else repr(value)
        unit = f" ({metadata['unit']})" if metadata["unit"] else ""
        said = f"{where}: {key} = {shown}" if where else f"{key} {shown}"
        raise ProfileError(f"{said} is impossible; allowed: {metadata['allowed']}{unit}")
    return tuple(value) if isinstance(value, list) else value


def _check_together(path: Path, text: str, values: Mapping[str, Any]) -> None:
    """What one file says must not contradict itself."""
    useless = next((n for n in TILE_SETTINGS if n in values), None)
    if values.get("do_image_splitting") is False and useless:
        raise ProfileError(
            f"{_where(path, text, useless)}: {useless} has no effect beside do_image_splitting = false; leave it out"
        )
    if values.get("low_memory") and values.get("prefill", "none") != "none":
        raise ProfileError(
            f"{_where(path, text, 'prefill')}: prefill has no effect beside low_memory = true; leave one out"
        )
    for low, high in (("min_image_tokens", "max_image_tokens"), ("min_tiles", "max_tiles")):
        if low in values and high in values and values[low] > values[high]:
            raise ProfileError(f"{_where(path, text, low)}: {low} = {values[low]} is above {high} = {values[high]}")


def changed(parent: Profile, values: Mapping[str, Any], who: str) -> Profile:
    """The profile with other values; `who` gave them."""
    origin = {**parent.origin, **dict.fromkeys(values, who)}
    return Profile(**{**{f.name: getattr(parent, f.name) for f in fields(Profile)}, **values, "origin": origin})


def _where(path: Path, text: str, key: str, section: str = "") -> str:
    """File and line; tomllib tells no lines of what it has read."""
    inside = not section
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([\w.-]+)", line):
            inside = header[1] == section
            if header[1] == key and not section:
                return f"{path}, line {number}"
        elif inside and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return f"{path}, line {number}"
    return str(path)
