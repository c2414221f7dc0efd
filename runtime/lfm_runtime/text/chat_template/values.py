"""What a template computes with: undefined names, namespaces, loops, macros; methods, tests and filters as Jinja has
them.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lfm_runtime.errors import PromptError

_MAX_RANGE = 100_000  # Jinja's sandbox has the same limit
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        (
            "capitalize",
            "count",
            "endswith",
            "find",
            "index",
            "isalnum",
            "isalpha",
            "isdigit",
            "islower",
            "isspace",
            "isupper",
            "join",
            "lower",
            "lstrip",
            "partition",
            "removeprefix",
            "removesuffix",
            "replace",
            "rfind",
            "rpartition",
            "rsplit",
            "rstrip",
            "split",
            "splitlines",
            "startswith",
            "strip",
            "swapcase",
            "title",
            "upper",
        )
    ),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
}


class TemplateError(PromptError):
    """A template cannot be parsed, asks for what is not known here, or fails on a conversation."""


class Undefined:
    """What a name without a value is: empty in text and loops, false in tests, an error in anything else."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return ""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "Undefined"

    def __getitem__(self, key: Any) -> Any:
        raise TemplateError(f"chat template: {self.name} is undefined and has no item {key!r}")

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Undefined)

    __hash__ = None  # type: ignore[assignment]


class Namespace:
    """`namespace(…)`: the one value whose attributes a template may set."""

    def __init__(self, *given: Any, **values: Any) -> None:
        self.values = dict(*given, **values)

    def __repr__(self) -> str:
        return f"<Namespace {self.values!r}>"


class Loop:
    """The variable `loop` inside `{% for %}`."""

    def __init__(self, items: Sequence[Any], at: int) -> None:
        self._items, self._at = items, at

    def __repr__(self) -> str:
        return f"<LoopContext {self._at + 1}/{len(self._items)}>"

    def get(self, name: str) -> Any:
        """Return an attribute of `loop`; raises TemplateError for one that is not known."""
        at, count = self._at, len(self._items)
        known = {
            "index": at + 1,
            "index0": at,
            "first": at == 0,
            "last": at + 1 == count,
            "length": count,
            "revindex": count - at,
            "revindex0": count - at - 1,
            "previtem": self._items[at - 1] if at else Undefined("previtem"),
            "nextitem": self._items[at + 1] if at + 1 < count else Undefined("nextitem"),
        }
        if name not in known:
            raise TemplateError(f"chat template: loop.{name} is not supported; supported are {', '.join(known)}")
        return known[name]


class Scope(dict[str, Any]):
    """Names of one block; what it lacks is looked up outside."""

    def __init__(self, outer: Scope | None, values: Mapping[str, Any] | None = None) -> None:
        super().__init__(values or {})
        self.outer = outer

    def find(self, name: str) -> Any:
        """Return the value of a name, from the innermost block that has it, else Undefined."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope:
                return scope[name]
            scope = scope.outer
        return Undefined(name)


class Break(Exception):  # noqa: N818  (a signal, not an error)
    """Raised by `{% break %}`, caught by the loop."""


class Continue(Exception):  # noqa: N818
    """Raised by `{% continue %}`, caught by the loop."""


@dataclass(repr=False)
class Macro:
    """`{% macro %}`: called with values, gives text. Its free names are those of the place where it stands."""

    name: str
    parameters: list[str]
    defaults: list[Callable[[Scope], Any]]  # of the last parameters
    body: Callable[[Scope, list[str]], None]
    scope: Scope

    def __call__(self, *given: Any, **named: Any) -> str:
        """The text for these arguments; a parameter that is left out is undefined, or its default."""
        if len(given) > len(self.parameters) or set(named) - set(self.parameters[len(given) :]):
            raise TemplateError(f"chat template: macro {self.name} takes {', '.join(self.parameters) or 'nothing'}")
        inner = Scope(self.scope, {**dict(zip(self.parameters, given, strict=False)), **named})
        missing = [parameter for parameter in self.parameters if parameter not in inner]
        inner.update({parameter: Undefined(parameter) for parameter in missing})
        for parameter, default in zip(
            self.parameters[len(self.parameters) - len(self.defaults) :], self.defaults, strict=True
        ):
            if parameter in missing:
                inner[parameter] = default(inner)
        out: list[str] = []
        self.body(inner, out)
        return "".join(out)

    def __repr__(self) -> str:
        return f"<Macro {self.name!r}>"


def attribute(value: Any, name: str) -> Any:
    """value.name: a method, else a key. A key that is also a method's name is the method, as in Jinja."""
    if isinstance(value, Undefined):
        raise TemplateError(f"chat template: {value.name} is undefined and has no {name}")
    if isinstance(value, Namespace):
        return value.values.get(name, Undefined(name))
    if isinstance(value, Loop):
        return value.get(name)
    if hasattr(value, name):
        if name in _METHODS.get(type(value), ()):
            return getattr(value, name)
        raise TemplateError(f"chat template: .{name} of a {type(value).__name__} is not supported")
    return value[name] if isinstance(value, dict) and name in value else Undefined(name)


