"""The top of a row of logits says what the whole row says, or the row is fetched."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from lfm_runtime.decode.sampling import GenerationSettings, Sampler, Top
from lfm_runtime.formats.contract import TOP_TOKENS


@settings(max_examples=300)
@given(data=st.data())
def test_the_top_says_what_the_row_says(data) -> None:
    """Any row, any settings: the token drawn from the top, or from the row it fetches, is the one drawn from the row.
    Few values, so that ties are common.
    """
    vocabulary = data.draw(st.integers(70, 200))
    steps = data.draw(st.sampled_from([0.25, 3.0]))
    row = np.array(
        data.draw(st.lists(st.integers(-8, 8), min_size=vocabulary, max_size=vocabulary)), np.float32
    ) * np.float32(steps)
    seen = data.draw(st.lists(st.integers(0, vocabulary - 1), max_size=100))
    choice = GenerationSettings(
        temperature=data.draw(st.sampled_from([0.0, 0.1, 0.7, 1.5])),
        min_p=data.draw(st.sampled_from([0.0, 0.15, 0.6])),
        top_k=data.draw(st.sampled_from([0, 1, 5, 64, 90])),
        top_p=data.draw(st.sampled_from([1.0, 0.8])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.05, 1.5, 0.8])),
        presence_penalty=data.draw(st.sampled_from([0.0, 0.0, 0.3, 2.0, -0.5])),
        frequency_penalty=data.draw(st.sampled_from([0.0, 0.0, 0.7, -0.2])),
        seed=3,
    )
    order = np.argsort(-row, kind="stable")[:TOP_TOKENS]
    a, b = Sampler(choice, vocabulary, seen), Sampler(choice, vocabulary, seen)
    for _ in range(5):
        assert a.next(row.copy()) == b.next(Top(row[order].copy(), order, row.copy))


def test_the_top_mostly_suffices() -> None:
    """With the model card's settings a row is hardly ever fetched; it is when more tokens are likely than the top
    holds.
    """
    rng = np.random.default_rng(0)
    fetched = 0

    def whole(row: np.ndarray):
        nonlocal fetched
        fetched += 1
        return row.copy()

    sampler = Sampler(GenerationSettings(seed=0), 65536, range(400))
    for _ in range(50):
        row = rng.normal(0, 2, 65536).astype(np.float32)
        order = np.argsort(-row)[:TOP_TOKENS]
        sampler.next(Top(row[order], order, lambda row=row: whole(row)))
    assert fetched == 0
    flat = np.zeros(65536, np.float32)
    sampler.next(Top(flat[:TOP_TOKENS], np.arange(TOP_TOKENS), lambda: whole(flat)))
    assert fetched == 1
