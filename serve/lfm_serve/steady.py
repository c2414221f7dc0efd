"""Memory of a process that lives for months: what requests of many sizes have used goes back to the system.

glibc keeps freed memory in heaps, one for each few threads, and takes ever larger blocks into them once one of their
size was freed; between blocks of other sizes gaps stay. Here there is one heap, and large blocks are always mapped by
themselves.
"""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # of malloc.h
_LARGE = 128 << 10


def keep_memory_steady() -> None:
    """Before threads are started; on systems without glibc nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_ARENA_MAX, 1)
    mallopt(_MMAP_THRESHOLD, _LARGE)
