"""What several tests of the runtime share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def drawing() -> Path:
    """An image of shapes, which the demo model knows."""
    return Path(__file__).resolve().parents[2] / "demo" / "eval" / "images" / "0000.png"
