"""The programs in examples/ run as they stand, and say what they should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "demo" / "eval" / "images" / "0000.png"


def run(name: str, *words: object) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_describe_says_what_is_there(demo_bundle) -> None:
    assert run("describe.py", demo_bundle, PICTURE) == "red cross, orange circle\n"


def test_a_conversation_and_its_fork_answer(demo_bundle) -> None:
    first, *others = run("conversation.py", demo_bundle, PICTURE).splitlines()
    assert first == "red cross, orange circle"
    assert others[0] == "2"
    assert len(others) == 2


def test_a_folder_is_answered_and_a_bad_file_is_an_error(demo_bundle, tmp_path) -> None:
    for name in ("0000.png", "0001.png", "0002.png"):
        (tmp_path / name).write_bytes((PICTURE.parent / name).read_bytes())
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    found = {line["image"]: line for line in map(json.loads, run("folder.py", demo_bundle, tmp_path).splitlines())}
    assert found["0000.png"]["text"] == "red cross, orange circle"
    assert "not a readable image" in found["bad.jpg"]["error"]
    assert len(found) == 4


def test_a_plan_names_its_memory(demo_bundle) -> None:
    assert "MiB at the peak" in run("plan.py", demo_bundle, PICTURE)


def test_measured_answers(demo_bundle) -> None:
    assert run("measure.py", demo_bundle, PICTURE).count("first token") == 3


@pytest.mark.parametrize("name", ["describe.py", "conversation.py", "folder.py", "measure.py", "plan.py"])
def test_wrong_words_are_told_what_is_right(name) -> None:
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1
    assert f"{name} BUNDLE" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_example_is_here() -> None:
    tested = Path(__file__).read_text()
    assert all(f'"{path.name}"' in tested for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_a_wrong_bundle_is_one_line(name) -> None:
    images = PICTURE.parent if name == "folder.py" else PICTURE
    command = [sys.executable, str(ROOT / "examples" / name), "nowhere", str(images)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "nowhere does not exist" in done.stderr
    assert done.stderr.count("\n") == 1
