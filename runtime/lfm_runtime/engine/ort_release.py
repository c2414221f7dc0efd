"""Tells which onnxruntime this is, where releases differ."""

from __future__ import annotations

import onnxruntime as ort

from lfm_runtime.installation import REFUSE_LINKS


def onnxruntime_is(version: str) -> bool:
    """Whether the onnxruntime here is of this version or a later one."""
    here, wanted = ([int(n) for n in v.split(".")[:2]] for v in (ort.__version__, version))
    return here >= wanted


def refuses_links() -> bool:
    """Whether it takes weights only from files, not through a link as in the hub's cache."""
    return ort.__version__ in REFUSE_LINKS


FOLDERS_SINCE = "1.24"
"""It refuses weights that a link leads to in another folder."""
PLACEMENT_SINCE = "1.24"
"""It tells which provider has which operator."""
