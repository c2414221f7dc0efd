"""The runtime's wheels for another machine: resolved by pip with every tag that applies there, hashes pinned, and
checked as what that machine's own pip and Python would take.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from email.parser import HeaderParser
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from lfm_runtime.errors import EdgeError, command
from lfm_runtime.formats.files import is_sealed, sealed
from lfm_runtime.formats.manifest import file_hash
from lfm_runtime.formats.writer import replacing
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from lfm_package.targets import Platform

REQUIREMENTS = "requirements.txt"
_NAME = "lfm-edge"
_PROGRAM = "lfm-edge wheelhouse"
_INSTALLER = "pip"  # from its wheel an environment is filled where the system's Python has no ensurepip


class WheelhouseError(EdgeError):
    """pip could not resolve, fetch or build; or what came cannot run on the target."""


@dataclass(frozen=True)
class Wheel:
    """One file of a wheelhouse, or one that pip would fetch; `size` is then 0."""

    file: str
    sha256: str
    requires: tuple[str, ...]
    requires_python: str
    license: str
    size: int = 0
    unpacked: int = 0

    @property
    def name(self) -> str:
        """Name of the distribution, normalized as PyPI does."""
        return canonicalize_name(parse_wheel_filename(self.file)[0])

    @property
    def version(self) -> Version:
        """Version of the distribution, from the file's name."""
        return parse_wheel_filename(self.file)[1]

    @staticmethod
    def read(path: Path) -> Wheel:
        """Read a wheel's metadata and hash; raises WheelhouseError where it is no wheel or damaged."""
        try:
            with zipfile.ZipFile(path) as archive:
                name = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
                said = HeaderParser().parsestr(archive.read(name).decode())
                unpacked = sum(entry.file_size for entry in archive.infolist())
        except (zipfile.BadZipFile, StopIteration, UnicodeDecodeError) as e:
            raise WheelhouseError(f"{path} is not a wheel, or is damaged; make the wheelhouse again") from e
        return Wheel(
            path.name,
            file_hash(path),
            tuple(said.get_all("Requires-Dist") or ()),
            said["Requires-Python"] or "",
            said["License-Expression"] or said["License"] or "",
            path.stat().st_size,
            unpacked,
        )


def wheelhouse(platform: Platform, folder: Path, extras: Sequence[str] = ()) -> list[Wheel]:
    """Everything that `pip install --no-index` needs on the target, as `folder`: wheels, and requirements.txt with
    their hashes; of these extras of lfm-edge too.

    Raises:
        WheelhouseError: pip fails, or what came cannot run on the target.
        BundleError: `folder` is something else than a wheelhouse, or cannot be written.
    """
    with replacing(folder, check=_check_ours) as new:
        ours = _our_wheel(new)
        resolved = resolve(platform, ours, extras)
        pins = new / REQUIREMENTS
        pins.write_text(_pinned(platform, resolved), encoding="utf-8")
        _pip("download", "--dest", str(new), "--no-deps", "--require-hashes", "-r", str(pins), *_tags(platform))
        found = read_wheelhouse(new)
        check(platform, found)
        pins.write_text(sealed(_pinned(platform, found, commented=_INSTALLER), _PROGRAM), encoding="utf-8")
    return found


def read_wheelhouse(folder: Path) -> list[Wheel]:
    """The wheels of a folder, by name.

    Raises:
        WheelhouseError: it holds none, or damaged ones.
    """
    found = [Wheel.read(path) for path in sorted(folder.glob("*.whl"))]
    if not found:
        raise WheelhouseError(
            f"{folder} holds no wheels; make a wheelhouse with: "
            f"{command('wheelhouse', '--target', 'TARGET', '-o', folder)}"
        )
    return sorted(found, key=lambda wheel: wheel.name)


