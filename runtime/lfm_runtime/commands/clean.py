"""`lfm-edge clean`: remove what interrupted commands and earlier onnxruntimes left beside a bundle."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Remove what lies beside a bundle and is of no use any more: work of interrupted quantize runs, half-written "
        "bundles, graphs prepared for another processor or onnxruntime, or from graphs that are gone. The bundle stays "
        "as it is."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="print what would be removed")


def run(options: argparse.Namespace) -> int:
    """Print what is removed, with sizes, and return 0."""
    import errno
    import shutil

    from lfm_runtime.errors import BundleError
    from lfm_runtime.formats.files import holds_a_model, to_write

    # The bundle may be damaged, or missing: a first export that was killed left none.
    found = _leftovers(options.bundle.resolve())
    if not found and not options.bundle.exists():
        raise BundleError(f"{options.bundle} does not exist, and nothing of a bundle of this name lies there")
    if not found and not holds_a_model(options.bundle):
        raise BundleError(f"{options.bundle} is not a bundle; name the folder of one")
    if not found:
        print(f"nothing to remove beside {options.bundle}")
        return 0
    total = 0
    for path in found:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        total += size
        print(f"{path}  {size / 1e6:,.1f} MB")
        if not options.dry_run:
            try:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            except OSError as e:
                do = to_write(path.parent) if e.errno == errno.EROFS else "remove it by hand"
                do = "change its permissions: chmod -R u+w" if isinstance(e, PermissionError) else do
                raise BundleError(f"{path} cannot be removed ({e.strerror or e}); {do}") from e
    print(f"{total / 1e6:,.1f} MB {'would be removed' if options.dry_run else 'removed'}")
    return 0


def _leftovers(bundle: Path) -> list[Path]:
    """Folders of interrupted runs that no process is writing, and prepared graphs that do not fit this machine."""
    from lfm_runtime.bundle import Bundle
    from lfm_runtime.engine.prepared import NOTE, folder_of, outdated
    from lfm_runtime.errors import EdgeError

    here = folder_of(bundle)
    found = [*bundle.parent.glob(f".{bundle.name}.*-work"), *bundle.parent.glob(f".{bundle.name}.partial-*")]
    others = (path for path in here.parent.glob("onnxruntime-*") if path != here)
    found += [path for path in others if all((inner / NOTE).is_file() for inner in path.iterdir())]  # what we wrote
    with suppress(EdgeError):  # of a bundle that is damaged or missing, nobody knows
        found += outdated(Bundle.open(bundle))
    return sorted(path for path in found if not _in_use(path))


def _in_use(folder: Path) -> bool:
    """Whether a process holds the lock of a folder, or of the folder around a half-written bundle."""
    import fcntl
    import os

    place = folder if folder.name.endswith("-work") else folder.parent
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
