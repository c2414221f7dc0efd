"""Changes of an audit's JSON whose figures still agree: with their samples, and the stages with the total."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lfm_audit.figures import Figure
from lfm_runtime.formats.files import with_digest
from lfm_runtime.formats.typed import as_json


def figure(samples) -> dict[str, Any]:
    return as_json(Figure.of(samples))


def resampled(image: dict[str, Any], change: Callable[[list[float]], list[float]]) -> None:
    """The times of all answers about an image, changed alike: stages, first token and total."""
    for name, stage in image["stages"].items():
        image["stages"][name] = figure(change(stage["samples"]))
    image["ttft_ms"] = figure(change(image["ttft_ms"]["samples"]))
    image["total_ms"] = figure([sum(of) for of in zip(*(s["samples"] for s in image["stages"].values()), strict=True)])
    image["prefill_tok_s"] = figure(
        [image["prompt_tokens"] / ms * 1e3 for ms in image["stages"]["prefill_ms"]["samples"]]
    )
    steps, wanted = image["inter_token_ms"]["samples"], (image["new_tokens"] - 1) * image["total_ms"]["n"]
    image["inter_token_ms"] = figure([steps[n % len(steps)] for n in range(wanted)])


def sealed(raw: dict[str, Any]) -> str:
    """The text of a file whose writer knows of digests."""
    return json.dumps(with_digest(raw))


def images_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [image for found in result["variants"].values() for image in found["images"].values()]


def write(folder: Path, name: str, result: dict) -> Path:
    """The audit as the file NAME.json, sealed again."""
    path = folder / f"{name}.json"
    path.write_text(sealed(result))
    return path
