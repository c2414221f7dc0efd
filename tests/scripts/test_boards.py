"""The install scripts on recorded trees of boards, with what uname and Python say there; and what a failing pip is
explained as.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "profiles"))
from trees import DEVICES, write  # noqa: E402

pytestmark = pytest.mark.process


def check(
    script: str, root: Path, programs: Path, *, uname: str = "aarch64", python: str = "3.11", bits: int = 64
) -> subprocess.CompletedProcess[str]:
    programs.mkdir(exist_ok=True)
    (programs / "uname").write_text(f"#!/bin/sh\necho {uname}\n")
    # Asked for its version, then for the size of a pointer.
    (programs / "fake").write_text(f'#!/bin/sh\ncase "$2" in *version_info*) echo {python} ;; *) echo {bits} ;; esac\n')
    for name in ("uname", "fake"):
        (programs / name).chmod(0o755)
    for name in ("python3", "python3.10", "python3.11", "python3.12", "python3.13"):
        (programs / name).unlink(missing_ok=True)
        (programs / name).symlink_to("fake")
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "LFM_EDGE_ROOT": str(root)}
    return subprocess.run(
        ["sh", str(ROOT / "scripts" / f"{script}.sh"), "--check"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.mark.parametrize("name", [n for n in DEVICES if n.startswith("pi")])
def test_raspberry_pis(name, tmp_path) -> None:
    done = check("install_raspberry_pi", write(tmp_path / "root", DEVICES[name][0]), tmp_path / "bin")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Raspberry Pi ")
    assert ("warning: 416 MiB" in done.stdout) == (name in ("pi-zero2w", "pi3a+"))


@pytest.mark.parametrize(
    ("name", "python", "said"),
    [("orin-nano", "3.10", "JetPack 6 (L4T 36.4.3), Python 3.10"), ("agx-orin", "3.10", "JetPack 6")],
)
def test_jetsons(name, python, said, tmp_path) -> None:
    done = check("install_jetson", write(tmp_path / "root", DEVICES[name][0]), tmp_path / "bin", python=python)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


@pytest.mark.parametrize(
    ("script", "tree", "more", "said"),
    [
        ("install_raspberry_pi", "pi4-2gb", {"uname": "armv7l"}, "this system is 32-bit (armv7l)"),
        ("install_raspberry_pi", "pi4-2gb", {"bits": 32}, "this Python is 32-bit, on a 64-bit kernel"),
        ("install_raspberry_pi", "pi5-4gb", {"python": "3.9"}, "needs Python 3.10 or newer; found: 3.9"),
        ("install_raspberry_pi", "orin-nano", {}, "not a Raspberry Pi; use scripts/install_jetson.sh"),
        ("install_raspberry_pi", "x86-avx2", {"uname": "x86_64"}, "no board with a device tree, not a Raspberry Pi"),
        ("install_raspberry_pi", "rockpi", {}, "this is Radxa ROCK 5B, not a Raspberry Pi"),
        ("install_jetson", "pi5-4gb", {}, "not a Jetson; use scripts/install_raspberry_pi.sh"),
        ("install_jetson", "rockpi", {}, "/etc/nv_tegra_release is missing"),
        ("install_jetson", "jetson-nano", {"python": "3.6"}, "L4T 32.7.4 is JetPack 4 (Python 3.6): too old"),
    ],
)
def test_the_cause_and_the_fix(script, tree, more, said, tmp_path) -> None:
    done = check(script, write(tmp_path / "root", DEVICES[tree][0]), tmp_path / "bin", **more)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_other_releases(tmp_path) -> None:
    tree = DEVICES["orin-nano"][0]
    root = write(tmp_path / "root", {**tree, "etc/nv_tegra_release": "# R35 (release), REVISION: 5.0, GCID: 1\n"})
    assert "JetPack 5 (Python 3.8" in check("install_jetson", root, tmp_path / "bin").stderr
    root = write(tmp_path / "root", {**tree, "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 1\n"})
    assert (
        "JetPack 7 (L4T 38.2.0), Python 3.12" in check("install_jetson", root, tmp_path / "bin", python="3.12").stdout
    )
    root = write(tmp_path / "root", {**tree, "proc/device-tree/model": "Raspberry Pi Model B Rev 2\0"})
    assert "has a 32-bit processor" in check("install_raspberry_pi", root, tmp_path / "bin").stderr


@pytest.mark.parametrize(
    ("log", "status", "said"),
    [
        (
            "ERROR: Could not find a version that satisfies the requirement onnxruntime>=1.20 (from versions: none)\nERROR: No matching distribution found for onnxruntime>=1.20",
            1,
            "No matching distribution found for onnxruntime>=1.20: no wheel for this Python (3.9)",
        ),
        (
            "ERROR: numpy-2.4.6-cp313-cp313-manylinux_2_28_aarch64.whl is not a supported wheel on this platform.",
            1,
            "another Python or processor",
        ),
        ("ImportError: /usr/lib/aarch64-linux-gnu/libstdc++.so.6: version `GLIBCXX_3.4.29' not found", 1, "JetPack 5"),
        ("", 132, "1.21.0 does on Cortex-A53 and A72"),
        ("Illegal instruction (core dumped)", 1, "onnxruntime!=1.21.0"),
        ("error: externally-managed-environment\n× This environment is externally managed", 1, "a virtual environment"),
        (
            "CUDA failure 209: no kernel image is available for execution on the device",
            1,
            "pip uninstall -y onnxruntime-gpu",
        ),
        (
            "WARNING: Retrying: Failed to establish a new connection: [Errno -3] Temporary failure in name resolution",
            1,
            "install from a stick",
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            1,
            "the disk is full",
        ),
        (
            "Error: Command '[...]/python', '-m', 'ensurepip' returned non-zero exit status 1.",
            1,
            "sudo apt install python3-venv",
        ),
        ("something else\nwent wrong", 1, "went wrong. The whole output is in"),
    ],
)
def test_failures_are_explained(log, status, said, tmp_path) -> None:
    (tmp_path / "log").write_text(log)
    script = f". {ROOT}/scripts/board.sh; version=3.9; explain {tmp_path}/log {status}"
    done = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=True)
    assert said in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_pip_that_fails_ends_the_script(tmp_path) -> None:
    script = f". {ROOT}/scripts/board.sh; try sh -c 'echo No space left on device; exit 1'; echo not here"
    done = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the disk is full" in done.stderr
