"""What onnxruntime raises becomes one of our errors, in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state

from lfm_runtime.engine.ort_release import refuses_links
from lfm_runtime.errors import BundleError, EdgeError, OutOfMemoryError, is_out_of_memory, more_memory
from lfm_runtime.installation import WITHOUT_LINKS

_IN_ITS_SOURCE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/\S+:\d+ [^()]*\([^()]*\)( const)?( \[with [^\]]*\])? "
)
_NOT_WRITTEN = "Failed to write"
# onnxruntime's exceptions share no base class of their own; these are all of them. A run with bindings, and what is
# about memory of a device, raises plain RuntimeErrors.
_FAILURES: tuple[type[Exception], ...] = tuple(
    c for c in vars(onnxruntime_pybind11_state).values() if isinstance(c, type) and issubclass(c, Exception)
)


@contextmanager
def failures_are_ours(what: object) -> Iterator[None]:
    """An exception of onnxruntime becomes a BundleError about `what`, in one line; one about memory, and numpy's and
    Python's, an OutOfMemoryError.
    """
    try:
        yield
    except Exception as e:
        if (is_onnxruntimes(e) or isinstance(e, MemoryError)) and is_out_of_memory(e):
            if isinstance(e, EdgeError):
                raise
            raise OutOfMemoryError(f"not enough memory for {what} ({reason(e)[:200]}); {more_memory()}") from e
        if not is_onnxruntimes(e):
            raise
        if "escapes model directory" in reason(e) and refuses_links():
            raise BundleError(
                f"{what} has its weights behind a link, which onnxruntime {ort.__version__} refuses; install another "
                f"release: {WITHOUT_LINKS}, or copy the folder with its files: cp -rL"
            ) from e
        if "escapes model directory" in reason(e):
            raise BundleError(
                f"{what} has its weights behind a link to another folder, which onnxruntime refuses; copy the bundle "
                "with its files: cp -rL"
            ) from e
        if _NOT_WRITTEN in reason(e):
            raise BundleError(
                f"{what}: its prepared form cannot be written (the disk is full, or files may not be so large: "
                "ulimit -f); free some space, or raise the limit"
            ) from e
        raise BundleError(
            f"{what} does not work with onnxruntime {ort.__version__} ({reason(e)[:300]}); check it with "
            "--verify, or export it again"
        ) from e


def reason(e: BaseException | None) -> str:
    """What onnxruntime says, in one line and without where in its source it says it."""
    return _IN_ITS_SOURCE.sub("", " ".join(str(e).split()))


def is_onnxruntimes(e: Exception) -> bool:
    """Whether the exception was raised by onnxruntime."""
    return isinstance(e, _FAILURES) or (
        type(e) is RuntimeError and ("onnxruntime" in str(e) or str(e).startswith("Error in execution"))
    )
