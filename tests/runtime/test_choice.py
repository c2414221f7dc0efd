"""Given answers scored: against transformers' log-likelihoods, and what a user asks for in a wrong way."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from lfm_runtime import Model
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import SettingError

PICTURES = sorted((Path(__file__).resolve().parents[2] / "demo" / "eval" / "images").iterdir())[:3]
ANSWERS = [
    "yes",
    "no",
    "A red circle.",
    "so long an answer that it takes more than one step of the decoder, of sixteen tokens",
]


def by_transformers(model: Model, picture: Path, question: str, answers: list[str]) -> list[float]:
    """One pass over prompt and answer for each answer, nothing cached, with the reference's own processor."""
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from PIL import Image
    from reference import demo_model, demo_processor

    processor = demo_processor()
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    tokenizer, found = processor.tokenizer, []
    for answer in answers:
        inputs = processor(images=[[Image.open(picture)]], text=[text], return_tensors="pt", add_special_tokens=False)
        prompt = inputs["input_ids"]
        ids = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.convert_tokens_to_ids("<|im_end|>")]
        inputs["input_ids"] = torch.cat([prompt, torch.tensor([ids])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = demo_model()(**inputs).logits[0, prompt.shape[1] - 1 : -1].double()
        found.append(float(logits.log_softmax(-1)[range(len(ids)), ids].sum()))
    return found


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: p.stem)
def test_log_likelihoods_are_those_of_transformers(demo_model, picture) -> None:
    question = "What is in this image?"
    chosen = demo_model.choose(picture, question, ANSWERS)
    wanted = by_transformers(demo_model, picture, question, ANSWERS)
    np.testing.assert_allclose(chosen.log_likelihoods, wanted, atol=1e-4, rtol=2e-6)
    softmax = np.exp(np.array(wanted) - max(wanted))
    np.testing.assert_allclose(chosen.probabilities, softmax / softmax.sum(), atol=1e-4)
    assert chosen.best == ANSWERS[int(np.argmax(wanted))]
    assert math.isclose(chosen.share, sum(map(math.exp, wanted)), rel_tol=1e-3)


def test_what_the_model_says_is_the_likeliest(demo_model) -> None:
    """Its greedy answer among others; and the share that the answers have of all that it could say."""
    for picture in PICTURES:
        said = demo_model.answer(picture, "What is in this image?", temperature=0, repetition_penalty=1.0).text()
        chosen = demo_model.choose(picture, "What is in this image?", ["A dog.", said, "yes"])
        assert chosen.best == said and chosen.share > 0.2


def test_several_questions_read_the_image_once(demo_model) -> None:
    questions = [("Is it red?", ["yes", "no"]), ("What is in this image?", ANSWERS), ("Colour?", ["red", "blue"])]
    together = demo_model.choose_each(PICTURES[0], questions)
    for (question, answers), found in zip(questions, together, strict=True):
        alone = demo_model.choose(PICTURES[0], question, answers)
        np.testing.assert_allclose(found.log_likelihoods, alone.log_likelihoods, atol=1e-4)
    assert together[0].report.cached_tokens == 0
    assert all(one.report.cached_tokens >= one.report.image_tokens for one in together[1:])
    assert all(one.report.timing_ms["vision"] is None for one in together[1:])


def test_times_of_several_questions_do_not_overlap(demo_model) -> None:
    """Each has its own: waiting for the others is none of it."""
    questions = [("Is it red?", ["yes", "no"])] * 20
    begun = time.perf_counter()
    found = demo_model.choose_each(PICTURES[0], questions)
    whole = (time.perf_counter() - begun) * 1e3
    times = [one.report.timing_ms for one in found]
    assert sum(one["total"] for one in times) <= whole
    for one in times:
        assert (
            sum(one[stage] or 0.0 for stage in ("prompt", "preprocess", "vision", "embed", "prefill")) <= one["total"]
        )


def test_without_logits_of_every_token(portable_like, demo_model) -> None:
    """Graphs of other exporters give the last token's logits alone: the answers are fed token by token."""
    found = portable_like.choose(PICTURES[0], "What?", ANSWERS)
    np.testing.assert_allclose(
        found.log_likelihoods, demo_model.choose(PICTURES[0], "What?", ANSWERS).log_likelihoods, atol=1e-4
    )


@pytest.fixture
def portable_like(demo_model, monkeypatch):
    monkeypatch.setattr(type(demo_model.decoder), "verifies", property(lambda _: False))
    return demo_model


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([], "there is none"),
        (["yes"], "there is 1"),
        (["a", ""], "empty"),
        (["a", "b", "a"], "there twice"),
        ("yes,no", "a list of texts"),
        ([1, 2], "a list of texts"),
    ],
)
def test_answers_that_are_no_choice(demo_model, answers, said) -> None:
    with pytest.raises(SettingError, match=said):
        demo_model.choose(PICTURES[0], "What?", answers)


def test_the_command(demo_bundle, demo_model, capsys) -> None:
    words = ["run", str(demo_bundle), str(PICTURES[0]), "-p", "Is it red?", "--threads", "2", "--choices"]
    assert main([*words, "yes,no", "--quiet"]) == 0
    rows = capsys.readouterr().out.splitlines()
    wanted = demo_model.choose(PICTURES[0], "Is it red?", ["yes", "no"])
    assert [row.split()[-1] for row in rows] == sorted(("yes", "no"), key=lambda a: a != wanted.best)
    assert main([*words, "yes,no", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"] == wanted.best
    np.testing.assert_allclose([a["log_likelihood"] for a in found["answers"]], wanted.log_likelihoods, atol=1e-4)
    assert main([*words, "yes"]) == 2
    assert "give two or more" in capsys.readouterr().err
    assert main([*words, "yes,no", "--temperature", "0.5"]) == 2
    assert "--temperature" in capsys.readouterr().err


@pytest.mark.parametrize("questions", ["x", [("q",)], [("q", ["yes", "no"], 1)]])
def test_questions_that_are_no_pairs(demo_model, questions) -> None:
    with pytest.raises(SettingError, match=r"is no pair; give \(question, answers\)"):
        demo_model.choose_each(PICTURES[0], questions)
