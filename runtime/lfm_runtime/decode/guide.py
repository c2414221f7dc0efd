"""Answers that follow a grammar: before each token, which tokens may come (llguidance, the extra `json`).

Order of a token: repetition penalty, then this mask, then the filters; so that a filter never keeps only what may not
come. Where only one continuation is possible its tokens are known without the decoder, and are fed in one step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm_runtime.errors import SettingError
from lfm_runtime.installation import install_advice
from lfm_runtime.text.tokenizer import Tokenizer
from lfm_runtime.text.tool_calls import CALL_END, CALL_START, function_of, is_name

_SPELLING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As models write JSON; free white space is where small models run on without end."""
NOT_ENFORCED = ("patternProperties", "minProperties", "maxProperties")
"""What llguidance takes and does not keep: #265, and found by tests."""

_MORE_PROPERTIES = {"additionalProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref"}


class Grammars:
    """Grammars for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
        """`eos`: tokens that end an answer.

        Raises:
            SettingError: llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError as e:
            raise SettingError(f"answers in a schema need llguidance: {install_advice('json')}") from e
        self._library = llguidance
        self._tokenizer = tokenizer
        size = len(tokenizer.vocabulary.tokens)
        several = hasattr(llguidance.LLTokenizer, "eos_tokens")  # 1.6, the newest for glibc 2.28, takes one
        self._compiled = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(tokenizer, eos)),
            n_vocab=size,
            eos_token=list(eos) if several else eos[0],
        )

    def of_schema(self, schema: str) -> Guide:
        """For answers that are JSON of this schema, itself JSON.

        Raises:
            SettingError: it is no JSON schema, or asks for what cannot be enforced.
        """
        try:
            raw = json.loads(schema)
        except (ValueError, RecursionError) as e:
            raise SettingError(f"the schema is not JSON ({str(e)[:200]})") from e
        if raw is True:
            raw = {}
        if not isinstance(raw, dict):
            raise SettingError("the schema is not a JSON object")
        if found := _not_enforced(raw):
            raise SettingError(f"the schema cannot be enforced: {found}; leave it out")
        try:
            text = json.dumps(_closed(raw), allow_nan=False)
            found = self._library.LLMatcher.grammar_from_json_schema(text, overrides=_SPELLING)
        except (ValueError, RecursionError) as e:  # a number or a character that JSON has not, or too deep
            raise SettingError(f"the schema cannot be enforced: {str(e)[:200]}") from e
        return self._guide(found, "the schema")

    def of_calls(self, tools: Sequence[Mapping[str, Any]], name: str = "") -> Guide:
        """For answers that are one call of a tool, of this one where it has a name.

        Raises:
            SettingError: there is no such tool, or its parameters cannot be enforced; the model knows no calls.
        """
        functions = [function_of(tool) for tool in tools]
        functions = [f for f in functions if not name or f.get("name") == name]
        if not functions:
            raise SettingError(f"tool_choice asks for {name or 'a call'!r}, and there is no such tool")
        rules = [f'start: {CALL_START} "[" ({" | ".join(f"call{i}" for i in range(len(functions)))}) "]" {CALL_END}']
        try:
            for i, function in enumerate(functions):
                rules += _call_rules(f"call{i}", function)
        except (ValueError, RecursionError, AttributeError) as e:
            raise SettingError(f"the tools' parameters cannot be enforced: {str(e)[:200]}") from e
        if lacking := [token for token in (CALL_START, CALL_END) if token not in self._tokenizer.id_of]:
            raise SettingError(f"this model has no token {lacking[0]}, so that no call of a tool can be asked for")
        return self._guide(self._library.LLMatcher.grammar_from_lark("\n".join(rules)), "the tools' parameters")

    def _guide(self, grammar: str, what: str) -> Guide:
        try:
            failed, messages = self._library.LLMatcher.validate_grammar_with_warnings(grammar, self._compiled)
        except ValueError as e:  # a character that is none
            raise SettingError(f"{what} cannot be enforced: {str(e)[:200]}") from e
        if failed or messages:
            raise SettingError(f"{what} cannot be enforced: {messages[0][:300]}")
        matcher = self._library.LLMatcher(self._compiled, grammar, log_level=0)
        guide = Guide(matcher, len(self._tokenizer.vocabulary.tokens))
        if guide.finished or not guide.allowed().any():
            raise SettingError(f"{what} cannot be enforced: nothing that can be written fits it")
        return guide


