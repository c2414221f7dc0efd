"""A cluster, as quantizing sees it: functions called on workers that have the same bundle and images under the same
paths; and questions in parts for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import BundleError
from lfm_runtime.formats.manifest import MANIFEST, file_hash
from lfm_runtime.questions import Question

SENT_QUESTIONS = 16
"""In a part, or a few more of the same image."""

Sent = tuple[str, str, str | None, str, str]
"""A Question's fields, in their order. A Path of Python 3.13 cannot be read by an older one."""


class Cluster(Protocol):
    """Where functions are called. What they return stays there until it is asked for, and other calls can take it."""

    @property
    def size(self) -> int:
        """Processes that take part."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function with values, or with what other calls return; returns what stands for its result."""

    def share(self, value: Any) -> Any:
        """Bring a value to where many calls take it."""

    def results(self, calls: Sequence[Any], *, large: bool = False) -> Iterator[Any]:
        """What calls return, in their order. Raises what they raise. `large`: megabytes, which go the short way."""


class _Here:
    """This process."""

    size = 1

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def share(self, value: Any) -> Any:
        return value

    def results(self, calls: Sequence[Any], *, large: bool = False) -> Iterator[Any]:  # noqa: ARG002  (see Cluster)
        return iter(calls)


HERE: Cluster = _Here()


def cluster_of(scheduler: str | None) -> AbstractContextManager[Cluster]:
    """The workers of a scheduler; None: this process."""
    if scheduler is None:
        return nullcontext(HERE)
    (found,) = entry_points(group="lfm_edge.clusters", name="workers")
    workers: AbstractContextManager[Cluster] = found.load()(scheduler)
    return workers


def parts_of(questions: Sequence[Question]) -> list[list[Sent]]:
    """Some questions each; those about one image stay together where they stand together."""
    parts: list[list[Sent]] = [[]]
    for question in questions:
        if len(parts[-1]) >= SENT_QUESTIONS and str(question.image) != parts[-1][-1][0]:
            parts.append([])
        parts[-1].append(sent(question))
    return parts


def sent(question: Question) -> Sent:
    """A question as it travels."""
    return str(question.image), question.text, question.answer, question.task, question.place


def received(questions: Sequence[Sent]) -> list[Question]:
    """The questions of a part."""
    return [Question(Path(image), text, answer, task, place) for image, text, answer, task, place in questions]


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
