"""What can go wrong, said so that the person at the keyboard can act on it. Commands print these in one line. And
words of such lines.
"""

from __future__ import annotations

import contextlib
import errno
import shlex
from pathlib import Path
from typing import Any


class EdgeError(Exception):
    """A problem we can explain: what, where, and what to do next. No traceback."""

    exit_code = 2


class BundleError(EdgeError, ValueError):
    """The bundle folder is incomplete, damaged, or made for another version."""


class GraphContractError(EdgeError, ValueError):
    """A graph lacks an input or output the runtime binds, or has one it does not know."""


class ImageError(EdgeError, ValueError):
    """The image cannot be opened, is empty, or is larger than the limit."""


class PromptError(EdgeError, ValueError):
    """The tokenizer, the chat template or the conversation cannot be expressed, or does not fit the context."""


class ContextFullError(PromptError):
    """Prompt and answer together have more tokens than the context. `tokens`: the prompt's."""

    def __init__(self, message: str, tokens: int = 0) -> None:
        super().__init__(message)
        self.tokens = tokens


class SettingError(EdgeError, ValueError):
    """A setting has an impossible value, or could have no effect."""


class OutOfMemoryError(EdgeError, MemoryError):
    """Memory ran out; no file is at fault."""


def more_memory() -> str:
    """What helps where memory runs out."""
    with contextlib.suppress(ImportError):
        import resource

        if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
            return "raise the limit, ulimit -v"
    return "close other programs"


_OUT_OF_MEMORY = (
    "bad_alloc",
    "bad_array_new_length",
    "MemoryError",
    "not enough memory",
    "Cannot allocate memory",
    "Unable to allocate",
    "Failed to allocate",
    "pthread_create failed",  # the stack of a thread does not fit
    "can't start new thread",
    "failed to map segment from shared object",  # a library of a package that is imported
)
"""How the C++ library, numpy, onnxruntime, Python and the system say it."""


def is_out_of_memory(cause: BaseException | str | None) -> bool:
    """Whether an exception, what caused it, or the words of a program that failed say that memory ran out."""
    while isinstance(cause, BaseException):
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return True
        if any(sign in str(cause) for sign in _OUT_OF_MEMORY):
            return True
        cause = cause.__cause__
    return cause is not None and any(sign in cause for sign in _OUT_OF_MEMORY)


_DO = {
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.EIO: "the disk or card fails; copy the file to another",
    errno.EMFILE: "close files, or raise ulimit -n",
    errno.ENFILE: "close other programs",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "no file can have such a name",
}


def unreadable(path: Path, cause: OSError, error: type[EdgeError], missing: str) -> EdgeError:
    """The error for a file that the system did not read. `missing`: what to do if the file is not there; another copy
    or another export helps against nothing else.
    """
    if is_out_of_memory(cause):
        return OutOfMemoryError(f"not enough memory to read {path}; {more_memory()}")
    if isinstance(cause, (FileNotFoundError, NotADirectoryError)):
        return error(f"{path} is missing; {missing}")
    do = _DO.get(cause.errno or 0)
    return error(f"{path} cannot be read: {cause.strerror or cause}{f'; {do}' if do else ''}")


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 image, 2,000 images, 2 boxes."""
    plural = "es" if noun.endswith("x") else "s"
    return f"{number:,} {noun}{plural * (number != 1)}"


def pair(value: Any, names: str) -> tuple[Any, Any]:
    """What a program gave as a pair. Raises SettingError where it is none."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise SettingError(f"{value!r:.60} is no pair; give ({names})")
    return value[0], value[1]


def command(*words: object) -> str:
    """A command of ours that a message gives, to be pasted into a shell whatever its paths are."""
    return shlex.join(["lfm-edge", *map(str, words)])
