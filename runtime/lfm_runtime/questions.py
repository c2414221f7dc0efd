"""Questions about images from a JSONL file, and a user's own golden set: questions that a device must answer alike."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import BundleError, EdgeError, ImageError, PromptError, unreadable
from lfm_runtime.formats.files import read_json_object, to_json
from lfm_runtime.formats.typed import as_json, read_as
from lfm_runtime.model import Model

GOLDEN_FOLDER = "golden"
GOLDEN_QUESTIONS = f"{GOLDEN_FOLDER}/questions.json"
GOLDEN_TOKENS = 64
"""Of a golden answer, at most."""


_log = logging.getLogger(__name__)
_KEYS = ("image", "question", "answer", "task")


@dataclass(frozen=True)
class Question:
    """What is asked about an image. `answer` is known, or None."""

    image: Path
    text: str
    answer: str | None = None
    task: str = "all"
    place: str = ""  # FILE, line N


def read_jsonl(path: Path, folders: Sequence[Path], error: type[EdgeError] = PromptError) -> list[Question]:
    """Questions of a JSONL file, an object {"image", "question", "answer", "task"} a line; the last two may be missing.

    Args:
        path: the file.
        folders: where images are looked for, in this order.
        error: what is raised.

    Raises:
        error: not such a file, empty, or an image that is in none of the folders; with the line.
    """
    try:
        whole = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON's texts may hold U+2028
    except OSError as e:
        raise unreadable(path, e, error, "check the path") from e
    except UnicodeDecodeError as e:
        raise error(f"{path} is not UTF-8 text ({e}); questions are JSONL: one object a line") from e
    lines = {number: line for number, line in enumerate(whole, 1) if line.strip()}
    if not lines:
        raise error(f'{path} is empty; write one object a line: {{"image": …, "question": …}}')
    if next(iter(lines.values())).lstrip().startswith("["):
        lines_of_it = f"jq -c '.[]' {path.name} > {path.stem}-lines.jsonl"
        raise error(f"{path} is a JSON array; write one object a line instead: {lines_of_it}")
    return [_read(line, folders, f"{path}, line {number}", error) for number, line in lines.items()]


def _read(line: str, folders: Sequence[Path], where: str, error: type[EdgeError]) -> Question:
    try:
        entry = json.loads(line)
        name, question, answer = str(entry["image"]), str(entry["question"]), entry.get("answer")
        task = entry.get("task", "all")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise error(
            f'{where}: no JSON object with "image" and "question"; write one: {{"image": …, "question": …}}'
        ) from e
    for key in sorted(set(entry) - set(_KEYS)):
        if meant := difflib.get_close_matches(key, set(_KEYS) - set(entry), n=1, cutoff=0.8):
            raise error(f"{where}: unknown key {key!r}; did you mean {meant[0]!r}?")
    if not isinstance(entry["image"], str):
        raise error(f"{where}: image is {name[:40]}, not a file's name in quotes")
    if not (isinstance(entry["question"], str) and question.strip()):
        raise error(f"{where}: the question is empty or no text; write one, or remove the line")
    if isinstance(answer, (bool, list, dict)) or not isinstance(task, str):
        key, wrong = ("task", task) if not isinstance(task, str) else ("answer", answer)
        raise error(f"{where}: {key} is {json.dumps(wrong)[:40]}, not a text in quotes")
    image = next((folder / name for folder in folders if (folder / name).exists()), None)
    if image is None:
        places = " or ".join(str(folder) for folder in dict.fromkeys(folders))
        raise error(f"{where}: {name} is not in {places}; correct the path")
    return Question(image, question, None if answer is None else str(answer), task, where)


# ----------------------------------------------------------------------------------------------- a golden set


@dataclass(frozen=True)
class GoldenAnswer:
    """A question of the golden set, and the greedy answer where the bundle was packed."""

    image: str  # a file of the bundle
    question: str
    answer: str


@dataclass(frozen=True)
class GoldenSet:
    """golden/questions.json of a packed bundle."""

    schema: Literal[1]
    setup: str  # what answered: variant, prefill decoder, profile
    answers: tuple[GoldenAnswer, ...]

    @staticmethod
    def of(bundle: Bundle) -> GoldenSet | None:
        """Read a bundle's golden set; None where it has none.

        Raises:
            BundleError: damaged.
        """
        path = bundle.folder / GOLDEN_QUESTIONS
        if not path.exists():
            return None
        return read_as(GoldenSet, read_json_object(path, BundleError), path, BundleError, "pack the bundle again")

    def to_text(self) -> str:
        """Return the text of the file."""
        return to_json(as_json(self), indent=1) + "\n"


def record(model: Model, questions: Sequence[Question]) -> tuple[GoldenSet, dict[str, Path]]:
    """A golden set as this model answers it, and the images it is about, by their names in the bundle.

    Raises:
        ImageError, PromptError: a question cannot be asked; names its line.
    """
    images: dict[Path, str] = {}
    for question in questions:
        images.setdefault(question.image, f"{GOLDEN_FOLDER}/{len(images):04d}{question.image.suffix.lower()}")
    answers, unlike = [], []
    for question in questions:
        try:
            answer = _answer(model, question.image, question.text)
        except (ImageError, PromptError) as e:
            raise type(e)(f"{question.place}: {e}" if question.place else str(e)) from e
        answers.append(GoldenAnswer(images[question.image], question.text, answer))
        if question.answer is not None and question.answer.strip() != answer.strip():
            unlike.append(f"{question.place}: {answer[:60]!r}, not {question.answer[:60]!r}")
    if unlike:
        known = sum(question.answer is not None for question in questions)
        _log.warning(
            "lfm-edge: the model answers %d of %d otherwise than the file (%s); devices are checked against the "
            "model's answers, not the file's",
            len(unlike),
            known,
            unlike[0],
        )
    return GoldenSet(1, model.setup.summary, tuple(answers)), {name: path for path, name in images.items()}


def differing(model: Model, golden: GoldenSet) -> Iterator[tuple[GoldenAnswer, str]]:
    """Yield (golden answer, what this model says instead) for each question that is answered in another way."""
    for one in golden.answers:
        said = _answer(model, model.bundle.folder / one.image, one.question)
        if said != one.answer:
            yield one, said


def _answer(model: Model, image: Path, question: str) -> str:
    return model.answer(image, question, temperature=0, max_new_tokens=GOLDEN_TOKENS).text()
