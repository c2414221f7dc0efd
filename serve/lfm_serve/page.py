"""GET /: the page that asks the model, one file without any other host."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

_ONLY_THIS = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' blob: data:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Whatever a model or an image says, the page talks to its own server alone."""


@cache
def _text() -> str:
    return files("lfm_serve").joinpath("page.html").read_text(encoding="utf-8")


async def page(_: Request) -> Response:
    """Return the page."""
    headers = {
        "Content-Security-Policy": _ONLY_THIS,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(_text(), headers=headers)
