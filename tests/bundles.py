"""Reads bundles with the standard library alone, as any program could."""

import json
from pathlib import Path


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())
