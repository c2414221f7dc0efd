"""One variant of a bundle as one file: only what that variant reads, named and hashed, the same bytes from the same
inputs.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

from lfm_profiles import Profile, to_toml
from lfm_runtime.bundle import Bundle, client_files
from lfm_runtime.errors import BundleError, SettingError
from lfm_runtime.formats.files import check_output, check_room
from lfm_runtime.formats.manifest import MANIFEST, PROFILE, SIGNATURE, SUMS, File, Manifest, file_hash
from lfm_runtime.formats.writer import check_no_link

from lfm_package.sbom import is_bill, sbom
from lfm_package.signature import sign
from lfm_package.wheelhouse import Wheel

_MOST_PARTS = 1000


@dataclass(frozen=True)
class Extras:
    """What is packed beside the variants, and how the archive is signed and split."""

    profile: Profile | None = None  # packed as profile.toml, all values resolved
    wheels: Sequence[Wheel] = ()  # that it will run on, for the bill of materials
    sign_with: Path | None = None  # a key of ssh: SHA256SUMS.sig is packed as well
    golden: Mapping[str, Path | bytes] = field(default_factory=dict)  # a golden set: name in the bundle → content
    split: int = 0  # largest size of a part in bytes, for media that hold no larger files; 0 is one file
    with_extras: Sequence[str] = ()  # of lfm-edge, whose wheels a stick has as well


NOTHING = Extras()


def pack(folder: Path, variants: Sequence[str], output: Path, extras: Extras = NOTHING) -> list[Path]:
    """Write variants of a bundle as a tar file, or as parts of it. What was there before stays until all is written.

    Args:
        folder: the bundle.
        variants: the first is what the device takes by default.
        output: NAME.tar. The files lie in a folder NAME inside.
        extras: profile, wheels, key, size of parts.

    Returns:
        The files written: the archive or its parts NAME.tar.000, NAME.tar.001 …; NAME.tar.sha256 (of the whole);
        NAME.cdx.json, the bill of materials.

    Raises:
        BundleError: not a bundle of lfm-edge, a variant or file is missing or damaged, or the output cannot be written.
        SettingError: an output of another kind; a key that cannot sign.
    """
    manifest = reduced(folder, variants)
    texts = {name: text.encode() for name, text in client_files(Bundle.open(folder), manifest).items()}
    texts |= {PROFILE: to_toml(extras.profile, named=True).encode()} if extras.profile else {}
    texts |= {name: data for name, data in extras.golden.items() if isinstance(data, bytes)}
    places = {name: path for name, path in extras.golden.items() if isinstance(path, Path)}
    manifest = manifest.with_files({n: File(path.stat().st_size, file_hash(path)) for n, path in places.items()})
    for name, data in texts.items():
        manifest = manifest.with_files({name: File(len(data), hashlib.sha256(data).hexdigest())})
    manifest = replace(manifest, files=dict(sorted(manifest.files.items())))
    texts[MANIFEST] = manifest.to_text().encode()
    sums = {name: file.sha256 for name, file in manifest.files.items()} | {
        MANIFEST: hashlib.sha256(texts[MANIFEST]).hexdigest()
    }
    texts[SUMS] = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()
    if extras.sign_with:
        texts[SIGNATURE] = _signature(texts[SUMS], extras.sign_with)
    if output.suffix != ".tar":
        raise SettingError(f"{output} is not a .tar; the output must be one (compression hardly makes weights smaller)")
    top = output.name.removesuffix(".tar")
    _check_space(output, sum(file.bytes for file in manifest.files.values()))
    parts = _Parts(output, extras.split)
    try:
        with parts, tarfile.open(fileobj=cast("IO[bytes]", parts), mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for name in sorted({*manifest.files, *texts}):
                if name in texts:
                    tar.addfile(entry(f"{top}/{name}", len(texts[name])), io.BytesIO(texts[name]))
                else:
                    _add(tar, places.get(name, folder / name), f"{top}/{name}", manifest.files[name])
        return parts.finish({f"{output.name}.sha256": parts.sum, f"{top}.cdx.json": sbom(top, manifest, extras.wheels)})
    except OSError as e:
        raise BundleError(f"cannot write {output}: {e.strerror or e}; existing files are unchanged") from e
    finally:
        parts.discard()


def is_packed(archive: Path, holds: str = MANIFEST) -> bool:
    """Whether lfm-edge pack wrote this file, or its first part: a tar of one folder with its name and a manifest.
    `holds`: another file that tells, such as a stick's install.sh.
    """
    top = re.sub(r"\.tar(\.\d{3})?$", "", archive.name)
    try:
        with tarfile.open(archive, "r:") as tar:
            return any(member.name == f"{top}/{holds}" for member in itertools.islice(tar, 100))
    except tarfile.TarError:
        return False


def check_place(output: Path, *, signed: bool, force: bool) -> None:
    """Before long work: raise EdgeError where `pack` would replace a file that it did not write: the archive, parts of
    one, the sum or the bill of materials; or a signed archive by one that is not `signed`.
    """
    name = output.name
    if not name:
        raise SettingError(f"{output} is a folder; name a file, such as {output / 'cam.tar'}")
    sums, bill = output.with_name(f"{name}.sha256"), output.with_name(f"{name.removesuffix('.tar')}.cdx.json")
    parts = sorted(output.parent.glob(f"{glob.escape(name)}.[0-9][0-9][0-9]"))
    for path, ours in (
        (output, is_packed),
        *((path, is_packed) for path in parts[:1]),
        (sums, lambda path: re.fullmatch(rf"[0-9a-f]{{64}}  {re.escape(name)}\n", path.read_text()) is not None),
        (bill, is_bill),
    ):
        check_no_link(path)
        check_output(path, "lfm-edge pack", ours, force=force)
    for path in (output, *parts[:1]):
        if not (force or signed) and path.exists() and path.stat().st_size and is_packed(path, SIGNATURE):
            raise BundleError(f"{path} is signed; sign this one too: --sign KEY, or replace it with --force")


def reduced(folder: Path, variants: Sequence[str]) -> Manifest:
    """The manifest of these variants alone.

    Raises:
        BundleError: not a bundle of lfm-edge, or it lacks one of them.
    """
    manifest, bundle = Manifest.of(folder), Bundle.open(folder)
    for variant in variants:
        bundle.graphs(variant)
    return manifest.only(variants)


def _signature(sums: bytes, key: Path) -> bytes:
    with tempfile.TemporaryDirectory(prefix="lfm-edge-") as folder:
        (Path(folder) / SUMS).write_bytes(sums)
        return sign(Path(folder) / SUMS, key).read_bytes()


def entry(name: str, size: int, mode: int = 0o644) -> tarfile.TarInfo:
    """Return a tar entry that holds no time, owner or permissions of this machine."""
    made = tarfile.TarInfo(name)
    made.size, made.mode, made.mtime = size, mode, 0
    return made


def _add(tar: tarfile.TarFile, path: Path, name: str, wanted: File) -> None:
    """Add a file to the archive; raises BundleError where its SHA-256 is not the manifest's."""
    with path.open("rb") as f:
        reader = _Hashing(f)
        tar.addfile(entry(name, int(wanted.bytes)), cast("IO[bytes]", reader))
    if reader.digest.hexdigest() != wanted.sha256:
        raise BundleError(f"{path} is damaged (its SHA-256 is not {MANIFEST}'s); copy the bundle again")


