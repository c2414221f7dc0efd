"""The main path: images and a question in, text out, piece by piece. Reads top to bottom as one answer is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lfm_profiles import default_threads
from numpy.typing import NDArray
from PIL import Image

from lfm_runtime.bundle import Bundle
from lfm_runtime.decoder import Decoder
from lfm_runtime.errors import PromptError, SettingError
from lfm_runtime.images import MAX_MEGAPIXELS, ImageLike, ImagePlan, ImageSettings, cut_views, open_image, plan_image
from lfm_runtime.prompt import Message, PromptBuilder, RenderedPrompt
from lfm_runtime.report import Report
from lfm_runtime.sampling import GenerationSettings, Sampler
from lfm_runtime.sessions import Sessions, failures_are_ours, load_sessions
from lfm_runtime.tokenizer import TextStream

Progress = Callable[[int, int], None]
"""Called with (views encoded, views in all) before each view and after the last."""


@dataclass(frozen=True)
class PlannedImage:
    """An opened image with its plan."""

    image: Image.Image
    plan: ImagePlan


class Answer:
    """An answer being made: iterate for the text, then read `report`. Closing the iterator early stops the work."""

    def __init__(self, pieces: Iterator[str], report: Report) -> None:
        self._pieces = pieces
        self.report = report

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def text(self) -> str:
        """Run to the end and return the whole text."""
        for _ in self._pieces:
            pass
        return self.report.text


class Model:
    """A loaded bundle. `load` is the way in; one answer at a time per Model."""

    def __init__(self, bundle: Bundle, variant: str, sessions: Sessions, images: ImageSettings, threads: int) -> None:
        self.bundle = bundle
        self.variant = variant
        self.images = images
        self.threads = threads
        self.prompts = PromptBuilder(bundle.prompt)
        self.decoder = Decoder(sessions.decoder, sessions.embed, sessions.decoder_path)
        self.load_ms = 0.0
        self._vision = sessions.vision
        self._mask_type = np.int64 if _type_of(sessions.vision, "pixel_attention_mask") == "tensor(int64)" else np.int32

    @staticmethod
    def load(
        folder: str | Path, *, variant: str | None = None, threads: int | None = None, verify: bool = False, **images: Any
    ) -> Model:
        """Load a bundle, or a folder with a hub repository's ONNX files.

        Args:
            folder: the bundle.
            variant: fp32, fp16, int8 or int4; the bundle's first by default.
            threads: of each operator; the physical cores by default.
            verify: hash large files as well, not only small ones.
            **images: image settings that override the checkpoint's (max_image_tokens, do_image_splitting, max_tiles …).

        Raises:
            BundleError, GraphContractError: the folder cannot be used; the message says what to do.
            SettingError: an unknown, impossible or useless setting.
        """
        started = time.perf_counter()
        if threads is not None and not 1 <= threads <= 1024:
            raise SettingError(f"threads {threads} is impossible; allowed: 1 up to the machine's cores")
        bundle = Bundle.open(Path(folder))
        if verify:
            bundle.verify()
        name, graphs = bundle.graphs(variant)
        count = threads or default_threads()
        model = Model(bundle, name, load_sessions(graphs, count), image_settings(bundle.images, images), count)
        model.load_ms = (time.perf_counter() - started) * 1e3
        return model

    def answer(
        self, images: Sequence[ImageLike], question: str, *, system: str = "", max_megapixels: float = MAX_MEGAPIXELS,
        progress: Progress | None = None, **generation: Any,
    ) -> Answer:  # fmt: skip
        """Answer a question about images (or about none). Bad input raises here; the work starts with the iteration.

        Args:
            images: paths, bytes, PIL images or uint8 arrays [height, width, 3].
            question: the user's text, after the images.
            system: a system prompt.
            max_megapixels: larger images are refused.
            progress: told of every view encoded.
            **generation: temperature, min_p, top_k, top_p, repetition_penalty, max_new_tokens, seed, stop.

        Raises:
            ImageError, PromptError, SettingError.
        """
        messages = [Message("system", system)] if system else []
        messages.append(Message("user", question, len(images)))
        return self.converse(messages, images, max_megapixels=max_megapixels, progress=progress, **generation)

    def converse(
        self, messages: Sequence[Message], images: Sequence[ImageLike], *, max_megapixels: float = MAX_MEGAPIXELS,
        features: NDArray[np.float32] | None = None, progress: Progress | None = None, **generation: Any,
    ) -> Answer:  # fmt: skip
        """As `answer`, for several turns. `features` are those of all images, kept from an earlier turn (see `encode`)."""
        started = time.perf_counter()
        report = Report()
        report.timing_ms["load"] = self.load_ms
        settings = self.bundle.generation.with_changes(generation)
        with report.stage("image"):
            planned = [self.open(image, max_megapixels=max_megapixels) for image in images]
        prompt = self.prompts.render(messages, [p.plan for p in planned])
        self._check_context(prompt)
        report.prompt_tokens, report.image_tokens = len(prompt.ids), prompt.image_tokens
        report.tiles = sum(len(p.plan.views) for p in planned)
        pieces = self._generate(prompt, planned, features, settings, report, progress, started)
        return Answer(_explained(pieces, self.bundle.folder), report)

    def open(self, image: ImageLike, *, max_megapixels: float = MAX_MEGAPIXELS) -> PlannedImage:
        """Open one image and plan its views; nothing is encoded."""
        opened = open_image(image, max_megapixels=max_megapixels)
        return PlannedImage(opened, plan_image(opened.width, opened.height, self.images))

    def _generate(
        self, prompt: RenderedPrompt, planned: Sequence[PlannedImage], features: NDArray[np.float32] | None,
        settings: GenerationSettings, report: Report, progress: Progress | None, started: float,
    ) -> Iterator[str]:  # fmt: skip
        if features is None:
            features = self.encode(planned, report, progress)
        with report.stage("embed"):
            embeds = self.decoder.embed_prompt(prompt.ids, features, self.prompts.image_id)
        capacity = min(self.bundle.context_length, len(prompt.ids) + settings.max_new_tokens)
        with report.stage("prefill"):
            state = self.decoder.start(capacity)
            logits = state.step(embeds)
        del embeds, features

        sampler = Sampler(settings, self.decoder.vocabulary, prompt.ids)
        stream, stops = TextStream(self.prompts.tokenizer), StopStrings(settings.stop)
        first_token: float | None = None
        while True:
            token = sampler.next(logits)
            first_token = first_token or time.perf_counter()
            report.new_tokens += 1
            if token in self.bundle.eos:
                report.finish_reason = "eos"
                break
            if piece := stops.pass_on(stream.add(token)):
                report.text += piece
                yield piece
            if stops.found:
                report.finish_reason = "stop"
                break
            if report.new_tokens == settings.max_new_tokens:
                report.finish_reason = "length"
                break
            if state.length == capacity:
                report.finish_reason = "context"
                break
            logits = state.step(self.decoder.embed([token]))
        if rest := stops.pass_on(stream.finish()) + stops.rest():
            report.text += rest
            yield rest
        report.finish(started, first_token, time.perf_counter())

    def encode(
        self, planned: Sequence[PlannedImage], report: Report | None = None, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Image features [image tokens, H] of all views of all images in order. Each view runs alone, without padding."""
        report = report or Report()
        total = sum(len(p.plan.views) for p in planned)
        parts: list[NDArray[np.float32]] = []
        for item in planned:
            cut = cut_views(item.image, item.plan, self.images)
            for view in item.plan.views:
                if progress:
                    progress(len(parts), total)
                with report.stage("image"):
                    patches = next(cut)
                with report.stage("vision"):
                    (found,) = self._vision.run(["image_features"], {
                        "pixel_values": patches[None],
                        "pixel_attention_mask": np.ones((1, len(patches)), self._mask_type),
                        "spatial_shapes": np.array([[view.rows, view.columns]], np.int64),
                    })  # fmt: skip
                parts.append(np.asarray(found, np.float32).reshape(view.tokens, -1))
        if progress and total:
            progress(total, total)
        return np.concatenate(parts) if parts else np.empty((0, self.decoder.hidden), np.float32)

    def _check_context(self, prompt: RenderedPrompt) -> None:
        limit = self.bundle.context_length
        if len(prompt.ids) >= limit:
            raise PromptError(
                f"the prompt has {len(prompt.ids)} tokens ({prompt.image_tokens} of them image tokens), the context holds {limit} "
                "with the answer; shorten the text, or lower --max-image-tokens or --max-tiles"
            )


