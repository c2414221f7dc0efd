"""JSON as dataclasses: what is in a file is read right or refused with its place; the schema agrees with the reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lfm_runtime.errors import BundleError
from lfm_runtime.formats.manifest import Manifest
from lfm_runtime.formats.typed import as_json, read_as, schema_of

jsonschema = pytest.importorskip("jsonschema")


@dataclass(frozen=True)
class Inner:
    n: int
    share: float | None = None


@dataclass(frozen=True)
class Outer:
    name: Annotated[str, "what it is called"]
    kind: Literal["a", "b"]
    sizes: tuple[int, ...]
    pair: tuple[int, str]
    parts: Mapping[str, Inner]
    either: int | str | None
    anything: Any = None
    more: Mapping[str, str] = field(default_factory=dict, metadata={"omitted": True})


GOOD = {"name": "x", "kind": "a", "sizes": [1, 2], "pair": [1, "y"], "parts": {"p": {"n": 3}}, "either": None}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def read(value) -> Outer:
    return read_as(Outer, value, Path("file.json"), BundleError, "make it again")


def test_types_read_what_they_write() -> None:
    found = read(GOOD)
    assert found.parts["p"] == Inner(3)
    assert found.sizes == (1, 2)
    assert as_json(found) == {**GOOD, "parts": {"p": {"n": 3, "share": None}}, "anything": None}
    assert read(json.loads(json.dumps(as_json(found)))) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 5}, "file.json: name is 5, expected a string; make it again"),
        ({"kind": "c"}, "kind is 'c', expected 'a' or 'b'"),
        ({"sizes": [1, True]}, r"sizes\[1\] is True, expected a whole number"),
        ({"sizes": "12"}, "sizes is '12', expected a list"),
        ({"pair": [1]}, "pair is a list, expected a list of 2"),
        ({"parts": {"p": {}}}, "parts.p has no n"),
        ({"parts": {"p": {"n": 1, "share": "x"}}}, "parts.p.share is 'x', expected a number"),
        ({"parts": []}, "parts is a list, expected an object"),
        ({"either": 1.5}, "either is 1.5, expected a whole number or a string"),
        ({"more": {"k": None}}, "more.k is null, expected a string"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(change, message) -> None:
    with pytest.raises(BundleError, match=message):
        read({**GOOD, **change})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**GOOD, **change}, schema_of(Outer, "outer", ""))


def holds_a_whole_float(value) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return (isinstance(value, float) and value.is_integer()) or any(map(holds_a_whole_float, inner))


@given(key=st.sampled_from(sorted(GOOD)), value=JSON)
def test_reader_and_schema_agree(key, value) -> None:
    """An independent validator accepts what we read and refuses what we refuse. It calls 1.0 an integer, we do not."""
    changed = {**GOOD, key: value}
    valid = jsonschema.Draft202012Validator(schema_of(Outer, "outer", "")).is_valid(changed)
    try:
        read(changed)
    except BundleError:
        assert not valid or holds_a_whole_float(value)
    else:
        assert valid


def test_a_manifest_written_again_is_the_same(demo_bundle) -> None:
    text = (demo_bundle / "manifest.json").read_text()
    assert json.loads(Manifest.of(demo_bundle).to_text()) == json.loads(text)
    jsonschema.validate(json.loads(text), schema_of(Manifest, "manifest", ""))
