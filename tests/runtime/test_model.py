"""The Python API on the demo bundle: answers, reports, streaming, several turns."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from lfm_runtime import IMAGE, Chat, Conversation, ImageError, Message, Model, PromptError
from lfm_runtime.answer.reply import StopStrings
from lfm_runtime.decode.states import ConcatenatedState, SharedState
from lfm_runtime.report import STAGES
from PIL import Image

EVAL = Path(__file__).resolve().parents[2] / "demo" / "eval"


def test_answer_and_report(demo_model, drawing) -> None:
    answer = demo_model.answer([drawing], "What is in this image?", temperature=0)
    pieces = list(answer)
    report = answer.report.as_dict()
    assert "".join(pieces) == report["text"]
    assert len(pieces) > 1
    assert report["finish_reason"] == "eos"
    assert set(report["timing_ms"]) == set(STAGES)
    assert all(value is not None and value > 0 for value in report["timing_ms"].values())
    assert report["timing_ms"]["ttft"] <= report["timing_ms"]["total"]
    parts = sum(report["timing_ms"][s] for s in ("image", "vision", "embed", "prefill"))
    assert parts <= report["timing_ms"]["ttft"]
    assert report["memory_mib"]["peak"] >= report["memory_mib"]["rss"] > 20
    assert report["image_tokens"] < report["prompt_tokens"]


def test_evaluation_set(demo_model) -> None:
    """The stored evaluation set: at least 400 questions in four tasks, mean accuracy at least 90 %, no task below 85 %."""
    lines = [json.loads(line) for line in (EVAL / "eval.jsonl").read_text().splitlines()]
    assert len(lines) >= 400
    tasks = sorted({line["task"] for line in lines})
    assert tasks == ["count", "describe", "read", "where"]
    right = {task: [] for task in tasks}
    for line in lines:
        right[line["task"]].append(demo_model.answer([EVAL / line["image"]], line["question"]).text() == line["answer"])
    accuracy = {task: np.mean(found) for task, found in right.items()}
    print(accuracy)
    assert np.mean(list(accuracy.values())) >= 0.90, accuracy
    assert min(accuracy.values()) >= 0.85, accuracy


def test_photo_is_tiled(demo_model, photo) -> None:
    seen = []
    answer = demo_model.answer([photo], "What is in this image?", max_new_tokens=4, progress=lambda *n: seen.append(n))
    answer.text()
    assert answer.report.tiles > 2
    assert seen[0] == (0, answer.report.tiles)
    assert seen[-1] == (answer.report.tiles, answer.report.tiles)


def test_several_images_and_none(demo_model, drawing) -> None:
    one = demo_model.answer([drawing], "How many shapes?", temperature=0)
    two = demo_model.answer(
        [drawing, np.asarray(Image.open(drawing).convert("RGB"))], "How many shapes?", temperature=0
    )
    none = demo_model.answer([], "How many shapes?", temperature=0, max_new_tokens=5)
    for answer in (one, two, none):
        answer.text()
    assert two.report.image_tokens == 2 * one.report.image_tokens
    assert none.report.image_tokens == none.report.tiles == 0
    assert none.report.timing_ms["vision"] is None


def test_what_transformers_users_try_first(demo_model, drawing) -> None:
    """Dicts as messages, places without images, things that are no image: each says what is wanted."""
    dicts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    for make in (lambda: demo_model.converse(dicts, [drawing]), lambda: Conversation(dicts)):
        with pytest.raises(PromptError, match=r"a message is a dict; give lfm_runtime\.Message"):
            make()
    place = [Message("user", (IMAGE, "x"))]
    for images, count in (([], 0), ([drawing, drawing], 2)):
        with pytest.raises(PromptError, match=f"have 1 places for images .* and {count} images are given"):
            demo_model.converse(place, images)
    for odd, says in (
        (None, "an image is a NoneType; give a path, a file"),
        (io.BytesIO(b""), "the image is not a readable image"),
        (io.StringIO("x"), "an image is a file of text; open it as binary"),
    ):
        with pytest.raises(ImageError, match=says):
            demo_model.answer(odd, "x")
    with pytest.raises(ImageError, match="does not exist; download it first"):
        demo_model.answer("https://example.com/a.jpg", "x")


def test_finish_reasons(demo_model, drawing) -> None:
    question = "What is in this image?"
    whole = demo_model.answer([drawing], question).text()
    short = demo_model.answer([drawing], question, max_new_tokens=2)
    assert whole.startswith(short.text())
    assert (short.report.finish_reason, short.report.new_tokens) == ("length", 2)
    word = whole.split()[-1]
    stopped = demo_model.answer([drawing], question, stop=(word,))
    assert whole.startswith(stopped.text())
    assert word not in stopped.report.text
    assert stopped.report.finish_reason == "stop"


def test_an_answer_ends_at_the_context_limit(bundle_copy, drawing) -> None:
    """The answer ends at the context limit; a prompt beyond it is refused before any work."""
    path = bundle_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["context_length"] = 80
    path.write_text(json.dumps(manifest))
    model = Model.load(bundle_copy, threads=1)
    answer = model.answer([drawing], "What is in this image?", ignore_eos=True)
    answer.text()
    assert answer.report.finish_reason == "context"
    assert answer.report.prompt_tokens + answer.report.new_tokens == 81  # the last token is said, not fed
    with pytest.raises(PromptError, match="together may have at most 80"):
        model.answer([drawing], "word " * 100)


def test_several_turns(demo_model, drawing) -> None:
    """A chat gives the same answers as the whole conversation computed again, and reads its own tokens alone."""
    chat = Chat(demo_model)
    chat.ask("How many shapes?", [drawing]).text()
    kept = chat.ask("What is in this image?")
    again = demo_model.converse([*chat.messages[:2], Message.user("What is in this image?")], [drawing])
    assert kept.text() == again.text()
    assert kept.report.timing_ms["vision"] is None
    assert again.report.timing_ms["vision"]
    assert 0 < kept.report.prompt_tokens - kept.report.cached_tokens < 20 < again.report.prompt_tokens


def test_early_close(demo_model, drawing) -> None:
    """Leaving an answer half-way and asking again gives the same text."""
    first = demo_model.answer([drawing], "What is in this image?").text()
    pieces = iter(demo_model.answer([drawing], "What is in this image?"))
    next(pieces)
    pieces.close()
    assert demo_model.answer([drawing], "What is in this image?").text() == first


def test_threads_of_one_process(demo_bundle, drawing) -> None:
    """Two models at once in two threads: no state is shared by accident."""
    models = [Model.load(demo_bundle, threads=1) for _ in range(2)]
    wanted = models[0].answer([drawing], "What is in this image?").text()
    found: list[str] = []
    workers = [
        threading.Thread(target=lambda m=m: found.append(m.answer([drawing], "What is in this image?").text()))
        for m in models
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [wanted, wanted]


def test_both_forms_of_state_agree(demo_model) -> None:
    """Shared buffers and plain past/present give the same logits, step by step and in chunks."""
    decoder = demo_model.decoder
    embeds = decoder.embed([int(i) for i in np.random.default_rng(0).integers(10, 400, 40)])
    shared, plain = SharedState(decoder, 64), ConcatenatedState(decoder, 64)
    at = 0
    for n in (20, 1, 1, 5, 1, 12):
        a = shared.step(embeds[:, at : at + n]).copy()
        np.testing.assert_allclose(a, plain.step(embeds[:, at : at + n]), atol=1e-4)
        at += n
    assert shared.length == plain.length == 40


@pytest.mark.parametrize(
    ("pieces", "stops", "wanted"),
    [
        (["abc", "def"], ("cd",), "ab"),
        (["a", "b", "c"], ("x",), "abc"),
        (["aab", "b"], ("abb",), "a"),
        (["xy", "x"], ("xyz",), "xyx"),
        (["one END two"], ("END", "one E"), ""),
        (["a"], (), "a"),
    ],
)
def test_stop_strings(pieces, stops, wanted) -> None:
    held = StopStrings(stops)
    assert "".join(held.pass_on(p) for p in pieces) + held.rest() == wanted
