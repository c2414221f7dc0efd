"""Questions in parts, for the workers of a cluster, which have the same bundle and images under the same paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import BundleError
from lfm_runtime.formats.manifest import MANIFEST, file_hash
from lfm_runtime.questions import Question

SENT_QUESTIONS = 16
"""In a part, or a few more of the same image."""

Sent = tuple[str, str, str | None, str, str]
"""A Question's fields, in their order. A Path of Python 3.13 cannot be read by an older one."""
Spread = Callable[[Callable[[Sequence[Sent]], Any], "Sequence[Sequence[Sent]]"], Iterable[Any]]
"""Calls a function with each part elsewhere; what it returns, in the order of the parts."""


def spread_over(scheduler: str | None) -> Spread | None:
    """What calls on the workers of a scheduler; None: here."""
    if scheduler is None:
        return None
    (found,) = entry_points(group="lfm_edge.clusters", name="spread")
    return partial(found.load(), scheduler)


def parts_of(questions: Sequence[Question]) -> list[list[Sent]]:
    """Some questions each; those about one image stay together where they stand together."""
    parts: list[list[Sent]] = [[]]
    for question in questions:
        if len(parts[-1]) >= SENT_QUESTIONS and str(question.image) != parts[-1][-1][0]:
            parts.append([])
        parts[-1].append((str(question.image), question.text, question.answer, question.task, question.place))
    return parts


def received(sent: Sequence[Sent]) -> list[Question]:
    """The questions of a part."""
    return [Question(Path(image), text, answer, task, place) for image, text, answer, task, place in sent]


@dataclass(frozen=True)
class SharedBundle:
    """A bundle that every machine has under the same path."""

    folder: str
    manifest: str  # SHA-256 of its manifest.json

    @staticmethod
    def of(folder: Path) -> SharedBundle:
        """The bundle of this machine."""
        return SharedBundle(str(folder.resolve()), file_hash(folder / MANIFEST))

    def open(self) -> Bundle:
        """The bundle of the machine that this runs on.

        Raises:
            BundleError: there is none, or another one.
        """
        bundle = Bundle.open(Path(self.folder))
        if file_hash(bundle.folder / MANIFEST) != self.manifest:
            raise BundleError(f"{self.folder} is another bundle there; copy the same one there")
        return bundle
