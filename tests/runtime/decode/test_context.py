"""Going on from what is known: marks, snapshots, forks and caches equal computing everything again."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lfm_profiles import Device, read
from lfm_runtime import Chat, EdgeError, ImageError, Message, Model, PromptError, SettingError
from lfm_runtime.batch import answer_all
from lfm_runtime.commands.cli import main
from lfm_runtime.decode.cache import Cache
from lfm_runtime.decode.context import Context, prompt_keys
from lfm_runtime.decode.state import Snapshot
from lfm_runtime.decode.states import ConcatenatedState, SharedState
from lfm_runtime.images.opened import view_key
from lfm_runtime.setup.resolve import resolve
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
PICTURES = [ROOT / "demo" / "eval" / "images" / f"{i:04d}.png" for i in range(3)]
QUESTION = "What is in this image?"


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(120, 400, n)


def states(model, capacity):
    return SharedState(model.decoder, capacity), ConcatenatedState(model.decoder, capacity)


@pytest.mark.parametrize("boundary", [1, 2, 3, 7, 20, 39])
@pytest.mark.parametrize("form", [0, 1])
def test_rewinding_equals_recomputing(demo_model, boundary, form) -> None:
    """At every boundary, also within the convolutions' kernel of the start: logits after a rewind against a fresh
    state's.
    """
    ids, other = tokens(40), tokens(9, 1)
    embed = demo_model.decoder.embed
    state, fresh = states(demo_model, 64)[form], states(demo_model, 64)[form]
    state.step(embed(list(ids[:boundary])))
    mark = state.mark()
    for token in ids[boundary:]:
        state.step(embed([int(token)]))
    state.rewind(mark)
    assert state.length == boundary
    again = [state.step(embed([int(token)])).copy() for token in other]
    fresh.step(embed(list(ids[:boundary])))
    wanted = [fresh.step(embed([int(token)])).copy() for token in other]
    np.testing.assert_allclose(again, wanted, atol=1e-4)


@pytest.mark.parametrize("form", [0, 1])
def test_snapshot_starts_another_state(demo_model, form) -> None:
    """What the first state does after a copy was made, and a larger capacity, change nothing."""
    embed = demo_model.decoder.embed
    state = states(demo_model, 48)[form]
    state.step(embed(list(tokens(21))))
    snapshot = state.snapshot().copy()
    wanted = state.step(embed(list(tokens(5, 1)))).copy()
    state.step(embed(list(tokens(5, 2))))
    other = type(state)(demo_model.decoder, 96, snapshot)
    np.testing.assert_allclose(other.step(embed(list(tokens(5, 1)))), wanted, atol=1e-4)


def test_keys_tell_images_apart(demo_model) -> None:
    one, two = (demo_model.open(p).cut() for p in PICTURES[:2])
    prompt = demo_model.prompts.render([Message.user("x", 2)], [one.layout, two.layout])
    image = demo_model.prompts.image_id
    keys = [
        prompt_keys(prompt.ids, image, [*a.keys, *b.keys], prompt.view_ends)
        for a, b in ((one, two), (one, one), (two, one))
    ]
    assert len({k.tobytes() for k in keys}) == 3
    assert [int((k < 0).sum()) for k in keys] == [prompt.image_tokens] * 3
    assert {int(k) for k in keys[0] if k < 0} == {*one.keys, *two.keys}
    first_end, last_end = prompt.image_ends
    assert keys[0][first_end - 1] == one.keys[0]
    assert keys[0][last_end - 1] == two.keys[0]
    assert np.array_equal(np.flatnonzero(keys[0] < 0), np.flatnonzero(np.array(prompt.ids) == image))
    assert demo_model.open(PICTURES[0]).cut().keys == one.keys
    pixels = np.zeros((2, 3, 3), np.uint8)
    assert len({view_key(pixels, "a"), view_key(pixels, "b"), view_key(pixels.reshape(3, 2, 3), "a")}) == 3


def test_session_equals_the_whole_conversation(demo_model) -> None:
    """Three turns with a new image in the second, each against a conversation computed from nothing."""
    chat = Chat(demo_model, system="Be short.")
    messages, images = [Message("system", "Be short.")], []
    for question, new in (("How many shapes?", PICTURES[:1]), (QUESTION, PICTURES[1:2]), ("How many shapes?", [])):
        answer = chat.ask(question, new, max_new_tokens=12)
        turn = Message.user(question, len(new))
        images += new
        wanted = demo_model.converse([*messages, turn], images, max_new_tokens=12).text()
        assert answer.text() == wanted
        messages += [turn, Message("assistant", wanted)]
    assert answer.report.cached_tokens > 0.8 * answer.report.prompt_tokens


def test_fork_goes_its_own_way(demo_model) -> None:
    chat = Chat(demo_model)
    chat.ask("How many shapes?", PICTURES[:1]).text()
    other = chat.fork()
    apart = chat.ask(QUESTION).text(), other.ask("How many shapes?").text()
    assert apart == (
        demo_model.converse([*chat.messages[:2], Message("user", QUESTION)], PICTURES[:1]).text(),
        demo_model.converse([*chat.messages[:2], Message.user("How many shapes?")], PICTURES[:1]).text(),
    )
    assert len(chat.messages) == len(other.messages) == 4


def test_closed_answers_are_part_of_the_talk(demo_model) -> None:
    chat = Chat(demo_model)
    answer = chat.ask(QUESTION, PICTURES[:1])
    pieces = iter(answer)
    next(pieces)
    with pytest.raises(SettingError, match="not finished"):
        chat.ask("x")
    with pytest.raises(SettingError, match="fork before or after"):
        chat.fork()
    pieces.close()
    assert chat.messages[-1] == Message("assistant", answer.report.text)
    wanted = demo_model.converse([*chat.messages, Message("user", "How many shapes?")], PICTURES[:1]).text()
    assert chat.ask("How many shapes?").text() == wanted


def test_failed_turn_leaves_the_conversation(demo_model) -> None:
    chat = Chat(demo_model)
    chat.ask("How many shapes?", PICTURES[:1]).text()
    with pytest.raises(EdgeError):
        chat.ask("x", [ROOT / "README.md"])
    assert len(chat.messages) == 2
    assert chat.ask(QUESTION).report.cached_tokens == 0  # nothing happens before the answer is read
    assert len(chat.messages) == 2


def test_interrupted_answers(demo_model, monkeypatch) -> None:
    """Of an answer that Ctrl-C ends, what was said stays; one that had said nothing is forgotten with its question."""
    chat, real, steps = Chat(demo_model), SharedState.step_token, iter(range(2))

    def interrupted(state, token):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return real(state, token)

    with monkeypatch.context() as patch:
        patch.setattr(SharedState, "step_token", interrupted)
        answer = chat.ask(QUESTION, PICTURES[0])
        with pytest.raises(KeyboardInterrupt):
            answer.text()
    assert chat.messages == [Message.user(QUESTION, 1), Message("assistant", answer.report.text)]
    with monkeypatch.context() as patch:
        patch.setattr(SharedState, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            chat.ask("x").text()
    assert len(chat.messages) == 2
    wanted = demo_model.converse([*chat.messages, Message.user("How many shapes?")], PICTURES[:1])
    assert chat.ask("How many shapes?").text() == wanted.text()


def test_step_that_fails_is_computed_again(demo_model, monkeypatch) -> None:
    """A context whose state broke half-way starts from nothing rather than from a wrong state."""
    chat = Chat(demo_model)
    wanted = chat.ask(QUESTION, PICTURES[:1]).text()
    with monkeypatch.context() as patch:
        patch.setattr(SharedState, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            chat.ask("How many shapes?").text()
    assert len(chat.messages) == 2
    again = chat.ask("How many shapes?")
    assert (
        again.text() == demo_model.converse([*chat.messages[:2], Message.user("How many shapes?")], PICTURES[:1]).text()
    )
    assert wanted
    assert again.report.cached_tokens == 0


def test_one_image_is_a_list_of_one(demo_model) -> None:
    """A path is not taken letter by letter, nor an array row by row."""
    wanted = demo_model.answer([PICTURES[0]], QUESTION, temperature=0).text()
    picture = Image.open(PICTURES[0]).convert("RGB")
    for image in (str(PICTURES[0]), PICTURES[0], PICTURES[0].read_bytes(), picture, np.asarray(picture)):
        assert demo_model.answer(image, QUESTION, temperature=0).text() == wanted
    assert Chat(demo_model).ask(QUESTION, PICTURES[0], temperature=0).text() == wanted
    ((_, report),) = answer_all(demo_model, [(PICTURES[0], QUESTION)], temperature=0)
    assert report.text == wanted
    with pytest.raises(ImageError, match=r"What is in this image\? does not exist"):
        demo_model.answer(QUESTION, str(PICTURES[0]))
    for question in ([QUESTION], None, 5):
        with pytest.raises(PromptError, match="must be a str"):
            demo_model.answer(PICTURES[0], question)
    with pytest.raises(ImageError, match="NoneType"):
        demo_model.answer(None, QUESTION)


def cached_model(bundle, folder=None, **more) -> Model:
    return Model.load(bundle, threads=2, cache_mib=16, cache_folder=folder, **more)


def test_second_question_about_the_same_image(demo_bundle, demo_model) -> None:
    """Nothing of the image is computed again, and the text is the same."""
    model = cached_model(demo_bundle)
    model.answer(PICTURES[:1], "How many shapes?").text()
    answer = model.answer(PICTURES[:1], QUESTION)
    assert answer.text() == demo_model.answer(PICTURES[:1], QUESTION).text()
    assert answer.report.timing_ms["vision"] is None
    assert (
        answer.report.cached_tokens == answer.report.image_tokens + 5
    )  # bos, <|im_start|>, user, newline, <|image_start|>
    other = model.answer(PICTURES[1:2], QUESTION)
    assert other.text() == demo_model.answer(PICTURES[1:2], QUESTION).text()
    assert other.report.cached_tokens == 0
    behind_text = model.converse([Message("system", "Be short."), Message.user(QUESTION, 1)], PICTURES[:1])
    assert behind_text.text()
    assert behind_text.report.timing_ms["vision"] is None  # features are kept apart from what stands before the image
    assert behind_text.report.cached_tokens == 0


def test_cache_on_disk_serves_another_process(demo_bundle, demo_model, tmp_path) -> None:
    words = [
        "run",
        str(demo_bundle),
        str(PICTURES[0]),
        "-p",
        QUESTION,
        "--json",
        "--cache",
        str(tmp_path / "cache"),
        "--threads",
        "2",
    ]
    code = f"import sys; from lfm_runtime.commands.cli import main; sys.exit(main({words!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    reports = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    import json

    first, second = (json.loads(done.stdout) for done in reports)
    assert first["text"] == second["text"] == demo_model.answer(PICTURES[:1], QUESTION).text()
    assert first["cached_tokens"] == 0 < second["cached_tokens"]
    assert second["timing_ms"]["vision"] is None


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", "flip", "cut"])
def test_damaged_entry_is_computed_again(demo_bundle, demo_model, tmp_path, damage) -> None:
    cached_model(demo_bundle, tmp_path).answer(PICTURES[:1], QUESTION).text()
    for path in tmp_path.glob("*.npz"):
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content[len(content) // 2] ^= 0xFF
        path.write_bytes(
            damage if isinstance(damage, bytes) else content[: len(content) // 2] if damage == "cut" else content
        )
    answer = cached_model(demo_bundle, tmp_path).answer(PICTURES[:1], QUESTION)
    assert answer.text() == demo_model.answer(PICTURES[:1], QUESTION).text()
    assert answer.report.cached_tokens == 0
    assert all(zipfile.ZipFile(path).testzip() is None for path in tmp_path.glob("*.npz"))  # and kept anew


def test_foreign_entries_are_not_used(demo_bundle, demo_model, tmp_path) -> None:
    """Another variant's cache in the same folder: nothing is taken from it."""
    cached_model(demo_bundle, tmp_path).answer(PICTURES[:1], QUESTION).text()
    other = cached_model(demo_bundle, tmp_path)
    other.cache = Cache("another model", folder=tmp_path)
    answer = other.answer(PICTURES[:1], QUESTION)
    answer.text()
    assert answer.report.cached_tokens == 0


