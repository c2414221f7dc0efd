"""`lfm-edge caption`: a record of every image, whatever happens to files, disks and processes."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from lfm_runtime import Model
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import SettingError
from lfm_serve.asking import Asking, is_extract, with_fields
from lfm_serve.captions.images import find
from lfm_serve.captions.journal import read_records
from lfm_serve.captions.making import Counts
from lfm_serve.captions.progress import Progress
from lfm_serve.captions.setup import plan
from PIL import Image

IMAGES = sorted((Path(__file__).resolve().parents[2] / "demo" / "eval" / "images").glob("*.png"))
QUESTION = "What is in this image?"
KEYS = ["path", "sha256", "size", "modified", "settings", "text", "finish_reason", "prompt_tokens", "image_tokens"]
KEYS += ["new_tokens", "ms", "peak_mib"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve images."""
    (tmp_path / "images").mkdir()
    for image in IMAGES[:12]:
        shutil.copy(image, tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def caption(demo_bundle, folder, tmp_path):
    """A function that runs the command on the folder; returns its exit code and the records."""

    def run(*words: str, code: int = 0) -> list[dict]:
        out = tmp_path / "out.jsonl"
        arguments = ["caption", str(demo_bundle), str(folder), "-o", str(out), "--threads", "1", "--quiet", *words]
        asked = () if {"-p", "--fields"}.intersection(words) else ("-p", QUESTION)
        assert main([*arguments, *asked]) == code
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


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


def test_odd_files(caption, folder, tmp_path) -> None:
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
    assert len(caption("--recursive", "--max-megapixels", "20")) == len(found)
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


def test_other_settings_are_named(caption, demo_bundle, folder, tmp_path, capsys) -> None:
    caption()
    before = (tmp_path / "out.jsonl").read_bytes()
    caption("-p", "How many?", code=2)
    assert f"(question: '{QUESTION}', now 'How many?')" in capsys.readouterr().err
    caption("--max-image-tokens", "16", code=2)
    assert "images: " in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before


# ---------------------------------------------------------------------------------------------- answers of other forms


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
    assert {(row["path"], row["text"]) for row in rows} == {(one["path"], one["text"]) for one in found}


def test_a_table_as_parquet(caption, folder, tmp_path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / "zero.png").touch()
    found = caption("--table", str(tmp_path / "t.parquet"), code=3)
    rows = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert [(row["path"], row["text"], row["error"]) for row in rows] == [
        (one["path"], one.get("text"), one.get("error")) for one in found
    ]


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


def test_fields(caption, tmp_path, demo_bundle, monkeypatch) -> None:
    """A JSON object of the fields; an Extract checkpoint is asked as it was trained: the image is the whole turn."""
    pytest.importorskip("llguidance")
    (tmp_path / "f.yaml").write_text("shape: its shape, one word\ncolour:\n")
    found = caption("--fields", str(tmp_path / "f.yaml"), "--max-new-tokens", "200", "--table", str(tmp_path / "t.csv"))
    whole = [one["fields"] for one in found if one["finish_reason"] == "schema"]
    assert all(list(fields) == ["shape", "colour"] for fields in whole)
    assert all(one["fields"] is None for one in found if one["finish_reason"] == "length")
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
    job = asking.work(model, model.open(IMAGES[0]), {"max_new_tokens": 8})
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
    assert "0002.txt is not of lfm-edge caption and stays; --force replaces it" in capsys.readouterr().err
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
    assert "line 1 is no record of lfm-edge caption" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- what is decided


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
        (["-p", " "], "the question is missing"),
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
        (["-p", "x", "--schema", "f.yaml"], "the schema is not JSON"),
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


# --------------------------------------------------------------------------------------------------- processes that end


def started(bundle: Path, folder: Path, out: Path, *words: str, **more) -> subprocess.Popen:
    command = [sys.executable, "-m", "lfm_runtime", "caption", str(bundle), str(folder), "-o", str(out), "-p", QUESTION]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--threads", "1", *words], env=environment, stderr=subprocess.PIPE, text=True, **more
    )


