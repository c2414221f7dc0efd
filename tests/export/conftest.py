"""What several tests of the export share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    reference = pytest.importorskip("reference")
    return reference.save_tiny(reference.tiny_model(), tmp_path_factory.mktemp("tiny") / "c")
