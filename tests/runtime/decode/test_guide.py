"""Answers in a schema: what the demo model writes at temperature 1, judged by jsonschema, which is not llguidance."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

from lfm_runtime.batch import Batch, answer_all  # noqa: E402
from lfm_runtime.decode.guide import Grammars  # noqa: E402
from lfm_runtime.decode.sampling import GenerationSettings, Sampler, Top  # noqa: E402
from lfm_runtime.errors import SettingError  # noqa: E402

ANSWER = {
    "type": "object",
    "properties": {"label": {"enum": ["red", "a long label of many words"]}, "count": {"type": "integer", "maximum": 99}},
    "required": ["label", "count"],
    "additionalProperties": False,
}  # fmt: skip
FORMATS = ["date-time", "date", "time", "uuid", "email", "ipv4", "uri"]
PATTERNS = ["^[a-z]{2,5}$", "^\\d{3}-\\d{4}$", "^(red|green|blue)+$", "[A-F0-9]{4}", "^a?b*c$"]


def leaf(r: random.Random) -> Any:
    low = r.randint(-50, 50)
    kinds: list[Any] = [
        {"type": "string", "maxLength": r.randint(0, 12)},
        {"type": "string", "minLength": r.randint(1, 4), "maxLength": r.randint(4, 9)},
        {"type": "string", "pattern": r.choice(PATTERNS), "maxLength": 20},
        {"type": "string", "format": r.choice(FORMATS)},
        {"type": "integer", "minimum": low, "maximum": low + r.randint(0, 500)},
        {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + r.randint(3, 500)},
        {"type": "integer", "multipleOf": r.randint(2, 9), "minimum": 0, "maximum": 1000},
        {"type": "number", "minimum": 0, "maximum": r.choice([1, 1.5, 100])},
        {"type": "boolean"},
        {"type": "null"},
        {"const": r.choice(["x", 1, True, None, {"a": [1]}, 'quo"te'])},
        {"enum": r.sample(["red", "green", 1, 2.5, None, False, "ä b", ["l"]], 3)},
    ]
    return r.choice(kinds)


def schema(r: random.Random, depth: int = 2, *, refs: bool = False) -> Any:
    """A random schema of the kinds that pydantic, Frigate and people write."""
    kind = r.random() if depth else 1
    if kind < 0.4:
        names = r.sample(["label", "count", "note", "a b", "ü", "type", "items"], r.randint(0, 4))
        found: dict[str, Any] = {"type": "object", "properties": {n: schema(r, depth - 1, refs=refs) for n in names}}
        found["required"] = r.sample(names, r.randint(0, len(names)))
        if r.random() < 0.8:
            found["additionalProperties"] = False
        return found
    if kind < 0.55:
        low = r.randint(0, 2)
        bounds = {"minItems": low, "maxItems": low + r.randint(0, 2)}
        return {"type": "array", "items": schema(r, depth - 1, refs=refs), **bounds}
    if kind < 0.7:
        return {"anyOf": [schema(r, depth - 1, refs=refs) for _ in range(r.randint(1, 3))]}
    if refs and kind < 0.8:
        return {"$ref": f"#/$defs/{r.choice(['One', 'Two'])}"}
    return leaf(r)


def whole(r: random.Random) -> Any:
    found = schema(r, refs=True)
    return {**found, "$defs": {"One": schema(r, 1), "Two": leaf(r)}} if isinstance(found, dict) else found


def judge(text: str, of: Any) -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    # The year 0 and leap seconds are RFC 3339's, and not Python's.
    text = re.sub(r"(?<=\d\d:\d\d):60", ":59", re.sub(r'"0000-(?=\d\d-\d\d)', '"0001-', text))
    jsonschema.Draft202012Validator(of, format_checker=checker).validate(json.loads(text))


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 10))]
)  # fmt: skip
def test_answers_are_valid_or_cut(demo_model, part) -> None:
    """A thousand random schemas in all, at temperature 1. What is refused is refused before anything is generated."""
    said = {"schema": 0, "eos": 0, "length": 0, "refused": 0}
    for n in range(100 * part, 100 * part + 100):
        of = whole(random.Random(n))
        try:
            answer = demo_model.answer([], "Say it.", schema=of, temperature=1.0, seed=n, max_new_tokens=120)
        except SettingError as e:
            assert re.search("cannot be enforced", str(e)), (of, e)
            said["refused"] += 1
            continue
        text = answer.text()
        said[answer.report.finish_reason] += 1
        if answer.report.finish_reason != "length":
            judge(text, of)
    assert said["schema"] + said["eos"] > 60 and said["refused"] < 10, said


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_one_answer_and_a_batch_say_the_same(demo_model, photo, temperature) -> None:
    """Tokens that a grammar forces are fed in one step; the text is the one of single steps."""
    more = {"schema": ANSWER, "temperature": temperature, "max_new_tokens": 90, **({"seed": 3} if temperature else {})}
    alone = demo_model.answer(photo, "What is it?", **more)
    judge(alone.text(), ANSWER)
    assert alone.report.finish_reason == "schema"
    fast = demo_model.answer(photo, "What is it?", speculate=6, **more)
    assert fast.text() == alone.report.text
    for _, report in answer_all(demo_model, [(photo, "What is it?")] * 3, rows=3, **more):
        assert (report.text, report.new_tokens) == (alone.report.text, alone.report.new_tokens)


def test_forced_tokens_take_fewer_steps(demo_model, monkeypatch) -> None:
    """The long label is one step, whatever number of tokens it has."""
    only = {"const": "a label so long that no model would be asked for each of its many words"}
    steps = []
    step = Batch._decode
    monkeypatch.setattr(Batch, "_decode", lambda self: steps.append(1) or step(self))
    ((_, report),) = answer_all(demo_model, [([], "x")], schema=only, temperature=0)
    assert json.loads(report.text) == only["const"]
    assert report.new_tokens > 20 and len(steps) <= 5


def test_a_cut_answer_says_length(demo_model) -> None:
    for n in range(1, 12):
        answer = demo_model.answer([], "x", schema=ANSWER, temperature=0, max_new_tokens=n)
        answer.text()
        assert answer.report.finish_reason == "length" and answer.report.new_tokens == n


def test_the_last_token_may_close_it(demo_model) -> None:
    """An answer that is complete with the last token it may have is complete."""
    answer = demo_model.answer([], "x", schema=ANSWER, temperature=0)
    answer.text()
    exact = demo_model.answer([], "x", schema=ANSWER, temperature=0, max_new_tokens=answer.report.new_tokens)
    assert exact.text() == answer.report.text and exact.report.finish_reason == "schema"


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"type": "array", "uniqueItems": True, "items": {"type": "integer"}}, "uniqueItems"),
        ({"$ref": "https://example.com/x.json"}, "example.com"),
        ({"type": "object", "patternProperties": {"^a": {"type": "integer"}}}, "patternProperties"),
        ({"type": "object", "properties": {"a": {"type": "object", "minProperties": 2}}}, "minProperties"),
        ({"type": "strin"}, "strin"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
        ({"type": "string", "format": "madeup"}, "madeup"),
    ],
)
def test_what_cannot_be_enforced_is_refused_before(demo_model, of, said) -> None:
    with pytest.raises(SettingError, match=said):
        demo_model.answer([], "x", schema=of)


def test_no_property_is_invented(demo_model) -> None:
    """Where a schema does not say that there may be others; with additionalProperties: true there may."""
    of = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 3}, "o": {"$ref": "#/$defs/O"}},
          "required": ["a", "o"], "$defs": {"O": {"type": "object", "properties": {"b": {"type": "null"}}}}}  # fmt: skip
    for seed in range(5):
        answer = demo_model.answer([], "x", schema=of, temperature=2.0, seed=seed, max_new_tokens=80)
        found = json.loads(answer.text())
        assert set(found) == {"a", "o"} and set(found["o"]) <= {"b"}
    grammars = Grammars(demo_model.prompts.tokenizer, demo_model.bundle.eos)
    encode = demo_model.prompts.tokenizer.encode
    for more, allowed in (({}, False), ({"additionalProperties": True}, True)):
        guide = grammars.of_schema(json.dumps({"type": "object", "properties": {"a": {"type": "null"}}, **more}))
        for token in encode('{"a": null'):
            guide.accept(token)
        assert bool(guide.allowed()[encode(",")[0]]) is allowed


def test_a_property_may_have_a_keywords_name(demo_model) -> None:
    of = {"type": "object", "properties": {"minProperties": {"type": "integer"}}, "required": ["minProperties"]}
    demo_model.answer([], "x", schema=of)


def test_a_grammar_for_the_top_of_the_logits(demo_model) -> None:
    """Where only the likeliest tokens come from a device: the same draws as from whole rows."""
    random_ = np.random.default_rng(0)
    grammars = Grammars(demo_model.prompts.tokenizer, demo_model.bundle.eos)
    vocabulary = demo_model.decoder.info.vocabulary
    for temperature in (0.0, 1.0):
        settings = GenerationSettings(temperature, min_p=0.1, seed=None if temperature == 0 else 7)
        rows, tops = (Sampler(settings, vocabulary, [], grammars.of_schema(json.dumps(ANSWER))) for _ in range(2))
        for _ in range(12):
            logits = random_.normal(0, 3, vocabulary).astype(np.float32)
            ids = np.sort(np.argsort(-logits)[:16])[::-1]
            ids = ids[np.argsort(-logits[ids], kind="stable")]
            token = tops.next(Top(logits[ids].copy(), ids.astype(np.int64), logits.copy))
            assert token == rows.next(logits.copy())
            if rows._guide.finished:
                break


def test_calls_need_the_tokens_for_them(demo_model) -> None:
    """The demo's tokenizer has none; tests/serve/test_tools.py has the family's."""
    grammars = Grammars(demo_model.prompts.tokenizer, demo_model.bundle.eos)
    with pytest.raises(SettingError, match=r"this model has no token <\|tool_call_start\|>, so that no call"):
        grammars.of_calls([{"type": "function", "function": {"name": "stop"}}])
    with pytest.raises(SettingError, match="no such tool"):
        grammars.of_calls([{"type": "function", "function": {"name": "stop"}}], "nothing")
    lost = {"name": "f", "parameters": {"properties": {"a": {"minProperties": 2}}}}
    with pytest.raises(SettingError, match="minProperties"):
        grammars.of_calls([lost])
