"""Images and questions to calibrate and to judge with: read, checked, and turned into what the graphs take."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import ImageError, PromptError, unreadable
from lfm_runtime.images.layout import ImageSettings, lay_out
from lfm_runtime.images.names import images_below, is_image
from lfm_runtime.images.pixels import cut_views, open_image
from lfm_runtime.questions import Question, read_jsonl
from lfm_runtime.text.messages import Message
from numpy.typing import NDArray
from PIL import Image

from lfm_quantize.graph import QuantizeError

FEW_IMAGES = 8
MOST_ANSWER_TOKENS = 64
"""Room kept for an answer, known or greedy."""
BUILT_IN = (
    "What is in this image?",
    "Describe the image in detail.",
    "What text can be read here?",
    "How many objects are there?",
    "What colours do you see?",
    "Where is the main object?",
    "Is there a person in the picture?",
    "What is happening here?",
)


@dataclass
class View:
    """One view of an image as the encoder takes it."""

    patches: NDArray[np.float32]  # [rows·columns, 768]
    rows: int
    columns: int

    def feeds(self) -> dict[str, NDArray[Any]]:
        """The vision encoder's inputs."""
        return {
            "pixel_values": self.patches[None],
            "pixel_attention_mask": np.ones((1, len(self.patches)), np.int64),
            "spatial_shapes": np.array([[self.rows, self.columns]], np.int64),
        }


@dataclass
class Sample:
    """A question ready for the graphs. `ids` is the prompt, then the answer once there is one."""

    question: Question
    views: list[View]
    ids: list[int]
    prompt_tokens: int
    extra: list[View] = field(default_factory=list)  # more views of the image, for the encoder alone

    @property
    def answer_ids(self) -> list[int]:
        """The answer's tokens."""
        return self.ids[self.prompt_tokens :]


def read_questions(
    images: Path | Sequence[Path] | None, prompts: Path | None
) -> tuple[list[Question], dict[Path, str]]:
    """Questions about the usable images, and why others could not be opened.

    Args:
        images: folders (searched with their subfolders), image files, or text files of paths, one a line.
        prompts: questions, one a line, dealt out to the images in turn; or JSONL {image, question, answer, task}, whose
            images lie beside the file or in `images`. Without prompts, a few built-in questions.

    Raises:
        QuantizeError: nothing usable, or a file that is not what it should be.
    """
    places = [] if images is None else [images] if isinstance(images, Path) else list(images)
    found = list(dict.fromkeys(path for place in places for path in _find_images(place)))
    given = _read_prompts(prompts, [place for place in places if place.is_dir()]) if prompts else []
    if given and isinstance(given[0], Question):
        questions: list[Question] = [q for q in given if isinstance(q, Question)]
    else:
        texts = [t for t in given if isinstance(t, str)] or list(BUILT_IN)
        questions = [Question(path, texts[i % len(texts)]) for i, path in enumerate(found)]
    tried = {image: _problem(image) for image in dict.fromkeys(q.image for q in questions)}
    skipped = {image: problem for image, problem in tried.items() if problem}
    skipped_of = next((q.place for q in questions if q.image in skipped), "")
    questions = [q for q in questions if q.image not in skipped]
    if not questions:
        where = skipped_of or ", ".join(map(str, places)) or prompts
        why = f": {named(skipped)}" if skipped else ""
        what = "JPEG or PNG files there" if skipped_of else "a folder with JPEG or PNG files"
        raise QuantizeError(f"{where} has no usable image{why}; name {what}")
    return questions, skipped


def named(skipped: Mapping[Path, str]) -> str:
    """Name images that could not be opened, the first three by name, and say why the first could not."""
    names = [path.name for path in skipped]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    each = "the first: " if len(names) > 1 else ""
    return f"{', '.join(names[:3])}{more} could not be opened ({each}{next(iter(skipped.values()))})"


def _find_images(images: Path) -> list[Path]:
    if images.is_dir():
        return images_below(images)
    if not images.exists():
        raise QuantizeError(f"{images} does not exist; name a folder of images, or a text file with one path a line")
    if is_image(images.name):
        return [images]
    try:
        lines = images.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        return [images]  # an image of a rare kind, or none: it is opened next
    except OSError as e:
        raise unreadable(images, e, QuantizeError, "name a folder of images, or a text file of paths") from e
    of_json = any(line.lstrip().startswith(("{", "[")) for line in lines[:1])
    if images.suffix == ".jsonl" or (of_json and re.search('"(image|question)"', "".join(lines))):
        raise QuantizeError(f"{images} holds questions, not paths; give it as --prompts {images}")
    if of_json:
        raise QuantizeError(f"{images} holds JSON, not paths; name a folder of images, or a text file of paths")
    return [images.parent / line.strip() for line in lines if line.strip()]


def _read_prompts(path: Path, folders: Sequence[Path]) -> list[Question] | list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as e:
        raise unreadable(path, e, QuantizeError, "check the path") from e
    except UnicodeDecodeError as e:
        raise QuantizeError(f"{path} cannot be read as text ({e}); prompts are one a line, or JSONL") from e
    if not lines:
        raise QuantizeError(f"{path} is empty; prompts are one a line, or JSONL with image, question and answer")
    if not lines[0].lstrip().startswith(("{", "[")) and path.suffix != ".jsonl":
        return lines
    return list(read_jsonl(path, [path.parent, *folders], QuantizeError))


def _problem(path: Path) -> str:
    """Why an image cannot be opened; empty where it can."""
    try:
        open_image(path)
    except ImageError as e:
        return str(e)
    return ""


def to_sample(bundle: Bundle, question: Question, *, split: bool, images: ImageSettings | None = None) -> Sample:
    """The question as the runtime would put it, with the checkpoint's image settings or others. Without `split`, the
    image is one view, and a tile of a large one goes to `extra`.
    """
    image = open_image(question.image)
    settings = images or (bundle.images if split else replace(bundle.images, do_image_splitting=False))
    plan = lay_out(image.width, image.height, settings)
    views = _views(image, plan, settings)
    extra = []
    if not split and bundle.images.do_image_splitting:
        tiled = lay_out(image.width, image.height, bundle.images)
        if tiled.tiled:
            extra = [_views(image, tiled, bundle.images)[tiled.rows * tiled.columns // 2]]
    try:
        rendered = bundle.prompts.render([Message.user(question.text, 1)], [plan])
    except PromptError as e:
        raise QuantizeError(f"{question.place or question.text[:60]}: {e}") from e
    ids = list(rendered.ids)
    if len(ids) + MOST_ANSWER_TOKENS > bundle.context_length:
        size = f"{len(ids)} tokens, but prompt and answer together may have at most {bundle.context_length}"
        raise QuantizeError(f"the question about {question.image} has {size}; leave it out")
    return Sample(question, views, ids, len(ids), extra)


def _views(image: Image.Image, plan: Any, settings: Any) -> list[View]:
    return [
        View(patches, v.rows, v.columns)
        for patches, v in zip(cut_views(image, plan, settings), plan.views, strict=True)
    ]


def split_off(questions: Sequence[Question], share: float, seed: int) -> tuple[list[Question], list[Question]]:
    """(rest, part): `share` of the images, with all their questions, set apart."""
    images = sorted({q.image for q in questions})
    apart = set(random.Random(seed).sample(images, max(1, round(len(images) * share)))) if len(images) > 1 else set()  # noqa: S311
    return [q for q in questions if q.image not in apart], [q for q in questions if q.image in apart]
