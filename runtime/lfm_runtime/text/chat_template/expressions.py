"""Tokens → expressions, each a function of the names that are visible where it stands."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from lfm_runtime.text.chat_template.tokens import Token, syntax, tokenize
from lfm_runtime.text.chat_template.values import FILTERS, TESTS, Scope, TemplateError, Undefined, attribute, item

Expression = Callable[[Scope], Any]

_CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "none": None, "None": None}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda a, b: a in b,
    "not in": lambda a, b: a not in b,
}
_ADD = {"+": operator.add, "-": operator.sub}
_MULTIPLY = {"*": operator.mul, "/": operator.truediv, "//": operator.floordiv, "%": operator.mod}


class Parser:
    """Reads a template's tokens; one method for each level of precedence."""

    def __init__(self, source: str) -> None:
        self._stream = list(tokenize(source))
        self._at = 0
        self._depth = 0  # of loops, macros and other blocks with names of their own
        self._read_inside: set[str] = set()

    @property
    def _token(self) -> Token:
        return (
            self._stream[self._at]
            if self._at < len(self._stream)
            else Token("eof", "", self._stream[-1].line if self._stream else 1)
        )

    def _is(self, *values: str) -> bool:
        return self._token.kind in ("name", "operator") and self._token.value in values

    def _skip(self, value: str) -> bool:
        found = self._is(value)
        self._at += found
        return found

    def _expect(self, value: str = "", kind: str = "") -> Any:
        token = self._token
        if (value and not self._is(value)) or (kind and token.kind != kind):
            raise syntax(token.line, f"{value or kind} is expected where {token.value!r} stands")
        self._at += 1
        return token.value

    def _new_name(self) -> str:
        """Read a name that the template sets; raises TemplateError for anything else."""
        name: str = self._expect(kind="name")
        if name in _CONSTANTS:
            raise syntax(self._token.line, f"{name} cannot be set")
        return name

    def _unknown(self, what: str) -> TemplateError:
        return syntax(self._token.line, f"{what} is not supported ({self._token.value!r})")

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
            left = _either(left, self._and())
        return left

    def _and(self) -> Expression:
        left = self._not()
        while self._skip("and"):
            left = _both(left, self._not())
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

    def _chain(
        self, operators: Mapping[str, Callable[[Any, Any], Any]], operand: Callable[[], Expression]
    ) -> Expression:
        left = operand()
        while self._is(*operators):
            left = _applied(operators[self._expect()], left, [operand()], {})
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
            if name in ("varargs", "kwargs", "caller"):
                raise syntax(token.line, f"{name} is not supported")
            if self._depth:
                self._read_inside.add(name)
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
                raise TemplateError(f"chat template: {function.name} is not supported; it is called")
            return function(*(g(scope) for g in given), **{name: n(scope) for name, n in named.items()})

        return call

    def _filtered(self, value: Expression) -> Expression:
        while True:
            if self._skip("|"):
                name = self._expect(kind="name")
                if name not in FILTERS:
                    raise syntax(
                        self._token.line, f"the filter {name} is not supported; supported are {', '.join(FILTERS)}"
                    )
                given, named = self._arguments() if self._is("(") else ([], {})
                value = _applied(FILTERS[name], value, given, named)
            elif self._skip("is"):
                value = self._test(value)
            elif self._is("("):
                value = self._call(value)
            else:
                return value

    def _test(self, value: Expression) -> Expression:
        negated = self._skip("not")
        name = self._expect(kind="name")
        if name not in TESTS:
            raise syntax(self._token.line, f"the test {name} is not supported; supported are {', '.join(TESTS)}")
        given: list[Expression] = []
        named: dict[str, Expression] = {}
        plain = self._token.kind in ("name", "string", "number") and not self._is(
            "else", "or", "and", "is", "if", "not", "in"
        )
        if self._is("("):
            given, named = self._arguments()
        elif plain or self._is("[", "{"):
            given = [self._postfix(self._primary())]
        found = _applied(TESTS[name], value, given, named)
        return (lambda scope: not found(scope)) if negated else found


def _either(left: Expression, right: Expression) -> Expression:
    return lambda scope: left(scope) or right(scope)


def _both(left: Expression, right: Expression) -> Expression:
    return lambda scope: left(scope) and right(scope)


def _constant(value: Any) -> Expression:
    return lambda _: value


def _getattr(value: Expression, name: str) -> Expression:
    return lambda scope: attribute(value(scope), name)


def _getitem(value: Expression, key: Expression) -> Expression:
    return lambda scope: item(value(scope), key(scope))


def _applied(
    function: Callable[..., Any], value: Expression, given: list[Expression], named: dict[str, Expression]
) -> Expression:
    return lambda scope: function(
        value(scope), *(g(scope) for g in given), **{name: n(scope) for name, n in named.items()}
    )
