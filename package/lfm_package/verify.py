"""Is a bundle whole, unchanged, and of itself alone? For bundles that came over a network or a stick."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from lfm_runtime.bundle import Bundle, check_names, in_a_cache
from lfm_runtime.engine.execution import Execution
from lfm_runtime.engine.loader import check_onnxruntime, load_session
from lfm_runtime.engine.prepared import remove_damaged
from lfm_runtime.errors import BundleError, EdgeError, command
from lfm_runtime.formats.contract import GRAPHS
from lfm_runtime.formats.files import check_no_pointer
from lfm_runtime.formats.manifest import BESIDE_MANIFEST, MANIFEST, SUMS, File, Manifest, file_hash, unlike_sums
from lfm_runtime.formats.onnx_file import external_files

from lfm_package.signature import check_signature

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Progress = Callable[[int, int], None]
"""Called with (bytes hashed, bytes in all)."""


def verify(folder: Path, progress: Progress = lambda *_: None, *, signers: Path | None = None) -> list[str]:
    """Everything that is wrong with a bundle; nothing is loaded that was not hashed before.

    Args:
        folder: the bundle.
        progress: told how far the hashing is.
        signers: who may have signed it (see signature.py); None asks for no signature.

    Raises:
        BundleError: it is no bundle of lfm-edge, or of a newer schema.
        SettingError: `signers` is no file, or ssh-keygen is missing.
    """
    if not folder.is_dir():
        packed = f"; unpack it, which verifies it: {command('unpack', folder, '-o', folder.with_suffix(''))}"
        raise BundleError(f"{folder} is not a folder{packed if folder.suffix == '.tar' else '; name a bundle'}")
    check_names(folder)
    if (folder / "stick.conf").is_file():
        raise BundleError(
            f"{folder} is a stick, not a bundle; its install.sh checks it before it installs: sh "
            f"{shlex.quote(str(folder / 'install.sh'))}"
        )
    if problems := _not_plain(folder):
        return problems  # what is not a plain file is not read
    manifest = Manifest.read(folder)
    if manifest is None:
        if (folder / SUMS).exists():
            Bundle.open(folder)  # which says what is missing
        raise BundleError(f"{folder} has no {MANIFEST}: nothing to compare with; make a bundle with: lfm-edge export")
    if in_a_cache(folder):
        manifest = manifest.of_whole_variants(folder)
    if problems := _strangers(folder, set(manifest.files)):
        return problems
    if signers is not None:
        try:
            check_signature(folder / SUMS, signers)
        except BundleError as e:
            return [str(e)]
    problems = [*_hashes(folder, manifest.files, progress), *unlike_sums(folder, manifest.files)]
    if problems:
        return problems
    for name in sorted(manifest.files):
        if name.endswith(".onnx"):
            problems += _outside(folder, name, manifest.files)
    return problems or Bundle.open(folder).contradictions() or _unloadable(folder)


def _not_plain(folder: Path) -> list[str]:
    """Return a message for each entry that is neither a plain file nor a folder."""
    found = []
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        if not os.access(place, os.R_OK | os.X_OK):
            raise BundleError(f"{place} cannot be read; change its permissions")
    for path in sorted(folder.rglob("*")):
        name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
        if _is_of_hub_cache(folder, path):
            mode = path.resolve().lstat().st_mode
        if stat.S_ISLNK(mode):
            found.append(f"{name} is a link; a bundle has none: copy the file itself")
        elif not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            found.append(f"{name} is not a plain file; remove it")
    return found


def _is_of_hub_cache(folder: Path, path: Path) -> bool:
    """Whether a file is a link as huggingface_hub makes them: snapshots/REVISION/NAME to blobs/HASH of the same
    repository.
    """
    snapshot = folder.resolve()
    return (
        path.is_symlink()
        and snapshot.parent.name == "snapshots"
        and path.resolve().parent == snapshot.parents[1] / "blobs"
    )


def _strangers(folder: Path, named: set[str]) -> list[str]:
    """Files that the manifest does not name, and those it names that are not there."""
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return [f"{name} is not named by {MANIFEST}; remove it" for name in sorted(there - named - BESIDE_MANIFEST)] + [
        f"{name} is missing; copy the bundle again" for name in sorted(named - there)
    ]


def _hashes(folder: Path, files: Mapping[str, File], progress: Progress) -> list[str]:
    found = []
    total, done = sum(entry.bytes for entry in files.values()), 0
    for name, wanted in files.items():
        check_no_pointer(folder / name, BundleError)
        size = (folder / name).stat().st_size
        if size != wanted.bytes:
            found.append(f"{name} has {size} bytes, {MANIFEST} says {wanted.bytes}; copy the bundle again")
        elif file_hash(folder / name) != wanted.sha256:
            found.append(f"{name} is damaged (its SHA-256 is not {MANIFEST}'s); copy the bundle again")
        done += wanted.bytes
        progress(done, total)
    return found


def _outside(folder: Path, name: str, files: Mapping[str, File]) -> list[str]:
    """Weights that a graph looks for elsewhere than in the bundle's own files."""
    try:
        places = external_files(folder / name)
    except BundleError as e:
        return [str(e)]
    found = []
    for place in sorted(places):
        inside = PurePosixPath(name).parent / place
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts or inside.as_posix() not in files:
            found.append(f"{name} takes weights from {place}, which is not a file of the bundle; do not use it")
    return found


def verify_prepared(folder: Path) -> list[str]:
    """What is damaged of the graphs that lfm-edge prepare wrote beside a bundle; it is removed."""
    bundle = Bundle.open(folder)
    sources = [path for graphs in bundle.variants.values() for path in graphs.values()]
    return remove_damaged(bundle, sources)


def _unloadable(folder: Path) -> list[str]:
    """Variants whose graphs onnxruntime cannot load. Weights stay mapped, one graph at a time."""
    bundle = Bundle.open(folder)
    graphs = {stem.stem: stem for stem in GRAPHS}
    found: dict[Path, str] = {}
    for variant in bundle.variants:
        for stem, path in bundle.graphs(variant)[1].items():
            if path in found:
                continue
            found[path] = ""
            try:
                check_onnxruntime(bundle, path)
                session = load_session(path, graphs[stem], Execution(1, packed=False))
                found[path] = _unlike(bundle.name_of(path), bundle.manifest, session)
            except EdgeError as e:
                found[path] = str(e)
    return [problem for problem in found.values() if problem]


def _unlike(name: str, manifest: Manifest | None, session: InferenceSession) -> str:
    """The first input or output of a graph that the manifest describes otherwise, as a message; "" where none is."""
    entry = manifest.graphs.get(name) if manifest else None
    if entry is None:
        return ""
    for edges, values in ((entry.inputs, session.get_inputs()), (entry.outputs, session.get_outputs())):
        there = {value.name: tuple(n if isinstance(n, int) else None for n in value.shape) for value in values}
        said = {edge: tuple(n if isinstance(n, int) else None for n in edges[edge].shape) for edge in edges}
        if odd := sorted(edge for edge in there.keys() | said.keys() if there.get(edge) != said.get(edge)):
            return f"{MANIFEST} describes {odd[0]} of {name} otherwise than the graph; copy or export the bundle again"
    return ""
