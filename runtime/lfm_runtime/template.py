"""Chat templates without jinja2: the part of Jinja that chat templates use, with the settings of transformers.

`Template(source)` parses, `render(**values)` gives the text that transformers' `apply_chat_template` gives: trim_blocks, lstrip_blocks,
loop controls, `{% generation %}`, `tojson` without HTML escapes, `raise_exception`, `strftime_now`. Values are what JSON knows. What is
not known here is an error that names it; nothing is guessed. Grammar and semantics: Jinja 3.1 (https://jinja.palletsprojects.com);
export compares both on every template that it takes.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lfm_runtime.errors import PromptError

Expression = Callable[["Scope"], Any]
Statement = Callable[["Scope", list[str]], None]

_MAX_RANGE = 100_000  # Jinja's sandbox has the same limit
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize count endswith find index isalnum isalpha isdigit islower isspace isupper join lower lstrip partition removeprefix "
        "removesuffix replace rfind rpartition rsplit rstrip split splitlines startswith strip swapcase title upper".split()
    ),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
}


class TemplateError(PromptError):
    """A template cannot be parsed, asks for what is not known here, or fails on a conversation."""


# ------------------------------------------------------------------------------------------------------------- values


class Undefined:
    """What a name without a value is: empty in text and loops, false in tests, an error in anything else."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return ""

    def __bool__(self) -> bool:
        return False

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


class Loop:
    """`loop` inside a for."""

    def __init__(self, items: Sequence[Any], at: int) -> None:
        self._items, self._at = items, at

    def get(self, name: str) -> Any:
        """One of its attributes."""
        at, count = self._at, len(self._items)
        known = {
            "index": at + 1, "index0": at, "first": at == 0, "last": at + 1 == count, "length": count,
            "revindex": count - at, "revindex0": count - at - 1,
            "previtem": self._items[at - 1] if at else Undefined("previtem"),
            "nextitem": self._items[at + 1] if at + 1 < count else Undefined("nextitem"),
        }  # fmt: skip
        if name not in known:
            raise TemplateError(f"chat template: loop.{name} is not known here; known are {', '.join(known)}")
        return known[name]


