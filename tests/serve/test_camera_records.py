"""Records of a camera in a file: whole, at the end of our own files alone, and counted where they are lost."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lfm_serve.cameras import records
from lfm_serve.cameras.records import Appended, RecordsError

RECORD = {"time": "2026-01-01T00:00:00.000Z", "source": "cam", "frame": 1, "text": "ä"}


def test_records_are_appended_whole(tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    for _ in range(2):
        file = Appended(out, print)
        file.write(RECORD)
        with pytest.raises(RecordsError, match="is being written by another"):
            Appended(out, print)
        file.close()
    assert [json.loads(line) for line in out.read_text().splitlines()] == [RECORD] * 2


@settings(max_examples=60)
@given(at=st.integers(0, 300))
def test_a_torn_last_record_is_dropped(tmp_path_factory, at) -> None:
    out = tmp_path_factory.mktemp("torn") / "out.jsonl"
    line = (json.dumps(RECORD, ensure_ascii=False) + "\n").encode()
    out.write_bytes((3 * line)[:at])
    file = Appended(out, print)
    file.write(RECORD)
    file.close()
    assert out.read_bytes() == line * (min(at, 3 * len(line)) // len(line) + 1)


def test_zeros_after_a_power_cut_are_dropped(tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    line = (json.dumps(RECORD, ensure_ascii=False) + "\n").encode()
    out.write_bytes(line + line[:20] + bytes(200))
    for _ in range(2):
        Appended(out, print).close()
        assert out.read_bytes() == line
        out.write_bytes(line + bytes(200))


@pytest.mark.parametrize(
    "content", ["notes\n", '{"a": 1}\n', '{"path": "a.png", "text": "x"}\n', "notes", "5", '{"tim']
)
def test_nobody_elses_file_is_written(tmp_path, content) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    if content == '{"tim':  # which is how ours begins
        Appended(out, print).close()
        return
    with pytest.raises(RecordsError, match="did not write it"):
        Appended(out, print)
    assert out.read_text() == content


def test_a_full_disk_loses_records_and_says_how_many(tmp_path, monkeypatch) -> None:
    said: list[str] = []
    file = Appended(tmp_path / "out.jsonl", said.append)
    file.write(RECORD)
    with monkeypatch.context() as full:
        full.setattr(records, "append", raises(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        for _ in range(3):
            file.write(RECORD)
    file.write(RECORD)
    with monkeypatch.context() as broken:
        broken.setattr(records, "append", raises(OSError(errno.EIO, os.strerror(errno.EIO))))
        with pytest.raises(RecordsError, match="Input/output error"):
            file.write(RECORD)
    file.close()
    assert len(said) == 2
    assert "records are lost until there is room" in said[0]
    assert "3 records lost" in said[1]
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 2


def raises(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path, monkeypatch) -> None:
    """As logrotate does it, without a signal."""
    monkeypatch.setattr(records, "_SYNC_S", -1.0)
    out = tmp_path / "out.jsonl"
    file = Appended(out, print)
    file.write(RECORD)
    out.rename(tmp_path / "out.1.jsonl")
    file.write(RECORD)
    file.write(RECORD)
    file.close()
    assert [path.read_text().count("\n") for path in (tmp_path / "out.1.jsonl", out)] == [1, 2]
