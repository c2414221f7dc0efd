"""The error after each layer as a picture: bars in plain SVG, readable in any browser, for print and for a report."""

from __future__ import annotations

from html import escape

from lfm_quantize.quality import Quality

_ROW, _LABEL, _WIDTH = 18, 210, 420
_COLOURS = {"image": "#2b6cb0", "text": "#dd6b20"}


def error_plot(quality: Quality) -> str:
    """An SVG document: a row a layer, one bar for image tokens and one for text tokens."""
    layers = quality.layers
    top = max((v for layer in layers for v in (layer.image, layer.text) if v is not None), default=1.0) or 1.0
    height = 60 + _ROW * len(layers) + 30
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABEL + _WIDTH + 90}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="11" fill="#1a202c">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="10" y="20" font-size="14">{escape(quality.variant)} against {escape(quality.against)}: '
        "relative error of the hidden state after each layer</text>",
    ]
    for i, (kind, colour) in enumerate(_COLOURS.items()):
        out.append(f'<rect x="{10 + 110 * i}" y="31" width="10" height="10" fill="{colour}"/>')
        out.append(f'<text x="{26 + 110 * i}" y="40">{kind} tokens</text>')
    for row, layer in enumerate(layers):
        y = 56 + row * _ROW
        out.append(f'<text x="{_LABEL - 8}" y="{y + 11}" text-anchor="end">{escape(layer.name)}</text>')
        for i, (kind, colour) in enumerate(_COLOURS.items()):
            value = getattr(layer, kind)
            if value is not None:
                length = max(1.0, _WIDTH * value / top)
                out.append(f'<rect x="{_LABEL}" y="{y + 7 * i + 1}" width="{length:.1f}" height="6" fill="{colour}"/>')
        shown = max(v for v in (layer.image, layer.text, 0.0) if v is not None)
        out.append(f'<text x="{_LABEL + _WIDTH * shown / top + 6:.1f}" y="{y + 11}" fill="#4a5568">{shown:.2%}</text>')
    out.append(
        f'<text x="10" y="{height - 10}" fill="#4a5568">{quality.images} images, {quality.questions} questions; '
        f"KL {quality.kl:.2g} nats, cosine mean {quality.cosine_mean:.5f}</text></svg>"
    )
    return "\n".join(out) + "\n"
