"""Reading files that somebody else may have damaged: whatever is wrong becomes one of our errors, naming the file."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lfm_runtime.errors import EdgeError, unreadable

_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError, RecursionError)


def read_json_object(
    path: Path, error: type[EdgeError], *, required: bool = True, advice: str = "copy or export it again"
) -> dict[str, Any]:
    """A JSON object; {} when the file is missing and not required. `advice`: what to do about a file that is missing or
    damaged.

    Raises:
        error: missing, unreadable, not JSON, or JSON of another kind.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("version https://git-lfs"):
            raise error(f"{path} is a Git LFS pointer, not the file; fetch it: git lfs pull, or hf download")
        value = json.loads(text)
    except OSError as e:
        if isinstance(e, FileNotFoundError) and not required:
            return {}
        raise unreadable(path, e, error, advice) from e
    except EdgeError:
        raise
    except (ValueError, RecursionError) as e:  # JSON and UTF-8 errors alike
        raise error(f"{path} is not valid JSON ({e}); {advice}") from e
    if not isinstance(value, dict):
        raise error(f"{path} holds no JSON object; {advice}")
    return value


def to_json(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """JSON without NaN and infinity, which are none.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(value, indent=indent, ensure_ascii=ascii_only, allow_nan=False)


def write_whole(path: Path, text: str) -> None:
    """The file appears whole or not at all; what was there stays until then.

    Raises:
        EdgeError: it cannot be written there.
    """
    path = Path(os.path.realpath(path))
    try:
        _write_whole(path, text)
    except OSError as e:
        raise EdgeError(f"{path} cannot be written ({e.strerror or e}); choose another place") from e


def check_writable(path: Path) -> None:
    """Before long work, raise EdgeError where write_whole could not write this file."""
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise EdgeError(f"{folder} is not a folder; make it, or write elsewhere")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}."):
            pass
    except OSError as e:
        raise EdgeError(f"{path} cannot be written ({e.strerror or e}); choose another place") from e


def _write_whole(path: Path, text: str) -> None:
    # Made by os.open, the file has the mode that the caller's umask gives; tempfile's are private.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def linked_copy(folder: Path, copy: Path) -> None:
    """The same tree of folders with links to the files: what is written there leaves the original alone."""
    folder = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_file():
            place = copy / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)


@contextmanager
def damage_is(error: type[EdgeError], path: Path, advice: str) -> Iterator[None]:
    """While the content of `path` is taken apart, a wrong type or a missing key is `error`, in one line."""
    try:
        yield
    except EdgeError:
        raise
    except _DAMAGE as e:
        raise error(
            f"{path} has a wrong or missing value ({type(e).__name__}: {' '.join(str(e).split())[:200]}); {advice}"
        ) from e