def test_files_of_others_in_the_folder_stay(demo_bundle, demo_model, tmp_path) -> None:
    """However large and old; and what has our names but not our sizes is computed again."""
    strange = {"experiment.npz": b"mine", "prefix-mine.npz": b"mine", "prefix-21-mine.npz": b"mine"}
    for name, content in strange.items():
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (1, 1))
    with (tmp_path / "experiment.npz").open("r+b") as f:
        f.truncate(3 << 30)
    wanted = demo_model.answer(PICTURES[:1], QUESTION).text()
    assert cached_model(demo_bundle, tmp_path).answer(PICTURES[:1], QUESTION).text() == wanted
    assert {path.name for path in tmp_path.iterdir()} > strange.keys()
    ours = [path for path in tmp_path.iterdir() if path.name not in strange]
    assert {path.name.split("-")[0] for path in ours} == {"image", "prefix"}
    for change in (lambda a: a[..., :-1], lambda a: a[:0], lambda a: a.astype("U9")):
        for path in ours:
            with np.load(path) as file:
                arrays = {name: change(file[name]) for name in file.files}
            np.savez(path, **arrays)
        answer = cached_model(demo_bundle, tmp_path).answer(PICTURES[:1], QUESTION)
        assert answer.text() == wanted
        assert answer.report.cached_tokens == 0
    for path in ours:
        np.savez(path, other=np.zeros((2, 3), np.float32))
    assert cached_model(demo_bundle, tmp_path).answer(PICTURES[:1], QUESTION).text() == wanted
    with pytest.raises(SettingError, match="where lfm-edge prepare keeps graphs"):
        Cache("m", folder=tmp_path / "bundle.prepared")


