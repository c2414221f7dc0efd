"""Pages made of a recorded audit and tuning: what they say, that they need nothing from outside, and that a browser
shows them.
"""

import copy
import json
import re
import shutil
import subprocess

import pytest
from lfm_runtime.commands.cli import main

pytest.importorskip("matplotlib")
from edits import figure, images_of, resampled, sealed, write
from lfm_audit.report.page import audit_page
from lfm_audit.report.plots import waterfall
from lfm_audit.report.source import all_series, named_audits
from lfm_audit.report.tables import Row, Table, changes_table
from pages import Page

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def changed(result: dict, factor: float = 1.3) -> dict:
    """A later audit of a slower machine that was throttled, with sensors."""
    other = copy.deepcopy(result)
    for found in other["variants"].values():
        for image in found["images"].values():
            resampled(image, lambda samples: [x * factor for x in samples])
            image["energy_per_answer_j"] = figure([1.5, 1.6, 1.7])
    machine = other["machine"]
    for n, sample in enumerate(machine["samples"]):
        sample.update(temperature_c=50.0 + n / 10, frequency_mhz=2400.0, power_w=5.0, throttled=n % 7 == 0)
    machine.update(
        temperature_max_c=70.0, throttle_bits_before=0, throttle_bits_after=0x20002, mean_w=5.0, peak_w=6.0, idle_w=2.0
    )
    other["verdict"] = {"valid": False, "reasons": ["the clock <b>jumped</b> & more"]}
    other["limits"] = [
        {"name": "ttft_ms", "limit": 10.0, "variant": "int4", "image": "small", "measured": 60.0, "holds": False}
    ]
    other["soak"] = {
        "variant": "int4",
        "steady": True,
        "ttft_change": 0.1,
        "inter_token_change": 0.05,
        "minutes": [
            {"minute": n, "answers": 9, "ttft_ms": 60.0 + n, "inter_token_ms": 0.5, "temperature_c": 60.0}
            for n in range(4)
        ],
    }
    return other


def test_one_audit(audit, tmp_path) -> None:
    path = write(tmp_path, "board", audit)
    assert main(["report", str(path)]) == 0
    text = path.with_suffix(".html").read_text()
    page = Page(text)
    assert page.loads == [] and not re.search(r"url\(\s*['\"]?http", text)
    assert page.headings[:2] == ["What it costs", "Variants compared"]
    assert {"Where the time of an answer goes", "Memory", "Every figure", "Settings"} <= set(page.headings)
    assert "Soak" not in page.headings
    assert page.svgs >= 5
    said = " ".join(page.words)
    for found in audit["variants"].values():
        assert f"{found['memory']['peak_mib']['max']:,.0f} MiB at the peak" in said, (
            "largest, above the fold as in table and chart"
        )
        assert f"peak {found['memory']['peak_mib']['max']:,.0f}" in said
        for image in found["images"].values():
            assert f"{image['ttft_ms']['median']:,.0f}" in said
    assert "no temperature" in said


def test_two_audits(audit, tmp_path) -> None:
    paths = [write(tmp_path, "before", audit), write(tmp_path, "after", changed(audit))]
    assert main(["report", *map(str, paths), "-o", str(tmp_path / "both.html")]) == 0
    page = Page((tmp_path / "both.html").read_text())
    said = " ".join(page.words)
    assert {"Limits", "What changed", "Soak", "The machine during the audit"} <= set(page.headings)
    assert "the clock <b>jumped</b> & more" in said, "shown as it is, not as markup"
    assert "+30.0%" in said and "0x20002" in said and "broken" in said


def test_changes(audit, tmp_path) -> None:
    """Worse and better by the audits' own intervals; the same audit twice is within noise."""
    audits = named_audits(
        [write(tmp_path, "a", audit), write(tmp_path, "b", changed(audit, 3.0)), write(tmp_path, "c", audit)]
    )
    rows = [row.cells for row in changes_table(audits).rows]
    ttft = [cells for cells in rows if cells[2] == "first token, ms"]
    assert {cells[6] for cells in ttft if cells[0] == "b"} == {"worse"}
    assert {cells[6] for cells in ttft if cells[0] == "c"} == {"within noise"}


