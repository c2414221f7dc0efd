"""Changing sticks as if lfm-edge stick had made them so."""

import hashlib
from pathlib import Path


def sums(stick: Path) -> None:
    """As if lfm-edge stick had made what lies there."""
    names = sorted(p for p in stick.rglob("*") if p.is_file() and not p.name.startswith("SHA256SUMS"))
    (stick / "SHA256SUMS").write_text(
        "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(stick)}\n" for p in names)
    )


def another(stick: Path, **settings: str) -> None:
    """A stick of another version, or with other settings."""
    conf = dict(line.split("=", 1) for line in (stick / "stick.conf").read_text().splitlines())
    (stick / f"{conf['name']}.tar").rename(stick / f"{settings.get('name', conf['name'])}.tar")
    (stick / "stick.conf").write_text("".join(f"{key}={value}\n" for key, value in {**conf, **settings}.items()))
    sums(stick)
