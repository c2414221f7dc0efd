"""A packed bundle becomes a folder: all of it, verified, or nothing. The archive may come from anywhere and is not
trusted.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import tarfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from lfm_runtime.errors import BundleError
from lfm_runtime.formats.files import check_room, holds_a_model
from lfm_runtime.formats.manifest import BESIDE_MANIFEST, MANIFEST, PROFILE, SUMS, Manifest, file_hash
from lfm_runtime.formats.writer import check_replaceable, replacing

from lfm_package.verify import verify

_DAMAGE = (tarfile.TarError, EOFError)
_LARGEST_MANIFEST = 64 << 20
_BLOCK = 1 << 20
_LONGEST_DESCRIPTION = 1 << 20


def unpack(archive: Path, folder: Path, *, signers: Path | None = None) -> None:
    """The bundle in `archive`, every byte verified, as `folder`; a bundle that was there is replaced when all is well.
    One with graphs that the archive lacks is not.

    Args:
        archive: NAME.tar; where that is in parts NAME.tar.000, NAME.tar.001 …, they are read as one.
        folder: the bundle's place.
        signers: who may have signed it (see signature.py); None asks for no signature.

    Raises:
        BundleError: not an archive of lfm-edge, cut off, tampered with, damaged, not signed as asked, or no room,
            or `folder` has graphs that the archive lacks; `folder` is as before.
        SettingError: `signers` is no file, or ssh-keygen is missing.
    """
    if archive.is_dir():
        raise BundleError(f"{archive} is a folder; {_what_folder(archive)}")
    try:
        entries = _looked_through(archive)
        wanted = sum(entry.size for entry in entries.values())
        parent = folder.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        check_room(parent, wanted, str(archive), BundleError)
        with replacing(folder, lambda there: _check_nothing_lost(there, entries)) as new, _opened(archive) as tar:
            for name, entry in entries.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(entry)
                assert source is not None
                with source, (new / name).open("wb") as f:
                    shutil.copyfileobj(source, f, _BLOCK)
            if problems := verify(new, signers=signers):
                raise BundleError(f"{archive}: {problems[0].replace(f'{new}/', '')}")
    except _DAMAGE as e:
        raise BundleError(f"{archive} {_no_tar(archive)}") from e
    except FileNotFoundError as e:
        raise BundleError(f"{e.filename or archive} does not exist; check the path") from e
    except OSError as e:
        raise BundleError(f"{archive} cannot be read: {e.strerror or e}") from e


def _check_nothing_lost(there: Path, entries: Collection[str]) -> None:
    check_replaceable(there)
    old = Manifest.read(there)
    named = old.files.get(PROFILE) if old else None
    if named and (edited := there / PROFILE).is_file() and file_hash(edited) != named.sha256:
        raise BundleError(f"{edited} was edited and would be lost; move it elsewhere, and give it to --profile")
    if old and (lost := sorted(name for name in old.graphs if name not in entries)):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise BundleError(
            f"{there} has {lost[0]}{more}, which the archive lacks and would be lost; choose another output"
        )


def _what_folder(folder: Path) -> str:
    """What to do with a folder instead of unpacking it."""
    if (folder / "stick.conf").is_file():
        return f"install what is on the stick: sh {shlex.quote(str(folder / 'install.sh'))}"
    if holds_a_model(folder):
        return "a bundle in a folder needs no unpacking"
    return "name the .tar that lfm-edge pack wrote"


def _no_tar(archive: Path) -> str:
    """What is wrong with a file that cannot be read as a tar, and what to do."""
    begin = b""
    with suppress(FileNotFoundError), archive.open("rb") as f:  # there may be parts of it alone
        begin = f.read(6)
    if begin[:2] == b"\x1f\x8b":
        return f"is compressed; unpack it first: gunzip {archive}"
    if begin[:6] == b"\xfd7zXZ\0":
        return f"is compressed; unpack it first: unxz {archive}"
    if begin[:4] == b"\x28\xb5\x2f\xfd":
        return f"is compressed; unpack it first: zstd -d {archive}"
    if re.fullmatch(r"\.\d{3}", archive.suffix):
        return f"is one part of several; name the whole, whose parts are found: {archive.with_suffix('')}"
    if parts := _parts(archive):
        return f"is cut off: its last part is {parts[-1].name}; copy the parts after it, or that one again"
    return "is not a tar file, or is cut off; copy it again"


def _looked_through(archive: Path) -> dict[str, tarfile.TarInfo]:
    """Name inside the bundle → entry, every name and size checked before anything is written."""
    entries: dict[str, tarfile.TarInfo] = {}
    tops = set()
    with _opened(archive) as tar:
        for entry in tar:
            path = PurePosixPath(entry.name)  # "./cam/x" is cam/x
            if entry.isdir() and not path.is_absolute() and ".." not in path.parts:
                continue  # other programs name folders as well
            if path.is_absolute() or ".." in path.parts or {"\\", "\0"} & set(entry.name) or len(path.parts) < 2:
                alone = len(path.parts) == 1 and not path.is_absolute() and path.name in (SUMS, MANIFEST, "config.json")
                raise BundleError(
                    f"{archive} holds {entry.name!r}, "
                    + (
                        "outside of a folder; make it with lfm-edge pack, or with the folder's name: tar cf cam.tar cam"
                        if alone
                        else "a name outside of its folder; do not use it"
                    )
                )
            if not entry.isreg() or entry.issparse():
                raise BundleError(f"{archive} holds {entry.name!r}, which is a link, a device or sparse; do not use it")
            tops.add(path.parts[0])
            name = PurePosixPath(*path.parts[1:]).as_posix()
            if name in entries:
                raise BundleError(f"{archive} holds {entry.name!r} twice; do not use it")
            entries[name] = entry
        if len(tops) != 1 or MANIFEST not in entries:
            raise BundleError(f"{archive} is not a bundle packed by lfm-edge: no {MANIFEST} in one folder")
        for name in BESIDE_MANIFEST & entries.keys():
            if entries[name].size > _LARGEST_MANIFEST:
                raise BundleError(f"{archive}: {name} is too large; do not use it")
        source = tar.extractfile(entries[MANIFEST])
        assert source is not None
        try:
            files = json.loads(source.read())["files"]
            sizes = {name: int(entry["bytes"]) for name, entry in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as e:
            raise BundleError(f"{archive}: {MANIFEST} is damaged: it lists no files and sizes; copy it again") from e
    for name, entry in entries.items():
        if name not in BESIDE_MANIFEST and entry.size != sizes.get(name):
            said = f"{sizes[name]} bytes" if name in sizes else "nothing"
            raise BundleError(
                f"{archive} holds {name} with {entry.size} bytes, its {MANIFEST} says {said}; do not use it"
            )
    if missing := sorted(sizes.keys() - entries.keys()):
        raise BundleError(f"{archive} lacks {missing[0]}, which its {MANIFEST} names; copy it again")
    return entries


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    parts = _parts(archive)
    mode: Any = "r:"  # no compression: what is not looked at cannot do harm
    if archive.exists() and parts:
        raise BundleError(f"both {archive} and {parts[0].name} exist, perhaps from different runs; remove one")
    if not parts:
        with tarfile.open(archive, mode, tarinfo=_Entry) as tar:
            yield tar
        return
    for n, part in enumerate(parts):
        if part.suffix != f".{n:03d}":
            raise BundleError(f"{archive}.{n:03d} is missing between the parts of {archive.name}; copy it again")
    with io.BufferedReader(_Joined(parts)) as stream, tarfile.open(fileobj=stream, mode=mode, tarinfo=_Entry) as tar:
        yield tar


def _parts(archive: Path) -> list[Path]:
    folder = archive.parent
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return [folder / name for name in names if re.fullmatch(rf"{re.escape(archive.name)}\.\d{{3}}", name)]


class _Entry(tarfile.TarInfo):
    """Python reads what describes an entry whole into memory, however long it says it is."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        described = (
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
        )
        if self.type in described and self.size > _LONGEST_DESCRIPTION:
            raise tarfile.ReadError("an entry's description is too long")
        return super()._proc_member(tar)  # type: ignore[misc]


class _Joined(io.RawIOBase):
    """Files one after the other, read as one: joining them first would take their room twice."""

    def __init__(self, parts: list[Path]) -> None:
        self._files = [part.open("rb") for part in parts]
        ends, end = [], 0
        for part in parts:
            end += part.stat().st_size
            ends.append(end)
        self._ends, self._at = ends, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._ends[-1]}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        for file, end in zip(self._files, self._ends, strict=True):
            if self._at < end:
                size = min(len(buffer), end - self._at)
                file.seek(-(end - self._at), io.SEEK_END)
                block = file.read(size)
                buffer[: len(block)] = block
                self._at += len(block)
                return len(block)
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()
