"""SIGKILL at any moment leaves the old state or the new one, and the next run succeeds: export, quantize, prepare,
install.

A few moments here; fifty of each are slow (LONG=1).
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from bundles import tree
from lfm_package.verify import verify
from lfm_runtime.bundle import Bundle
from lfm_runtime.engine.prepared import find, folder_of
from sticks import another

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[1]
KILLS = pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])


def edge(*words: object) -> list[str]:
    return [sys.executable, "-m", "lfm_runtime", *map(str, words)]


def run(words: Sequence[str], *, kill_after: float | None = None) -> float:
    """To the end, which must be a good one; or killed, with all it started. Returns the seconds it took."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if words[0] == "sh":
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("LFM_", "PYTHON"))}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    begun = time.monotonic()
    process = subprocess.Popen(
        words, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        process.wait(kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    else:
        assert process.returncode == 0, process.stderr.read()
    process.stderr.close()
    return time.monotonic() - begun


def kill_often(kills: int, command: Sequence[str], longest: float, check: Callable[[], None]) -> None:
    """At moments spread over the whole run and a little more, in random order."""
    rng = random.Random(kills)
    moments = [longest * 1.05 * (n + rng.random()) / kills for n in range(kills)]
    rng.shuffle(moments)
    for moment in moments:
        run(command, kill_after=moment)
        check()


@KILLS
def test_export(tmp_path, kills) -> None:
    changed = Path(shutil.copytree(ROOT / "demo" / "checkpoint", tmp_path / "changed"))
    settings = json.loads((changed / "preprocessor_config.json").read_text())
    (changed / "preprocessor_config.json").write_text(json.dumps({**settings, "max_tiles": 4}))
    bundle, saved = tmp_path / "place" / "bundle", tmp_path / "saved"
    run(edge("export", ROOT / "demo" / "checkpoint", "-o", bundle, "--quiet"))
    shutil.copytree(bundle, saved)
    longest = run(edge("export", changed, "-o", tmp_path / "new", "--quiet"))
    old, new = tree(saved), tree(tmp_path / "new")
    assert old != new

    def check() -> None:
        assert verify(bundle) == []
        assert tree(bundle) in (old, new)
        if tree(bundle) == new:
            shutil.rmtree(bundle)
            shutil.copytree(saved, bundle)

    kill_often(kills, edge("export", changed, "-o", bundle, "--quiet"), longest, check)
    run(edge("export", changed, "-o", bundle, "--quiet"))
    assert tree(bundle) == new
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.slow  # a killed run that goes on is tested beside quantize
@KILLS
def test_quantize(demo_bundle, tmp_path, kills) -> None:
    """With calibration: what was already calibrated is kept between runs, so that each kill hits another part."""
    bundle, saved = tmp_path / "place" / "bundle", demo_bundle
    images = tmp_path / "images.txt"
    images.write_text("\n".join(str(p) for p in sorted((ROOT / "demo" / "calibration" / "images").iterdir())[:6]))
    words = ["--variant", "int8", "--calibration", images, "--quiet"]
    shutil.copytree(saved, bundle)
    longest = run(edge("quantize", bundle, *words))
    new, old = tree(bundle).keys(), tree(saved)

    def reset() -> None:
        shutil.rmtree(bundle)
        shutil.copytree(saved, bundle)

    def check() -> None:
        assert verify(bundle) == []
        if "int8" in Bundle.open(bundle).variants:
            assert tree(bundle).keys() == new
            reset()
        else:
            assert tree(bundle) == old

    reset()
    kill_often(kills, edge("quantize", bundle, *words), longest, check)
    run(edge("quantize", bundle, *words))
    assert verify(bundle) == []
    assert tree(bundle).keys() == new
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


@KILLS
def test_prepare(demo_bundle, tmp_path, kills) -> None:
    place = tmp_path / "place" / "bundle"
    shutil.copytree(demo_bundle, place)
    bundle = Bundle.open(place)
    command = edge("prepare", place)
    longest = run(command)
    paths = [path for stem, path in bundle.graphs(None)[1].items() if stem != "embed_tokens"]

    def check() -> None:
        """Each graph is prepared and every byte of it right, or not prepared at all; nothing is there that must be
        warned of.
        """
        found = [find(bundle, path, verify=True) for path in paths]
        assert [one.note for one in found] == [None] * len(found)
        if all(one.path != path for one, path in zip(found, paths, strict=True)):
            shutil.rmtree(folder_of(place))

    check()
    kill_often(kills, command, longest, check)
    run(command)
    assert all(find(bundle, path, verify=True).path != path for path in paths)
    assert sorted(p.name for p in folder_of(place).iterdir()) == sorted(path.stem for path in paths)


@pytest.mark.slow  # half a minute each; install.sh's whole life is tested in package/
@pytest.mark.parametrize("kills", [1, 50])
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="the stick is for x86 Linux")
def test_install(stick_once, tmp_path, kills) -> None:
    for name in ("old", "new"):
        shutil.copytree(stick_once, tmp_path / name)
        another(tmp_path / name, name=name)
    prefix = tmp_path / "edge"
    command = [["sh", str(tmp_path / name / "install.sh"), "--prefix", str(prefix)] for name in ("old", "new")]
    run(command[0])
    longest = run(command[1])
    run([*command[0], "--rollback"])

    def check() -> None:
        current = (prefix / "current").readlink()
        assert current.name.startswith(("old-", "new-"))
        assert (prefix / current / "complete").exists()
        assert verify(prefix / current / "bundle") == []
        words = [
            str(prefix / "bin" / "lfm-edge"),
            "run",
            str(prefix / "current" / "bundle"),
            "-p",
            "Hello",
            "--max-new-tokens",
            "2",
        ]
        run(["sh", "-c", 'exec "$@"', "sh", *words])
        if current.name.startswith("new-"):
            run([*command[0], "--rollback"])
        for version in (prefix / "versions").glob("new-*"):
            if (version / "complete").exists():
                (version / "complete").unlink()  # the next one begins anew

    check()
    kill_often(kills, command[1], longest, check)
    run(command[1])
    assert (prefix / "current").readlink().name.startswith("new-")
    assert {p.name.split("-")[0] for p in (prefix / "versions").iterdir()} == {"old", "new"}
    assert not [p.name for p in prefix.iterdir() if p.name.endswith(".new")]
