"""Several answers at once equal the same answers one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lfm_runtime import EdgeError, Model, SettingError
from lfm_runtime.batch import answer_all
from lfm_runtime.decode.states import BatchState

ROOT = Path(__file__).resolve().parents[2]
PICTURES = sorted((ROOT / "demo" / "eval" / "images").iterdir())[:6]


def test_rows_equal_single_states(demo_model) -> None:
    """Three sequences of different lengths, one joining late, one leaving, then moved: each row's logits against its
    own state's.
    """
    decoder, rng = demo_model.decoder, np.random.default_rng(0)
    prompts = [[int(i) for i in rng.integers(120, 400, n)] for n in (30, 3, 17)]
    singles = [decoder.start(64) for _ in prompts]
    for single, ids in zip(singles, prompts, strict=True):
        single.step(decoder.embed(ids))
    state = BatchState(decoder, 3, 64)

    def compare(rows: dict[int, int]) -> None:
        tokens = [int(i) for i in rng.integers(120, 400, state.rows)]
        got = state.step(np.ascontiguousarray(decoder.embed(tokens)[0][:, None])).copy()
        for row, which in rows.items():
            np.testing.assert_allclose(got[row], singles[which].step(decoder.embed([tokens[row]])), atol=1e-4)

    state.put(0, singles[0].snapshot())
    state.put(1, singles[1].snapshot())
    compare({0: 0, 1: 1})
    compare({0: 0, 1: 1})
    state.put(2, singles[2].snapshot())
    compare({0: 0, 1: 1, 2: 2})
    state.leave(0)
    compare({1: 1, 2: 2})
    state = state.moved(2, 128)
    compare({0: 1, 1: 2})
    compare({0: 1, 1: 2})
    assert state.lengths == [3 + 6, 17 + 4]


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
    with pytest.raises(SettingError, match="low_memory"):
        list(answer_all(Model.load(demo_bundle, low_memory=True), []))
