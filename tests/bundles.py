"""Bundles as any program would read them."""

import json
from pathlib import Path


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())
