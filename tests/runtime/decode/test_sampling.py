"""Sampling against transformers' logits processors, and by distribution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lfm_runtime.decode.sampling import GenerationSettings, Sampler, distribution, not_applied, penalise
from lfm_runtime.errors import BundleError, SettingError

CASES = [
    {"temperature": 0.1, "min_p": 0.15},
    {"temperature": 1.0, "min_p": 0.0},
    {"temperature": 0.7, "min_p": 0.0, "top_k": 5},
    {"temperature": 1.3, "min_p": 0.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.02, "top_k": 50, "top_p": 0.95},
    {"temperature": 2.0, "min_p": 0.3, "top_k": 3, "top_p": 0.5},
    {"temperature": 0.5, "min_p": 1.0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_like_transformers(case, seed) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("reference")
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(seed).standard_normal(1000).astype(np.float32) * 3
    scores = TemperatureLogitsWarper(case["temperature"])(None, torch.tensor(logits)[None])
    if case.get("top_k"):
        scores = TopKLogitsWarper(case["top_k"])(None, scores)
    if case.get("top_p"):
        scores = TopPLogitsWarper(case["top_p"])(None, scores)
    if case["min_p"]:
        scores = MinPLogitsWarper(case["min_p"])(None, scores)
    wanted = torch.softmax(scores, -1)[0].numpy()
    ids, p = distribution(logits, GenerationSettings(**case))
    got = np.zeros(1000)
    got[ids] = p
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_penalty_like_transformers() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("reference")
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    ids = [3, 5, 3, 99]
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), torch.tensor(logits)[None])[0].numpy()
    penalise(logits, np.unique(ids), 1.3)
    np.testing.assert_allclose(logits, wanted, rtol=1e-6)


@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, 0.25), (1.0, 0.5), (-0.5, 0.0), (0.3, -0.4)])
def test_presence_and_frequency_penalty_as_openai_defines_them(presence, frequency) -> None:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, c of the tokens generated: those of the prompt
    do not count.
    """
    logits = np.random.default_rng(0).standard_normal(30)
    choice = {"temperature": 0.0, "repetition_penalty": 1.0}
    sampler = Sampler(
        GenerationSettings(**choice, presence_penalty=presence, frequency_penalty=frequency), 30, range(30)
    )
    counts = np.zeros(30)
    for _ in range(25):
        wanted = int((logits - counts * frequency - (counts > 0) * presence).argmax())
        assert sampler.next(logits.astype(np.float32)) == wanted
        counts[wanted] += 1
    assert (counts > 0).sum() > 3 or min(presence, frequency) < 0 or not frequency


def test_draws_follow_the_distribution() -> None:
    """20,000 draws; each frequency within five standard errors of its probability."""
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    sampler = Sampler(GenerationSettings(temperature=1, min_p=0, repetition_penalty=1, seed=1), 4, [])
    n = 20_000
    counts = np.bincount([sampler.next(logits) for _ in range(n)], minlength=4) / n
    p = np.exp(logits)
    assert (np.abs(counts - p) < 5 * np.sqrt(p * (1 - p) / n)).all()


def test_seed_and_greedy() -> None:
    logits = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    hot = GenerationSettings(temperature=1, min_p=0, seed=7)
    a, b = (Sampler(hot, 50, []) for _ in range(2))
    assert [a.next(logits.copy()) for _ in range(20)] == [b.next(logits.copy()) for _ in range(20)]
    assert (
        Sampler(GenerationSettings(temperature=0, repetition_penalty=1), 50, []).next(logits.copy()) == logits.argmax()
    )
    top = int(logits.argmax())
    assert Sampler(GenerationSettings(temperature=0, repetition_penalty=100), 50, [top]).next(logits.copy()) != top


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"min_p": 2},
        {"top_k": -1},
        {"top_p": 0},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"stop": ("",)},
        {"nonsense": 1},
        {"max_new_tokens": "5"},
        {"max_new_tokens": 5.0},
        {"temperature": "hot"},
        {"top_k": True},
        {"seed": "x"},
        {"temperature": 0, "top_k": 3},
        {"temperature": 0, "seed": 3},
    ],
    ids=str,
)
def test_generation_settings_that_cannot_be_are_refused(bad) -> None:
    with pytest.raises(SettingError):
        GenerationSettings().with_changes(bad)


def test_numbers_of_numpy_are_numbers() -> None:
    found = GenerationSettings().with_changes({"max_new_tokens": np.int64(5), "temperature": np.float32(0.5)})
    assert (found.max_new_tokens, found.temperature) == (5, 0.5)


def test_what_is_not_applied_is_named() -> None:
    neutral = {"num_beams": 1, "no_repeat_ngram_size": 0, "bad_words_ids": None, "suppress_tokens": [], "typical_p": 1}
    assert not_applied({**neutral, "temperature": 0.3}) == []
    assert not_applied({"num_beams": 4, "bad_words_ids": [[5]]}) == ["num_beams", "bad_words_ids"]


def test_logits_that_are_not_numbers() -> None:
    with pytest.raises(BundleError, match="NaN or infinite"):
        Sampler(GenerationSettings(), 4, []).next(np.full(4, np.nan, np.float32))


def test_defaults() -> None:
    """The model card's, unless generation_config.json says otherwise; do_sample false is greedy."""
    card = GenerationSettings.from_config({"eos_token_id": 7})
    assert (card.temperature, card.min_p, card.repetition_penalty) == (0.1, 0.15, 1.05)
    assert GenerationSettings.from_config({"do_sample": False, "temperature": 0.7}).temperature == 0
    assert GenerationSettings.from_config({"temperature": 0.3, "top_k": 40}).top_k == 40
    with pytest.raises(SettingError, match="generation_config"):
        GenerationSettings.from_config({"temperature": "warm"})
    with pytest.raises(SettingError, match=r"here/generation_config.json: top_p 7.0 is impossible"):
        GenerationSettings.from_config({"top_p": 7.0}, Path("here/generation_config.json"))
