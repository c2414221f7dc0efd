"""A question with given answers, and how likely each of them is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lfm_runtime.answer.reply import Job
from lfm_runtime.errors import SettingError
from lfm_runtime.report import Report

_FEWEST = 2


@dataclass(frozen=True)
class Choice:
    """A question to be asked."""

    job: Job
    answers: tuple[str, ...]
    ids: Sequence[Sequence[int]]  # of each answer


@dataclass(frozen=True)
class Chosen:
    """What a model makes of given answers."""

    answers: tuple[str, ...]
    log_likelihoods: tuple[float, ...]
    """Natural logarithms: that the model says exactly this, and then ends."""
    report: Report

    @cached_property
    def probabilities(self) -> tuple[float, ...]:
        """Of each answer, if it must be one of them; the sum is 1."""
        top = max(self.log_likelihoods)
        parts = [math.exp(score - top) for score in self.log_likelihoods]
        return tuple(part / sum(parts) for part in parts)

    @property
    def best(self) -> str:
        """The likeliest answer."""
        return self.answers[self.log_likelihoods.index(max(self.log_likelihoods))]

    @property
    def share(self) -> float:
        """The probability that the model, left to itself at temperature 1, gives one of the answers; a small one says
        that they are not what it would say.
        """
        return sum(map(math.exp, self.log_likelihoods))

    def as_dict(self) -> dict[str, Any]:
        """As JSON, in the order of the answers."""
        rows = zip(self.answers, self.probabilities, self.log_likelihoods, strict=True)
        answers = [{"answer": a, "probability": p, "log_likelihood": score} for a, p, score in rows]
        return {"best": self.best, "share": self.share, "answers": answers}


def check_answers(answers: Sequence[str]) -> None:
    """Raise SettingError for answers that are no list of texts, fewer than two, an empty one, or one twice."""
    if isinstance(answers, str) or not all(isinstance(answer, str) for answer in answers):
        raise SettingError(f'the answers are {answers!r:.60}; give a list of texts: ["yes", "no"]')
    if len(answers) < _FEWEST:
        raise SettingError(
            f"a choice needs two answers or more, and there {'is 1' if answers else 'is none'}; give two or more"
        )
    for answer in answers:
        if not answer or list(answers).count(answer) > 1:
            what = "there twice" if answer else "empty"
            raise SettingError(f"the answer {answer!r:.40} is {what}; give different texts")