def _explained(pieces: Iterator[str], folder: Path) -> Iterator[str]:
    with failures_are_ours(folder):
        yield from pieces


class StopStrings:
    """Holds text back while it could be the start of a stop string; a stop string itself is never passed on."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found = False
        self._held = ""

    def pass_on(self, text: str) -> str:
        """What of the text so far is certain to be before any stop string."""
        if not self.stops or self.found:
            return "" if self.found else text
        text = self._held + text
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        keep = max(
            (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back when the answer ended for another reason."""
        held, self._held = self._held, ""
        return held


def image_settings(base: ImageSettings, changes: dict[str, Any]) -> ImageSettings:
    """The checkpoint's image settings with the user's changes.

    Raises:
        SettingError: unknown or impossible; or tile settings while splitting is off.
    """
    changed = {name: value for name, value in changes.items() if value is not None}
    if "max_image_tokens" in changed and "min_image_tokens" not in changed:  # lowering the maximum alone is what people ask for
        changed["min_image_tokens"] = min(base.min_image_tokens, changed["max_image_tokens"])
    try:
        settings = replace(base, **changed)
    except TypeError as e:
        raise SettingError(f"image settings: {str(e).split('__init__() ')[-1]}") from e
    useless = [name for name in ("min_tiles", "max_tiles", "use_thumbnail", "tile_size") if name in changed]
    if not settings.do_image_splitting and useless:
        raise SettingError(f"{', '.join(useless)} has no effect while do_image_splitting is off; leave it out or turn splitting on")
    return settings


def _type_of(session: Any, name: str) -> str:
    return next(str(i.type) for i in session.get_inputs() if i.name == name)
