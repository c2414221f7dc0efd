"""Guessing changes the time and nothing else: the same texts, the same distribution, the same state afterwards."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lfm_runtime import Chat, Message, Model
from lfm_runtime.answer.reply import Answer
from lfm_runtime.commands.cli import main
from lfm_runtime.decode.speculation import PromptLookup
from lfm_runtime.decode.states import SharedState
from lfm_runtime.formats.contract import MANY_TOKENS

ROOT = Path(__file__).resolve().parents[3]
PICTURES = sorted((ROOT / "demo" / "eval" / "images").iterdir())[:4]
QUESTION = "What is in this image?"
LOOP = "red circle, blue square, red circle, blue square, red circle,"


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(1, 6))
def test_what_followed_last_is_proposed(tokens, most) -> None:
    """Against a search from the end, for runs of four, of three and of two."""
    lookup = PromptLookup(tokens, most)
    wanted: list[int] = []
    for n in (4, 3, 2):
        tail = tokens[-n:]
        starts = [i for i in range(len(tokens) - n) if tokens[i : i + n] == tail]
        if len(tokens) > n - 1 and starts:
            wanted = tokens[starts[-1] + n :][:most]
            break
    assert lookup.propose() == wanted


def test_fewer_are_proposed_after_wrong_ones() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], 6)
    sizes = [len(lookup.propose())]
    for right in (2, 2, 0, 1, 2):
        lookup.learn(right, sizes[-1])
        sizes.append(len(lookup.propose()))
    assert sizes == [6, 2, 4, 1, 2, 4]


@pytest.mark.parametrize("tokens", [2, 3, 9, MANY_TOKENS - 1])
def test_keeping_equals_never_having_speculated(demo_model, tokens) -> None:
    """After every number of right guesses: logits of the step, and of what comes after, against feeding the right ones
    alone.
    """
    decoder = demo_model.decoder
    ids = [int(i) for i in np.random.default_rng(0).integers(120, 400, 30 + tokens)]
    for right in range(1, tokens + 1):
        state, plain = SharedState(decoder, 64), SharedState(decoder, 64)
        state.step(decoder.embed(ids[:21]))
        plain.step(decoder.embed(ids[:21]))
        logits = state.step_all(decoder.embed(ids[21 : 21 + tokens])).copy()
        assert len(logits) == tokens
        state.keep(right)
        wanted = [plain.step(decoder.embed([token])).copy() for token in ids[21 : 21 + right]]
        np.testing.assert_allclose(logits[:right], wanted, atol=1e-4)
        assert state.length == plain.length == 21 + right
        for token in (5, 130, 200):
            np.testing.assert_allclose(
                state.step(decoder.embed([token])), plain.step(decoder.embed([token])), atol=1e-4
            )


def asked_twice(model: Model, picture: Path, **settings) -> Answer:
    """The same question again in a conversation: the answer before can be copied."""
    first = model.answer([picture], QUESTION, temperature=0).text()
    messages = [Message.user(QUESTION, 1), Message("assistant", first), Message("user", QUESTION)]
    return model.converse(messages, [picture], **settings)


@pytest.mark.parametrize("most", [1, 4, MANY_TOKENS - 2])
def test_greedy_text_is_the_same(demo_model, most) -> None:
    right = steps = 0
    for picture in PICTURES:
        answer, wanted = (asked_twice(demo_model, picture, temperature=0, speculate=n) for n in (most, 0))
        assert answer.text() == wanted.text()
        assert answer.report.finish_reason == wanted.report.finish_reason
        assert answer.report.new_tokens == wanted.report.new_tokens
        assert wanted.report.speculative_tokens == 0
        right += answer.report.accepted_tokens
        steps += answer.report.new_tokens
    assert right > steps / 4  # or little was tested


def test_sampled_text_is_the_same_for_a_seed(demo_model) -> None:
    """A guess is checked against the very draw that would have been made without it."""
    guessed = right = 0
    for seed in range(20):
        settings = {"temperature": 3.0, "min_p": 0.01, "seed": seed, "max_new_tokens": 30}
        answers = [asked_twice(demo_model, PICTURES[0], speculate=n, **settings) for n in (0, 5)]
        assert answers[0].text() == answers[1].text()
        guessed += answers[1].report.speculative_tokens
        right += answers[1].report.accepted_tokens
    assert 0 < right < guessed


def test_sampled_tokens_follow_the_distribution(demo_model) -> None:
    """Texts of 150 answers with guesses against 150 with other seeds without: a chi-square of their counts."""
    counts: list[Counter[str]] = [Counter(), Counter()]
    right = 0
    model = Model.load(demo_model.bundle.folder, threads=2, cache_mib=16)
    for i in range(150):
        for found, speculate in zip(counts, (0, 4), strict=True):
            settings = {"temperature": 3.0, "min_p": 0.02, "seed": 1000 * speculate + i, "max_new_tokens": 3}
            answer = asked_twice(model, PICTURES[0], speculate=speculate, **settings)
            found[answer.text()] += 1
            right += answer.report.accepted_tokens
    common = [text for text in counts[0] | counts[1] if counts[0][text] + counts[1][text] >= 8]
    rows = np.array([[*(c[text] for text in common), 150 - sum(c[text] for text in common)] for c in counts], float)
    rows = rows[:, rows.sum(0) > 0]
    freedom = rows.shape[1] - 1
    assert freedom >= 2
    assert right > 30
    expected = rows.sum(0) / 2
    assert ((rows - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_conversation_goes_on_after_speculation(demo_model) -> None:
    """Answers that end in the middle of a run of right guesses leave a state that equals recomputation."""
    right = 0
    for limit in range(2, 9):
        chat = Chat(demo_model)
        settings = {"temperature": 0, "speculate": 6}
        chat.ask(QUESTION, PICTURES[:1], **settings).text()
        cut = chat.ask(QUESTION, max_new_tokens=limit, **settings)
        cut.text()
        right += cut.report.accepted_tokens
        third = chat.ask("How many shapes?", **settings).text()
        again = demo_model.converse(
            [*chat.messages[:4], Message("user", "How many shapes?")], PICTURES[:1], temperature=0
        )
        assert third == again.text()
    assert right > 0


def test_speculative_tokens_stay_inside_the_context(bundle_copy, demo_model) -> None:
    """Speculative tokens never reach beyond the context's end."""
    import json

    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["model"]["context_length"] = 70
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    model = Model.load(bundle_copy, threads=2)
    answers = [model.answer([], LOOP, temperature=0, speculate=n) for n in (0, 14)]
    assert answers[0].text() == answers[1].text()
    assert {answer.report.finish_reason for answer in answers} <= {"context", "eos"}


def test_speculation_that_cannot_be_is_refused(demo_bundle, tmp_path, capsys) -> None:
    for value in ("-1", str(MANY_TOKENS - 1)):
        assert main(["run", str(demo_bundle), "-p", "x", "--speculate", value]) == 2
        assert "speculate" in capsys.readouterr().err
    onnx = pytest.importorskip("onnx")
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    (bundle / "manifest.json").unlink()
    path = bundle / "onnx" / "decoder_model_merged.onnx"
    model = onnx.load(str(path), load_external_data=False)
    del model.graph.output[-3:]  # a graph as the hub has it
    for node in model.graph.node:
        node.output[:] = [name.replace("conv_input.", "read.") for name in node.output]
        node.input[:] = [name.replace("conv_input.", "read.") for name in node.input]
    path.write_bytes(model.SerializeToString())
    assert main(["run", str(bundle), "-p", "x", "--speculate", "4"]) == 2
    assert "export" in capsys.readouterr().err
    assert main(["run", str(bundle), "-p", "x", "--max-new-tokens", "4"]) == 0
