"""A bundle appears whole or not at all: everything is written beside it, then the two change places.

A killed writer leaves a folder `.NAME.partial-…` behind; the next one that writes this bundle removes it. Writers of
one folder wait for each other, so that neither loses the other's variants.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lfm_runtime.errors import BundleError, EdgeError
from lfm_runtime.formats.files import check_outside_bundles, to_write
from lfm_runtime.formats.manifest import BESIDE_MANIFEST, MANIFEST, Manifest

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing(bundle: Path, check: Callable[[Path], None] | None = None, *, elsewhere: bool = True) -> Iterator[Path]:
    """A fresh folder to fill; when the block ends well it becomes `bundle`, else it is removed and `bundle` stays.
    `check` raises for a folder that must not be replaced; by default everything but a bundle. `elsewhere`: whether the
    user could name another one.

    Raises:
        BundleError: `bundle` is something else than a bundle, cannot be written, or the disk is full.
        EdgeError: it lies inside a bundle.
    """
    bundle = Path(os.path.abspath(bundle))  # noqa: PTH100  (resolve() would follow a link at the end); "." must get a name; links in its parents are followed as they stand
    try:
        check_outside_bundles(bundle)
        check_no_link(bundle)
        bundle.parent.mkdir(parents=True, exist_ok=True)
        with _locked(bundle):
            _recover(bundle)
            (check or check_replaceable)(bundle)
            if bundle.is_dir() and not os.access(bundle, os.W_OK):  # renaming it would need its parent's alone
                raise BundleError(
                    f"{bundle} is read-only; {to_write(bundle)}{', or choose another output' * elsewhere}"
                )
            staging = Path(tempfile.mkdtemp(prefix=f".{bundle.name}.partial-", dir=bundle.parent))
            try:
                yield staging
                staging.chmod(0o755)  # mkdtemp makes it private
                for path in staging.rglob("*"):
                    if path.is_file():
                        _sync(path)
                _swap(staging, bundle)
            except EdgeError as e:  # whoever reads it finds the folder that he named, not one that is gone
                if e.args and isinstance(e.args[0], str):
                    e.args = (e.args[0].replace(str(staging), str(bundle)), *e.args[1:])
                raise
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        denied = e.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        free = f", {shutil.disk_usage(bundle.parent).free >> 20} MiB free" if full and bundle.parent.is_dir() else ""
        there = next((place for place in bundle.parents if place.exists()), bundle)
        do = "free some space" if full else to_write(there) if denied else ""
        other = "choose another output" if elsewhere else ""
        do = ", or ".join(filter(None, (do, other))) or "try again"
        raise BundleError(f"cannot write {bundle}: {e.strerror or e}{free}; nothing has changed there; {do}") from e


def carry_over(bundle: Path, folder: Path, names: Iterable[str]) -> None:
    """The bundle's files `names` in the new folder as well: hard links where the file system can, copies elsewhere. A
    link becomes the file: what is written there later would be written through it, into the hub's cache.

    Raises:
        BundleError: the bundle lacks one.
    """
    for name in names:
        if not (bundle / name).is_file():
            said = f"{bundle / name} is missing, which {MANIFEST} names"
            raise BundleError(f"{said}; copy the bundle again, or remove it to make it anew")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        source = (bundle / name).resolve()
        try:
            os.link(source, folder / name)
        except OSError:
            shutil.copyfile(source, folder / name)


@contextmanager
def _locked(bundle: Path) -> Iterator[None]:
    """Wait for writers of the same folder, then keep others waiting. The lock is the folder's own: no lock file is left
    behind, and the kernel releases it when a process dies.
    """
    descriptor = os.open(bundle.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_no_link(output: Path) -> None:
    """Raise BundleError for a link, which a new folder or archive would replace instead of what it leads to."""
    if output.is_symlink():
        raise BundleError(f"{output} is a link; name what it leads to: {output.resolve()}")


def check_place(folder: Path) -> None:
    """Before long work, raise BundleError where `replacing` could not write this folder."""
    check_outside_bundles(folder)
    check_no_link(folder)
    folder = Path(os.path.abspath(folder))  # noqa: PTH100  (links stay); "." must get a name
    there = next((place for place in folder.parents if place.exists()), folder)
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=f".{folder.name}."):
            pass
    except OSError as e:
        raise BundleError(f"{folder} cannot be written ({there}: {e.strerror or e}); choose another output") from e


def check_replaceable(bundle: Path) -> None:
    """Only what an export made may be replaced, and only when nothing else lies in it, and not inside a bundle."""
    check_outside_bundles(bundle)
    check_no_link(bundle)
    if bundle.exists() and not bundle.is_dir():
        raise BundleError(f"{bundle} is not a folder; choose another output")
    if not bundle.is_dir() or not any(bundle.iterdir()):
        return
    try:
        manifest = Manifest.read(bundle)
    except BundleError as e:
        damage = str(e).split(";")[0]
        raise BundleError(f"{damage}, so what is in {bundle} is not known; remove it, or choose another output") from e
    if manifest is None or not manifest.is_ours:
        raise BundleError(f"{bundle} is a folder that lfm-edge did not make; choose another output")
    known = {*BESIDE_MANIFEST, *manifest.files}
    for path in bundle.rglob("*"):
        if not path.is_dir() and path.relative_to(bundle).as_posix() not in known:
            raise BundleError(f"{path} is not part of the bundle and would be lost; move it or choose another output")


def _recover(bundle: Path) -> None:
    """After exports that were killed: put back a bundle caught between two renames, remove half-written ones."""
    for path in sorted(bundle.parent.glob(f".{bundle.name}.partial-*")):
        if path.name.endswith(".old") and not bundle.exists():
            path.rename(bundle)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(staging: Path, bundle: Path) -> None:
    """Put `staging` in the place of `bundle`; what was there ends up at `staging`, for removal."""
    if not bundle.exists():
        staging.rename(bundle)
        return
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(_AT_FDCWD, bytes(staging), _AT_FDCWD, bytes(bundle), _RENAME_EXCHANGE) == 0:
        return
    # Where the kernel or file system cannot exchange (macOS, some network disks): two renames, a moment without a
    # bundle.
    old = staging.with_name(staging.name + ".old")
    bundle.rename(old)
    try:
        staging.rename(bundle)
    except OSError:
        old.rename(bundle)
        raise
    shutil.rmtree(old, ignore_errors=True)
