"""Questions in parts, for the workers of a cluster, which have the same bundle and images under the same paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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


def digest(folder: Path) -> str:
    """SHA-256 of a bundle's manifest, by which workers know whether they have the same one."""
    return file_hash(folder / MANIFEST)


def same_bundle(folder: str, manifest: str) -> Bundle:
    """The bundle of a worker.

    Raises:
        BundleError: there is none, or another one.
    """
    bundle = Bundle.open(Path(folder))
    if digest(bundle.folder) != manifest:
        raise BundleError(f"{folder} is another bundle there; copy the same one there")
    return bundle