class Guide:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros((vocabulary + 31) // 32, np.int32)
        self._vocabulary = vocabulary

    @property
    def finished(self) -> bool:
        """Whether nothing may come any more: the answer is complete."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next [vocabulary of the tokenizer].

        Raises:
            SettingError: the grammar has become too large to go on with.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8), count=self._vocabulary, bitorder="little")
        return bits.view(np.bool_)

    def accept(self, token: int) -> None:
        """Go on by a token that may come."""
        self._matcher.consume_token(token)
        self._check()

    def forced(self) -> list[int]:
        """The tokens that come next for sure, as far as they are known."""
        return list(self._matcher.compute_ff_tokens())

    def _check(self) -> None:
        if self._matcher.is_error():
            said = str(self._matcher.get_error()).partition("\n")[0]
            raise SettingError(f"the answer cannot go on within its schema: {said[:200]}; take a simpler schema")


class _Tokens:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(i) for i in range(len(tokenizer.vocabulary.tokens))]
        self.special_token_ids = sorted(tokenizer.special)
        self.eos_token_id, self.bos_token_id = eos[0], None

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode(), special=False)


def _not_enforced(schema: Any) -> str:
    """The first keyword of a schema that llguidance would take and not keep."""
    if isinstance(schema, Mapping):
        for name, inner in schema.items():
            if name in ("enum", "const", "default", "examples"):
                continue
            if name == "properties" and isinstance(inner, Mapping):
                found = next(filter(None, map(_not_enforced, inner.values())), "")
            else:
                found = name if name in NOT_ENFORCED else _not_enforced(inner)
            if found:
                return str(found)
    if isinstance(schema, list):
        return next(filter(None, map(_not_enforced, schema)), "")
    return ""


def _closed(schema: Any) -> Any:
    """The schema without properties that it does not name, where it does not say that there may be others: a small
    model would go on inventing them. As in llama.cpp; what is left is valid by the schema as it was.
    """
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for name, inner in schema.items():
        if name in ("properties", "$defs", "definitions") and isinstance(inner, Mapping):
            found[name] = {key: _closed(value) for key, value in inner.items()}
        elif name in ("enum", "const", "default", "examples", "allOf"):  # the parts of allOf are of one object
            found[name] = inner
        else:
            found[name] = _closed(inner)
    if "properties" in schema and not schema.keys() & _MORE_PROPERTIES:
        found["additionalProperties"] = False
    return found


def _call_rules(rule: str, function: Mapping[str, Any]) -> list[str]:
    """Lark rules for one function's call: the required arguments, then any of the others, each in its order. Where a
    name cannot stand in a call, the call is written as JSON.
    """
    parameters = function.get("parameters") or {}
    if found := _not_enforced(parameters):
        raise ValueError(found)
    properties, required = parameters.get("properties") or {}, parameters.get("required") or []
    if not all(map(is_name, (str(function.get("name")), *properties))):
        whole = {**_closed({"type": "object", "properties": {}, **parameters}), "x-guidance": _SPELLING}
        before = json.dumps({"name": function.get("name"), "arguments": None}).removesuffix("null}")
        return [
            f'{rule}: {json.dumps(before)} {rule}_all "}}"',
            f"{rule}_all: %json {json.dumps(whole, allow_nan=False)}",
        ]
    definitions = _closed({k: v for k, v in parameters.items() if k in ("$defs", "definitions")})
    rules: list[str] = []
    given: list[str] = []
    others: list[str] = []
    for n, (name, schema) in enumerate(properties.items()):
        inner = {**(_closed(schema) if isinstance(schema, Mapping) else {}), **definitions, "x-guidance": _SPELLING}
        rules.append(f"{rule}_{n}: {json.dumps(f'{name}=')} %json {json.dumps(inner, allow_nan=False)}")
        (given if name in required else others).append(f"{rule}_{n}")
    tail = " ".join(f'(", " {name})?' for name in others)
    if given:
        arguments = ' ", " '.join(given) + f" {tail}"
    else:
        firsts = [" ".join([name, *(f'(", " {later})?' for later in others[n + 1 :])]) for n, name in enumerate(others)]
        arguments = f"({' | '.join(f'({first})' for first in firsts)})?" if firsts else ""
    opening = json.dumps(f"{function.get('name')}(")
    return [f'{rule}: {opening} {arguments} ")"', *rules]