def resolve(platform: Platform, ours: Wheel, extras: Sequence[str] = ()) -> list[Wheel]:
    """What pip would fetch for the target beside our own wheel. Metadata only: nothing is downloaded.

    Two things pip's dry run takes from the Python that it runs on, not from the target: environment markers ("tomli;
    python_version < '3.11'"), and which Python a release needs. So both are looked at here: what is missing for the
    target is asked for by name, what its Python cannot run is excluded, and pip is asked again until neither is left.
    What only the Python here needs is left out.
    """
    ours = replace(ours, requires=tuple(str(requirement) for requirement in _for_target(platform, ours, extras)))
    wanted = {_INSTALLER, *ours.requires}
    unsuited: set[str] = set()
    while True:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write("\n".join(sorted(unsuited)))
            constraints.flush()
            report = _pip(
                "install",
                "--dry-run",
                "--ignore-installed",
                "--ignore-requires-python",
                "--target",
                "unused",
                "--report",
                "-",
                "--constraint",
                constraints.name,
                *_tags(platform),
                *sorted(wanted),
            )
        found = [_reported(entry) for entry in json.loads(report)["install"]]
        missing = {
            str(requirement) for wheel, requirement in _unmet(platform, [ours, *found]) if wheel is not ours
        } - wanted
        unsuited_now = {f"{wheel.name}!={wheel.version}" for wheel in found if not _suits(platform, wheel)}
        if not missing and not unsuited_now:
            found = _reached(platform, ours, found)
            check(platform, [ours, *found])
            return found
        wanted, unsuited = wanted | missing, unsuited | unsuited_now


def check(platform: Platform, wheels: Sequence[Wheel]) -> None:
    """That the target's Python and C library load each wheel, and that every requirement there is met by another.

    Raises:
        WheelhouseError: naming the first that is not so.
    """
    loadable = set(platform.tags)
    names = [wheel.name for wheel in wheels]
    for wheel in wheels:
        if not parse_wheel_filename(wheel.file)[3] & loadable:
            raise WheelhouseError(f"{wheel.file} does not run on {platform}")
        if not _suits(platform, wheel):
            raise WheelhouseError(f"{wheel.file} needs Python {wheel.requires_python}; {platform}")
        if names.count(wheel.name) > 1:
            raise WheelhouseError(f"{wheel.name} is there more than once; make the wheelhouse again")
    for wheel, requirement in _unmet(platform, wheels):
        raise WheelhouseError(f"{wheel.file} needs {requirement}, which is not among the wheels for {platform}")


def glibc_needed(wheels: Iterable[Wheel]) -> int:
    """The minor of the oldest glibc 2.x that loads all of them; 0 where none has compiled code."""
    needed = 0
    for wheel in wheels:
        minors = [
            int(found[1])
            for tag in parse_wheel_filename(wheel.file)[3]
            if (found := re.match(r"manylinux_2_(\d+)_", tag.platform))
        ]
        legacy = [17 for tag in parse_wheel_filename(wheel.file)[3] if tag.platform.startswith("manylinux2014")]
        needed = max(needed, min([*minors, *legacy], default=0))
    return needed


def _suits(platform: Platform, wheel: Wheel) -> bool:
    return SpecifierSet(wheel.requires_python).contains(platform.markers["python_full_version"])


def _unmet(platform: Platform, wheels: Sequence[Wheel]) -> list[tuple[Wheel, Requirement]]:
    """Requirements that hold on the target and that no wheel meets, with who has them."""
    there = {wheel.name: wheel.version for wheel in wheels}

    def met(requirement: Requirement) -> bool:
        version = there.get(canonicalize_name(requirement.name))
        return version is not None and requirement.specifier.contains(version, prereleases=True)

    return [
        (wheel, requirement) for wheel in wheels for requirement in _for_target(platform, wheel) if not met(requirement)
    ]


def _for_target(platform: Platform, wheel: Wheel, extras: Iterable[str] = ()) -> list[Requirement]:
    """The requirements of a wheel and of these extras of it that hold on the platform, without markers."""
    found = []
    for text in wheel.requires:
        requirement = Requirement(text)
        marker, requirement.marker = requirement.marker, None
        if marker is None or any(marker.evaluate({**platform.markers, "extra": extra}) for extra in ("", *extras)):
            found.append(requirement)
    return found


