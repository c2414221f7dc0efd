"""Several answers at once equal the same answers one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lfm_runtime import EdgeError, Model, SettingError
from lfm_runtime.answer.reply import Job
from lfm_runtime.batch import Batch, answer_all
from lfm_runtime.decode.batch_state import BatchState
from lfm_runtime.decode.states import SharedState
from lfm_runtime.errors import BundleError
from lfm_runtime.text.messages import Message

ROOT = Path(__file__).resolve().parents[2]
PICTURES = sorted((ROOT / "demo" / "eval" / "images").iterdir())[:6]


def test_rows_equal_single_states(demo_model) -> None:
    """Three sequences of different lengths, one read while the others go on, one leaving, then moved: each row's logits
    against its own state's.
    """
    decoder, rng = demo_model.decoder, np.random.default_rng(0)
    prompts = [[int(i) for i in rng.integers(120, 400, n)] for n in (30, 3, 17)]
    singles = [decoder.start(64) for _ in prompts]
    state = BatchState(decoder, 3, 64)

    def read(row: int, which: int) -> SharedState:
        found = state.reading(row)
        np.testing.assert_allclose(
            found.step(decoder.embed(prompts[which])), singles[which].step(decoder.embed(prompts[which])), atol=1e-4
        )
        return found

    def compare(*rows: int) -> None:
        tokens = [int(i) for i in rng.integers(120, 400, len(rows))]
        got = state.step(np.ascontiguousarray(decoder.embed(tokens)[0][:, None])).copy()
        for row, which in enumerate(rows):
            np.testing.assert_allclose(got[row], singles[which].step(decoder.embed([tokens[row]])), atol=1e-4)

    state.join(0, read(0, 0))
    state.join(1, read(1, 1))
    compare(0, 1)
    late = read(2, 2)
    compare(0, 1)
    state.leave(0)
    compare(1)
    state.join(2, late)  # from the third row into the second
    compare(1, 2)
    state = state.moved(128)
    compare(1, 2)
    compare(1, 2)
    assert state.lengths == [3 + 6, 17 + 3]


def test_a_seat_that_is_dropped_is_free_at_once(demo_model, photo) -> None:
    """While its views are encoded, and while it is decoded; the others go on as if it had never been there."""
    settings = {"temperature": 0, "max_new_tokens": 100, "ignore_eos": True}

    def job(image) -> Job:
        return demo_model.prepare_answer([Message.user("How many shapes?", 1)], [image], **settings)

    wanted = demo_model.answer(PICTURES[0], "How many shapes?", **settings).text()
    batch = Batch(demo_model, 3, 2048)
    kept = batch.add(job(PICTURES[0]))
    while not batch.has_seat:
        batch.step()
    tiled = batch.add(job(photo))
    batch.step()
    assert not batch.has_seat
    batch.drop(tiled)
    assert batch.has_seat
    assert not tiled.finished
    gone = batch.add(job(PICTURES[1]))
    while not batch.has_seat and not kept.finished:
        batch.step()
    assert batch.running == 2
    batch.drop(gone)
    assert batch.running == 1
    while not kept.finished:
        batch.step()
    assert kept.job.reply.report.text == wanted
    assert batch.running == 0


def test_a_step_that_fails_ends_the_answers_that_it_concerns(demo_model, monkeypatch) -> None:
    def fails(*_):
        raise BundleError("broken")

    def job() -> Job:
        return demo_model.prepare_answer([Message.user("How many shapes?")], [], temperature=0, ignore_eos=True)

    batch = Batch(demo_model, 2, 1024)
    first = batch.add(job())
    while not batch.has_seat:
        batch.step()
    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "reading", lambda *_, **__: iter(fails, None))
        second = batch.add(job())
        assert second in batch.step()
    assert str(second.error) == "broken"
    assert not first.finished
    with monkeypatch.context() as patch:
        assert batch.running == 1
        patch.setattr(BatchState, "step", fails)
        assert batch.step() == [first]
    assert str(first.error) == "broken"
    assert batch.running == 0
    assert batch.has_seat


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_same_texts_in_any_number_of_rows(demo_model, rows) -> None:
    asked = ("What is in this image?", "How many shapes?")
    questions = [*(([p], q) for p in PICTURES[:3] for q in asked), ([PICTURES[3]], asked[0]), ([], "hello")]
    settings = {"temperature": 0, "max_new_tokens": 20}
    wanted = [demo_model.answer(images, text, **settings) for images, text in questions]
    texts = [answer.text() for answer in wanted]
    found = dict(answer_all(demo_model, questions, rows=rows, **settings))
    assert [found[i].text for i in range(len(questions))] == texts
    assert [found[i].finish_reason for i in range(len(questions))] == [answer.report.finish_reason for answer in wanted]
    assert all(found[i].timing_ms["total"] > 0 for i in found)


def test_longer_than_the_first_buffers(demo_model, photo) -> None:
    """A tiled photo among small pictures: the buffers grow while others are being answered."""
    questions = [
        ([PICTURES[0]], "What is in this image?"),
        ([photo], "What is in this image?"),
        ([PICTURES[1]], "How many shapes?"),
    ]
    settings = {"temperature": 0, "max_new_tokens": 200}
    found = dict(answer_all(demo_model, questions, rows=2, **settings))
    assert [found[i].text for i in range(3)] == [
        demo_model.answer(images, text, **settings).text() for images, text in questions
    ]


def test_sampling_with_a_seed(demo_model) -> None:
    settings = {"temperature": 1.0, "min_p": 0.02, "seed": 5, "max_new_tokens": 12}
    questions = [([PICTURES[0]], "What is in this image?")] * 3
    texts = {report.text for _, report in answer_all(demo_model, questions, rows=2, **settings)}
    assert texts == {demo_model.answer(*questions[0], **settings).text()}


def test_one_bad_image_does_not_stop_the_rest(demo_model) -> None:
    questions = [
        ([PICTURES[0]], "How many shapes?"),
        ([ROOT / "README.md"], "How many shapes?"),
        ([PICTURES[1]], "How many shapes?"),
    ]
    found = dict(answer_all(demo_model, questions, rows=2))
    assert isinstance(found[1], EdgeError)
    assert found[0].text
    assert found[2].text
    assert list(answer_all(demo_model, [])) == []


def test_batches_that_cannot_be_are_refused(demo_model, demo_bundle) -> None:
    with pytest.raises(SettingError, match="rows 0"):
        list(answer_all(demo_model, [], rows=0))
    with pytest.raises(SettingError, match="temperature"):
        list(answer_all(demo_model, [], temperature=-1))
    for odd in (("a.png",), "ab c", 5):
        with pytest.raises(SettingError, match=r"is no pair; give \(images, question\)"):
            list(answer_all(demo_model, [odd]))
    with pytest.raises(SettingError, match="low_memory"):
        list(answer_all(Model.load(demo_bundle, low_memory=True), []))
