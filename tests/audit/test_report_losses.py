"""A variant's loss on the pages of audits: to what, how sure, and whether it was measured as the audit ran."""

import copy

import pytest
from lfm_runtime.commands.cli import main

pytest.importorskip("matplotlib")
from edits import write
from pages import Page


def test_a_loss_names_what_it_is_to(audit, tmp_path) -> None:
    """Records of older bundles may be of a comparison with int8."""
    audit = copy.deepcopy(audit)
    first, second = audit["variants"].values()
    first["quality"] = {"kl": 0.0123, "against": "fp32"}
    second["quality"] = {"kl": 0.0456, "against": "fp32"}
    assert main(["report", str(write(tmp_path, "alike", audit))]) == 0
    page = Page((tmp_path / "alike.html").read_text())
    assert {"KL to fp32", "0.012", "0.046"} <= set(page.words)
    assert "Quality and cost" in page.headings
    assert "no plot of" not in (tmp_path / "alike.html").read_text()
    first["quality"]["questions"], second["quality"]["questions"] = 34, 480
    assert main(["report", str(write(tmp_path, "few", audit))]) == 0
    page = Page((tmp_path / "few.html").read_text())
    assert {"0.012, 34 questions", "0.046, 480 questions"} <= set(page.words)
    assert "Quality and cost" not in page.headings, "means of other questions are not on one scale"
    del first["quality"]["questions"], second["quality"]["questions"]
    second["quality"]["against"] = "int8"
    assert main(["report", str(write(tmp_path, "unlike", audit))]) == 0
    page = Page((tmp_path / "unlike.html").read_text())
    assert {"KL", "0.012 to fp32", "0.046 to int8"} <= set(page.words)
    assert "Quality and cost" not in page.headings, "they are not on one scale"
    assert "no plot of quality and cost" in (tmp_path / "unlike.html").read_text()
    second["quality"]["against"], second["prefill"] = "fp32", "int8"
    assert main(["report", str(write(tmp_path, "alone", audit))]) == 0
    page = Page((tmp_path / "alone.html").read_text())
    assert {"0.012", "0.046, alone"} <= set(page.words)
    assert "Where the prefill decoder or image settings were others than here, that is said" in " ".join(page.words)
    second["quality"]["board"] = {"prefill": "int8"}
    assert main(["report", str(write(tmp_path, "both", audit))]) == 0
    assert "0.046" in Page((tmp_path / "both.html").read_text()).words
    second["prefill"] = None
    assert main(["report", str(write(tmp_path, "judged", audit))]) == 0
    assert "0.046, with int8 for the prefill" in Page((tmp_path / "judged.html").read_text()).words
    tiles = ["do_image_splitting off instead of on", "max_new_tokens 64 instead of 128"]
    second["quality"] |= {"kl_error": 0.00712, "board": {"profile": "pi5", "prefill": None, "changes": tiles}}
    as_board = "0.046 ± 0.007, as pi5 (do_image_splitting off instead of on)"
    for name, changes in (("unknown", None), ("with-tiles", []), ("fewer", ["max_image_tokens 64 instead of 256"])):
        second["changes"] = changes
        path = write(tmp_path, name, audit)
        assert main(["report", str(path), "-o", str(tmp_path / f"{name}.md")]) == 0
        assert f"| {as_board} |" in (tmp_path / f"{name}.md").read_text()
    assert main(["report", str(path)]) == 0
    page = Page(path.with_suffix(".html").read_text())
    assert as_board in page.words
    assert "Quality and cost" not in page.headings, "its cost is of other images than its loss"
    second["changes"] = tiles[:1]
    assert main(["report", str(write(tmp_path, "as-pi5", audit)), "-o", str(tmp_path / "as-pi5.md")]) == 0
    assert "| 0.046 ± 0.007 |" in (tmp_path / "as-pi5.md").read_text()
    del second["quality"]["board"]
    assert main(["report", str(write(tmp_path, "as-made", audit)), "-o", str(tmp_path / "as-made.md")]) == 0
    assert "| 0.046 ± 0.007, with the checkpoint's image settings |" in (tmp_path / "as-made.md").read_text()