def wait_for(process: subprocess.Popen, words: str) -> str:
    """Read what a process says until these words come."""
    said = ""
    for line in process.stderr:
        said += line
        if words in line:
            return said
    raise AssertionError(f"it ended without {words!r}: {said}")


def test_killed_at_any_moment(demo_bundle, tmp_path) -> None:
    """SIGKILL again and again: every record is there once, whole, and the texts are those of one run."""
    shutil.copytree(IMAGES[0].parent, tmp_path / "images")
    out, moments = tmp_path / "out.jsonl", 50 if os.environ.get("LONG") == "1" else 10
    before, between = b"", 0
    for n in range(moments):
        process = started(demo_bundle, tmp_path / "images", out)
        wait_for(process, "at once")
        time.sleep(0.02 * (n % 7))
        process.kill()
        process.communicate()
        lines = out.read_bytes().split(b"\n")
        assert out.read_bytes().startswith(before), "what was whole is gone"
        between += 1 < len(lines) <= len(IMAGES)
        before = b"".join(line + b"\n" for line in lines[:-1])
        paths = [json.loads(line)["path"] for line in lines[:-1]]
        assert len(paths) == len(set(paths))
        if len(paths) == len(IMAGES):
            out.unlink()
            before = b""
    assert between, "no run was killed in the middle"
    process = started(demo_bundle, tmp_path / "images", out)
    process.communicate()
    assert process.returncode == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(one["path"] for one in found) == [f"images/{path.name}" for path in IMAGES]
    model = Model.load(demo_bundle, threads=1)
    for one in found[::40]:
        assert one["text"] == model.answer(tmp_path / one["path"], QUESTION, temperature=0).text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_answers_end(demo_bundle, tmp_path, number) -> None:
    out = tmp_path / "out.jsonl"
    process = started(demo_bundle, IMAGES[0].parent, out, "--rows", "4")
    wait_for(process, "at once")
    while not out.stat().st_size:
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate()[1]
    done = out.read_bytes().count(b"\n")
    assert done < len(IMAGES), "it was too fast for this test"
    assert process.returncode == 130, said
    assert "ending after the answers that are being made" in said
    assert f"out.jsonl: {done} answered" in said
    assert [json.loads(line)["finish_reason"] for line in out.read_text().splitlines()] == ["eos"] * done


def test_a_full_disk_is_waited_for(demo_bundle, folder, tmp_path) -> None:
    """The file may not grow beyond 1,500 bytes for a while."""
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))  # noqa: E731
    out = tmp_path / "out.jsonl"
    process = started(demo_bundle, folder, out, preexec_fn=small)
    wait_for(process, "waiting until there is room")
    for line in out.read_text().splitlines():
        json.loads(line)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert "there is room again" in said
    assert len(out.read_text().splitlines()) == 12


def test_new_images_are_waited_for(demo_bundle, folder, tmp_path) -> None:
    """One that is written slowly is read when it is closed; one that is moved in, at once. The folder is a link."""
    out = tmp_path / "out.jsonl"
    (tmp_path / "link").symlink_to(folder)
    process = started(demo_bundle, tmp_path / "link", out, "--watch")
    wait_for(process, "at once")
    drained = threading.Thread(target=process.stderr.read, daemon=True)
    content = IMAGES[40].read_bytes()
    ends = time.monotonic() + 120  # a test that hangs says less than one that fails
    with (folder / "slow.png").open("wb") as f:
        f.write(content[:100])
        f.flush()
        shutil.copy(IMAGES[41], tmp_path / "moved.png")
        (tmp_path / "moved.png").rename(folder / "moved.png")
        while b"moved.png" not in out.read_bytes():
            assert process.poll() is None
            assert time.monotonic() < ends
            time.sleep(0.01)
        assert b"slow.png" not in out.read_bytes()
        f.write(content[100:])
    while b"slow.png" not in out.read_bytes():
        assert process.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.01)
    drained.start()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    found = {one["path"]: one for one in read_records(out)}
    assert len(found) == 14
    assert "text" in found["link/slow.png"]
