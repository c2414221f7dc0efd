"""Files out of the page cache or into it, without being root: a start from disk, or one that is not, can then be
measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def drop_from_page_cache(paths: Iterable[Path]) -> None:
    """Ask the kernel to forget files. It keeps pages that are dirty, or mapped by a process that runs."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue  # one that may not be read is not read by the run either
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_into_page_cache(paths: Iterable[Path]) -> None:
    """Read every file to its end, so that the kernel holds its pages in the page cache."""
    for path in paths:
        with path.open("rb", buffering=0) as f:
            while f.read(1 << 20):
                pass
