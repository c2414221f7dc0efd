"""How what is missing is installed where the user stands: from a clone, or beside a wheel that is installed. The name
on the package index is not ours yet, so nothing is ever advised from there by that name.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

NAME = "lfm-edge"
STICK_EXTRAS = ("serve", "json", "video", "mqtt", "fleet")
"""What a stick may have besides: what boards do."""
REFUSE_LINKS = ("1.24.0", "1.24.1")
"""Releases of onnxruntime that take weights only from files, not through a link as in the hub's cache."""
WITHOUT_LINKS = "pip install 'onnxruntime!=1.24.0,!=1.24.1'"
_REQUIREMENT = re.compile(r"""([\w.-]+)(?:\[([\w., -]*)\])?\s*([^;]*?)\s*(?:;.*?extra\s*==\s*["']([\w-]+)["'].*)?$""")


def install_advice(extra: str) -> str:
    """A command that installs an extra here, or several with commas between: from the clone where lfm-edge is one, else
    their packages by name. What a stick has installed has no pip, and is verified as a whole: another stick is made.
    """
    if from_stick():
        if set(STICK_EXTRAS).issuperset(extra.split(",")):
            return " ".join(["lfm-edge stick BUNDLE … -o STICK", *(f"--extra {one}" for one in extra.split(","))])
        return f"pip install -e '.[{extra}]' in a clone, on another machine"
    clone = _clone()
    what = ["-e", f"{_shown(clone)}[{extra}]"] if clone else _all_requirements(extra)
    return shlex.join([_shown(Path(sys.executable)), "-m", "pip", "install", *what])


def extra_for(module: str, likely: str = "") -> str | None:
    """The extra whose package has a module, as far as its name tells: the `likely` one, else the smallest; None where
    none has.
    """
    wanted = module.partition(".")[0].lower().replace("_", "-")
    wanted = "pyyaml" if wanted == "yaml" else wanted
    found = [(name, extra) for name, _, _, extra in _requires() if extra and name.startswith(wanted)]
    exact = [extra for name, extra in found if name == wanted] or [extra for _, extra in found]
    return likely if likely in exact else min(exact, key=lambda extra: len(requirements(extra)), default=None)


def _all_requirements(extras: str) -> list[str]:
    return list(dict.fromkeys(name for extra in extras.split(",") for name in requirements(extra)))


def requirements(extra: str) -> list[str]:
    """What an extra asks for, that of extras it names included."""
    found: dict[str, None] = {}
    for name, inner, versions, of in _requires():
        if of == extra and name == NAME:
            for other in inner.split(","):
                found |= dict.fromkeys(requirements(other.strip()))
        elif of == extra:
            found[f"{name}[{inner}]{versions}" if inner else f"{name}{versions}"] = None
    return list(found)


def _requires() -> Iterator[tuple[str, str, str, str]]:
    """(package, its extras, versions, the extra of ours that asks for it or "")."""
    try:
        lines = distribution(NAME).requires or []
    except PackageNotFoundError:
        lines = []
    for line in lines:
        if match := _REQUIREMENT.match(line.strip()):
            name, inner, versions, extra = (part or "" for part in match.groups())
            yield name.lower().replace("_", "-"), inner, versions.strip("() "), extra


def from_stick() -> bool:
    """Whether package/lfm_package/install.sh made this environment."""
    version = Path(sys.prefix).parent
    return version.parent.name == "versions" and any((version / name).exists() for name in ("complete", ".lfm-edge"))


def _clone() -> Path | None:
    """Return the folder that an editable installation points to; None for any other installation."""
    try:
        raw = json.loads(distribution(NAME).read_text("direct_url.json") or "{}")
        if not raw["dir_info"]["editable"]:
            return None
        return Path(unquote(urlparse(raw["url"]).path))
    except (PackageNotFoundError, ValueError, KeyError, TypeError):
        return None


def _shown(path: Path) -> str:
    """Return the path relative to the current folder where it lies inside of it, else as it is."""
    near = os.path.relpath(path)
    return near if not near.startswith("..") else str(path)
