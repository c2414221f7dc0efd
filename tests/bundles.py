"""Reads bundles with the standard library alone, as any program could."""

import hashlib
import json
import shutil
from pathlib import Path


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def tree(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file, by its place."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def int4_words(bundle: Path, few: Path) -> list[str]:
    """The command that calibrates int4 with the images and questions of a folder."""
    asked = ["--calibration", str(few / "images"), "--prompts", str(few / "calibration.jsonl")]
    return ["quantize", str(bundle), "--variant", "int4", *asked, "--quiet"]


def cached(folder: Path, cache: Path) -> Path:
    """The folder as huggingface_hub's cache has it: links to blobs."""
    blobs, snapshot = cache / "models--owner--name" / "blobs", cache / "models--owner--name" / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    for n, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        shutil.copy(path, blobs / str(n))
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(path.relative_to(folder).parts) + 1), "blobs", str(n)))
    return snapshot
