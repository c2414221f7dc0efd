"""The JSONL file of captions: records whole, once each, and nobody else's file touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lfm_serve.captions.journal import Journal, JournalError, read_records

SETTINGS = {"weights": "w"}


def record(number: int, settings: str = "s", **more: object) -> dict:
    return {"path": f"{number}.png", "sha256": "x", "size": 1, "modified": 2.5, "settings": settings, **more}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("journal")


@settings(max_examples=60)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=8), st.integers(0, 2000), st.booleans())
@example(["a"], len(json.dumps(record(0, text="a"))), False)  # the newline alone is missing
@example(["a", "b"], 2 * len(json.dumps(record(0, text="a"))) + 1, True)
def test_a_file_cut_off_anywhere_goes_on(place, texts, at, twice) -> None:
    """What was whole stays, what was cut off is done again; no record is there twice."""
    out = place / "out.jsonl"
    out.unlink(missing_ok=True)
    wanted = [record(n, text=text) for n, text in enumerate(texts)]
    with Journal.open(out, SETTINGS, "s") as journal:
        for each in wanted:
            assert not journal.write(each)
    whole = out.read_bytes()
    cut = min(at, len(whole))
    os.truncate(out, cut)
    kept = whole[:cut].count(b"\n")
    with Journal.open(out, SETTINGS, "s") as journal:
        assert list(journal.records) == [each["path"] for each in wanted[:kept]]
        for each in wanted[0 if twice else kept :]:
            journal.write(each)
    assert sorted(map(str, read_records(out))) == sorted(map(str, wanted))
    assert out.read_bytes().count(b"\n") == len(wanted)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("notes of mine\n", "exists, and lfm-edge caption did not write it"),
        ('{"a": 1}\n', "exists, and lfm-edge caption did not write it"),
        ('{"path": "a.png", "label": "cat"}\n', "exists, and lfm-edge caption did not write it"),
        ('{"path": "a.png", "label": "cat"}', "exists, and lfm-edge caption did not write it"),
        ('{"path": "a', "exists, and lfm-edge caption did not write it"),
        ('["path", "sha256", "size", "modified", "settings"]\n', "exists, and lfm-edge caption did not write it"),
        (f"{json.dumps(record(1))}\nmine\n", "line 2 is no record"),
        (f"{json.dumps(record(1))}\n\n{json.dumps(record(2))}\n", "line 2 is no record"),
        (f"{json.dumps(record(1))}\n\n", "line 2 is no record"),
        (f"{json.dumps(record(1, text=5))}\n", "did not write it"),
        (f"{json.dumps(record(1))}\n{json.dumps(record(2, 'other'))}\n" + '{"pa', "was made with other settings"),
        (f"{json.dumps(record(1))}\nx\n{json.dumps(record(2))}\n", "line 2 is no record"),
        (f"{json.dumps(record(1, 'other'))}\n", "was made with other settings"),
        (f"{json.dumps(record(1))}\n{json.dumps(record(2, 'other'))}", "was made with other settings"),
        (f"{json.dumps(record(1))}\n5", "line 2 is no record"),
    ],
)
def test_what_is_not_ours_stays(tmp_path, content, says) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    with pytest.raises(JournalError, match=says), Journal.open(out, SETTINGS, "s"):
        pytest.fail("opened")
    assert out.read_text() == content


def test_a_damaged_first_line_of_ours_is_named(tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    with Journal.open(out, SETTINGS, "s") as journal:
        journal.write(record(1))
    for damaged in (record(1, text=5), {**record(1), "size": "big"}):
        out.write_text(f"{json.dumps(damaged)}\n")
        with pytest.raises(JournalError, match="line 1 is no record"), Journal.open(out, SETTINGS, "s"):
            pytest.fail("opened")


@pytest.mark.parametrize("damaged", ["[", '{"weights": "ab', "", "null", '{"other": 1}'])
def test_damaged_settings_name_no_difference(tmp_path, damaged) -> None:
    """They say nothing; with the settings of the run before it goes on, and they are written anew."""
    out, place = tmp_path / "out.jsonl", tmp_path / "out.jsonl.settings.json"
    with Journal.open(out, SETTINGS, "s") as journal:
        journal.write(record(1))
    whole = place.read_text()
    place.write_text(damaged)
    with (
        pytest.raises(JournalError, match=r"other settings \(out.jsonl.settings.json does not say which\)"),
        Journal.open(out, {**SETTINGS, "question": "x"}, "other"),
    ):
        pytest.fail("opened")
    assert place.read_text() == damaged
    with Journal.open(out, SETTINGS, "s") as journal:
        assert len(journal.records) == 1
    assert place.read_text() == whole


def test_a_second_writer_is_refused(tmp_path) -> None:
    with (
        Journal.open(tmp_path / "out.jsonl", SETTINGS, "s"),
        pytest.raises(JournalError, match="is being written by another"),
        Journal.open(tmp_path / "out.jsonl", SETTINGS, "s"),
    ):
        pytest.fail("opened")


def test_what_a_killed_rewriting_left_does_no_harm(tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    with Journal.open(out, SETTINGS, "s") as journal:
        for each in (record(1, text="a"), record(2, text="b"), record(1, text="c")):
            journal.write(each)
    (tmp_path / f".out.jsonl.{os.getpid()}").write_text('{"torn')
    with Journal.open(out, SETTINGS, "s"):
        pass
    assert [one["text"] for one in read_records(out)] == ["b", "c"]
    assert out.read_bytes().count(b"\n") == 2
    link = tmp_path / "link.jsonl"
    link.symlink_to(out)
    with Journal.open(link, SETTINGS, "s") as journal:
        journal.write(record(2, text="d"))
    assert link.is_symlink()
    assert [one["text"] for one in read_records(out)] == ["c", "d"]
