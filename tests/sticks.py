"""Changes sticks in such a way that their checksums still hold."""

import hashlib
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