def item(value: Any, key: Any) -> Any:
    """value[key]; an attribute where there is no such item."""
    if isinstance(value, Undefined):
        raise TemplateError(f"chat template: {value.name} is undefined and has no item {key!r}")
    if isinstance(value, (Namespace, Loop)):
        return attribute(value, key) if isinstance(key, str) else Undefined(str(key))
    try:
        return value[key]
    except (TypeError, LookupError):
        return attribute(value, key) if isinstance(key, str) else Undefined(str(key))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float, complex))


def _is_sequence(value: Any) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def _is_iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:
        return False
    return True


TESTS: dict[str, Callable[..., bool]] = {
    "defined": lambda v: not isinstance(v, Undefined),
    "undefined": lambda v: isinstance(v, Undefined),
    "none": lambda v: v is None,
    "string": lambda v: isinstance(v, str),
    "mapping": lambda v: isinstance(v, Mapping),
    "sequence": _is_sequence,
    "iterable": _is_iterable,
    "number": _number,
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "float": lambda v: isinstance(v, float),
    "boolean": lambda v: isinstance(v, bool),
    "true": lambda v: v is True,
    "false": lambda v: v is False,
    "in": lambda v, seq: v in seq,
    "eq": operator.eq,
    "equalto": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "odd": lambda v: v % 2 == 1,
    "even": lambda v: v % 2 == 0,
    "divisibleby": lambda v, n: v % n == 0,
}


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _default(value: Any, default_value: Any = "", boolean: bool = False) -> Any:
    return default_value if isinstance(value, Undefined) or (boolean and not value) else value


def _first(values: Any) -> Any:
    return next(iter(values), Undefined("first"))


def _last(values: Any) -> Any:
    return next(iter(reversed(values)), Undefined("last"))


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(value, (Mapping, Undefined)):
        raise TypeError("Can only get item pairs from a mapping.")
    yield from () if isinstance(value, Undefined) else value.items()


def _by_attribute(keep: bool) -> Callable[..., Iterator[Any]]:
    """selectattr or rejectattr: generators, as in Jinja, which are true even where they give nothing."""

    def select(values: Any, name: str, test: str = "", *arguments: Any) -> Iterator[Any]:
        for value in values:
            if bool(TESTS[test](_path(value, name), *arguments) if test else _path(value, name)) is keep:
                yield value

    return select


def _path(value: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        value = item(value, int(part) if part.isdigit() else part)
    return value


def _map(values: Any, *, attribute: str) -> Iterator[Any]:
    for value in values:
        yield _path(value, attribute)


FILTERS: dict[str, Callable[..., Any]] = {
    "tojson": _to_json,
    "trim": lambda v, chars=None: str(v).strip(chars),
    "string": str,
    "join": lambda v, d="": str(d).join(map(str, v)),
    "length": len,
    "count": len,
    "default": _default,
    "d": _default,
    "first": _first,
    "last": _last,
    "list": list,
    "items": _items,
    "upper": lambda v: str(v).upper(),
    "lower": lambda v: str(v).lower(),
    "capitalize": lambda v: str(v).capitalize(),
    "replace": lambda v, old, new, count=-1: str(v).replace(str(old), str(new), -1 if count is None else count),
    "abs": abs,
    "map": _map,
    "selectattr": _by_attribute(keep=True),
    "rejectattr": _by_attribute(keep=False),
}


def _range(*bounds: int) -> range:
    found = range(*bounds)
    if len(found) > _MAX_RANGE:
        raise TemplateError(f"chat template: range of {len(found)}; at most {_MAX_RANGE} are allowed")
    return found


def _raise_exception(message: str) -> None:
    raise TemplateError(f"chat template: {message}")


def known_names(now: datetime) -> dict[str, Any]:
    """Return the functions that every template may call, by name."""
    return {
        "namespace": Namespace,
        "range": _range,
        "dict": dict,
        "raise_exception": _raise_exception,
        "strftime_now": now.strftime,
    }
