from __future__ import annotations

import importlib.util

import pytest
from pictures import QUESTION

collect_ignore_glob = [] if importlib.util.find_spec("distributed") else ["test_*.py"]


@pytest.fixture
def command(demo_bundle, folder, tmp_path):
    """The words of a run over the folder: `command("--workers", "2")`."""

    def words(*more: str, images=None, out: str = "out.jsonl", bundle=None) -> list[str]:
        output = out if "://" in out else str(tmp_path / out)
        asked = ("-p", QUESTION, "-o", output, "--quiet", "--threads", "1")
        return ["caption", str(bundle or demo_bundle), str(images or folder), *asked, *more]

    return words
