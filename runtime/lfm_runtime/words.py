"""Words of messages."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 image, 2,000 images, 2 boxes."""
    plural = "es" if noun.endswith("x") else "s"
    return f"{number:,} {noun}{plural * (number != 1)}"
