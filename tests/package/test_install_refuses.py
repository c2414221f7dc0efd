"""What install.sh refuses, in one line and before anything is written: sticks, machines, places and words."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sticks import another, failed, install, sums

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="the stick is for x86 Linux"),
]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"machine": "aarch64", "target": "pi5"}, "this stick is for pi5 (aarch64), this machine is x86_64"),
        ({"python": "3.99"}, "is for Python 3.99, but this system has 3."),
        ({"glibc_minor": "99"}, "the wheels need 2.99"),
        ({"glibc_minor": "x"}, "stick.conf is damaged (glibc_minor); copy the stick again"),
        ({"need_kib": "9" * 20}, "stick.conf is damaged (need_kib)"),
        ({"need_kib": "99999999999"}, "MiB more; free some space, or name another disk"),
    ],
)
def test_another_machine(stick, tmp_path, settings, said) -> None:
    another(stick, **settings)
    told = failed(install(stick, tmp_path / "edge"))
    assert said in told
    assert not (tmp_path / "edge").exists()
    if numbers := re.search(r"has (\d+) MiB free, (\d+) are needed: (\d+) MiB more", told):
        free, needed, more = map(int, numbers.groups())
        assert needed - free == more


def fake(folder: Path, **programs: str) -> str:
    """Return a PATH where some programs are replaced by shell scripts."""
    folder.mkdir()
    for name, script in programs.items():
        (folder / name.replace("_", ".")).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name.replace("_", ".")).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_32_bit_system(stick, tmp_path) -> None:
    minor = sys.version_info.minor
    path = fake(tmp_path / "bin", python3="echo 3.11 32", **{f"python3_{minor}": f"echo 3.{minor} 32"})
    assert "this system is 32-bit" in failed(install(stick, tmp_path / "edge", PATH=path))


def test_no_python(stick, tmp_path) -> None:
    path = fake(tmp_path / "bin", python3="exit 1", **{f"python3_{sys.version_info.minor}": "exit 1"})
    assert "there is no Python 3." in failed(install(stick, tmp_path / "edge", PATH=path))


@pytest.mark.parametrize(
    "broken", ["cut", "missing", "flipped", "nothing", "garbage", "malformed", "unlisted", "two pips"]
)
def test_a_half_copied_stick(stick, tmp_path, broken) -> None:
    wheel = next((stick / "wheels").glob("numpy*"))
    if broken == "cut":
        wheel.write_bytes(wheel.read_bytes()[:-1])
    elif broken == "missing":
        wheel.unlink()
    elif broken == "flipped":
        data = bytearray((stick / "cam.tar").read_bytes())
        data[len(data) // 2] ^= 1
        (stick / "cam.tar").write_bytes(data)
    else:
        listed = (stick / "SHA256SUMS").read_text().splitlines()
        texts = {
            "nothing": [],
            "garbage": ["garbage"],
            "malformed": [line[1:] if "stick.conf" in line else line for line in listed],
            "unlisted": [line for line in listed if "stick.conf" not in line],
            "two pips": [*listed, listed[-1].replace("wheels/", "wheels/pip-1.whl")],
        }
        (stick / "SHA256SUMS").write_text("".join(f"{line}\n" for line in texts[broken]))
    said = failed(install(stick, tmp_path / "edge"))
    assert "copy it again" in said
    assert not (tmp_path / "edge").exists(), "looked at before anything is written"


def test_a_wheel_that_was_put_in(stick, tmp_path) -> None:
    """Hashes of the stick are right, those that lfm-edge pinned are not."""
    with (stick / "wheels" / next(p.name for p in (stick / "wheels").glob("psutil*"))).open("ab") as f:
        f.write(b"\0")
    sums(stick)
    done = install(stick, tmp_path / "edge")
    assert "could not be installed; still installed: nothing" in failed(done)
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
    assert list((tmp_path / "edge" / "versions").iterdir()) == []


def test_nowhere_to_write(stick, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for prefix in (tmp_path / "file", tmp_path / "file" / "edge"):
        assert f"{tmp_path / 'file'} is a file; name another folder" in failed(install(stick, prefix))
    done = install(stick, Path("/proc/edge"))  # it has no size
    assert "/proc/edge cannot be written by" in failed(done)
    assert done.stderr.count("\n") == 1
    for odd in (
        'a "board"',
        "a $HOME",
        "a `board`",
        "a \\board",
        "a\nboard",
    ):  # what starts Python's programs cannot have it
        assert "in its name, with which programs there would not start; name" in failed(install(stick, tmp_path / odd))
        assert not (tmp_path / odd).exists()
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o555)
        assert "cannot be written by" in failed(install(stick, tmp_path / "closed" / "edge"))


def test_words(stick, tmp_path) -> None:
    done = subprocess.run(["sh", str(stick / "install.sh"), "--help"], capture_output=True, text=True, check=True)
    assert "--rollback" in done.stdout
    assert "--bogus is unknown" in failed(install(stick, tmp_path / "edge", "--bogus"))
    assert "--signers needs a value" in failed(install(stick, tmp_path / "edge", "--signers"))
    assert "--prefix needs a value" in failed(install(stick, Path(), "--prefix", ""))
    done = subprocess.run(
        ["sh", str(stick / "install.sh")], capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]}
    )
    assert "HOME is not set" in failed(done)
