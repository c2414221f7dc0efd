"""Sticks: changed in such a way that their checksums still hold, and installed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path


def sums(stick: Path) -> None:
    """Write SHA256SUMS anew for the files that lie on the stick."""
    names = sorted(p for p in stick.rglob("*") if p.is_file() and not p.name.startswith("SHA256SUMS"))
    (stick / "SHA256SUMS").write_text(
        "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(stick)}\n" for p in names)
    )


def another(stick: Path, **settings: str) -> None:
    """Turn `stick` into one of another version, or with other settings."""
    conf = dict(line.split("=", 1) for line in (stick / "stick.conf").read_text().splitlines())
    (stick / f"{conf['name']}.tar").rename(stick / f"{settings.get('name', conf['name'])}.tar")
    (stick / "stick.conf").write_text("".join(f"{key}={value}\n" for key, value in {**conf, **settings}.items()))
    sums(stick)


def install(stick: Path, prefix: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LFM_", "PYTHON"))}
    return subprocess.run(
        ["sh", str(stick / "install.sh"), "--prefix", str(prefix), *words],
        capture_output=True,
        text=True,
        check=False,
        env={**kept, "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", **environment},
    )


def failed(done: subprocess.CompletedProcess[str]) -> str:
    """Return the error of an install.sh that exited with code 2: its last line."""
    assert done.returncode == 2, done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("install.sh: ")
    return said
