"""`lfm-edge watch` of stills: what is asked and recorded, and what wrong words get."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from datetime import datetime

import pytest
from lfm_runtime.commands.cli import main
from lfm_runtime.installation import install_advice
from lfm_serve.cameras import records
from pictures import IMAGES, QUESTION
from PIL import Image
from watching import HEAD, PATIENCE_S


@pytest.fixture
def watch(demo_bundle, capsys):
    """A function that runs the command here; returns its records."""

    def run(source: str, *words: str, code: int = 0) -> list[dict]:
        asked = () if {"-p", "--fields"}.intersection(words) else ("-p", QUESTION)
        capsys.readouterr()
        assert main(["watch", str(demo_bundle), source, *asked, "--threads", "1", *words]) == code
        out, run.said = capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()]

    return run


def test_a_folder_of_stills(watch, stills, demo_model) -> None:
    """Each once, in order; texts are those of single answers."""
    found = watch(str(stills))
    wanted = [demo_model.answer(path, QUESTION, temperature=0).text() for path in IMAGES[:6]]
    assert [(one["at"], one["text"]) for one in found] == [(f"{n}.png", text) for n, text in enumerate(wanted)]
    assert all(list(one) == [*HEAD[:3], "at", *HEAD[3:]] for one in found)
    assert "6 answers" in watch.said


def test_what_it_needs_is_said_once_and_for_all(watch, stills, tmp_path, starts_empty) -> None:
    """What is named as the least suffices; a video needs more than stills; what cannot be set is no advice."""
    pytest.importorskip("av")
    profile, needed = tmp_path / "small.toml", {}

    def allow(mib: int) -> str:
        profile.write_text(f'extends = "generic"\n[budget]\npeak_rss_mib = {mib}\n')
        return str(profile)

    (tmp_path / "film.mp4").write_bytes(b"not looked at")
    for source in (stills, tmp_path / "film.mp4"):
        for limit in (20, 30):
            watch(str(source), "--profile", allow(limit), code=2)
            said = re.search(
                rf"needs at least (\d+) MiB .*; profile small allows {limit} MiB \(peak_rss_mib\)\. (.*)\n", watch.said
            )
            assert said[2] == "Take a smaller model, or another profile"
            needed.setdefault(source.name, []).append(int(said[1]))
    few, more = needed.values()
    assert few[0] == few[1]
    assert min(more) >= few[0] + 50
    assert watch(str(stills), "--profile", allow(few[0] + 1), "--max-new-tokens", "1")
    assert f"reduced to fit the memory (profile small allows {few[0] + 1} MiB (peak_rss_mib)): no tiles" in watch.said


def test_several_questions_about_each(watch, stills) -> None:
    found = watch(str(stills), "-p", QUESTION, "-p", "How many shapes?")
    assert [one["question"] for one in found] == [QUESTION, "How many shapes?"] * 6
    assert {one["encoded_tiles"] for one in found[1::2]} == {0}
    assert all(one["cached_tokens"] >= one["image_tokens"] for one in found[1::2])


def test_a_camera_that_never_gave_a_picture_ends_with_3(watch) -> None:
    """Whoever waits for something learns that nothing was looked at."""
    assert [one["event"] for one in watch("exec:exit 7", "--until", "1s", code=3)][:1] == ["lost"]
    assert watch("exec:exit 7", "--until", "1s", "--until", "answer:cat", code=1)
    assert watch("exec:exec sleep 60", "--until", "1s", code=3) == [], "it is not lost yet"


def test_lost_records_of_a_camera_end_with_3(watch, stills, tmp_path, monkeypatch, demo_model) -> None:
    """Also where others were written: whoever looks at the exit code alone learns of them."""
    failures = iter([OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
    append = records.append

    def once_full(*words, **named) -> None:
        if error := next(failures, None):
            raise error
        append(*words, **named)

    monkeypatch.setattr(records, "append", once_full)
    last = demo_model.answer(IMAGES[1], QUESTION, temperature=0).text()
    source = f"exec:while :; do for n in 0 1; do cat {stills}/$n.png; sleep 0.3; done; done"
    watch(source, "--until", f"answer:{last}", "-o", str(tmp_path / "out.jsonl"), code=3)
    assert "records are lost until there is room" in watch.said and "1 record lost" in watch.said


def test_unreadable_stills_are_records(watch, stills) -> None:
    (stills / "2.png").write_bytes(b"")
    (stills / "3.png").write_bytes((stills / "4.png").read_bytes()[:60])
    with contextlib.suppress(OSError):
        shutil.copy(stills / "4.png", os.fsencode(stills) + b"/\xff.png")
    found = watch(str(stills), code=3)
    assert [one["at"] for one in found if "error" in one] == ["2.png", "3.png"]
    assert [os.fsencode(one["at"]) for one in found][6:] in ([], [b"\xff.png"])
    assert sum("text" in one for one in found) == len(found) - 2 >= 4
    assert "2 errors" in watch.said


def test_only_what_has_changed(watch, stills) -> None:
    for n in range(6):
        shutil.copy(IMAGES[n // 3], stills / f"{n}.png")
    found = watch(str(stills), "--changed", "0.02")
    assert [one["frame"] for one in found] == [0, 3]
    assert "4 pictures unchanged" in watch.said
    found = watch(str(stills))
    assert [one["encoded_tiles"] for one in found] == [1, 0, 0, 1, 0, 0]
    assert [one["changed"] == 0 for one in found] == [False, True, True, False, True, True]


def test_a_region(watch, stills, demo_model) -> None:
    found = watch(str(stills), "--roi", "0,0,64,64")
    assert {tuple(one["size"]) for one in found} == {(64, 64)}
    wanted = demo_model.answer(Image.open(IMAGES[0]).convert("RGB").crop((0, 0, 64, 64)), QUESTION, temperature=0)
    assert found[0]["text"] == wanted.text()


def test_until_an_answer(watch, stills) -> None:
    texts = [one["text"] for one in watch(str(stills))]
    word = texts[3].split()[0]
    first = next(n for n, text in enumerate(texts) if word in text.split())
    assert len(watch(str(stills), "--until", f"answer:{word}")) == first + 1
    assert watch(str(stills), "--until", "0s") == []
    assert len(watch(str(stills), "--until", "answer:zebra", code=1)) == 6
    for ends in (("answer:zebra", "0s"), ("0s", "answer:zebra")):
        assert watch(str(stills), "--until", ends[0], "--until", ends[1], code=1) == []


def test_choices_schemas_and_fields(watch, stills, tmp_path) -> None:
    found = watch(str(stills), "--choices", "red cross,green circle")
    assert all(set(one["probabilities"]) == {"red cross", "green circle"} for one in found)
    assert all(one["ms"]["ttft"] is None for one in found), "nothing is generated"
    pytest.importorskip("llguidance")
    (tmp_path / "fields.yaml").write_text("shape: the shape that is seen\n")
    found = watch(str(stills), "--fields", str(tmp_path / "fields.yaml"), "--max-new-tokens", "40", code=3)
    assert all((one["fields"] is None) == ("error" in one) for one in found)
    assert any("error" in one for one in found)


def test_records_are_appended_to_a_file(watch, stills, tmp_path, capsys) -> None:
    out = tmp_path / "out.jsonl"
    assert watch(str(stills), "-o", str(out)) == []
    with out.open("a") as f:
        f.write('{"time": "20')
    watch(str(stills), "-o", str(out))
    assert main(["report", str(out)]) == 2
    assert "out.jsonl has records of lfm-edge watch, not of lfm-edge caption" in capsys.readouterr().err
    assert [json.loads(line)["frame"] for line in out.read_text().splitlines()] == [*range(6), *range(6)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere.mp4"], "nowhere.mp4 does not exist"),
        (["stills", "--changed", "2"], "--changed 2 is impossible"),
        (["stills", "--changed", "nan"], "--changed nan is impossible"),
        (["stills", "--tile-tolerance", "-1"], "--tile-tolerance -1 is impossible"),
        (["stills", "--every", "2s"], "--every has no effect on a folder"),
        (["stills", "--stall", "2s"], "--stall is about cameras"),
        (["exec:x", "--stall", "0"], "--stall 0 is impossible"),
        (["exec:x", "--every", "99999999999d"], "--every '99999999999d' is no duration"),
        (["admin:secret@cam/1"], "^lfm-edge: …@cam/1 does not exist"),
        (["stills", "--roi", "1,2"], "--roi '1,2' is no region"),
        (["stills", "--roi", "9999,0,5,5"], "9999,0,5,5 is not inside of the picture of 128×128"),
        (["stills", "--roi", "0,0,1,1"], "is one pixel: shares have decimal points"),
        (["stills", "--roi", "100,100,29,5"], "100,100,29,5 is not inside of the picture of 128×128"),
        (["stills", "--roi", "0.5,0.0,0.6,1.0"], "reaches over the picture's edge"),
        (["stills", "--roi=-0.5,0.0,0.6,1.0"], "is no region of a picture"),
        (["stills", "--until", "later"], "--until 'later' is no end"),
        (
            ["stills", "--choices", "yes,no", "--until", "answer:maybe"],
            "answer:maybe never comes: --choices are yes, no",
        ),
        (["exec:x", "--every", "soon"], "--every 'soon' is no duration"),
        (["stills", "-o", "out.txt"], "name it OUT.jsonl"),
        (["stills", "-o", "nowhere/out.jsonl"], "nowhere"),
        (["stills", "--mqtt", "broker/topic"], "--mqtt is mqtt://"),
        (["stills", "--mqtt", "mqtt://me:se@cret@broker/a"], "write @ as %40"),
        (["stills", "--mqtt", "mqtt://broker:0/a"], "port 0 is impossible"),
        (["stills", "--mqtt", "mqtt://broker:99999/a"], "port 99999 is impossible"),
        (["stills", "--mqtt", "mqtt://a..b/a"], "a..b is no name of a host"),
        (["stills", "--mqtt", "mqtt://broker/" + 66_000 * "a"], "--mqtt is mqtt://"),
        (["stills", "-p", "word " * 40_000], "the prompt has"),
        (["stills", "--mqtt", "mqtt://me:secret@broker/a/+/b"], "no [+] or # in TOPIC"),
        (["stills", "-p", " "], "the question is empty"),
        (["stills", "--choices", "a,b", "--max-new-tokens", "3"], "no effect beside --choices"),
        (["stills", "--schema", "a.json", "--choices", "a,b"], "exclude each other"),
    ],
)
def test_wrong_words(demo_bundle, stills, capfd, monkeypatch, words, says) -> None:
    """One line, exit code 2, and no secret in it."""
    monkeypatch.chdir(stills.parent)
    asked = () if "-p" in words else ("-p", QUESTION)
    assert main(["watch", str(demo_bundle), *words, *asked, "--quiet"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.search(says, err)
    assert err.count("\n") == 1
    assert "secret" not in err


def test_times_are_utc(watch, stills, monkeypatch) -> None:
    """Wherever the board is."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    moment = datetime.fromisoformat(watch(str(stills))[0]["time"].replace("Z", "+00:00"))
    assert abs(moment.timestamp() - time.time()) < PATIENCE_S


def test_without_the_extras_it_says_which(demo_bundle, capsys, monkeypatch, stills) -> None:
    for name in ("av", "paho"):
        if importlib.util.find_spec(name):
            monkeypatch.setitem(sys.modules, name, None)
            for loaded in [module for module in sys.modules if module.startswith((f"{name}.", "lfm_serve.cameras."))]:
                monkeypatch.delitem(sys.modules, loaded)
    assert main(["watch", str(demo_bundle), "rtsp://me:secret@cam/1", "-p", QUESTION]) == 2
    assert main(["watch", str(demo_bundle), __file__, "-p", QUESTION]) == 2
    assert main(["watch", str(demo_bundle), str(stills), "-p", QUESTION, "--mqtt", "mqtt://broker/a"]) == 2
    said = capsys.readouterr().err
    for extra in ("video", "mqtt"):
        assert f"needs the extra {extra}: {install_advice(extra)}\n" in said
    assert f"{__file__} is no image, and as a video needs the extra video: " in said
    assert main(["watch", str(demo_bundle), str(IMAGES[0]), "-p", QUESTION, "--threads", "1"]) == 0, "needs none"
    assert "secret" not in said
