"""What every worker is told once: which bundle, what is asked, and what answers depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lfm_profiles.schema import IMAGE_SETTINGS, TILE_SETTINGS
from lfm_runtime.formats.files import to_json
from lfm_runtime.setup.setup import Setup
from lfm_serve.asking import Asking


class Item(NamedTuple):
    """An image of a batch: its pixels are read where it is answered about."""

    path: str  # or URL
    key: str  # as its record names it
    size: int | None = None  # of an URL, as it was listed
    modified: float | None = None


@dataclass(frozen=True)
class Job:
    """A run over images, but for the images. It travels to the workers as it is."""

    bundle: str  # a path that is the same everywhere, or an URL
    manifest: str  # SHA-256 of the bundle's manifest.json
    flags: Mapping[str, Any]  # settings of a profile: what answers depend on, and what the user gave
    asking: Asking
    settings: str  # the hash that records carry
    rows: int | None = None  # answers at once in a worker; None: as its memory allows
    max_megapixels: float = 100.0
    sample: str = ""  # an image that is a file, which every worker must see

    @property
    def name(self) -> str:
        """The name under which workers keep it."""
        told = to_json({k: v for k, v in asdict(self).items() if k != "sample"}, ascii_only=True)
        return f"lfm-edge-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def decided(setup: Setup) -> dict[str, Any]:
    """The flags that make another machine's setup give the same answers as this one, whatever profile it has."""
    images = setup.images
    names = [name for name in IMAGE_SETTINGS if images.do_image_splitting or name not in TILE_SETTINGS]
    return {
        "variant": setup.variant,
        "prefill": setup.prefill or "none",
        **{name: getattr(images, name) for name in names},
        "max_new_tokens": setup.generation.max_new_tokens,
    }
