"""What stages cost on this machine, as audits found out: kept beside what was prepared for it, so that plans can tell
milliseconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lfm_runtime.bundle import Bundle
from lfm_runtime.engine.prepared import folder_of
from lfm_runtime.errors import BundleError, EdgeError
from lfm_runtime.formats.files import DIGEST, check_digest, read_json_object, to_json, with_digest, write_whole

_NAME = "measured.json"
Pairs: TypeAlias = "tuple[tuple[int, float], ...]"
"""(so many, ms), rising."""


@dataclass(frozen=True)
class Costs:
    """Of one variant with so many threads, here."""

    opening: Pairs  # of an image's pixels
    cutting: Pairs  # of its patches
    vision: Pairs  # of a view's patches
    prefill: Pairs  # of a prompt's tokens
    inter_token_ms: float
    load_ms: float  # with low_memory: of an answer
    valid: bool  # whether the audit was

    def image_ms(self, pixels: int, patches: int) -> float:
        """Return the time to decode an image of so many pixels and to cut it into so many patches, in ms."""
        return _along(self.opening, pixels) + _along(self.cutting, patches)

    def vision_ms(self, patches: int) -> float:
        """Return the time to encode one view of so many patches, in ms."""
        return _along(self.vision, patches)

    def prefill_ms(self, tokens: int) -> float:
        """Return the time to process a prompt of so many tokens, in ms."""
        return _along(self.prefill, tokens)


def keep_costs(bundle: Bundle, found: Mapping[str, Costs]) -> None:
    """Remember what was measured, by `cost_key`; where nothing may be written, it is not remembered."""
    place = folder_of(bundle.folder) / _NAME
    known = {**_read(place), **{key: asdict(costs) for key, costs in found.items()}}
    with suppress(OSError, EdgeError):  # a read-only disk, another user's folder: plans go on without times
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, to_json(with_digest(known), indent=1) + "\n")


def find_costs(bundle: Bundle, variant: str, prefill: str | None, threads: int, *, low_memory: bool) -> Costs | None:
    """What is known of a variant; None before the first audit of these weights with this onnxruntime here."""
    key = cost_key(variant, prefill, threads, fingerprint(bundle, variant, prefill), low_memory=low_memory)
    found = _read(folder_of(bundle.folder) / _NAME).get(key)
    if found is None:
        return None
    try:
        opening, cutting, encoding, reading = (
            tuple((int(n), float(ms)) for n, ms in found[name]) for name in ("opening", "cutting", "vision", "prefill")
        )
        step, load = float(found["inter_token_ms"]), float(found["load_ms"])
        return Costs(opening, cutting, encoding, reading, step, load, bool(found["valid"]))
    except (KeyError, TypeError, ValueError):
        return None


def fingerprint(bundle: Bundle, variant: str, prefill: str | None = None) -> str:
    """Return a SHA-256 that tells the weights of a variant, and of the decoder that reads its prompts, from others."""
    parts = [part for path in bundle.graphs_read(variant, prefill) for part in bundle.fingerprint(path)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def cost_key(variant: str, prefill: str | None, threads: int, fingerprint: str, *, low_memory: bool) -> str:
    """What costs must have in common to be of the same."""
    return f"{variant} prefill={prefill or 'none'} threads={threads} low_memory={low_memory} {fingerprint[:16]}"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json_object(path, BundleError, required=False)
        check_digest(found, path, BundleError, "audit again")
    except BundleError:
        return {}  # damaged or edited: the next audit writes it anew
    return {name: value for name, value in found.items() if name != DIGEST} if DIGEST in found else {}


def _along(pairs: Pairs, at: int) -> float:
    """Return ms at `at`: interpolated linearly between the pairs, in proportion beyond them; 0 without any."""
    if not pairs or not at:
        return 0.0
    if at <= pairs[0][0]:
        return pairs[0][1] * at / pairs[0][0]
    if at >= pairs[-1][0]:
        return pairs[-1][1] * at / pairs[-1][0]
    return float(np.interp(at, [n for n, _ in pairs], [ms for _, ms in pairs]))