class _Hashing:
    """Reads a file and hashes what was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.digest = hashlib.sha256()
        self._file = file

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self.digest.update(block)
        return block


class _Parts(io.RawIOBase):
    """A file that is written as parts of at most so many bytes, under temporary names until `finish`."""

    def __init__(self, output: Path, size: int) -> None:
        self._output, self._size = output, size
        self._folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
        self._written: list[Path] = []
        self._file: IO[bytes] | None = None
        self._room, self._digest = 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        total = len(view)
        while len(view):
            if self._file is None or (self._size and not self._room):
                self._next()
            block = view[: self._room] if self._size else view
            assert self._file is not None
            self._file.write(block)
            self._room -= len(block)
            view = view[len(block) :]
        return total

    def _next(self) -> None:
        self._end()
        if len(self._written) == _MOST_PARTS:
            raise SettingError(f"more than {_MOST_PARTS} parts of {self._size} bytes; make them larger")
        name = f"{self._output.name}.{len(self._written):03d}" if self._size else self._output.name
        self._written.append(self._folder / name)
        self._file = self._written[-1].open("wb")
        self._room = self._size

    def _end(self) -> None:
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    @property
    def sum(self) -> str:
        """SHA-256 of the whole archive, as a line of sha256sum."""
        return f"{self._digest.hexdigest()}  {self._output.name}\n"

    def finish(self, texts: Mapping[str, str]) -> list[Path]:
        """Move all parts into place, write `texts` beside them and return the paths."""
        self._end()
        for name, text in texts.items():
            (self._folder / name).write_text(text, encoding="utf-8")
        places: list[Path] = []
        for path in self._output.parent.iterdir():  # of an earlier one: they would be taken for, or joined with, these
            if path.name == self._output.name or re.fullmatch(rf"{re.escape(self._output.name)}\.\d{{3}}", path.name):
                path.unlink()
        for path in [*self._written, *(self._folder / name for name in texts)]:
            place = self._output.with_name(path.name)
            path.replace(place)
            places.append(place)
        return places

    def discard(self) -> None:
        """Remove the temporary folder, with whatever `finish` has not moved."""
        if self._file:
            self._file.close()
            self._file = None
        shutil.rmtree(self._folder, ignore_errors=True)


def _check_space(output: Path, size: int) -> None:
    if not output.absolute().parent.is_dir():
        raise SettingError(f"{output.absolute().parent} is not a folder; make it, or write elsewhere")
    check_room(output.absolute().parent, size, output.name, BundleError)
