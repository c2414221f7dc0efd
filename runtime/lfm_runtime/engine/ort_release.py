"""Tells which onnxruntime this is, where releases differ."""

from __future__ import annotations

import onnxruntime as ort


def onnxruntime_is(version: str) -> bool:
    """Whether the onnxruntime here is of this version or a later one."""
    here, wanted = ([int(n) for n in v.split(".")[:2]] for v in (ort.__version__, version))
    return here >= wanted


PLACEMENT_SINCE = "1.24"
"""It tells which provider has which operator."""
