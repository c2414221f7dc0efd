"""Scripts that measure still measure: run once on the demo. What they find is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"


@pytest.mark.process
def test_every_row_of_the_benchmark_is_measured(gpu_bundle, tmp_path) -> None:
    words = [
        str(gpu_bundle),
        "--variant",
        "int4",
        "--threads",
        "1",
        "--repeat",
        "1",
        "--json",
        str(tmp_path / "b.json"),
    ]
    subprocess.run([sys.executable, str(BENCH / "bench.py"), *words], check=True, capture_output=True, timeout=600)
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert len(rows) > 20
    for name, row in rows.items():
        if name.startswith("memory"):
            assert row["peak"] > 0, name
            assert row["text"] == rows["memory, unprepared"]["text"], name
        else:
            measures = [found for found in row.values() if isinstance(found, dict)]
            assert measures, name
            assert all(found["median"] > 0 for found in measures), name


@pytest.mark.process
def test_plans_are_compared_with_runs(gpu_bundle, tmp_path) -> None:
    words = [str(gpu_bundle), "--variants", "int4", "--sizes", "1", "--json", str(tmp_path / "p.json")]
    subprocess.run(
        [sys.executable, str(BENCH / "check_plan.py"), *words], check=False, capture_output=True, timeout=600
    )
    rows = json.loads((tmp_path / "p.json").read_text())
    assert len(rows) == 4  # prepared or not, in low memory or not
    assert all(row["anonymous"] > 0 and row["measured"]["peak"] > 0 for row in rows)
