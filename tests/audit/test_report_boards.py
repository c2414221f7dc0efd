"""Pages of many boards: by their kind, and which of them are unlike the others."""

import copy
import re

import pytest
from lfm_runtime.commands.cli import main

pytest.importorskip("matplotlib")
from edits import resampled, write
from pages import Page


def board(audit: dict, n: int, factor: float = 1.0, name: str = "Raspberry Pi 5") -> dict:
    """An audit of another board of a kind: boards differ by up to 2 % in speed."""
    other = copy.deepcopy(audit)
    other["device"]["board"] = name
    for found in other["variants"].values():
        for image in found["images"].values():
            resampled(image, lambda samples: [x * factor * (1 + 0.004 * (n % 5)) for x in samples])
    return other


def test_many_boards(audit, tmp_path) -> None:
    """By their kind; a slow one, one that was throttled and one with other versions are found, and no other."""
    boards = {f"pi-{n:02}": board(audit, n) for n in range(9)}
    boards["pi-slow"] = board(audit, 0, 1.3)
    boards["pi-old"] = board(audit, 1)
    boards["pi-old"]["software"]["onnxruntime"] = "1.20.0"
    boards["pi-hot"] = board(audit, 2)
    boards["pi-hot"]["machine"].update(throttle_bits_before=0, throttle_bits_after=0x20002)
    boards["pi-weights"] = board(audit, 3)
    boards["pi-weights"]["bundle"]["fingerprint"] = dict.fromkeys(audit["bundle"]["fingerprint"], "0" * 64)
    boards |= {f"jetson-{n}": board(audit, n, 0.3, "Jetson Orin Nano") for n in range(3)}
    boards["alone"] = board(audit, 0, 5.0, "Raspberry Pi 3")
    paths = [write(tmp_path, name, result) for name, result in boards.items()]
    assert main(["report", *map(str, paths), "-o", str(tmp_path / "fleet.html")]) == 0
    page = Page((tmp_path / "fleet.html").read_text())
    said = " ".join(page.words)
    assert "– pi-hot" in said
    assert "– pi-00" not in said
    assert [heading.partition(":")[0] for heading in page.headings[:2]] == [
        "13 × Raspberry Pi 5",
        "3 × Jetson Orin Nano",
    ]
    assert "17 audits: 13 × Raspberry Pi 5, 3 × Jetson Orin Nano, 1 × Raspberry Pi 3" in said
    assert main(["report", *map(str, paths), "-o", str(tmp_path / "fleet.md")]) == 0
    rows = (tmp_path / "fleet.md").read_text().split("### ")[1].splitlines()
    unlike = {row.split("|")[1].strip(" *"): row.split("|")[-2].strip(" *") for row in rows if row.startswith("| ")}
    assert {name for name, why in unlike.items() if why != "–"} - {"board", "---"} == {
        "pi-slow",
        "pi-old",
        "pi-hot",
        "pi-weights",
    }
    assert re.search("worse than the others: first token by (29|30)%, answer by (29|30)%", unlike["pi-slow"])
    assert unlike["pi-old"] == f"onnxruntime 1.20.0, most have {audit['software']['onnxruntime']}"
    assert unlike["pi-hot"].startswith("throttled: the firmware's bits were 0x0 before and 0x20002 after")
    assert unlike["pi-weights"] == "other weights than most have"


def test_two_boards_are_compared_as_before(audit, tmp_path) -> None:
    paths = [write(tmp_path, name, board(audit, n)) for n, name in enumerate("ab")]
    assert main(["report", *map(str, paths), "-o", str(tmp_path / "both.html")]) == 0
    assert Page((tmp_path / "both.html").read_text()).headings[0] == "What it costs"
