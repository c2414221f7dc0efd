"""Parses a chat template into statements and runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from lfm_runtime.errors import PromptError
from lfm_runtime.text.chat_template.expressions import Expression, Parser
from lfm_runtime.text.chat_template.tokens import syntax
from lfm_runtime.text.chat_template.values import (
    Break,
    Continue,
    Loop,
    Macro,
    Namespace,
    Scope,
    TemplateError,
    known_names,
)

Statement = Callable[[Scope, list[str]], None]


class Template(Parser):
    """A parsed chat template; raises TemplateError for what is not known here."""

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self._set_late: set[str] = (
            set()
        )  # at the top, after a loop or macro has read them: what Jinja then reads depends on its compiler
        self._namespaces_set = 0
        try:
            self._body = self._statements(())
        except RecursionError as e:
            raise TemplateError("chat template: it is nested too deeply") from e
        if self._at < len(self._stream):
            raise self._unknown("a block that closes nothing")

    def render(self, *, now: datetime | None = None, **values: Any) -> str:
        """The text for these values (messages, tools, add_generation_prompt, bos_token …); `now` is what strftime_now
        tells, by default the time of the call.

        Raises:
            TemplateError: the template refuses them, or fails.
        """
        if late := sorted(self._set_late & values.keys()):
            raise TemplateError(
                f"chat template: {late[0]} is set after a loop or macro has read it, which is not supported"
            )
        out: list[str] = []
        try:
            names = known_names(now or datetime.now())  # noqa: DTZ005  (local time, as transformers has it)
            self._body(Scope(Scope(None, names), values), out)
        except PromptError:
            raise
        except (Break, Continue) as e:
            raise TemplateError("chat template: break or continue outside of a loop") from e
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError) as e:
            raise TemplateError(f"chat template: it fails on this conversation ({e or type(e).__name__})") from e
        return "".join(out)

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
            raise syntax(self._token.line, f"{' or '.join(until)} is missing")

        def run(scope: Scope, out: list[str]) -> None:
            for step in steps:
                step(scope, out)

        return run

    def _statement(self) -> Statement:
        word = self._expect(kind="name")
        parse = {
            "for": self._for,
            "if": self._if,
            "set": self._set,
            "macro": self._macro,
            "generation": self._generation,
            "break": self._break,
            "continue": self._continue,
        }.get(word)
        if parse is None:
            self._at -= 1
            raise self._unknown(f"the tag {word}")
        step: Statement = parse()
        self._expect(kind="end")
        return step

    def _body_until(self, *until: str, inner: bool = False) -> Statement:
        """Parse a block up to one of these tags; `inner`: it has names of its own."""
        self._expect(kind="end")
        self._depth += inner
        body = self._statements(until)
        self._depth -= inner
        self._at += 1  # the tag's begin; its word is the caller's
        return body

    def _for(self) -> Statement:
        names = self._targets()
        self._expect("in")
        values = self._tuple(conditional=False)
        condition = self._or() if self._skip("if") else None
        if self._is("recursive"):
            raise self._unknown("a recursive loop")
        before = self._namespaces_set
        body = self._body_until("endfor", "else", inner=True)
        if condition and self._namespaces_set > before:  # the condition may read it between two items
            raise self._unknown("a loop with a condition that sets a namespace")
        otherwise = self._body_until("endfor", inner=True) if self._skip("else") else None
        self._expect("endfor")

        def run(scope: Scope, out: list[str]) -> None:
            found = []
            for value in values(scope):
                inner = Scope(scope, _unpacked(names, value))
                if condition is None or condition(inner):
                    found.append(value)
            finished = False
            for i, value in enumerate(found):
                how = _run_once(body, Scope(scope, {**_unpacked(names, value), "loop": Loop(found, i)}), out)
                finished = finished or how is None
                if how is Break:
                    break
            if not finished and otherwise:  # as Jinja has it: also where every body was cut short
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
        name = self._new_name()
        attribute = self._expect(kind="name") if self._skip(".") else ""
        names = [name]
        while not attribute and self._skip(","):
            names.append(self._new_name())
        if self._token.kind == "end" and len(names) == 1 and not attribute:  # {% set x %}…{% endset %}
            body = self._body_until("endset", inner=True)
            self._expect("endset")

            def capture(scope: Scope, _: list[str]) -> None:
                text: list[str] = []
                body(Scope(scope), text)
                scope[name] = "".join(text)

            return capture
        self._expect("=")
        value = self._tuple()
        self._namespaces_set += bool(attribute)
        if not attribute and not self._depth:
            self._set_late.update(self._read_inside.intersection(names))

        def run(scope: Scope, _: list[str]) -> None:
            if not attribute:
                scope.update(_unpacked(names, value(scope)))
                return
            target = scope.find(name)
            if not isinstance(target, Namespace):
                raise TemplateError(f"chat template: {name}.{attribute} cannot be set, {name} is not a namespace")
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
            parameters.append(self._new_name())
            if self._skip("="):
                defaults.append(self._expression())
            elif defaults:
                raise self._unknown("a parameter without a default after one with")
        body = self._body_until("endmacro", inner=True)
        self._expect("endmacro")

        def run(scope: Scope, _: list[str]) -> None:
            scope[name] = Macro(name, parameters, defaults, body, scope)

        return run

    def _generation(self) -> Statement:
        """The assistant's own text, marked for training: a block with names of its own, as transformers has it."""
        body = self._body_until("endgeneration", inner=True)
        self._expect("endgeneration")
        return lambda scope, out: body(Scope(scope), out)

    def _break(self) -> Statement:
        return _signal(Break)

    def _continue(self) -> Statement:
        return _signal(Continue)

    def _targets(self) -> list[str]:
        bracket = self._skip("(")
        names = [self._new_name()]
        while self._skip(","):
            names.append(self._new_name())
        if bracket:
            self._expect(")")
        return names


def _text(value: str) -> Statement:
    return lambda _, out: out.append(value)


def _output(value: Expression) -> Statement:
    return lambda scope, out: out.append(str(value(scope)))


def _run_once(body: Statement, scope: Scope, out: list[str]) -> type[Exception] | None:
    """Run a loop's body once; how it was cut short, if it was."""
    try:
        body(scope, out)
    except (Break, Continue) as e:
        return type(e)
    return None


def _signal(error: type[Exception]) -> Statement:
    def run(_: Scope, __: list[str]) -> None:
        raise error

    return run


def _unpacked(names: Sequence[str], value: Any) -> dict[str, Any]:
    if len(names) == 1:
        return {names[0]: value}
    values = list(value)
    if len(values) != len(names):
        raise TemplateError(f"chat template: {len(values)} values for {', '.join(names)}")
    return dict(zip(names, values, strict=True))
