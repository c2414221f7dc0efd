"""JSON as dataclasses, both ways, and the JSON Schema of a dataclass: a format is a type, and only it knows its keys.

Field types may be bool, int, float, str, None, Any, Literal, unions of them, tuple[X, ...], Mapping[str, X], and
dataclasses of these. A field with a default may be missing from the JSON; keys that no field has are ignored, so that
what a later release adds does not hurt.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from lfm_runtime.errors import EdgeError

T = TypeVar("T")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", NoneType: "null"}
_SCHEMA_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "null"}


class _WrongError(ValueError):
    """A value of another type; the message says where."""


def read_as(kind: type[T], value: Any, path: Path, error: type[EdgeError], advice: str) -> T:
    """A JSON value as a dataclass.

    Args:
        kind: the dataclass.
        value: what `json.loads` gave.
        path: the file, for the message.
        error: what is raised.
        advice: what the user should do about a damaged file.

    Raises:
        error: naming the file, the place in it, what stands there and what belongs there.
    """
    try:
        found: T = _read(kind, value, "")
    except _WrongError as e:
        raise error(f"{path}: {e}; {advice}") from e
    return found


def as_json(value: Any) -> Any:
    """A dataclass as what `json.dumps` takes; tuples become lists. A field that its default leaves out stays out when
    it is empty (see `optional`).
    """
    if is_dataclass(value) and not isinstance(value, type):
        pairs = ((f, getattr(value, f.name)) for f in fields(value))
        return {_key(f): as_json(v) for f, v in pairs if v or not f.metadata.get("omitted")}
    if isinstance(value, Mapping):
        return {str(key): as_json(v) for key, v in value.items()}
    return [as_json(v) for v in value] if isinstance(value, (list, tuple)) else value


def schema_of(kind: type, title: str, description: str) -> dict[str, Any]:
    """JSON Schema (2020-12) of a dataclass. `Annotated[X, "text"]` gives a field its description."""
    parts: dict[str, Any] = {}
    whole = _schema_of_dataclass(kind, parts)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, "description": description}
    return {**head, **whole, "$defs": dict(sorted(parts.items()))}


# ------------------------------------------------------------------------------------------------------------ reading


def _read(kind: Any, value: Any, at: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _read(inner[0], value, at)
    if kind is Any:
        return _finite(value, at)
    if origin in (Union, UnionType):
        return _read_union(inner, value, at)
    if origin is Literal:
        return value if value in inner and type(value) in map(type, inner) else _wrong(at, value, _wanted(kind))
    if origin is tuple:
        return _read_tuple(inner, value, at)
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, dict):
            _wrong(at, value, "an object")
        return {key: _read(inner[1], v, f"{at}.{key}" if at else key) for key, v in value.items()}
    if is_dataclass(kind):
        return _read_dataclass(kind, value, at)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        _wrong(at, value, _wanted(kind))
    return value


def _read_union(kinds: tuple[Any, ...], value: Any, at: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    kinds = tuple(k for k in kinds if k is not NoneType)
    if len(kinds) == 1:
        return _read(kinds[0], value, at)
    for kind in kinds:
        with suppress(_WrongError):
            return _read(kind, value, at)
    return _wrong(at, value, " or ".join(_wanted(kind) for kind in kinds))


def _read_tuple(kinds: tuple[Any, ...], value: Any, at: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        _wrong(at, value, "a list")
    if len(kinds) == 2 and kinds[1] is ...:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        _wrong(at, value, f"a list of {len(kinds)}")
    return tuple(_read(kind, v, f"{at}[{n}]") for n, (kind, v) in enumerate(zip(kinds, value, strict=True)))


def _read_dataclass(kind: Any, value: Any, at: str) -> Any:
    if not isinstance(value, dict):
        _wrong(at, value, "an object")
    found = {}
    for field, inner in _fields(kind):
        key = _key(field)
        if key in value:
            found[field.name] = _read(inner, value[key], f"{at}.{key}" if at else key)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise _WrongError(f"{at + ' has no ' if at else 'it has no '}{key}")
    return kind(**found)


def _finite(value: Any, at: str) -> Any:
    """Anything but NaN and infinity, which Python reads as numbers and JSON does not know."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        _finite(inner, f"{at}.{key}")
    if isinstance(value, float) and not math.isfinite(value):
        _wrong(at, value, "a number")
    return value


def _wrong(at: str, value: Any, wanted: str) -> Any:
    raise _WrongError(f"{at or 'it'} is {_shown(value)}, expected {wanted}")


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return repr(value)[:60] if value is not None else "null"


def _wanted(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return _NAMES.get(kind, "a list" if get_origin(kind) is tuple else "an object")


@functools.cache
def _fields(kind: type) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(kind, include_extras=True)
    return [(f, hints[f.name]) for f in fields(cast("Any", kind))]


def _key(field: Field[Any]) -> str:
    """What a field is called in JSON: a Python keyword, or another's name, cannot be its own."""
    return str(field.metadata.get("key", field.name))


# ------------------------------------------------------------------------------------------------------------- schema


def _schema(kind: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """Of a field's type; dataclasses are put into `parts` and referred to."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return {**_schema(inner[0], parts), "description": inner[1]}
    if kind is Any:
        return {}
    if origin in (Union, UnionType):
        found = [_schema(k, parts) for k in inner]
        if all(set(part) == {"type"} for part in found):
            return {"type": [part["type"] for part in found]}
        return {"anyOf": found}
    if origin is Literal:
        return {"enum": list(inner)} if len(inner) > 1 else {"const": inner[0]}
    if origin is tuple:
        if len(inner) == 2 and inner[1] is ...:
            return {"type": "array", "items": _schema(inner[0], parts)}
        found = [_schema(k, parts) for k in inner]
        return {"type": "array", "prefixItems": found, "minItems": len(found), "items": False}
    if isinstance(kind, type) and is_dataclass(kind):
        if kind.__name__ not in parts:
            parts[kind.__name__] = {}  # so that one that holds itself is not begun again
            parts[kind.__name__] = _schema_of_dataclass(kind, parts)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if inner:
        return {"type": "object", "additionalProperties": _schema(inner[1], parts)}
    return {"type": _SCHEMA_NAMES[kind]}


def _schema_of_dataclass(kind: type, parts: dict[str, Any]) -> dict[str, Any]:
    required = [_key(f) for f, _ in _fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    return {
        "type": "object",
        "properties": {_key(f): _schema(k, parts) for f, k in _fields(kind)},
        "required": required,
        "additionalProperties": False,
    }
