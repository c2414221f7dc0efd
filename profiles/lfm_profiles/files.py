"""Profiles as files: found by name, read from TOML with what they extend, written."""

from __future__ import annotations

import difflib
import functools
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]
from lfm_profiles.schema import (
    AUTO,
    SETTINGS,
    TILE_SETTINGS,
    Board,
    Budget,
    Match,
    Profile,
    ProfileError,
    _checked,
    changed,
)

SHIPPED = Path(__file__).parent


_SECTIONS: dict[str, Any] = {"match": Match, "budget": Budget, "board": Board}


_TEXTS = ("name", "description", "extends")


def to_toml(profile: Profile, *, named: bool = False) -> str:
    """A file that gives all that this profile gives, by itself. The rules of `auto` are left out. `named`: the file's
    name is not the profile's, which is written into it.
    """
    useless = {
        *(TILE_SETTINGS if profile.do_image_splitting is False else ()),
        *(("prefill",) if profile.low_memory else ()),
    }
    texts = {"name": profile.name} if named else {}
    texts["description"] = profile.description
    lines = [*(f"{key} = {json.dumps(text, ensure_ascii=False)}" for key, text in texts.items()), ""]
    lines += [
        f"{name} = {_toml(getattr(profile, name))}"
        for name in SETTINGS
        if name in profile.origin and name not in useless
    ]
    for section, table in (("budget", profile.budget), ("board", profile.board)):
        given = {name: value for name, value in asdict(table).items() if value}
        if given:
            lines += ["", f"[{section}]", *(f"{name} = {_toml(value)}" for name, value in given.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """Texts, numbers, booleans and lists of them are the same in JSON."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def names() -> list[str]:
    """Return the names of the shipped profiles, sorted."""
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
    if path.is_dir():
        raise ProfileError(f"{name} is a folder; name a profile, or its .toml file")
    raise ProfileError(f"there is no profile {name!r}; shipped: {AUTO}, {', '.join(names())}; or name a .toml file")


def _extended(path: Path, text: str, extends: str) -> str:
    """What a profile's file extends: a file beside it, by its name with or without .toml, or a shipped profile."""
    where = _where(path, text, "extends")
    file = path.parent / (extends if extends.endswith(".toml") else f"{extends}.toml")
    if extends.endswith(".toml"):
        if not file.is_file():
            raise ProfileError(f"{where}: {file} does not exist; name a file beside this one, or a shipped profile")
        return str(file)
    if file.is_file() and file.resolve() != path.resolve():  # one's own may extend the shipped profile of the same name
        return str(file)
    try:
        path_of(extends)
    except ProfileError as e:
        raise ProfileError(f"{where}: {e}") from e
    return extends


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
        raise ProfileError(f"{path}: extends is circular: {' → '.join(p.stem for p in (*_below, path))}")
    text, raw = _parsed(path)
    raw = dict(raw)
    parent = Profile(path.stem)
    extends = raw.pop("extends", None)
    if extends == AUTO:
        parent = detected() if detected else parent
    elif extends is not None:
        wanted = _extended(path, text, extends)
        parent = read(wanted, detected=detected, _below=(*_below, path))
    sections = {
        section: _section(path, text, raw.pop(section, {}), section, kind) for section, kind in _SECTIONS.items()
    }
    _check_match(path, text, sections["match"])
    description, said = raw.pop("description", ""), raw.pop("name", path.stem)
    values = {k: _value(path, text, k, v, {n: f.metadata for n, f in SETTINGS.items()}) for k, v in raw.items()}
    _check_together(path, text, values, parent)
    inherited = {"budget": asdict(parent.budget), "board": asdict(parent.board)}
    made = changed(parent, values, path.stem)
    return Profile(
        **{
            **{f.name: getattr(made, f.name) for f in fields(Profile)},
            "name": said,
            "description": description,
            "match": Match(**sections["match"]),
            "budget": Budget(**inherited["budget"] | sections["budget"]),
            "board": Board(**inherited["board"] | sections["board"]),
        }
    )


def _parsed(path: Path) -> tuple[str, dict[str, Any]]:
    return _parsed_once(path) if path.parent == SHIPPED else _read_parsed(path)  # a user's own changes


@functools.cache  # of every profile shipped, choosing one reads the rules
def _parsed_once(path: Path) -> tuple[str, dict[str, Any]]:
    return _read_parsed(path)


def _read_parsed(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        raw = tomllib.loads(text)
    except FileNotFoundError as e:
        raise ProfileError(f"{path} does not exist; name a .toml file, or one of: {AUTO}, {', '.join(names())}") from e
    except OSError as e:
        raise ProfileError(f"{path} cannot be read ({e.strerror}); check the path") from e
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as e:
        raise ProfileError(f"{path} is not TOML ({e}); see profiles/README.md") from e
    for key in _TEXTS:
        if not isinstance(raw.get(key, ""), str):
            raise ProfileError(f"{_where(path, text, key)}: {key} must be a string in quotes")
        if not raw.get(key, "").replace("\n", " ").isprintable():  # a stranger's would steer the terminal
            raise ProfileError(f"{_where(path, text, key)}: {key} has characters that cannot be shown; leave them out")
    return text, raw


def read_match(name: str) -> Match:
    """When a shipped profile is taken; nothing else of it is looked at."""
    path = path_of(name)
    text, raw = _parsed(path)
    return Match(**_section(path, text, raw.get("match", {}), "match", Match))


def _section(path: Path, text: str, table: Any, section: str, kind: Any) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ProfileError(f"{_where(path, text, section)}: {section} must be a table: [{section}]")
    metadata = {f.name: f.metadata for f in fields(kind)}
    return {key: _value(path, text, key, value, metadata, section) for key, value in table.items()}


def _value(
    path: Path, text: str, key: str, value: Any, known: Mapping[str, Mapping[str, Any]], section: str = ""
) -> Any:
    if key not in known:
        meant = difflib.get_close_matches(key, known, 1)
        do = f"did you mean {meant[0]}?" if meant else f"allowed: {', '.join(known)}"
        raise ProfileError(f"{_where(path, text, key, section)}: unknown key {key!r}; {do}")
    return _checked(key, value, known[key], _where(path, text, key, section))


def _check_match(path: Path, text: str, match: Mapping[str, Any]) -> None:
    least, most = match.get("min_ram_mib", 0), match.get("max_ram_mib", 0)
    if most and least > most:
        where = _where(path, text, "min_ram_mib", "match")
        raise ProfileError(f"{where}: min_ram_mib = {least} is above max_ram_mib = {most}")


def _check_together(path: Path, text: str, values: Mapping[str, Any], parent: Profile) -> None:
    """Raise ProfileError where a setting of the file contradicts another one of it, or one that it extends."""

    def at(name: str) -> Any:
        return values.get(name, getattr(parent, name))

    def fail(about: str, said: str) -> None:
        raise ProfileError(f"{_where(path, text, about)}: {said}")

    useless = next((n for n in TILE_SETTINGS if n in values), None)
    if useless and values.get("do_image_splitting") is False:  # where another file says so, it waits until that changes
        fail(useless, f"{useless} has no effect beside do_image_splitting = false; leave it out")
    if values.get("low_memory") and values.get("prefill", "none") != "none":
        fail("prefill", "prefill has no effect beside low_memory = true; leave one out")
    if at("low_memory") and "CUDAExecutionProvider" in at("providers") and {"low_memory", "providers"} & values.keys():
        here = "low_memory" in values
        do = "leave it out" if here else f"write low_memory = false, as {parent.origin['low_memory']} says otherwise"
        fail("low_memory" if here else "providers", f"low_memory = true is for the CPU; {do}")
    for low, high in (("min_image_tokens", "max_image_tokens"), ("min_tiles", "max_tiles")):
        said = next((name for name in (low, high) if name in values), None)
        if said and at(low) is not None and at(high) is not None and at(low) > at(high):
            fail(said, f"{low} = {at(low)} is above {high} = {at(high)}")
    said = next((name for name in ("affinity", "threads") if name in values), None)
    if said and at("threads") and isinstance(at("affinity"), tuple) and len(at("affinity")) < at("threads"):
        count = len(at("affinity"))
        fail(
            said,
            f"affinity names {count} of the {at('threads')} processors that threads needs; name as many, or lower it",
        )


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
