"""A bundle appears whole or not at all: everything is written beside it, then the two change places.

A killed export leaves a folder `.NAME.partial-PID` behind; the next export of that bundle removes it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lfm_runtime.bundle import MANIFEST

from lfm_export.config import CheckpointError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing(bundle: Path) -> Iterator[Path]:
    """A fresh folder to fill; when the block ends well it becomes `bundle`, else it is removed and `bundle` stays.

    Raises:
        CheckpointError: `bundle` is something else than a bundle, cannot be written, or the disk is full.
    """
    if bundle.is_symlink() or (bundle.exists() and not bundle.is_dir()):
        raise CheckpointError(f"{bundle} is not a folder; choose another output")
    if bundle.is_dir() and any(bundle.iterdir()) and not (bundle / MANIFEST).exists():
        raise CheckpointError(f"{bundle} is a folder with other files and no {MANIFEST}; choose another output")
    staging = bundle.parent / f".{bundle.name}.partial-{os.getpid()}"
    try:
        bundle.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(bundle)
        staging.mkdir()
        yield staging
        for path in staging.rglob("*"):
            if path.is_file():
                _sync(path)
        _swap(staging, bundle)
    except OSError as e:
        reason = e.strerror or str(e)
        free = f", {shutil.disk_usage(bundle.parent).free >> 20} MiB free" if bundle.parent.exists() else ""
        raise CheckpointError(f"cannot write {bundle}: {reason}{free}; the bundle is as before") from e
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_leftovers(bundle: Path) -> None:
    """Staging folders of exports of this bundle that are no longer running."""
    for path in bundle.parent.glob(f".{bundle.name}.partial-*"):
        pid = path.name.rpartition("-")[2]
        if not (pid.isdigit() and _alive(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
    # Where the kernel or file system cannot exchange (macOS, some network disks): two renames, a moment without a bundle.
    old = staging.with_name(staging.name + ".old")
    bundle.rename(old)
    staging.rename(bundle)
    shutil.rmtree(old, ignore_errors=True)
