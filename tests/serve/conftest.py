"""What several files ask for: a server of the demo bundle, stills, processes that watch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lfm_runtime.commands.cli import main
from pictures import IMAGES, QUESTION
from servers import Server
from watching import Watching


@pytest.fixture(scope="session")
def server(demo_bundle):
    pytest.importorskip("starlette")
    found = Server(demo_bundle, "--max-body-mib", "8")
    yield found
    assert found.stop() == 0


@pytest.fixture
def stills(tmp_path) -> Path:
    (tmp_path / "stills").mkdir()
    for n, image in enumerate(IMAGES[:6]):
        shutil.copy(image, tmp_path / "stills" / f"{n}.png")
    return tmp_path / "stills"


@pytest.fixture
def watching(demo_bundle, tmp_path) -> Iterator[Callable[..., Watching]]:
    started: list[Watching] = []

    def start(source: str, *words: str) -> Watching:
        started.append(Watching(demo_bundle, source, tmp_path / f"out{len(started)}.jsonl", *words))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


@pytest.fixture
def caption(demo_bundle, folder, tmp_path):
    """A function that runs the command on the folder; returns its exit code and the records."""

    def run(*words: str, code: int = 0) -> list[dict]:
        out = tmp_path / "out.jsonl"
        arguments = ["caption", str(demo_bundle), str(folder), "-o", str(out), "--threads", "1", "--quiet", *words]
        asked = () if {"-p", "--fields"}.intersection(words) else ("-p", QUESTION)
        assert main([*arguments, *asked]) == code
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run