def test_names(audit, tmp_path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    paths = [write(tmp_path / folder, "audit", audit) for folder in ("x", "y")]
    audits = named_audits([*paths, paths[0]])
    assert [a.name for a in audits] == ["x/audit (1)", "y/audit", "x/audit (3)"]
    assert len({series.label for series in all_series(audits)}) == 6


def test_markdown(audit, tmp_path) -> None:
    paths = [write(tmp_path, "before", audit), write(tmp_path, "after", changed(audit))]
    assert main(["report", *map(str, paths), "-o", str(tmp_path / "pr.md")]) == 0
    text = (tmp_path / "pr.md").read_text()
    assert "### What it costs" in text and "**broken**" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, (
            "all rows of a table are as long"
        )
    assert "### What changed\n\n|  | of | figure | before | after |" in text
    assert Table(["a"], [Row(["x|y\nz"])]).markdown().endswith("| x\\|y z |")
    assert main(["report", str(paths[0]), "-o", str(tmp_path / "one.md")]) == 0
    first = next(iter(audit["variants"]))
    assert f"### Variants compared\n\n|  | of | figure | {first} | the other |" in (tmp_path / "one.md").read_text()


TUNING = {
    "tool": "lfm-edge tune",
    "version": "0.1.0",
    "objective": "latency",
    "floor_kl": 0.1,
    "reference": "fp32",
    "rounds": 3,
    "profile": "generic",
    "key": {
        "bundle": ["x"],
        "onnxruntime": "1.24.0",
        "machine": "aarch64",
        "cpu_features": ["asimddp"],
        "images": ["/photos/a.jpg"],
        "question": "?",
    },
    "points": [
        {
            "settings": {
                "variant": variant,
                "prefill": "none",
                "threads": 2,
                "low_memory": low,
                "arena": True,
                "max_image_tokens": 256,
                "tiles": 1,
            },
            "latency_ms": {"1": ms, "2": ms * 1.02},
            "ttft_ms": {"1": ms * 0.8},
            "peak_mib": mib,
            "anonymous_mib": mib / 2,
            "energy_j": {},
            "kl": kl,
            "failed": None,
        }
        for variant, low, ms, mib, kl in (
            ("int4", False, 1000.0, 500.0, 0.01),
            ("int4", True, 1500.0, 350.0, 0.01),
            ("fp32", False, 2500.0, 1900.0, 0.0),
        )
    ]
    + [
        {
            "settings": dict.fromkeys(
                ("variant", "prefill", "threads", "low_memory", "arena", "max_image_tokens", "tiles"), 0
            ),
            "latency_ms": {},
            "ttft_ms": {},
            "peak_mib": 0.0,
            "anonymous_mib": 0.0,
            "energy_j": {},
            "kl": None,
            "failed": "no memory",
        }
    ],
}
TUNING["front"] = [point["settings"] for point in TUNING["points"][:3]]
TUNING["chosen"] = TUNING["front"][0]


def test_tuning(tmp_path) -> None:
    path = write(tmp_path, "tuned", TUNING)
    assert main(["report", str(path)]) == 0
    page = Page(path.with_suffix(".html").read_text())
    assert page.headings == ["Chosen", "All points", "The front", "Notes"]
    assert "no memory" in " ".join(page.words)
    assert main(["report", str(path), "-o", str(tmp_path / "t.md")]) == 0
    assert "| int4 |" in (tmp_path / "t.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["GOOD", "-o", "x.pdf"], "a report is .html or .md"),
        (["GOOD", "-o", "nowhere/x.html"], "is not a folder"),
        (["GOOD", "few.jsonl"], "few.jsonl is of lfm-edge caption, and reported alone: lfm-edge report few.jsonl"),
        (["nowhere.json"], "nowhere.json is missing"),
        (["CUT"], "is not valid JSON"),
        (["HALF"], "machine has no samples"),
        (["TUNING", "GOOD"], "is a result of lfm-edge tune"),
    ],
)
def test_a_report_of_what_is_no_audit_is_refused(audit, tmp_path, capsys, words, message) -> None:
    half = copy.deepcopy(audit)
    del half["machine"]["samples"]
    places = {
        "GOOD": write(tmp_path, "good", audit),
        "HALF": write(tmp_path, "half", half),
        "TUNING": write(tmp_path, "tuning", TUNING),
        "CUT": tmp_path / "cut.json",
    }
    places["CUT"].write_text(sealed(audit)[:500])
    assert main(["report", *(str(places.get(word, word)) for word in words)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium (Debian: apt install chromium)")
def test_in_a_browser(audit, tmp_path) -> None:
    """Chromium lays it out without network: everything is inside the page's width, plots have a size, and print has
    pages.
    """
    path = tmp_path / "page.html"
    page = audit_page(named_audits([write(tmp_path, "before", audit), write(tmp_path, "after", changed(audit))]))
    probe = """<script>const out = {width: document.documentElement.scrollWidth, view: innerWidth,
      svgs: [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).map(r => [r.width, r.height]),
      headings: [...document.querySelectorAll('h2')].map(h => h.textContent), first: document.querySelector('.verdict').getBoundingClientRect().top};
      document.title = 'PROBE' + JSON.stringify(out);</script>"""
    path.write_text(page.replace("</body>", probe + "</body>"))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1100,900",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    dom = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    found = json.loads(re.search(r"<title>PROBE(.*?)</title>", dom)[1].replace("&amp;", "&"))
    assert found["width"] <= found["view"]
    assert len(found["svgs"]) >= 6 and all(width > 500 and height > 60 for width, height in found["svgs"])
    assert found["headings"][0] == "What it costs" and found["first"] < 200
    pdf = tmp_path / "page.pdf"
    subprocess.run(
        [CHROMIUM, *flags, f"--print-to-pdf={pdf}", path.as_uri()], capture_output=True, timeout=120, check=True
    )
    assert len(re.findall(rb"/Type\s*/Page[^s]", pdf.read_bytes())) >= 2


def test_the_first_screen(audit, tmp_path) -> None:
    """One sentence a variant, a title that tells the pages of a fleet apart, and reasons grouped."""
    audit["bundle"]["source"] = {
        "name": "LFM2-VL-450M",
        "revision": None,
        "license": None,
        "adapter": "cam",
        "weights": "x",
    }
    audit["device"]["board"] = "Raspberry Pi 5 Model B"
    for image in images_of(audit):
        resampled(image, lambda samples: [x * (1 + n % 3) for n, x in enumerate(samples)])
    text = audit_page(named_audits([write(tmp_path, "a", audit)]))
    page = Page(text)
    title = re.search("<title>(.*)</title>", text)[1]
    assert title.startswith("LFM2-VL-450M with cam int8, int4 · Raspberry Pi 5 Model B · 20")
    said = " ".join(" ".join(page.words).split())
    large = audit["variants"]["int8"]["images"]["large"]
    rate = large["decode_tok_s"]["median"]
    assert f"then {rate:,.1f} tokens a second" in said
    assert "LFM2-VL-450M with cam, int8, on Raspberry Pi 5 Model B: first token" in said
    assert said.count("spread: ") == 1
    assert "energy, J" not in said, "a column that says nothing is left out"
    assert "Quality and cost" in page.headings
    for name in ("Every figure", "Notes"):
        assert f"<details><summary><h2>{name}</h2>" in text


def test_bars_end_where_the_table_says(audit, tmp_path) -> None:
    """The answer that is drawn has the median total, and its stages add up; all images have one scale."""
    drawn = waterfall(all_series(named_audits([write(tmp_path, "a", audit)])))
    for image in images_of(audit):
        total = sorted(image["total_ms"]["samples"])[(image["total_ms"]["n"] - 1) // 2]
        assert f" {total:,.0f} ms" in drawn


def test_two_audits_alike_are_not_worse_in_bold(audit, tmp_path) -> None:
    """As compare: within 5 % nothing is highlighted, beyond noise or not."""
    other = copy.deepcopy(audit)
    for image in images_of(other):
        resampled(image, lambda samples: [x * 1.04 for x in samples])
    rows = changes_table(named_audits([write(tmp_path, "a", audit), write(tmp_path, "b", other)])).rows
    assert any(row.cells[6] == "worse" for row in rows)
    assert not any(row.bad for row in rows)


def test_background_load_is_marked_where_it_was(audit, tmp_path) -> None:
    """Beside answers that took longer, in the same picture."""
    pytest.importorskip("matplotlib")
    from lfm_audit.report import plots

    said = "others used more than 5% of the processors"

    def evenness() -> str:
        named = named_audits([write(tmp_path, "a", audit)])
        return str(plots.over_time(named, all_series(named)))

    spans = audit["machine"]["background"]
    assert len(spans) == 18, "each process has its time"
    assert said not in evenness()
    spans[3]["share"] = spans[7]["share"] = 0.4
    assert evenness().count(said) == 1
