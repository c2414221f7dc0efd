"""What a request may be, decided at the start; and what opening an image takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lfm_profiles import now
from lfm_runtime.setup.machine import this_machine

FEW_IMAGE_TOKENS = 64
"""Of an image that a client wants looked at with `detail: low`: one view."""
_COPIES = 2.0
"""Of the decoded image, itself included, while it is opened, turned upright and resized."""


@dataclass(frozen=True)
class Limits:
    """Bounds on what strangers send."""

    max_body_mib: int = 64
    max_megapixels: float = 25.0
    header_s: float = 20.0  # for the headers of a request to come
    body_s: float = 60.0  # for a whole body to come
    request_s: float = 600.0  # for a whole answer, the time in the queue included
    ping_s: float = 5.0  # between signs of life of a stream
    strict_model: bool = False  # a model's name must be the server's
    image_hosts: tuple[str, ...] = ()  # that images may be fetched from
    media_path: Path | None = None  # below which file URLs are opened


def image_mib(width: int, height: int) -> float:
    """Memory for opening an image."""
    return 3 * _COPIES * width * height / 2**20


def free_mib() -> int | None:
    """Memory that this process might take now; None where nothing tells."""
    return now(this_machine().device).free_mib