class Scope(dict[str, Any]):
    """Names of one block; what it lacks is looked up outside."""

    def __init__(self, outer: Scope | None, values: Mapping[str, Any] | None = None) -> None:
        super().__init__(values or {})
        self.outer = outer

    def find(self, name: str) -> Any:
        """The value of a name."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope:
                return scope[name]
            scope = scope.outer
        return Undefined(name)


class _Break(Exception):  # noqa: N818  (a signal, not an error)
    pass


class _Continue(Exception):  # noqa: N818
    pass


@dataclass
class Macro:
    """`{% macro %}`: called with values, gives text. Its free names are those of the place where it stands."""

    name: str
    parameters: list[str]
    defaults: list[Expression]  # of the last parameters
    body: Statement
    scope: Scope

    def __call__(self, *given: Any, **named: Any) -> str:
        if len(given) > len(self.parameters) or set(named) - set(self.parameters[len(given) :]):
            raise TemplateError(f"chat template: macro {self.name} takes {', '.join(self.parameters) or 'nothing'}")
        inner = Scope(self.scope, {**dict(zip(self.parameters, given, strict=False)), **named})
        first_default = len(self.parameters) - len(self.defaults)
        for i, parameter in enumerate(self.parameters):
            if parameter not in inner:
                inner[parameter] = self.defaults[i - first_default](inner) if i >= first_default else Undefined(parameter)
        out: list[str] = []
        self.body(inner, out)
        return "".join(out)


def _attribute(value: Any, name: str) -> Any:
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
        raise TemplateError(f"chat template: .{name} of a {type(value).__name__} is not known here")
    return value[name] if isinstance(value, dict) and name in value else Undefined(name)


def _item(value: Any, key: Any) -> Any:
    """value[key]; an attribute where there is no such item."""
    if isinstance(value, Undefined):
        raise TemplateError(f"chat template: {value.name} is undefined and has no item {key!r}")
    if isinstance(value, (Namespace, Loop)):
        return _attribute(value, key) if isinstance(key, str) else Undefined(str(key))
    try:
        return value[key]
    except (TypeError, LookupError):
        return _attribute(value, key) if isinstance(key, str) else Undefined(str(key))


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


_TESTS: dict[str, Callable[..., bool]] = {
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
    "eq": operator.eq, "equalto": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "odd": lambda v: v % 2 == 1,
    "even": lambda v: v % 2 == 0,
    "divisibleby": lambda v, n: v % n == 0,
}  # fmt: skip


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _default(value: Any, default_value: Any = "", boolean: bool = False) -> Any:
    return default_value if isinstance(value, Undefined) or (boolean and not value) else value


def _first(values: Any) -> Any:
    return next(iter(values), Undefined("first"))


def _last(values: Any) -> Any:
    return next(iter(reversed(values)), Undefined("last"))


def _items(value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, (Mapping, Undefined)):
        raise TypeError("Can only get item pairs from a mapping.")
    return [] if isinstance(value, Undefined) else list(value.items())


def _by_attribute(keep: bool) -> Callable[..., list[Any]]:
    def select(values: Any, name: str, test: str = "", *arguments: Any) -> list[Any]:
        return [v for v in values if bool(_TESTS[test](_path(v, name), *arguments) if test else _path(v, name)) is keep]

    return select


def _path(value: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        value = _item(value, int(part) if part.isdigit() else part)
    return value


def _map(values: Any, *, attribute: str) -> list[Any]:
    return [_path(v, attribute) for v in values]


_FILTERS: dict[str, Callable[..., Any]] = {
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


# ------------------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Token:
    """`kind` is name, string, number, operator, data, or begin/end of a tag; `value` its text or value."""

    kind: str
    value: Any
    line: int


_OPEN = re.compile(r"(.*?)(\{%|\{\{|\{#)([-+]?)", re.S)
_COMMENT_END = re.compile(r".*?(?:\+#\}|-#\}\s*|#\}\n?)", re.S)
_TAG_END = {"{%": re.compile(r"\+%\}|-%\}\s*|%\}\n?"), "{{": re.compile(r"-\}\}\s*|\}\}")}
_WORD = re.compile(
    r"(?P<space>\s+)|(?P<float>(?<!\.)\d+(?:\.\d+)?[eE][-+]?\d+|(?<!\.)\d+\.\d+)|(?P<integer>[1-9]\d*|0+)(?!\w)|(?P<name>[^\W\d]\w*)"
    r"|(?P<string>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
    r"|(?P<operator>//|\*\*|==|!=|>=|<=|[-+*/%~\[\](){}<>=.:|,;])",
    re.S,
)
_CLOSES = {"(": ")", "[": "]", "{": "}"}


def _tokens(source: str) -> Iterator[Token]:
    source = re.sub(r"\r\n|\r|\n", "\n", source)
    source = source.removesuffix("\n")
    at = 0
    while found := _OPEN.match(source, at):
        text, opening, sign = found.groups()
        if sign == "-":
            text = text.rstrip()
        elif sign != "+" and opening != "{{":  # lstrip_blocks: white space alone before a block goes, back to the line's start
            start = text.rfind("\n") + 1
            if (start > 0 or at == 0 or source[at - 1] == "\n") and not text[start:].strip():
                text = text[:start]
        line = source.count("\n", 0, found.end()) + 1
        if text:
            yield Token("data", text, line)
        at = found.end()
        if opening == "{#":
            end = _COMMENT_END.match(source, at)
            if end is None:
                raise _syntax(line, "a comment is not closed")
            at = end.end()
            continue
        yield Token("begin", opening, line)
        at, inner = _tag(source, at, _TAG_END[opening], line)
        yield from inner
        yield Token("end", opening, line)
    if at < len(source):
        yield Token("data", source[at:], source.count("\n") + 1)


def _tag(source: str, at: int, closing: re.Pattern[str], line: int) -> tuple[int, list[Token]]:
    """The tokens of one tag, and where it ends."""
    tokens: list[Token] = []
    open_brackets: list[str] = []
    while True:
        if not open_brackets and (end := closing.match(source, at)):
            return end.end(), tokens
        found = _WORD.match(source, at)
        if found is None:
            raise _syntax(line, f"{source[at : at + 20]!r} cannot be read" if at < len(source) else "a tag is not closed")
        kind, text = str(found.lastgroup), found[0]
        if kind == "operator" and text in _CLOSES:
            open_brackets.append(_CLOSES[text])
        elif kind == "operator" and text in _CLOSES.values() and (not open_brackets or open_brackets.pop() != text):
            raise _syntax(line, f"{text!r} closes nothing")
        value: Any = text
        if kind == "string":
            try:
                value = text[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
            except UnicodeDecodeError as e:
                raise _syntax(line, f"{text[:20]} has an escape that is none") from e
        elif kind in ("integer", "float"):
            kind, value = "number", int(text) if kind == "integer" else float(text)
        if kind != "space":
            tokens.append(Token(kind, value, line))
        at = found.end()


def _syntax(line: int, what: str) -> TemplateError:
    return TemplateError(f"chat template, line {line}: {what}")


# ------------------------------------------------------------------------------------------------------------- parser

_CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "none": None, "None": None}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "in": lambda a, b: a in b, "not in": lambda a, b: a not in b,
}  # fmt: skip
_ADD = {"+": operator.add, "-": operator.sub}
_MULTIPLY = {"*": operator.mul, "/": operator.truediv, "//": operator.floordiv, "%": operator.mod}


class Template:
    """A parsed chat template."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._stream = list(_tokens(source))
        self._at = 0
        try:
            self._body = self._statements(())
        except RecursionError as e:
            raise TemplateError("chat template: it is nested too deeply") from e
        if self._at < len(self._stream):
            raise self._unknown("a block that closes nothing")

    def render(self, *, now: datetime | None = None, **values: Any) -> str:
        """The text for these values (messages, tools, add_generation_prompt, bos_token …); `now` is what strftime_now tells, by default
        the time of the call.

        Raises:
            TemplateError: the template refuses them, or fails.
        """
        known = {
            "namespace": Namespace, "range": _range, "dict": dict, "raise_exception": _raise_exception,
            "strftime_now": (now or datetime.now()).strftime,  # noqa: DTZ005  (local time, as transformers has it)
        }  # fmt: skip
        out: list[str] = []
        try:
            self._body(Scope(Scope(None, known), values), out)
        except PromptError:
            raise
        except (_Break, _Continue) as e:
            raise TemplateError("chat template: break or continue outside of a loop") from e
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError) as e:
            raise TemplateError(f"chat template: it fails on this conversation ({e or type(e).__name__})") from e
        return "".join(out)

    # -- tokens

    @property
    def _token(self) -> Token:
        return self._stream[self._at] if self._at < len(self._stream) else Token("eof", "", self._stream[-1].line if self._stream else 1)

    def _is(self, *values: str) -> bool:
        return self._token.kind in ("name", "operator") and self._token.value in values

    def _skip(self, value: str) -> bool:
        found = self._is(value)
        self._at += found
        return found

    def _expect(self, value: str = "", kind: str = "") -> Any:
        token = self._token
        if (value and not self._is(value)) or (kind and token.kind != kind):
            raise _syntax(token.line, f"{value or kind} is expected where {token.value!r} stands")
        self._at += 1
        return token.value

    def _unknown(self, what: str) -> TemplateError:
        return _syntax(self._token.line, f"{what} is not known here ({self._token.value!r})")

    # -- statements

    def _statements(self, until: tuple[str, ...]) -> Statement:
        """Up to one of the tags named, which is left to be read."""
        steps: list[Statement] = []
        while self._at < len(self._stream):
            token = self._token
            if token.kind == "data":
                self._at += 1
                steps.append(_text(token.value))
            elif token.value == "{{":
                self._at += 1
                steps.append(_output(self._tuple()))
                self._expect(kind="end")
            else:
                word = self._stream[self._at + 1].value
                if word in until:
                    break
                self._at += 1
                steps.append(self._statement())
        if until and self._at >= len(self._stream):
            raise _syntax(self._token.line, f"{' or '.join(until)} is missing")

        def run(scope: Scope, out: list[str]) -> None:
            for step in steps:
                step(scope, out)

        return run

    def _statement(self) -> Statement:
        word = self._expect(kind="name")
        parse = {
            "for": self._for, "if": self._if, "set": self._set, "macro": self._macro, "generation": self._generation,
            "break": lambda: _signal(_Break), "continue": lambda: _signal(_Continue),
        }.get(word)  # fmt: skip
        if parse is None:
            self._at -= 1
            raise self._unknown(f"the tag {word}")
        step = parse()
        self._expect(kind="end")
        return step

    def _body_until(self, *until: str) -> Statement:
        self._expect(kind="end")
        body = self._statements(until)
        self._at += 1  # the tag's begin; its word is the caller's
        return body

    def _for(self) -> Statement:
        names = self._targets()
        self._expect("in")
        values = self._tuple(conditional=False)
        condition = self._or() if self._skip("if") else None
        if self._is("recursive"):
            raise self._unknown("a recursive loop")
        body = self._body_until("endfor", "else")
        otherwise = self._body_until("endfor") if self._skip("else") else None
        self._expect("endfor")

        def run(scope: Scope, out: list[str]) -> None:
            found = []
            for value in values(scope):
                inner = Scope(scope, _unpacked(names, value))
                if condition is None or condition(inner):
                    found.append(value)
            for i, value in enumerate(found):
                try:
                    body(Scope(scope, {**_unpacked(names, value), "loop": Loop(found, i)}), out)
                except _Continue:
                    continue
                except _Break:
                    break
            if not found and otherwise:
                otherwise(Scope(scope), out)

        return run

    def _if(self) -> Statement:
        branches = [(self._tuple(conditional=False), self._body_until("elif", "else", "endif"))]
        while self._skip("elif"):
            branches.append((self._tuple(conditional=False), self._body_until("elif", "else", "endif")))
        otherwise = self._body_until("endif") if self._skip("else") else None
        self._expect("endif")

        def run(scope: Scope, out: list[str]) -> None:
            for condition, body in branches:
                if condition(scope):
                    return body(scope, out)
            return otherwise(scope, out) if otherwise else None

        return run

    def _set(self) -> Statement:
        name = self._expect(kind="name")
        attribute = self._expect(kind="name") if self._skip(".") else ""
        names = [name]
        while not attribute and self._skip(","):
            names.append(self._expect(kind="name"))
        if self._token.kind == "end" and len(names) == 1 and not attribute:  # {% set x %}…{% endset %}
            body = self._body_until("endset")
            self._expect("endset")

            def capture(scope: Scope, _: list[str]) -> None:
                text: list[str] = []
                body(Scope(scope), text)
                scope[name] = "".join(text)

            return capture
        self._expect("=")
        value = self._tuple()

        def run(scope: Scope, _: list[str]) -> None:
            if not attribute:
                scope.update(_unpacked(names, value(scope)))
                return
            target = scope.find(name)
            if not isinstance(target, Namespace):
                raise TemplateError(f"chat template: {name}.{attribute} cannot be set, {name} is no namespace")
            target.values[attribute] = value(scope)

        return run

    def _macro(self) -> Statement:
        name = self._expect(kind="name")
        parameters: list[str] = []
        defaults: list[Expression] = []
        self._expect("(")
        while not self._skip(")"):
            if parameters:
                self._expect(",")
            parameters.append(self._expect(kind="name"))
            if self._skip("="):
                defaults.append(self._expression())
            elif defaults:
                raise self._unknown("a parameter without a default after one with")
        body = self._body_until("endmacro")
        self._expect("endmacro")

        def run(scope: Scope, _: list[str]) -> None:
            scope[name] = Macro(name, parameters, defaults, body, scope)

        return run

    def _generation(self) -> Statement:
        """The assistant's own text, marked for training: a block with names of its own, as transformers has it."""
        body = self._body_until("endgeneration")
        self._expect("endgeneration")
        return lambda scope, out: body(Scope(scope), out)

    def _targets(self) -> list[str]:
        bracket = self._skip("(")
        names = [self._expect(kind="name")]
        while self._skip(","):
            names.append(self._expect(kind="name"))
        if bracket:
            self._expect(")")
        return names

    # -- expressions, loosest first

    def _tuple(self, *, conditional: bool = True) -> Expression:
        parse = self._expression if conditional else self._or
        parts = [parse()]
        if not self._is(","):
            return parts[0]
        while self._skip(","):
            if self._token.kind == "end" or self._is(")", "="):
                break
            parts.append(parse())
        return lambda scope: tuple(part(scope) for part in parts)

    def _expression(self) -> Expression:
        value = self._or()
        while self._skip("if"):
            value = self._choice(value, self._or())
        return value

    def _choice(self, value: Expression, condition: Expression) -> Expression:
        otherwise = self._expression() if self._skip("else") else None

        def choose(scope: Scope) -> Any:
            if condition(scope):
                return value(scope)
            return otherwise(scope) if otherwise else Undefined("an if without else")

        return choose

    def _or(self) -> Expression:
        left = self._and()
        while self._skip("or"):
            left = (lambda a, b: lambda scope: a(scope) or b(scope))(left, self._and())
        return left

    def _and(self) -> Expression:
        left = self._not()
        while self._skip("and"):
            left = (lambda a, b: lambda scope: a(scope) and b(scope))(left, self._not())
        return left

    def _not(self) -> Expression:
        if self._skip("not"):
            inner = self._not()
            return lambda scope: not inner(scope)
        return self._comparison()

    def _comparison(self) -> Expression:
        first = self._sum()
        rest: list[tuple[Callable[[Any, Any], Any], Expression]] = []
        while True:
            token = self._token
            if self._is("not") and self._stream[self._at + 1].value == "in":
                self._at += 2
                rest.append((_COMPARE["not in"], self._sum()))
            elif self._is(*_COMPARE):
                self._at += 1
                rest.append((_COMPARE[token.value], self._sum()))
            else:
                break
        if not rest:
            return first

        def compare(scope: Scope) -> Any:
            left = first(scope)
            result: Any = True
            for test, expression in rest:
                right = expression(scope)
                result = test(left, right)
                if not result:
                    break
                left = right
            return result

        return compare

    def _chain(self, operators: Mapping[str, Callable[[Any, Any], Any]], operand: Callable[[], Expression]) -> Expression:
        left = operand()
        while self._is(*operators):
            apply = operators[self._expect()]
            left = (lambda f, a, b: lambda scope: f(a(scope), b(scope)))(apply, left, operand())
        return left

    def _sum(self) -> Expression:
        return self._chain(_ADD, self._joined)

    def _joined(self) -> Expression:
        return self._chain({"~": lambda a, b: f"{a}{b}"}, self._product)

    def _product(self) -> Expression:
        return self._chain(_MULTIPLY, lambda: self._chain({"**": operator.pow}, self._unary))

    def _unary(self, *, filtered: bool = True) -> Expression:
        if self._is("-", "+"):
            apply = operator.neg if self._expect() == "-" else operator.pos
            inner = self._unary(filtered=False)
            value: Expression = lambda scope: apply(inner(scope))  # noqa: E731
        else:
            value = self._primary()
        value = self._postfix(value)
        return self._filtered(value) if filtered else value

    def _primary(self) -> Expression:
        token = self._token
        self._at += 1
        if token.kind == "name":
            name = token.value
            if name in _CONSTANTS:
                return _constant(_CONSTANTS[name])
            return lambda scope: scope.find(name)
        if token.kind == "number":
            return _constant(token.value)
        if token.kind == "string":
            text = token.value
            while self._token.kind == "string":
                text += self._expect()
            return _constant(text)
        if token.kind == "operator" and token.value == "(":
            if self._skip(")"):
                return _constant(())
            value = self._tuple()
            self._expect(")")
            return value
        if token.kind == "operator" and token.value == "[":
            values = self._listed("]", self._expression)
            return lambda scope: [value(scope) for value in values]
        if token.kind == "operator" and token.value == "{":
            pairs = self._listed("}", self._pair)
            return lambda scope: {key(scope): value(scope) for key, value in pairs}
        self._at -= 1
        raise self._unknown("an expression like this")

    def _listed(self, closing: str, parse: Callable[[], Any]) -> list[Any]:
        found: list[Any] = []
        while not self._skip(closing):
            if found:
                self._expect(",")
                if self._skip(closing):
                    break
            found.append(parse())
        return found

    def _pair(self) -> tuple[Expression, Expression]:
        key = self._expression()
        self._expect(":")
        return key, self._expression()

    def _postfix(self, value: Expression) -> Expression:
        while True:
            if self._skip("."):
                if self._token.kind == "number":
                    value = _getitem(value, _constant(self._expect()))
                else:
                    value = _getattr(value, self._expect(kind="name"))
            elif self._skip("["):
                value = _getitem(value, self._subscript())
            elif self._is("("):
                value = self._call(value)
            else:
                return value

    def _subscript(self) -> Expression:
        parts: list[Expression] = [_constant(None)]
        sliced = False
        while not self._skip("]"):
            if self._skip(":"):
                sliced = True
                parts.append(_constant(None))
            else:
                parts[-1] = self._expression()
                if not self._is(":", "]"):
                    raise self._unknown("a subscript like this")
        if not sliced:
            return parts[0]
        return lambda scope: slice(*(part(scope) for part in parts))

    def _arguments(self) -> tuple[list[Expression], dict[str, Expression]]:
        given: list[Expression] = []
        named: dict[str, Expression] = {}
        self._expect("(")
        while not self._skip(")"):
            if given or named:
                self._expect(",")
                if self._skip(")"):
                    break
            following = self._stream[self._at + 1] if self._at + 1 < len(self._stream) else self._token
            if self._token.kind == "name" and following.kind == "operator" and following.value == "=":
                name = self._expect()
                self._at += 1
                named[name] = self._expression()
            elif named or self._is("*", "**"):
                raise self._unknown("an argument like this")
            else:
                given.append(self._expression())
        return given, named

    def _call(self, value: Expression) -> Expression:
        given, named = self._arguments()

        def call(scope: Scope) -> Any:
            function = value(scope)
            if isinstance(function, Undefined):
                raise TemplateError(f"chat template: {function.name} is not known here; it is called")
            return function(*(g(scope) for g in given), **{name: n(scope) for name, n in named.items()})

        return call

    def _filtered(self, value: Expression) -> Expression:
        while True:
            if self._skip("|"):
                name = self._expect(kind="name")
                if name not in _FILTERS:
                    raise _syntax(self._token.line, f"the filter {name} is not known here; known are {', '.join(_FILTERS)}")
                given, named = self._arguments() if self._is("(") else ([], {})
                value = _applied(_FILTERS[name], value, given, named)
            elif self._skip("is"):
                value = self._test(value)
            elif self._is("("):
                value = self._call(value)
            else:
                return value

    def _test(self, value: Expression) -> Expression:
        negated = self._skip("not")
        name = self._expect(kind="name")
        if name not in _TESTS:
            raise _syntax(self._token.line, f"the test {name} is not known here; known are {', '.join(_TESTS)}")
        given: list[Expression] = []
        named: dict[str, Expression] = {}
        if self._is("("):
            given, named = self._arguments()
        elif self._token.kind in ("name", "string", "number") and not self._is("else", "or", "and", "is", "if", "not", "in"):
            given = [self._postfix(self._primary())]
        elif self._is("[", "{"):
            given = [self._postfix(self._primary())]
        found = _applied(_TESTS[name], value, given, named)
        return (lambda scope: not found(scope)) if negated else found


def _text(value: str) -> Statement:
    return lambda _, out: out.append(value)


def _output(value: Expression) -> Statement:
    return lambda scope, out: out.append(str(value(scope)))


def _signal(error: type[Exception]) -> Statement:
    def run(_: Scope, __: list[str]) -> None:
        raise error

    return run


def _constant(value: Any) -> Expression:
    return lambda _: value


def _getattr(value: Expression, name: str) -> Expression:
    return lambda scope: _attribute(value(scope), name)


def _getitem(value: Expression, key: Expression) -> Expression:
    return lambda scope: _item(value(scope), key(scope))


def _applied(function: Callable[..., Any], value: Expression, given: list[Expression], named: dict[str, Expression]) -> Expression:
    return lambda scope: function(value(scope), *(g(scope) for g in given), **{name: n(scope) for name, n in named.items()})


def _unpacked(names: Sequence[str], value: Any) -> dict[str, Any]:
    if len(names) == 1:
        return {names[0]: value}
    values = list(value)
    if len(values) != len(names):
        raise TemplateError(f"chat template: {len(values)} values for {', '.join(names)}")
    return dict(zip(names, values, strict=True))
