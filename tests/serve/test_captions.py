"""`lfm-edge caption`: a record of every image, whatever its file is, and runs that go on."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
from lfm_runtime import Model
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import SettingError
from lfm_runtime.images.files import _FORMATS
from lfm_serve.asking import Asking
from lfm_serve.captions.images import find, read_image
from lfm_serve.captions.making import Counts
from lfm_serve.captions.output import _shown
from lfm_serve.captions.progress import Progress
from lfm_serve.captions.setup import plan
from pictures import IMAGES, QUESTION
from PIL import Image

KEYS = ["path", "sha256", "size", "modified", "settings", "text", "finish_reason", "prompt_tokens", "image_tokens"]
KEYS += ["new_tokens", "ms", "peak_mib"]


def test_texts_are_those_of_single_answers(caption, demo_model) -> None:
    found = caption("--rows", "4")
    wanted = {f"images/{path.name}": demo_model.answer(path, QUESTION, temperature=0).text() for path in IMAGES[:12]}
    assert {record["path"]: record["text"] for record in found} == wanted
    assert len(found) == len(wanted)
    assert all(list(record) == KEYS for record in found)


def test_one_at_a_time_says_the_same(caption, tmp_path) -> None:
    together = {record["path"]: record["text"] for record in caption("--rows", "4")}
    (tmp_path / "out.jsonl").unlink()
    assert {record["path"]: record["text"] for record in caption("--rows", "1")} == together
    (tmp_path / "out.jsonl").unlink()
    assert {record["path"]: record["text"] for record in caption("--low-memory")} == together


def test_a_second_run_does_what_is_missing(caption, folder, tmp_path, monkeypatch) -> None:
    """Nothing done: not even the model is loaded; changed images are done again, and stand in the file once."""
    first = caption()
    with monkeypatch.context() as unloaded:
        unloaded.setattr(Model, "of", lambda *_, **__: pytest.fail("loaded for nothing"))
        assert caption() == first
    out = tmp_path / "out.jsonl"
    out.write_text("".join(f"{json.dumps(record)}\n" for record in first[4:]))
    shutil.copy(IMAGES[20], folder / IMAGES[5].name)
    os.utime(folder / IMAGES[6].name, (1, 1))  # touched
    found = caption()
    assert sorted(record["path"] for record in found) == sorted(record["path"] for record in first)
    old = {record["path"]: record for record in first}
    changed = {record["path"] for record in found if record["sha256"] != old[record["path"]]["sha256"]}
    assert changed == {f"images/{IMAGES[5].name}"}
    assert {record["path"] for record in found} == set(old)


def test_errors_are_records_and_can_be_tried_again(caption, folder) -> None:
    good = (folder / IMAGES[3].name).read_bytes()
    (folder / IMAGES[3].name).write_bytes(good[:60])
    found = {record["path"]: record for record in caption(code=3)}
    bad = found[f"images/{IMAGES[3].name}"]
    assert list(bad) == [*KEYS[:5], "error"]
    assert "not a readable image or is cut off" in bad["error"]
    assert sum("text" in record for record in found.values()) == 11
    assert caption("--retry-errors", code=3)
    (folder / IMAGES[3].name).write_bytes(good)
    again = caption("--retry-errors")
    assert all("text" in record for record in again)
    assert len(again) == 12


def test_odd_files(caption, demo_bundle, folder, tmp_path, capsys) -> None:
    """Each is a record or a line, and the run goes on."""
    (folder / "zero.png").touch()
    shutil.copy(IMAGES[0], folder / "new\nline.png")
    shutil.copy(IMAGES[0], os.fsencode(folder) + b"/bad\xff.png")
    (folder / "nothing.png").symlink_to("nowhere")
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "deep").mkdir()
    (folder / "deep" / "circle").symlink_to("..")
    shutil.copy(IMAGES[1], folder / "deep" / "deep.PNG")
    (folder / "notes.txt").write_text("x")
    os.mkfifo(folder / "pipe.png")
    Image.new("L", (9000, 3000)).save(folder / "huge.png")
    found = caption("--recursive", "--max-megapixels", "20", code=3)
    text = {record["path"].removeprefix("images/"): record.get("text") for record in found}
    errors = {record["path"].removeprefix("images/") for record in found if "error" in record}
    assert errors == {"zero.png", "nothing.png", "itself.png", "huge.png"}
    assert text["new\nline.png"] == text["bad\udcff.png"] == text[IMAGES[0].name]
    assert text["deep/deep.PNG"] == text[IMAGES[1].name]
    assert len(found) == len(text) == 12 + 7
    words = ["caption", str(demo_bundle), str(folder), "-o", str(tmp_path / "out.jsonl"), "-p", QUESTION]
    assert main([*words, "--threads", "1", "--recursive", "--max-megapixels", "20"]) == 3, "as the run before"
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(found)
    assert "0 answered, 19 there already, 4 with an error (--retry-errors does those again)" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "out.jsonl")]) == 0


def test_what_cannot_be_read_for_a_moment_keeps_its_answer(caption, folder, capsys, monkeypatch) -> None:
    """A folder that is gone, or a disk that fails: an answer is never replaced by such an error."""
    first = caption()
    kept, stat = IMAGES[2].name, os.stat

    def fails(path, *rest, **more):
        if str(path).endswith(kept):
            raise PermissionError(13, "Permission denied")
        return stat(path, *rest, **more)

    with monkeypatch.context() as failing:
        failing.setattr(os, "stat", fails)
        assert caption() == first
    os.utime(folder / kept, (1, 1))
    with monkeypatch.context() as failing:
        failing.setattr(
            "lfm_serve.captions.images._check_plain", lambda _: (_ for _ in ()).throw(OSError(5, "I/O error"))
        )
        assert caption() == first
    assert f"{kept} cannot be read (I/O error); its record stays" in capsys.readouterr().err


def test_the_same_folder_under_two_names(demo_bundle, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    words = ["caption", str(demo_bundle), ".", str(folder), "-o", str(tmp_path / "o.jsonl"), "-p", QUESTION, "--quiet"]
    assert main(words) == 0
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 12


def test_patterns_and_places(folder, tmp_path) -> None:
    (folder / "deep").mkdir()
    shutil.copy(IMAGES[0], folder / "deep" / "0000.png")
    said: list[str] = []

    def names(*places: Path, recursive: bool = False, match: tuple[str, ...] = ()) -> list[str]:
        found = find([str(place) for place in places], recursive=recursive, match=match, warn=said.append)
        return [os.path.relpath(path, folder) for path in found]

    assert names(folder, match=("000[12]*",)) == ["0001.png", "0002.png"]
    assert names(folder, recursive=True, match=("deep/*",)) == ["deep/0000.png"]
    assert names(folder / "0003.png") == ["0003.png"]
    assert not said
    with pytest.raises(Exception, match="does not exist; name a folder of images"):
        names(tmp_path / "nowhere")


def test_every_kind_of_photo_is_found_in_a_folder(folder) -> None:
    """What Pillow registers for the formats that are read, but for icons and what programs keep for themselves."""
    Image.init()
    odd = {"ICO", "ICNS", "DDS", "XBM", "XPM", "SGI", "PCX"}
    rare = {".jpc", ".jpf", ".jpx", ".j2c", ".icb", ".vda", ".vst", ".avifs", ".pfm"}
    kinds = {suffix for suffix, kind in Image.registered_extensions().items() if kind in {*_FORMATS} - odd} - rare
    assert {".jpg", ".jfif", ".webp", ".tif"} < kinds
    for suffix in kinds:
        (folder / f"photo{suffix}").touch()
        (folder / f"PHOTO{suffix.upper()}").touch()
    found = set(find([str(folder)], recursive=False, match=("*hoto.*", "*HOTO.*"), warn=print))
    assert found == {str(path) for path in folder.iterdir() if path.stem.lower() == "photo"}


def test_a_small_file_takes_little_memory(demo_model, folder) -> None:
    """As much as it has, not as much as it may have."""
    path = folder / IMAGES[0].name
    tracemalloc.start()
    try:
        read_image(demo_model, str(path), path.name, max_megapixels=1)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_other_settings_are_named(caption, demo_bundle, folder, tmp_path, capsys) -> None:
    caption()
    before = (tmp_path / "out.jsonl").read_bytes()
    caption("-p", "How many?", code=2)
    assert f"(question: '{QUESTION}', now 'How many?')" in capsys.readouterr().err
    caption("--max-image-tokens", "16", code=2)
    assert "(images.max_image_tokens: 64, now 16)" in capsys.readouterr().err
    caption("--max-new-tokens", "5", code=2)
    assert "(generation.max_new_tokens: 64, now 5)" in capsys.readouterr().err
    long = f"{'Look at this. ' * 9}How many {'shapes are there in it, and of which colours? ' * 3}"
    assert _shown(repr(f"{long}?"), repr(f"{long}!")) != _shown(repr(f"{long}!"), repr(f"{long}?"))
    assert (tmp_path / "out.jsonl").read_bytes() == before


# ---------------------------------------------------------------------------------------------- answers of other forms


def test_progress_says_rate_and_time_left(monkeypatch, capsys) -> None:
    """A bar on a terminal; a line a minute elsewhere."""
    clock = [1000.0]
    monkeypatch.setattr("lfm_serve.captions.progress.time.monotonic", lambda: clock[0])
    counts = Counts(answered=30, errors=20, started=880.0)
    progress = Progress(counts, 200, quiet=False)
    progress.told()
    assert capsys.readouterr().err == ""
    clock[0] += 61
    counts.answered += 25
    progress.told()
    progress.told()
    assert capsys.readouterr().err == "75 of 200 images, 20 errors, 24.9 a minute, 5 min left\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert Progress(counts, 200, quiet=False).line().startswith("[########............] 75 of 200 images")
    counts.answered = 25_000
    assert "8,294 a minute" in Progress(counts, None, quiet=True).line()


def test_rows_that_fit(demo_bundle) -> None:
    bundle, asking = Bundle.open(demo_bundle), Asking(QUESTION)
    usual = plan(bundle, "generic", asking)
    assert usual.rows == 4
    assert usual.capacity >= usual.setup.forecast.prompt_tokens + 64
    assert plan(bundle, "generic", asking, low_memory=True).rows == 1
    assert plan(bundle, "generic", asking, rows=7).rows == 7
    with pytest.raises(SettingError, match="rows 0 is impossible"):
        plan(bundle, "generic", asking, rows=0)
    with pytest.raises(SettingError, match="--rows 2 has no effect: with one graph in memory"):
        plan(bundle, "generic", asking, rows=2, low_memory=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the question is missing"),
        (["-p", " "], "the question is empty"),
        (["-p", "x", "-o", "out.csv"], "records are JSONL"),
        (["-p", "x", "--choices", "a"], "a choice needs two answers"),
        (["-p", "x", "--choices", "a,b", "--max-new-tokens", "3"], "no effect beside --choices"),
        (["-p", "x", "--schema", "s.json", "--choices", "a,b"], "exclude each other"),
        (["--fields", "nowhere.yaml"], "cannot be read"),
        (["-p", "x", "--fields", "f.yaml"], "-p has no effect beside --fields"),
        (["-p", "x", "--force"], "--force is about --sidecar"),
        (["-p", "x", "--table", "t.xlsx"], "name a .csv or a .parquet"),
        (["-p", "x", "--max-megapixels", "0"], "allowed: above 0"),
        (["-p", "x", "--rows", "0"], "--rows 0 is impossible"),
        (["-p", "x", "--match", "*.gif"], "none matches *.gif; try without --match"),
        (["-p", "x", "--schema", "f.yaml"], "f.yaml is not JSON"),
        (["-p", "x", "-o", "nowhere/out.jsonl"], "is not a folder"),
    ],
)
def test_what_cannot_be_is_one_line(demo_bundle, folder, tmp_path, capsys, monkeypatch, words, says) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.yaml").write_text("a: b\n")
    out = [] if "-o" in words else ["-o", "out.jsonl"]
    assert main(["caption", str(demo_bundle), str(folder), *out, *words]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_a_pattern_chooses_from_folders(demo_bundle, folder, tmp_path, capsys) -> None:
    words = ["caption", str(demo_bundle), *map(str, folder.iterdir()), "-p", "x", "-o", str(tmp_path / "out.jsonl")]
    assert main([*words, "--match", "*.tif"]) == 2
    assert "--match chooses from folders, and has no effect on files that are named" in capsys.readouterr().err


def test_what_the_kernel_does_not_tell_of(folder) -> None:
    """More events at once than it counts, or files on a network disk: found when all is looked at again, but for what
    may be in work.
    """
    watching = pytest.importorskip("lfm_serve.captions.watching")
    watch = watching.Watch([str(folder)], recursive=False, match=(), again_s=0.05)
    untold = iter([["a.png"], ["a.png", "b.png"], ["a.png", "b.png"]])
    found = watch.paths(["first.png"], lambda: next(untold, []), lambda _: None)
    assert [next(found) for _ in range(3)] == ["first.png", "a.png", "b.png"]
    (folder / "late.png").write_bytes(IMAGES[0].read_bytes())
    assert next(found).endswith("late.png")
    watch.stop()
    assert list(found) == []
