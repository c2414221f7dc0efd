"""The error after each layer as a picture: bars, drawn by matplotlib (extra `report`)."""

from __future__ import annotations

import io
from pathlib import Path

from lfm_runtime.formats.files import write_whole
from matplotlib.figure import Figure

from lfm_quantize.judge.quality import Quality

_COLOURS = {"image": "#0072b2", "text": "#e69f00"}  # Okabe and Ito's
_TITLE = "lfm-edge quality"
_HEIGHT = 0.38  # of a bar; two a row


def error_plot(quality: Quality, path: Path) -> None:
    """Write a row a layer, one bar for image tokens and one for text tokens, in the format that the suffix names.

    Raises:
        EdgeError: it cannot be written there; what was there stays.
    """
    rows = range(len(quality.layers))
    figure = Figure(figsize=(7, 1.2 + 0.26 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for n, (kind, colour) in enumerate(_COLOURS.items()):
        errors = [getattr(layer, kind) or 0.0 for layer in quality.layers]
        axis.barh([row + (n - 0.5) * _HEIGHT for row in rows], errors, _HEIGHT, color=colour, label=f"{kind} tokens")
    axis.set_yticks(list(rows), [layer.name for layer in quality.layers], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("relative error of the hidden state after the layer")
    axis.set_title(f"{quality.variant} against {quality.against}", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    kind, drawn = path.suffix.lower().removeprefix("."), io.BytesIO()
    figure.savefig(drawn, format=kind, metadata={"Title": _TITLE, **({"Date": None} if kind == "svg" else {})})
    write_whole(path, drawn.getvalue())


def is_plot(path: Path) -> bool:
    """Whether `error_plot` wrote this file."""
    return _TITLE.encode() in path.read_bytes()
