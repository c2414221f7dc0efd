"""`lfm-edge caption` as a process: killed, stopped, without room, and waiting for new images."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from lfm_runtime import Model
from lfm_serve.captions.journal import read_records
from pictures import IMAGES, QUESTION


def started(bundle: Path, folder: Path, out: Path, *words: str, **more) -> subprocess.Popen:
    command = [sys.executable, "-m", "lfm_runtime", "caption", str(bundle), str(folder), "-o", str(out), "-p", QUESTION]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--threads", "1", *words], env=environment, stderr=subprocess.PIPE, text=True, **more
    )


def wait_for(process: subprocess.Popen, words: str) -> str:
    """Read what a process says until these words come."""
    said = ""
    for line in process.stderr:
        said += line
        if words in line:
            return said
    raise AssertionError(f"it ended without {words!r}: {said}")


def test_killed_at_any_moment(demo_bundle, tmp_path) -> None:
    """SIGKILL again and again: every record is there once, whole, and the texts are those of one run."""
    shutil.copytree(IMAGES[0].parent, tmp_path / "images")
    out, moments = tmp_path / "out.jsonl", 50 if os.environ.get("LONG") == "1" else 10
    before, between = b"", 0
    for n in range(moments):
        process = started(demo_bundle, tmp_path / "images", out)
        wait_for(process, "at once")
        if n % 2:  # while a record is written, as far as another process can see that
            while process.poll() is None and out.stat().st_size == len(before):
                time.sleep(0.001)
        else:
            time.sleep(0.02 * (n % 7))
        process.kill()
        process.communicate()
        lines = out.read_bytes().split(b"\n")
        assert out.read_bytes().startswith(before), "what was whole is gone"
        between += 1 < len(lines) <= len(IMAGES)
        before = b"".join(line + b"\n" for line in lines[:-1])
        paths = [json.loads(line)["path"] for line in lines[:-1]]
        assert len(paths) == len(set(paths))
        if len(paths) == len(IMAGES):
            out.unlink()
            before = b""
    assert between, "no run was killed in the middle"
    process = started(demo_bundle, tmp_path / "images", out)
    process.communicate()
    assert process.returncode == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(one["path"] for one in found) == [f"images/{path.name}" for path in IMAGES]
    model = Model.load(demo_bundle, threads=1)
    for one in found[::40]:
        assert one["text"] == model.answer(tmp_path / one["path"], QUESTION, temperature=0).text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_answers_end(demo_bundle, tmp_path, number) -> None:
    out = tmp_path / "out.jsonl"
    for n in range(10):  # so many that the signal comes before the end, even from a busy machine
        shutil.copytree(IMAGES[0].parent, tmp_path / f"images/{n}")
    process = started(demo_bundle, tmp_path / "images", out, "--recursive", "--rows", "4")
    wait_for(process, "at once")
    while not out.stat().st_size:
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate()[1]
    done = out.read_bytes().count(b"\n")
    assert done < 10 * len(IMAGES), "it was too fast for this test"
    assert process.returncode == 130, said
    assert "ending after the answers that are being made" in said
    assert f"out.jsonl: {done} answered" in said
    assert [json.loads(line)["finish_reason"] for line in out.read_text().splitlines()] == ["eos"] * done


def test_a_full_disk_is_waited_for(demo_bundle, folder, tmp_path) -> None:
    """The file may not grow beyond 1,500 bytes for a while."""
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))  # noqa: E731
    out = tmp_path / "out.jsonl"
    process = started(demo_bundle, folder, out, preexec_fn=small)
    wait_for(process, "waiting until there is room")
    for line in out.read_text().splitlines():
        json.loads(line)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert "there is room again" in said
    assert len(out.read_text().splitlines()) == 12


def test_new_images_are_waited_for(demo_bundle, folder, tmp_path) -> None:
    """One that is written slowly is read when it is closed; one that is moved in, at once. The folder is a link."""
    out = tmp_path / "out.jsonl"
    (tmp_path / "link").symlink_to(folder)
    process = started(demo_bundle, tmp_path / "link", out, "--watch")
    wait_for(process, "at once")
    drained = threading.Thread(target=process.stderr.read, daemon=True)
    content = IMAGES[40].read_bytes()
    ends = time.monotonic() + 120  # a test that hangs says less than one that fails
    with (folder / "slow.png").open("wb") as f:
        f.write(content[:100])
        f.flush()
        shutil.copy(IMAGES[41], tmp_path / "moved.png")
        (tmp_path / "moved.png").rename(folder / "moved.png")
        while b"moved.png" not in out.read_bytes():
            assert process.poll() is None
            assert time.monotonic() < ends
            time.sleep(0.01)
        assert b"slow.png" not in out.read_bytes()
        f.write(content[100:])
    while b"slow.png" not in out.read_bytes():
        assert process.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.01)
    drained.start()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    found = {one["path"]: one for one in read_records(out)}
    assert len(found) == 14
    assert "text" in found["link/slow.png"]