def _reached(platform: Platform, ours: Wheel, wheels: Sequence[Wheel]) -> list[Wheel]:
    """Those wheels that are needed on the platform: by ours, or by one of them, with the extras it asks for."""
    there = {wheel.name: wheel for wheel in wheels}
    reached: set[tuple[str, frozenset[str]]] = set()
    look = [Requirement(_INSTALLER), *_for_target(platform, ours)]
    while look:
        requirement = look.pop()
        one = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if one not in reached:
            reached.add(one)
            look += _for_target(platform, there[one[0]], requirement.extras)
    return [wheel for wheel in wheels if wheel.name in {name for name, _ in reached}]


def _reported(entry: dict[str, Any]) -> Wheel:
    """Return the wheel that an entry of pip's installation report describes."""
    said, download = entry["metadata"], entry["download_info"]
    file, sha256 = download["url"].rsplit("/", 1)[1], download["archive_info"]["hashes"]["sha256"]
    return Wheel(file, sha256, tuple(said.get("requires_dist") or ()), said.get("requires_python") or "", license="")


def _pinned(platform: Platform, wheels: Iterable[Wheel], *, commented: str = "") -> str:
    """Requirements with hashes; the wheel named `commented` is there, but not to be installed."""
    lines = [
        f"{'# ' if wheel.name == commented else ''}{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}"
        for wheel in wheels
    ]
    return f"# {platform}\n" + "\n".join(sorted(lines)) + "\n"


def _our_wheel(folder: Path) -> Wheel:
    """This lfm-edge as a wheel: from where it was installed (PEP 610), or else from the index."""
    installed = distribution(_NAME)
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    wanted = f"{_NAME}=={installed.version}"
    if "vcs_info" in origin:
        wanted = f"{_NAME} @ {origin['vcs_info']['vcs']}+{origin['url']}@{origin['vcs_info']['commit_id']}"
    elif origin:
        wanted = f"{_NAME} @ {origin['url']}"
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), wanted)
    return Wheel.read(next(folder.glob("lfm_edge-*.whl")))


def _tags(platform: Platform) -> list[str]:
    words = ["--only-binary=:all:", "--implementation", "cp", "--python-version", platform.system.python]
    for abi in (f"cp{platform.version[0]}{platform.version[1]}", "abi3", "none"):
        words += ["--abi", abi]
    for name in platform.platforms:
        words += ["--platform", name]
    return words


def _pip(*words: str) -> str:
    program = [sys.executable, "-m", "pip", *words, "--quiet", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        if "No space left on device" in done.stderr or "Disk quota exceeded" in done.stderr:
            raise WheelhouseError(
                f"pip {words[0]} failed: no space is left in the output's folder or in {tempfile.gettempdir()}; free "
                "some, or set TMPDIR"
            )
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it says nothing"]
        said = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        without = "No module named pip" in said
        advice = (
            f"install it: {sys.executable} -m ensurepip" if without else "check that the package index can be reached"
        )
        raise WheelhouseError(f"pip {words[0]} failed: {said.removeprefix('ERROR: ')}; {advice}")
    return done.stdout


def _check_ours(folder: Path) -> None:
    """Raise WheelhouseError for a folder that has something else than `wheelhouse` wrote: a wheel of the user's too."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise WheelhouseError(f"{folder} is a file; name a folder")
    pins, known = folder / REQUIREMENTS, ""
    with suppress(OSError, UnicodeDecodeError):
        known = pins.read_text(encoding="utf-8") if is_sealed(pins) else ""
    ours = {path for path in folder.glob("*.whl") if path.is_file() and file_hash(path) in known}
    strange = sorted({*folder.iterdir()} - ours - ({pins} if known else set()), key=lambda path: (path != pins, path))
    if strange:
        raise WheelhouseError(
            f"{strange[0]} was not written by {_PROGRAM}, or was edited since; choose another output than {folder}"
        )
