"""How likely each token of an answer was: against transformers, and the same by every way that makes answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lfm_runtime.batch import Batch
from lfm_runtime.errors import PromptError, SettingError
from lfm_runtime.text.messages import Conversation, Message

PICTURES = sorted((Path(__file__).resolve().parents[2] / "demo" / "eval" / "images").iterdir())[:3]
QUESTION = "What is in this image?"
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


def by_transformers(picture: Path, ids: list[int]) -> np.ndarray:
    """log_softmax [len(ids), vocabulary] before each of these tokens, the answer fed as a whole."""
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from PIL import Image
    from reference import demo_model, demo_processor

    processor = demo_processor()
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[[Image.open(picture)]], text=[text], return_tensors="pt", add_special_tokens=False)
    prompt = inputs["input_ids"]
    inputs["input_ids"] = torch.cat([prompt, torch.tensor([ids])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = demo_model()(**inputs).logits[0, prompt.shape[1] - 1 : -1].double()
    return logits.log_softmax(-1).numpy()


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: p.stem)
def test_they_are_those_of_transformers(demo_model, picture) -> None:
    """Of the model alone: a penalty and a temperature change the choice, not the odds."""
    answer = demo_model.answer(picture, QUESTION, temperature=0.7, seed=1, max_new_tokens=12, logprobs=5)
    said = answer.text()
    ids = [odds.token for odds in answer.odds]
    assert demo_model.prompts.tokenizer.decode(ids) == said
    wanted = by_transformers(picture, ids)
    np.testing.assert_allclose([odds.logprob for odds in answer.odds], wanted[range(len(ids)), ids], atol=1e-4)
    for odds, row in zip(answer.odds, wanted, strict=True):
        likeliest = [logprob for _, logprob in odds.likeliest]
        np.testing.assert_allclose(likeliest, np.sort(row)[::-1][:5], atol=2e-4)
        np.testing.assert_allclose(likeliest, row[[token for token, _ in odds.likeliest]], atol=2e-4)


def test_every_way_gives_the_same(demo_model) -> None:
    """Speculation and a batch; and an answer is what it is without them."""
    plain = demo_model.answer(PICTURES[0], QUESTION, temperature=0, logprobs=0)
    said = plain.text()
    without = demo_model.answer(PICTURES[0], QUESTION, temperature=0)
    assert (without.text(), without.odds) == (said, [])
    speculating = demo_model.answer(PICTURES[0], QUESTION, temperature=0, logprobs=0, speculate=4)
    assert speculating.text() == said
    batch = Batch(demo_model, 2, 256)
    opened = demo_model.open_all([PICTURES[0]], max_megapixels=100)
    chat = Conversation([Message.user(QUESTION, 1)])
    seats = []
    while not (seats[1:] and all(seat.finished for seat in seats)):
        if batch.has_seat and not seats[1:]:
            seats.append(batch.add(demo_model.prepare_answer(chat, opened, temperature=0, logprobs=0)))
        batch.step()
    for odds in (speculating.odds, *(seat.job.reply.odds for seat in seats)):
        assert [one.token for one in odds] == [one.token for one in plain.odds]
        np.testing.assert_allclose([one.logprob for one in odds], [one.logprob for one in plain.odds], atol=1e-4)
    assert not any(one.likeliest for one in plain.odds)


def test_what_a_stop_string_cuts_off_has_no_odds(demo_model) -> None:
    words = {"temperature": 0, "logprobs": 0}
    whole = demo_model.answer(PICTURES[0], QUESTION, **words)
    said, tokens = whole.text(), [demo_model.prompts.tokenizer.token_bytes(odds.token) for odds in whole.odds]
    for at in range(1, len(said) - 1):
        answer = demo_model.answer(PICTURES[0], QUESTION, **words, stop=said[at : at + 2])
        text, kept = answer.text(), [demo_model.prompts.tokenizer.token_bytes(odds.token) for odds in answer.odds]
        assert said.startswith(text)
        assert kept == tokens[: len(kept)]
        assert len(b"".join(kept[:-1])) < len(text.encode()) <= len(b"".join(kept)) or not text
        assert text or not kept


def test_a_grammar_changes_the_choice_and_not_the_odds(demo_model) -> None:
    """Tokens that a schema forces have odds as well, so they are fed one by one; the text is the same."""
    pytest.importorskip("llguidance")
    words = {"temperature": 0, "schema": SCHEMA, "max_new_tokens": 60}
    answer = demo_model.answer(PICTURES[0], QUESTION, **words, logprobs=1)
    said = answer.text()
    assert said == demo_model.answer(PICTURES[0], QUESTION, **words).text()
    ids = [odds.token for odds in answer.odds]
    assert demo_model.prompts.tokenizer.decode(ids) == said
    wanted = by_transformers(PICTURES[0], ids)
    np.testing.assert_allclose([odds.logprob for odds in answer.odds], wanted[range(len(ids)), ids], atol=2e-4)
    assert any(odds.likeliest[0][0] != odds.token for odds in answer.odds), "alone it would have said something else"


@pytest.mark.parametrize("count", [-1, 21, True, "x"])
def test_impossible_counts(demo_model, count) -> None:
    with pytest.raises(SettingError, match="logprobs"):
        demo_model.answer(PICTURES[0], QUESTION, logprobs=count)


@pytest.mark.parametrize(("name", "value"), [("stop", [5]), ("stop", 5), ("schema", 5), ("schema", ["x"])])
def test_settings_of_other_kinds(demo_model, name, value) -> None:
    with pytest.raises(SettingError, match=f"{name} is "):
        demo_model.answer(PICTURES[0], QUESTION, **{name: value})


def test_a_conversation_without_messages(demo_model) -> None:
    with pytest.raises(PromptError, match="has no message"):
        demo_model.converse(Conversation([]), [])
