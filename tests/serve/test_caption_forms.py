"""`lfm-edge caption`: answers of other forms, and what is written beside the records."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from lfm_runtime import Model
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import EdgeError, SettingError
from lfm_serve.asking import is_extract, with_fields
from lfm_serve.captions import making, sidecars
from pictures import IMAGES
from PIL import Image


def test_choices_and_their_probabilities(caption, demo_model, tmp_path) -> None:
    found = caption("-p", "How many shapes?", "--choices", "1,2,3", "--rows", "3")
    for one in found[:3]:
        chosen = demo_model.choose(tmp_path / one["path"], "How many shapes?", ["1", "2", "3"])
        assert one["text"] == chosen.best
        assert list(one["probabilities"].values()) == pytest.approx(chosen.probabilities, abs=1e-5)


def test_a_schema_and_a_table(caption, tmp_path) -> None:
    pytest.importorskip("llguidance")
    (tmp_path / "s.json").write_text('{"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"]}')
    found = caption("--schema", str(tmp_path / "s.json"), "--table", str(tmp_path / "t.csv"))
    assert all(json.loads(one["text"])["n"] in (1, 2, 3) for one in found)
    with (tmp_path / "t.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(row["path"], row["text"]) for row in rows] == sorted((one["path"], one["text"]) for one in found)


def test_a_table_as_parquet(caption, folder, tmp_path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / "zero.png").touch()
    found = caption("--table", str(tmp_path / "t.parquet"), code=3)
    types = {column.name: str(column.type) for column in parquet.read_schema(tmp_path / "t.parquet")}
    assert "null" not in types.values()
    rows = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert [(row["path"], row["text"], row["error"]) for row in rows] == [
        (one["path"], one.get("text"), one.get("error")) for one in sorted(found, key=lambda one: one["path"])
    ]


def test_fields(caption, tmp_path, demo_bundle, monkeypatch) -> None:
    """A JSON object of the fields; an Extract checkpoint is asked as it was trained: the image is the whole turn."""
    pytest.importorskip("llguidance")
    (tmp_path / "f.yaml").write_text("shape: its shape, one word\ncolour:\n")
    asked = ("--fields", str(tmp_path / "f.yaml"), "--max-new-tokens", "200", "--table", str(tmp_path / "t.csv"))
    found = caption(*asked, code=3)
    whole = [one for one in found if one["finish_reason"] == "schema"]
    assert whole and all(list(one["fields"]) == ["shape", "colour"] and "error" not in one for one in whole)
    cut = [one for one in found if one["finish_reason"] == "length"]
    assert cut and all(one["fields"] is None and "before its JSON was whole" in one["error"] for one in cut)
    assert "fields.shape,fields.colour" in (tmp_path / "t.csv").read_text().splitlines()[0]
    bundle = Bundle.open(demo_bundle)
    assert not is_extract(bundle)
    monkeypatch.setattr("lfm_serve.asking.is_extract", lambda _: True)
    asking = with_fields(bundle, tmp_path / "f.yaml")
    assert asking.question == ""
    assert asking.system == (
        "Extract the following from the image:\n\nshape: its shape, one word\ncolour: \n\nRespond with only a JSON "
        "object. Do not include any text outside the JSON."
    )
    model = Model.load(demo_bundle, threads=1)
    job = replace(asking, generation={"max_new_tokens": 8}).work(model, model.open(IMAGES[0]))
    assert model.answering(job).text().startswith("{")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "is no mapping"),
        ("", "is no mapping"),
        ("a: [1]\n", "what 'a' means is no text"),
        ("a: x\nb: y\na: z\n", "'a' stands there twice"),
        ("yes: x\n", "True is no name of a field; put it in quotes"),
        ("a: b: c\n", "is not YAML"),
        ("!!python/object/apply:os.system ['x']\n", "is not YAML"),
    ],
)
def test_fields_that_are_none(demo_bundle, tmp_path, text, says) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(SettingError, match=says):
        with_fields(Bundle.open(demo_bundle), tmp_path / "f.yaml")


def test_sidecars_replace_only_our_own(caption, folder, tmp_path, capsys) -> None:
    (folder / "0002.txt").write_text("mine")
    found = {one["path"]: one["text"] for one in caption("--sidecar", "txt")}
    assert (folder / "0001.txt").read_text() == found["images/0001.png"] + "\n"
    assert (folder / "0002.txt").read_text() == "mine"
    assert (
        "0002.txt has a text that is in no record of this output, and stays; --force replaces it"
        in capsys.readouterr().err
    )
    shutil.copy(IMAGES[30], folder / "0001.png")
    again = {one["path"]: one["text"] for one in caption("--sidecar", "txt")}
    assert again["images/0001.png"] != found["images/0001.png"]
    assert (folder / "0001.txt").read_text() == again["images/0001.png"] + "\n"
    (folder / "0003.txt").unlink()  # as where a run ended between a record and its text
    caption("--sidecar", "txt")
    assert (folder / "0003.txt").read_text() == again["images/0003.png"] + "\n"


def test_a_table_of_somebody_else_stays(caption, folder, tmp_path) -> None:
    """So does one that was corrected by hand."""
    table = tmp_path / "t.csv"
    table.write_text("my,own\n")
    assert caption("--table", str(table), code=2) == []
    assert table.read_text() == "my,own\n"
    caption("--table", str(table), "--force")
    shutil.copy(IMAGES[30], folder)
    caption("--table", str(table))
    corrected = table.read_text().replace("square", "SQUARE")
    table.write_text(corrected)
    caption("--table", str(table), code=2)
    assert table.read_text() == corrected


def test_texts_of_two_images_never_share_a_file(caption, folder, tmp_path, capsys) -> None:
    Image.open(IMAGES[0]).convert("RGB").save(folder / "0001.jpg")
    Image.open(IMAGES[0]).convert("RGB").save(tmp_path / "picture.txt", "jpeg")
    (folder / "0004.txt").symlink_to(tmp_path / "elsewhere")
    picture = (tmp_path / "picture.txt").read_bytes()
    found = caption("--sidecar", "txt", "--force", str(tmp_path / "picture.txt"))
    said = capsys.readouterr().err
    assert "0001.txt is that of" in said
    assert "picture.txt is not written" in said
    assert "0004.txt is a link and stays" in said
    assert (tmp_path / "picture.txt").read_bytes() == picture
    assert not (tmp_path / "elsewhere").exists()
    assert len(found) == 14


def test_sidecars_that_cannot_be_written(caption, folder, capsys, monkeypatch) -> None:
    """The answers are kept, the exit code says that texts are missing, and the same command writes them later."""
    (folder / "0001.txt").mkdir()
    os.mkfifo(folder / "0002.txt")
    real = sidecars.write_whole

    def denied(place, text) -> None:
        if place.name in ("0003.txt", "0004.txt"):
            raise EdgeError("no") from PermissionError(errno.EACCES, "Permission denied")
        real(place, text)

    monkeypatch.setattr(sidecars, "write_whole", denied)
    found = {one["path"]: one["text"] for one in caption("--sidecar", "txt", code=3)}
    said = capsys.readouterr().err
    assert f"0001.txt is no plain file and stays; the text of {folder / '0001.png'} is not written" in said
    assert f"0003.txt cannot be written: Permission denied; change the permissions of {folder}\n" in said
    assert said.count("Permission denied") == said.count("no plain file") == 1, "there may be 100,000"
    assert f"{folder}: the same of 1 other text\n" in said
    assert "4 texts could not be written beside the images; the same command writes them once that is mended" in said
    caption("--sidecar", "txt", code=3)
    monkeypatch.setattr(sidecars, "write_whole", real)
    (folder / "0001.txt").rmdir()
    (folder / "0002.txt").unlink()
    caption("--sidecar", "txt")
    for n in range(1, 5):
        assert (folder / f"000{n}.txt").read_text() == found[f"images/000{n}.png"] + "\n"


def test_a_text_that_could_not_be_replaced_is_replaced_later(caption, folder, capsys, monkeypatch) -> None:
    """It is ours still, though its image has changed since and has another record."""
    first = {one["path"]: one["text"] for one in caption("--sidecar", "txt")}
    shutil.copy(IMAGES[30], folder / "0001.png")
    with monkeypatch.context() as patch:
        denied = EdgeError("no")
        denied.__cause__ = PermissionError(errno.EACCES, "Permission denied")
        patch.setattr(sidecars, "write_whole", lambda *_: (_ for _ in ()).throw(denied))
        caption("--sidecar", "txt", code=3)
        assert (folder / "0001.txt").read_text() == first["images/0001.png"] + "\n"
        caption("--sidecar", "txt", code=3)
    again = {one["path"]: one["text"] for one in caption("--sidecar", "txt")}
    assert again["images/0001.png"] != first["images/0001.png"]
    assert (folder / "0001.txt").read_text() == again["images/0001.png"] + "\n"
    (folder / "0001.txt").write_text(first["images/0001.png"] + "\n")  # by the user, who likes that better
    capsys.readouterr()
    caption("--sidecar", "txt")
    assert "stays; --force replaces it" in capsys.readouterr().err


def test_a_full_disk_is_waited_for_with_sidecars(caption, folder, capsys, monkeypatch) -> None:
    real, full = sidecars.write_whole, [True, True, False]

    def sometimes(place, text) -> None:
        if place.name == "0003.txt" and full.pop(0):
            raise EdgeError("no") from OSError(errno.ENOSPC, "No space left on device")
        real(place, text)

    monkeypatch.setattr(sidecars, "write_whole", sometimes)
    monkeypatch.setattr(making, "_PAUSES_S", (0.01,))
    caption("--sidecar", "txt")
    said = capsys.readouterr().err
    assert "0003.txt cannot be written: No space left on device; waiting until there is room" in said
    assert "there is room again" in said
    assert (folder / "0003.txt").is_file()
    (folder / "0003.txt").unlink()
    full += [True]
    caption("--sidecar", "txt", code=2)
    assert "0003.txt cannot be written: No space left on device; free some space" in capsys.readouterr().err


def test_folders_that_take_no_sidecars_are_refused_first(caption, folder, tmp_path, capsys, monkeypatch) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and real(path, mode))
    (out := tmp_path / "out.jsonl").touch()
    assert caption("--sidecar", "txt", code=2) == []
    assert (
        f"--sidecar writes beside the images, and {folder} is not writable; change the perm" in capsys.readouterr().err
    )
    assert not out.with_name("out.jsonl.settings.json").exists(), "nothing was opened"


def test_sidecars_are_of_the_images_that_are_named(caption, folder, tmp_path) -> None:
    """A record that came from elsewhere names any file; and --force replaces a text whose image has its record."""
    first = caption()
    (tmp_path / "other.png").write_bytes(b"x")
    out = tmp_path / "out.jsonl"
    out.write_text(out.read_text() + json.dumps({**first[0], "path": "other.png", "text": "EVIL"}) + "\n")
    (folder / "0003.txt").write_text("mine")
    caption("--sidecar", "txt")
    assert not (tmp_path / "other.txt").exists()
    assert (folder / "0003.txt").read_text() == "mine"
    caption("--sidecar", "txt", "--force")
    assert (folder / "0003.txt").read_text() == {one["path"]: one["text"] for one in first}["images/0003.png"] + "\n"


def test_the_page_of_a_run(caption, folder, tmp_path, capsys) -> None:
    (folder / "<b>.png").write_bytes(b"x")
    caption(code=3)
    assert main(["report", str(tmp_path / "out.jsonl")]) == 0
    page = (tmp_path / "out.html").read_text()
    assert page.count("<article") == 13
    assert page.index('class="bad"') < page.index("data:image/jpeg")
    assert "&lt;b&gt;.png" in page
    assert "<b>" not in page
    assert "://" not in page.replace("http://www.w3.org", "")
    assert main(["report", str(tmp_path / "out.jsonl"), "-o", str(tmp_path / "x.md")]) == 2
    odd = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    odd |= {"path": "\ud800", "text": "\udcff", "ms": {"total": 10**400}, "probabilities": {"a": "x", "b": 0.5}}
    odd.pop("error", None)
    (tmp_path / "odd.jsonl").write_text(
        f"{json.dumps(odd)}\n{json.dumps({**odd, 'path': 'x', 'fields': {'a': None}})}\n"
    )
    assert main(["report", str(tmp_path / "odd.jsonl")]) == 0
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    assert main(["report", str(tmp_path / "other.jsonl")]) == 2
    assert "was not written by lfm-edge caption" in capsys.readouterr().err, "and no line of it is to be removed"
    (tmp_path / "other.jsonl.settings.json").write_text("{}")
    assert main(["report", str(tmp_path / "other.jsonl")]) == 2
    assert "line 1 is no record of lfm-edge caption; remove the line" in capsys.readouterr().err
