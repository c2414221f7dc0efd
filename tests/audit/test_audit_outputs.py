"""Where an audit and a report are written: judged before the work, and nothing of somebody else's is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
from edits import write
from lfm_audit import audit as audit_module
from lfm_audit import measured as measured_module
from lfm_audit.commands import audit as command_module
from lfm_audit.reading import read_audit
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import EdgeError


@pytest.mark.parametrize(
    ("output", "content", "said"),
    [
        ("audits", None, "audits is a folder; name a file"),
        ("nowhere/a.json", None, "is not a folder; make it"),
        ("mine.json", '{"mine": 1}', "exists, and lfm-edge audit did not write it"),
        ("mine.json", "not JSON", "exists, and lfm-edge audit did not write it"),
    ],
)
def test_where_it_cannot_be_written_nothing_is_measured(
    demo_bundle, tmp_path, monkeypatch, capsys, output, content, said
) -> None:
    monkeypatch.setattr(audit_module, "audit", lambda *_: pytest.fail("measures"))
    (tmp_path / "audits").mkdir()
    if content is not None:
        (tmp_path / output).write_text(content)
    assert main(["audit", str(demo_bundle), "-o", str(tmp_path / output)]) == 2
    assert said in capsys.readouterr().err
    (tmp_path / "mine.csv").write_text("date,price\n")
    assert main(["audit", str(demo_bundle), "--csv", str(tmp_path / "mine.csv")]) == 2
    assert (tmp_path / "mine.csv").read_text() == "date,price\n"


def test_what_was_measured_is_kept_when_its_place_fails(tmp_path, monkeypatch) -> None:
    """A disk that became full, or a folder that was removed meanwhile."""
    from lfm_runtime.formats import files

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(elsewhere))
    with pytest.raises(
        EdgeError, match=r"cannot be written \(No such file or directory\); it was written to .* instead"
    ):
        files.write_or_rescue(tmp_path / "gone" / "audit.json", "measured")
    (kept,) = elsewhere.iterdir()
    assert kept.read_text() == "measured"


def test_the_audit_of_another_bundle_stays(audit, demo_bundle, tmp_path, capsys) -> None:
    """It would have to be measured again."""
    place = Path(write(tmp_path, "a", {**audit, "bundle": {**audit["bundle"], "name": "other"}}))
    before = place.read_bytes()
    assert main(["audit", str(demo_bundle), "-o", str(place)]) == 2
    assert f"is an audit of other, not of {demo_bundle.name}; choose" in capsys.readouterr().err
    assert place.read_bytes() == before


def test_the_audit_of_another_variant_stays(audit, demo_bundle, tmp_path, capsys) -> None:
    place = Path(write(tmp_path, "a", {**audit, "bundle": {**audit["bundle"], "name": demo_bundle.name}}))
    before = place.read_bytes()
    assert main(["audit", str(demo_bundle), "-o", str(place), "--variants", "fp32"]) == 2
    assert "has figures of int8, int4, which this run does not measure; choose another" in capsys.readouterr().err
    assert place.read_bytes() == before


@pytest.mark.parametrize("suffix", [".html", ".md"])
def test_an_edited_report_stays(suffix, audit, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    source, page = write(tmp_path, "a", audit), tmp_path / f"page{suffix}"
    words = ["report", str(source), "-o", str(page)]
    for _ in range(2):
        assert main(words) == 0
    whole = page.read_text()
    for edited in (f"{whole}MY NOTES\n", f"Mine\n{whole}", whole.replace("a", "A", 1)):
        page.write_text(edited)
        assert main(words) == 2
        assert "or it was edited since; choose another name" in capsys.readouterr().err
        assert page.read_text() == edited
    assert main([*words, "--force"]) == 0
    assert page.read_text() == whole


def test_one_file_for_two_outputs(demo_bundle, tmp_path, capsys) -> None:
    words = ["audit", str(demo_bundle), "-o", str(tmp_path / "a.csv"), "--csv", str(tmp_path / "." / "a.csv")]
    assert main(words) == 2
    assert "-o and --csv are both" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_audit_of_other_weights_stays(audit, demo_bundle, tmp_path, capsys) -> None:
    """Of another bundle in a folder of the same name, or of this one before it was made again."""
    bundle = {**audit["bundle"], "name": demo_bundle.name, "fingerprint": {"fp32": "0" * 64}}
    place = Path(write(tmp_path, "a", {**audit, "bundle": bundle, "variants": {"fp32": audit["variants"]["int8"]}}))
    assert main(["audit", str(demo_bundle), "-o", str(place), "--variants", "fp32"]) == 2
    assert f"{place} is an audit of other weights than {demo_bundle} has now; choose" in capsys.readouterr().err


def test_an_edited_audit_stays(audit, demo_bundle, tmp_path, capsys) -> None:
    place = Path(write(tmp_path, "a", audit))
    place.write_text(place.read_text().replace(audit["bundle"]["name"], "mine"))
    assert main(["audit", str(demo_bundle), "-o", str(place)]) == 2
    assert "or it was edited since; choose another name" in capsys.readouterr().err


def test_an_audit_that_ended_early_replaces_none(audit, demo_bundle, tmp_path, monkeypatch, capsys) -> None:
    """Ctrl-C during a second audit to the same place."""
    whole = {**audit, "bundle": {**audit["bundle"], "name": demo_bundle.name}}
    place = Path(write(tmp_path, "a", whole))
    cut = read_audit(Path(write(tmp_path, "cut", {**whole, "partial": True, "stopped": "interrupted"})))
    monkeypatch.setattr(audit_module, "audit", lambda *_: cut)
    monkeypatch.setattr(measured_module, "keep_measured", lambda *_: None)
    before, names = place.read_bytes(), lambda: sorted(path.name for path in tmp_path.glob("a*"))
    monkeypatch.setattr(command_module, "_check_same", lambda *_: None)  # of int8 and int4, which are not here
    words = ["audit", str(demo_bundle), "-o", str(place)]
    for n, name in enumerate((f"{place.stem}-partial.json", f"{place.stem}-partial-2.json"), 2):
        main(words)
        said = capsys.readouterr().out
        assert f"{place} stays, since this audit ended early\nwritten: {tmp_path / name}" in said
        assert place.read_bytes() == before and len(names()) == n
    main([*words, "--force"])
    assert read_audit(place).partial
