"""The house's measures: files and functions that are read in one go, folders that fit a screen."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = [
    p
    for stage in ("audit", "export", "package", "profiles", "quantize", "runtime", "serve", "fleet")
    for p in (ROOT / stage).rglob("*.py")
]
LONGEST_FILE, LONGEST_FUNCTION, FULLEST_FOLDER = 400, 60, 14


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{node.name}, line {node.lineno}"


def test_folders_are_small() -> None:
    assert CODE
    full = {folder: n for folder, n in Counter(path.parent for path in CODE).items() if n > FULLEST_FOLDER}
    assert not full
