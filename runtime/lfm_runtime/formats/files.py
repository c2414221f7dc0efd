"""Reading files that somebody else may have damaged: whatever is wrong becomes one of our errors, naming the file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lfm_runtime.errors import EdgeError, unreadable

DIGEST = "sha256"
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
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows put a mark before it
        check_no_pointer(path, error)
        value = json.loads(text, parse_constant=_no_number)
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


def _no_number(text: str) -> float:
    """For NaN and Infinity, which Python's reader takes and others refuse."""
    raise ValueError(f"{text} is no number in JSON")


_POINTER, _LONGEST_POINTER = b"version https://git-lfs", 1024


def check_no_pointer(path: Path, error: type[EdgeError]) -> None:
    """Raise `error` where a Git LFS pointer lies in a file's place, as in a clone without git-lfs."""
    with suppress(OSError):
        if path.stat().st_size <= _LONGEST_POINTER and path.read_bytes().startswith(_POINTER):
            raise error(f"{path} is a Git LFS pointer, not the file; fetch it: git lfs pull, or hf download")


def with_digest(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own SHA-256 as the last entry, which tells edits and damage; it is no signature."""
    rest = {key: inner for key, inner in value.items() if key != DIGEST}
    return {**rest, DIGEST: hashlib.sha256(json.dumps(_canonical(rest), sort_keys=True).encode()).hexdigest()}


def _canonical(value: Any) -> Any:
    """1.0 as 1, which other programs write so."""
    if isinstance(value, dict):
        return {key: _canonical(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_digest(value: Mapping[str, Any], path: Path, error: type[EdgeError], advice: str) -> None:
    """Raise `error` where an object is not as `with_digest` left it; what never had a digest is not judged."""
    if DIGEST in value and with_digest(value)[DIGEST] != value[DIGEST]:
        raise error(f"{path} was edited or damaged: its sha256 is not that of its values; {advice}")


def to_json(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """JSON without NaN and infinity, which are none. What UTF-8 cannot write (half a surrogate pair, a name of other
    bytes) is escaped.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return to_json(value, indent=indent, ascii_only=True)
    return text


def write_whole(path: Path, text: str | bytes) -> None:
    """The file appears whole or not at all; what was there stays until then. What UTF-8 cannot write is escaped.

    Raises:
        EdgeError: it cannot be written there.
    """
    path = Path(os.path.realpath(path))
    if not path.is_dir():  # which the system names better
        _check_plain(path)
    try:
        _write_whole(path, text)
    except OSError as e:
        raise EdgeError(f"{path} cannot be written ({e.strerror or e}); choose another place") from e


def to_write(place: Path, what: str = "the bundle") -> str:
    """What the user can do so that a file or folder that is there can be written. Permissions do not help where the
    whole file system is mounted read-only. `what`: lies there.
    """
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        return f"mount the disk of {place} for writing, or copy {what} to another"
    return f"change the permissions of {place}"


def check_writable(path: Path) -> None:
    """Before long work, raise EdgeError where write_whole could not write this file."""
    if path.is_dir():
        raise EdgeError(f"{path} is a folder; name a file")
    _check_plain(path)
    check_outside_bundles(path)
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise EdgeError(f"{folder} is not a folder; make it, or write elsewhere")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}."):
            pass
    except OSError as e:
        raise EdgeError(f"{path} cannot be written ({e.strerror or e}); choose another place") from e


def _check_plain(path: Path) -> None:
    """A device or a pipe is written into by others; replaced by a file, it would be lost for all."""
    if path.exists() and not path.is_file():
        raise EdgeError(f"{path} is not a plain file, and would be replaced by one; name a file")


def check_plain(paths: Iterable[Path], error: type[EdgeError]) -> None:
    """Raise `error` for a pipe or a device among what a folder holds: whoever reads it may wait for ever."""
    for path in paths:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise error(f"{path} is not a plain file; remove it, or copy the folder again")


def check_outside_bundles(path: Path, *, itself: bool = False) -> None:
    """Raise EdgeError for an output inside a bundle, which holds what its manifest names and nothing else. `itself`: a
    bundle's folder is refused too.
    """
    place = path.parent.resolve() / path.name
    for folder in ((place,) if itself else ()) + tuple(place.parents):
        if all((folder / name).is_file() for name in ("manifest.json", "prompt.json")):
            raise EdgeError(f"{path} lies inside the bundle {folder}, which would not be whole; choose a place outside")


def check_output(path: Path, program: str, ours: Callable[[Path], bool], *, force: bool | None) -> None:
    """Before long work: whether an output can be written, and replaces only what this program wrote.

    Args:
        path: the output.
        program: what writes such files, for the message.
        ours: whether a file that exists was written by it; it may raise what reading a strange file raises.
        force: replace whatever is there; None: the program has no such flag.

    Raises:
        EdgeError: it cannot be written, or is somebody else's.
    """
    check_writable(path)
    if force or not path.exists() or not path.stat().st_size:
        return
    try:
        known = ours(path)
    except (OSError, ValueError, EdgeError):
        known = False
    if not known:
        do = "or remove it first" if force is None else "or replace it with --force"
        raise EdgeError(
            f"{path} exists, and {program} did not write it, or it was edited since; choose another name, {do}"
        )


def write_or_rescue(path: Path, text: str) -> None:
    """As write_whole, for what took long to measure: where its place fails, it is written to a temporary folder.

    Raises:
        EdgeError: it was written elsewhere, or nowhere; the message says where.
    """
    try:
        write_whole(path, text)
    except EdgeError as e:
        for folder in (tempfile.gettempdir(), Path.home(), Path.cwd()):
            rescued = Path(folder) / f"{path.stem}-{secrets.token_hex(4)}{path.suffix}"
            with suppress(OSError):
                _write_whole(rescued, text)
                raise EdgeError(f"{str(e).partition(';')[0]}; it was written to {rescued} instead") from e
        raise


_SEALED = re.compile(r"# Written by (?P<program>[^\n]*?); sha256 of what follows: (?P<digest>[0-9a-f]{16})\.[^\n]*\n")


def sealed(text: str, program: str) -> str:
    """A text file with comments (#) that can tell later whether somebody edited it: see `is_sealed`."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"# Written by {program}; sha256 of what follows: {digest}. Edited, it is not replaced.\n{text}"


def is_sealed(path: Path) -> bool:
    """Whether `sealed` made the file, and nobody edited it since."""
    text = path.read_text(encoding="utf-8")
    found = _SEALED.match(text)
    return found is not None and hashlib.sha256(text[found.end() :].encode()).hexdigest()[:16] == found["digest"]


def _write_whole(path: Path, text: str | bytes) -> None:
    # Made by os.open, the file has the mode that the caller's umask gives; tempfile's are private.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as f:
            f.write(text if isinstance(text, bytes) else text.encode(errors="backslashreplace"))
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_room(folder: Path, needed: int, what: str, error: type[EdgeError]) -> None:
    """Raise `error` where the disk of `folder`, which is there, has less than `needed` bytes free for `what`."""
    usage = shutil.disk_usage(folder)
    free = usage.free
    if not usage.total:
        raise error(f"{folder} is in a file system that holds no files of ours; name another folder")
    if free < needed:
        have, takes = free >> 20, -(-needed >> 20)  # MiB, so that the third figure is the difference of the others
        raise error(f"{folder} has {have} MiB free, {what} needs {takes}: {takes - have} MiB more; free some space")


def holds_a_model(folder: Path) -> bool:
    """Whether a folder has a file that describes a bundle or a checkpoint."""
    return any((folder / name).is_file() for name in ("manifest.json", "config.json", "genai_config.json"))


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