def test_folder_that_cannot_be_written(demo_bundle, tmp_path, caplog, monkeypatch) -> None:
    """A full disk is said once; the answers come all the same."""
    model = cached_model(demo_bundle, tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lfm_runtime.decode.cache.tempfile.mkstemp", full)
    assert model.answer(PICTURES[:1], QUESTION).text() == model.answer(PICTURES[:1], QUESTION).text()
    (record,) = caplog.records
    assert "No space left on device" in record.getMessage()


def test_budgets_hold(tmp_path) -> None:
    """In memory and on disk the entries longest unused go first; what is larger than the budget is not kept."""
    entry = {"past_conv.0": np.zeros((1, 64, 4), np.float32)}  # 1 KiB
    cache = Cache("m", max_bytes=3 << 10, folder=tmp_path, max_disk_bytes=5 << 10)
    prompts = [np.arange(10 + i) for i in range(6)]
    for i, keys in enumerate(prompts):
        cache.keep(keys, Snapshot(len(keys), entry))
        for path in tmp_path.glob("*.npz"):
            os.utime(path, (i, i)) if path.stat().st_mtime > 100 else None
    assert cache.nbytes <= 3 << 10
    assert sum(path.stat().st_size for path in tmp_path.glob("*.npz")) <= 5 << 10
    assert cache.longest(prompts[-1]).length == 15
    cache.keep(np.arange(99), Snapshot(99, {"a": np.zeros(4 << 10, np.uint8)}))
    assert cache.nbytes <= 3 << 10
    assert not any(name.startswith("prefix-99") for name in cache._kept)


def test_longest_prefix_wins(tmp_path) -> None:
    cache = Cache("m")
    for n in (3, 8, 5):
        cache.keep(np.arange(n), Snapshot(n, {"a": np.full(1, n)}))
    assert cache.longest(np.arange(7)).length == 5
    assert cache.longest(np.arange(7), longer_than=5) is None
    assert cache.longest(np.array([0, 1, 2, 9, 9, 9])).length == 3
    assert cache.longest(np.array([1, 2, 3])) is None


def test_low_memory_gives_the_same_answers(demo_bundle, demo_model) -> None:
    """One graph at a time: the encoder is gone when the decoder comes, and the other way round, in a conversation too."""
    model = Model.load(demo_bundle, threads=2, low_memory=True)
    assert not model.decoder.is_loaded
    chat = Chat(model)
    assert chat.ask(QUESTION, PICTURES[:1]).text() == demo_model.answer(PICTURES[:1], QUESTION).text()
    messages = list(chat.messages)
    second = chat.ask(
        "How many shapes?", PICTURES[1:2]
    ).text()  # loads the encoder again: the state outlives its decoder
    assert second == demo_model.converse([*messages, Message.user("How many shapes?", 1)], PICTURES[:2]).text()
    gone = weakref.ref(model.sessions.vision())
    assert gone() is None
    assert not model.decoder.is_loaded
    assert model.sessions._vision is None


def test_prefill_through_another_variant(demo_bundle, tmp_path, capsys, caplog, monkeypatch) -> None:
    """Long steps are int8's, short ones int4's, in one state; without the memory for both, int4's alone."""
    import shutil

    pytest.importorskip("onnx")
    from lfm_quantize.quantize import quantize
    from lfm_quantize.settings import Settings

    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    for variant in ("int8", "int4"):
        quantize(bundle, Settings(variant), warn=lambda _: None)
    split = Model.load(bundle, variant="int4", prefill="int8", threads=2)
    plain, fast = Model.load(bundle, variant="int4", threads=2), Model.load(bundle, variant="int8", threads=2)
    ids = [int(i) for i in tokens(40)]
    for n in (40, 3):  # a long step is int8's, a short one int4's
        wanted = (fast if n == 40 else plain).decoder
        np.testing.assert_array_equal(
            split.decoder.start(64).step(wanted.embed(ids[:n])), wanted.start(64).step(wanted.embed(ids[:n])).copy()
        )
    state = split.decoder.start(64)
    state.step(split.decoder.embed(ids))
    other = plain.decoder.start(64, state.snapshot())
    np.testing.assert_array_equal(state.step(split.decoder.embed([7])).copy(), other.step(split.decoder.embed([7])))
    assert split.answer(PICTURES[:1], QUESTION).text()
    assert split.sessions.identity() != plain.sessions.identity()
    wish = replace(read("generic"), variant=("int4",), prefill="int8", threads=2)
    both = resolve(bundle, wish)
    assert both.prefill == "int8"
    less = int(both.forecast.memory.peak - both.forecast.start.peak) - 1
    short = resolve(bundle, wish, device=Device("Linux", "x86_64", 64, 4096, ram_available_mib=less))
    assert (short.prefill, short.steps) == (None, ("no int8 decoder for prefill",))
    assert main(["run", str(bundle), "--variant", "int4", "--prefill", "fp16", "-p", "x"]) == 2
    assert "has no variant 'fp16'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prefill", "int8"], "has no variant 'int8'"),
        (["--prefill", "fp32"], "no effect"),
        (["--prefill", "fp32", "--low-memory"], "low_memory"),
        (["--threads", "-1"], "impossible"),
        (["--threads", "99999"], "impossible"),
        (["--cache", str(ROOT / "README.md")], "cannot be a cache folder"),
    ],
)
def test_cache_flags_without_effect_are_refused_in_a_line(demo_bundle, flags, says, capsys) -> None:
    assert main(["run", str(demo_bundle), "-p", "x", *flags]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_context_of_a_new_prompt_forgets(demo_model) -> None:
    """Another prompt in the same context shares what it shares and no more."""
    context = Context(demo_model.decoder)
    ids = tokens(30)
    other = np.concatenate([ids[:12], tokens(10, 3)])
    embed = demo_model.decoder.embed
    context.resume(context.find(ids), ids, 40)
    context.feed(embed(list(ids[:12])), ids[:12])
    context.remember()
    context.feed(embed(list(ids[12:])), ids[12:])
    known = context.find(other)
    assert known.length == 12
    context.resume(known, other, 600)
    logits = context.feed(embed(list(other[12:])), other[12:]).copy()
    np.testing.assert_allclose(logits, demo_model.decoder.start(64).step(embed(list(other))), atol=1e-4)
    assert context.find(tokens(5, 9)).length == 0


def test_a_long_prompt_in_parts_is_the_prompt(demo_model, photo, monkeypatch) -> None:
    """A tiled photo's tokens through steps of any size: the same logits, and the same text after them."""
    found = []
    for most in (10_000, 320, 50):
        monkeypatch.setattr("lfm_runtime.decode.context.MOST_AT_ONCE", most)
        job = demo_model.prepare_answer([Message.user(QUESTION, 1)], [photo], temperature=0, max_new_tokens=20)
        assert len(job.prompt.ids) > 320
        logits = demo_model.read(job, Context(demo_model.decoder)).copy()
        found.append((logits, demo_model.answer([photo], QUESTION, temperature=0, max_new_tokens=20).text()))
    for logits, text in found[1:]:
        np.testing.assert_allclose(logits, found[0][0], atol=1e-4)
        assert text == found[0][1]
