"""The demo's evaluation images, and what is asked about them."""

from __future__ import annotations

from pathlib import Path

IMAGES = sorted((Path(__file__).resolve().parents[1] / "demo" / "eval" / "images").glob("*.png"))
QUESTION = "What is in this image?"
