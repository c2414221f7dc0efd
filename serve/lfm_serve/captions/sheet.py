"""`lfm-edge report out.jsonl`: the images of a run with their answers, as one page that needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from lfm_runtime.errors import EdgeError
from lfm_runtime.formats.files import read_json_object
from lfm_runtime.images.pixels import open_image
from PIL import Image

from lfm_serve.captions.journal import read_records
from lfm_serve.captions.tables import printable

_PIXELS = 240
_QUALITY = 62
_MOST = 1e12


def page(path: Path) -> str:
    """The page of a JSONL file of lfm-edge caption: errors first, then in the order of the file.

    Raises:
        EdgeError: it cannot be read, or is something else.
    """
    records = read_records(path)
    if not records:
        raise EdgeError(f"{path} has no records; run lfm-edge caption first")
    settings = _settings(path)
    cards = [_card(path.resolve().parent, record) for record in records]
    cards.sort(key=lambda card: not card["error"])
    environment = Environment(
        loader=PackageLoader("lfm_serve.captions", "."), autoescape=True, undefined=StrictUndefined
    )
    times = sorted(card["ms"] for card in cards if card["ms"])
    return environment.get_template("sheet.html.jinja").render(
        name=path.name,
        made=", ".join(str(settings[key]) for key in ("bundle", "variant") if settings.get(key)),
        asked=_asked(settings),
        cards=cards,
        errors=sum(bool(card["error"]) for card in cards),
        median_ms=times[len(times) // 2] if times else None,
    )


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        return read_json_object(path.with_name(f"{path.name}.settings.json"), EdgeError)
    except EdgeError:
        return {}


def _asked(settings: Mapping[str, Any]) -> str:
    return str(printable(str(settings.get("question") or settings.get("system") or "")))


def _card(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    fields, odds = (v if isinstance(v := record.get(key), dict) else {} for key in ("fields", "probabilities"))
    ms = record["ms"].get("total") if isinstance(record.get("ms"), dict) else None
    return {
        "path": printable(record["path"]),
        "picture": _thumbnail(folder / record["path"]),
        "text": "" if fields else printable(str(record.get("text", ""))),
        "fields": {printable(k): "–" if v is None else printable(str(v)) for k, v in fields.items()},
        "odds": {printable(k): 100 * v for k, v in odds.items() if _is_number(v)},
        "error": printable(str(record["error"])) if "error" in record else "",
        "cut": record.get("finish_reason") == "length",
        "tokens": record["new_tokens"] if _is_number(record.get("new_tokens")) else None,
        "ms": ms if _is_number(ms) else None,
    }


def _thumbnail(path: Path) -> tuple[str, int, int] | None:
    """A data URI with its width and height; None where the image is not there any more, or cannot be opened."""
    try:
        if not path.is_file():
            return None
        image = open_image(path)
    except (EdgeError, OSError):
        return None
    image.thumbnail((_PIXELS, _PIXELS), Image.Resampling.BILINEAR, reducing_gap=2.0)
    stream = io.BytesIO()
    image.save(stream, "jpeg", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}", image.width, image.height


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < _MOST
