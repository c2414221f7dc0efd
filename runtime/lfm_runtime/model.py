"""The main path: images and a question in, text out, piece by piece. Reads top to bottom as one answer is made."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from lfm_profiles import Profile
from numpy.typing import NDArray

from lfm_runtime.answer.choice import Choice, Chosen, check_answers
from lfm_runtime.answer.reply import Answer, Job, Opened, Reply
from lfm_runtime.bundle import Bundle
from lfm_runtime.decode.cache import Cache
from lfm_runtime.decode.context import Context, prompt_keys, stops
from lfm_runtime.decode.guide import Grammars, Guide
from lfm_runtime.decode.sampling import Generation, GenerationSettings, Sampler
from lfm_runtime.decode.score import log_likelihood
from lfm_runtime.decode.speculation import PromptLookup, speculative_tokens
from lfm_runtime.engine.gpu import GpuError
from lfm_runtime.engine.sessions import Sessions
from lfm_runtime.engine.vision import Progress, encoding
from lfm_runtime.errors import ContextFullError, SettingError, pair
from lfm_runtime.images.layout import lay_out
from lfm_runtime.images.opened import CutImage, OpenedImage
from lfm_runtime.images.pixels import MAX_MEGAPIXELS, ImageLike, each_image, open_image
from lfm_runtime.report import Report, run_through
from lfm_runtime.setup.profile import on_cpu
from lfm_runtime.setup.resolve import resolve
from lfm_runtime.setup.setup import Ask, Flags, Setup
from lfm_runtime.text.messages import Conversation, Message
from lfm_runtime.text.prompt import RenderedPrompt

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on

_log = logging.getLogger(__name__)

Given: TypeAlias = "ImageLike | Opened"


class Model:
    """A loaded bundle. `load` is the way in; one answer at a time per Model."""

    def __init__(self, setup: Setup, *, cache_mib: int = 0, cache_folder: str | Path | None = None) -> None:
        """As the setup says; nothing is loaded yet. The caches: see `load`."""
        self.setup, self.bundle = setup, setup.bundle
        self.sessions = Sessions(
            setup.bundle, setup.variant, setup.prefill, setup.execution, unpacked=setup.unpacked, verify=setup.verify
        )
        self.decoder = self.sessions.decoder
        self.prompts = setup.bundle.prompts
        self.cache = None
        if cache_mib or cache_folder:
            folder = Path(cache_folder) if cache_folder else None
            self.cache = Cache(self.sessions.identity(), setup.bundle.facts, max_bytes=cache_mib << 20, folder=folder)
        self.load_ms = 0.0

    @staticmethod
    def load(
        folder: str | Path | Bundle,
        *,
        profile: str | os.PathLike[str] | Profile = "",
        ask: Ask | None = None,
        force: bool = False,
        verify: bool = False,
        cache_mib: int = 0,
        cache_folder: str | Path | None = None,
        **flags: Unpack[Flags],
    ) -> Model:
        """Load a bundle, or a folder with a hub repository's ONNX files, so that it fits this machine's memory.

        Args:
            folder: the bundle, opened or not.
            profile: how to run: a shipped profile's name or a TOML file; by default LFM_EDGE_PROFILE's, else the one
                packed with the bundle, else the one for this machine.
            ask: the sizes of the images and the question that memory is forecast for; by default one large image.
            force: load it whether it fits or not.
            verify: hash large files as well, not only small ones.
            cache_mib: memory for prompts' beginnings and image features; a later question about the same image starts
                there.
            cache_folder: keep them on disk too, for other processes.
            **flags: any setting of a profile (variant, prefill, threads, low_memory, max_image_tokens …), which
                overrides it.

        Raises:
            BundleError, GraphContractError: the folder cannot be used; the message says what to do.
            SettingError: an unknown, impossible or useless setting; a GPU that was named and cannot be used.
            DoesNotFitError: not even the smallest setup fits the memory; with the numbers.
        """
        setup = resolve(folder, profile, ask, force=force, verify=verify, **flags)
        for line in setup.reductions:
            _log.warning("lfm-edge: %s", line)
        return Model.of(setup, cache_mib=cache_mib, cache_folder=cache_folder)

    @staticmethod
    def of(setup: Setup, *, cache_mib: int = 0, cache_folder: str | Path | None = None, at_once: bool = False) -> Model:
        """Load what a setup says. Where nobody named its profile and the GPU fails, the CPU computes, with a warning.
        `at_once`: on a CPU return when loading has begun, for one answer; its errors then come with the answer.

        Raises:
            BundleError, GraphContractError: a graph cannot be used.
            GpuError: the GPU that was named cannot be used, or its memory is full.
            OutOfMemoryError: loading took more memory than there is.
        """
        started = time.perf_counter()
        model, failure = Model(setup, cache_mib=cache_mib, cache_folder=cache_folder), ""
        try:
            with setup.memory_is_told():
                model.sessions.begin() if at_once and not setup.execution.on_gpu else model.sessions.load()
        except GpuError as e:
            if not setup.profile.automatic:
                raise
            failure = str(e)  # and not the exception, which holds on to what was loaded
        if failure:
            _log.warning("lfm-edge: computing on the CPU: %s", failure)
            model.sessions.release()
            setup = resolve(setup.bundle, on_cpu(setup.profile), setup.ask)
            model = Model(setup, cache_mib=cache_mib, cache_folder=cache_folder)
            with setup.memory_is_told():
                model.sessions.load()
        model.load_ms = (time.perf_counter() - started) * 1e3
        return model

    def answer(
        self,
        images: ImageLike | Sequence[ImageLike],
        question: str,
        *,
        system: str = "",
        special: bool = True,
        max_megapixels: float = MAX_MEGAPIXELS,
        progress: Progress | None = None,
        **generation: Unpack[Generation],
    ) -> Answer:
        """Answer a question about images (or about none). Bad input raises here; the work starts with the iteration.

        Args:
            images: one or several of: paths, files open as binary, bytes, PIL images, uint8 arrays [height, width, 3].
            question: the user's text, after the images.
            system: a system prompt.
            special: False takes special tokens that the texts spell out as text: for texts of strangers.
            max_megapixels: larger images are refused.
            progress: told of every view encoded.
            **generation: settings that differ from the setup's: temperature, max_new_tokens, stop … `schema`, a JSON
                schema, makes the answer JSON of it; `tool_choice` ("required", or a name) makes it a call of a tool.

        Raises:
            ImageError: an image cannot be opened, or is too large.
            PromptError: the question does not fit the context, or names more images than there are.
            SettingError: a generation setting is impossible, or has no effect; a schema that cannot be enforced.
        """
        images = each_image(images)
        messages = [Message("system", system)] if system else []
        messages.append(Message.user(question, len(images)))
        chat = Conversation(messages, special=special)
        return self.converse(chat, images, max_megapixels=max_megapixels, progress=progress, **generation)

    def choose(
        self,
        images: ImageLike | Sequence[ImageLike],
        question: str,
        answers: Sequence[str],
        *,
        system: str = "",
        special: bool = True,
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> Chosen:
        """How likely each of these answers is; nothing is generated. For several questions about the same images:
        `choose_each`. Parameters and errors as for `answer`.
        """
        asked = [(question, answers)]
        return self.choose_each(images, asked, system=system, special=special, max_megapixels=max_megapixels)[0]

    def choose_each(
        self,
        images: ImageLike | Sequence[ImageLike],
        questions: Sequence[tuple[str, Sequence[str]]],
        *,
        system: str = "",
        special: bool = True,
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> list[Chosen]:
        """As `choose`, for (question, answers) pairs: the images are encoded and read once."""
        opened = self.open_all(images, max_megapixels=max_megapixels)
        turns = [Message("system", system)] if system else []
        asked = []
        for question, answers in (pair(one, "question, answers") for one in questions):
            chat = Conversation([*turns, Message.user(question, len(opened))], special=special)
            asked.append(self.prepare_choice(chat, opened, answers if isinstance(answers, str) else tuple(answers)))
        return self.chosen(asked)

    def chosen(self, asked: Sequence[Choice], context: Context | None = None) -> list[Chosen]:
        """Score the answers of prepared questions."""
        kept, context = context is not None, context or Context(self.decoder, self.cache)
        with self.setup.memory_is_told(), self.sessions.failures_are_ours(), self.sessions.execution.pinned():
            return run_through(self.choosing(asked, context, kept))

    def prepare_choice(self, chat: Conversation, images: Sequence[Given], answers: Sequence[str]) -> Choice:
        """As `prepare_answer`, for given answers.

        Raises:
            SettingError: fewer than two answers, an empty one, or one twice.
        """
        check_answers(answers)
        ids = [self.prompts.tokenizer.encode(text, special=False) for text in answers]
        job = self.prepare_answer(chat, images, max_new_tokens=max(map(len, ids)))
        return Choice(job, tuple(answers), ids)

    def choosing(
        self, asked: Sequence[Choice], context: Context, kept: bool = False
    ) -> Generator[None, None, list[Chosen]]:
        """Score the answers of each question, a view of an image, a step of tokens or an answer each time. `kept`: the
        context is used again afterwards.
        """
        found, returning = [], kept or len(asked) > 1 or self.cache is not None
        ready = max((one.job.prepared for one in asked), default=0.0)
        for one in asked:
            one.job.reply.report.waited += ready - one.job.prepared  # for the other questions
            logits = yield from self.reading(one.job, context, returning=returning)
            logits, scores = logits.copy(), []
            for ids in one.ids:
                yield
                scores.append(log_likelihood(self.decoder, context.state, logits, ids, self.bundle.eos))
            ready = one.job.finish()
            found.append(Chosen(one.answers, tuple(scores), one.job.reply.report))
        return found

    def converse(
        self,
        chat: Conversation | Sequence[Message],
        images: Given | Sequence[Given],
        *,
        context: Context | None = None,
        max_megapixels: float = MAX_MEGAPIXELS,
        progress: Progress | None = None,
        **generation: Unpack[Generation],
    ) -> Answer:
        """As `answer`, for several turns, with images at any place in them, and tools. What `context` has processed of
        them is not computed again (see Chat).
        """
        job = self.prepare_answer(chat, images, max_megapixels=max_megapixels, **generation)
        return self.answering(job, context, progress)

    def answering(self, job: Job, context: Context | None = None, progress: Progress | None = None) -> Answer:
        """The answer of a prepared job."""
        return Answer(self._computed(self._answer(job, context, progress)), job.reply)

    def prepare_answer(
        self,
        chat: Conversation | Sequence[Message],
        images: Given | Sequence[Given],
        *,
        max_megapixels: float = MAX_MEGAPIXELS,
        **generation: Unpack[Generation],
    ) -> Job:
        """Everything about an answer that bad input could spoil; nothing is computed yet. Parameters and errors as for
        `answer`.
        """
        started = time.perf_counter()
        report = Report()
        report.timing_ms["load"] = self.load_ms
        settings = self.setup.generation.with_changes(generation)
        if settings.speculate and not self.setup.verifies:
            do = "leave it out, or take a bundle of lfm-edge export without --portable, and a variant for CPUs"
            raise SettingError(
                "speculate needs a decoder on the CPU that can undo rejected tokens (a graph that also outputs "
                f"its convolutions' inputs); {do}"
            )
        with report.stage("image"), self.setup.memory_is_told():
            opened = self.open_all(images, max_megapixels=max_megapixels)
        with report.stage("prompt"):
            prompt = self.prompts.render(chat, [p.layout for p in opened])
        self._check_context(prompt)
        report.prompt_tokens, report.image_tokens = len(prompt.ids), prompt.image_tokens
        report.tiles = sum(len(p.layout.views) for p in opened)
        capacity = min(self.setup.context_length, len(prompt.ids) + settings.max_new_tokens)
        tools = chat.tools if isinstance(chat, Conversation) else ()
        guide = self._guide(settings, tools)
        room = capacity - len(prompt.ids)
        reply = Reply(self.prompts.tokenizer, self.bundle.eos, settings, room, report, tools=tools, guide=guide)
        return Job(prompt, opened, settings, reply, guide, capacity, started, time.perf_counter())

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.prompts.tokenizer, self.bundle.eos)

    def _guide(self, settings: GenerationSettings, tools: Sequence[Mapping[str, Any]]) -> Guide | None:
        """The grammar that an answer follows, where it has one."""
        if settings.schema is not None:
            return self._grammars.of_schema(settings.schema)
        if settings.tool_choice == "auto":
            return None
        return self._grammars.of_calls(tools, "" if settings.tool_choice == "required" else settings.tool_choice)

    def open(self, image: ImageLike, *, max_megapixels: float = MAX_MEGAPIXELS) -> OpenedImage:
        """Open one image and lay it out; nothing is encoded."""
        found = open_image(image, max_megapixels=max_megapixels)
        return OpenedImage(found, lay_out(found.width, found.height, self.setup.images), self.setup.images)

    def open_all(self, images: Given | Sequence[Given], *, max_megapixels: float) -> list[Opened]:
        """Open one or several images; those that are open already stay as they are."""
        return [
            i if isinstance(i, (OpenedImage, CutImage)) else self.open(i, max_megapixels=max_megapixels)
            for i in each_image(images)
        ]

    def _answer(self, job: Job, context: Context | None, progress: Progress | None) -> Generator[str]:
        returning = context is not None or self.cache is not None
        context = context or Context(self.decoder, self.cache)
        logits = self.read(job, context, progress, returning=returning)
        sampler = Sampler(job.settings, self.decoder.info.vocabulary, job.prompt.ids, job.guide)
        with closing(self._tokens(job, context, sampler, sampler.next(logits))) as tokens:
            for token in tokens:
                piece = job.reply.add(token, sampler.odds.popleft() if sampler.odds else None)
                if piece:
                    yield piece
                if job.reply.finished:
                    break
        job.finish()

    def _tokens(self, job: Job, context: Context, sampler: Sampler, token: int) -> Generator[int]:
        """One token after the other, from the first on, for as long as anyone asks."""
        if job.settings.speculate:
            lookup = PromptLookup(job.prompt.ids, job.settings.speculate)
            yield from speculative_tokens(self.decoder, context, sampler, lookup, token, job.capacity, job.reply.report)
        while True:
            yield token
            step = [token]
            for forced in sampler.forced():
                yield forced
                step.append(forced)
            logits = context.feed(self.decoder.embed(step), np.array(step)) if step[1:] else context.feed_token(token)
            token = sampler.next(logits)

    def read(
        self, job: Job, context: Context, progress: Progress | None = None, *, returning: bool = False
    ) -> NDArray[np.float32]:
        """Prefill what of the prompt neither `context` nor the cache has; returns the logits [vocabulary] of its last
        position. `returning`: somebody may come back to a place within it, in this context or through the cache.
        """
        return run_through(self.reading(job, context, progress, returning=returning))

    def reading(
        self, job: Job, context: Context, progress: Progress | None = None, *, returning: bool = False
    ) -> Generator[None, None, NDArray[np.float32]]:
        """As `read`, but a view of an image or a step of tokens each time."""
        prompt, opened, report = job.prompt, job.images, job.reply.report
        with report.stage("preprocess"):
            cut = [image.cut() for image in opened] if returning else []  # and hashing pixels takes time
            views = [key for image in cut for key in image.keys] or [-1] * len(prompt.view_ends)
            keys = prompt_keys(prompt.ids, self.prompts.image_id, views, prompt.view_ends)
        found = context.find(keys)
        known = report.cached_tokens = found.length
        skip = sum(end <= known for end in prompt.view_ends)
        features = yield from encoding(self.sessions, self.cache, cut or opened, report, progress, skip=skip)
        with report.loading(begun=not self.sessions.execution.low_memory):
            self.decoder.load()
        with report.stage("embed"):
            embeds = self.decoder.embed_prompt(prompt.ids[known:], features, self.prompts.image_id)
        with report.stage("prefill"):
            context.resume(found, keys, job.capacity)
        ends = stops(prompt.view_ends, prompt.image_ends, prompt.turns, len(prompt.ids)) if returning else (len(keys),)
        for end in (end for end in ends if end > known):
            if context.length > known:
                yield
            at = context.length
            part = context.feeding(embeds[:, at - known : end - known], keys[at:end])
            logits = yield from report.staged("prefill", part)
            with report.stage("prefill"):
                context.remember(cached=end in (*prompt.image_ends, *prompt.turns))
        return logits

    def encode(self, opened: Sequence[Opened], report: Report | None = None) -> NDArray[np.float32]:
        """Image features [image tokens, H] of all views of all images in order; each view runs alone and unpadded."""
        return run_through(encoding(self.sessions, self.cache, opened, report or Report()))

    def _computed(self, pieces: Generator[str]) -> Iterator[str]:
        """The pieces; while one is made, errors are ours and this thread stays on its processor."""
        with closing(pieces), self.setup.memory_is_told(), self.sessions.failures_are_ours():
            while True:
                with self.sessions.execution.pinned():
                    piece = next(pieces, None)
                if piece is None:
                    return
                yield piece

    def _check_context(self, prompt: RenderedPrompt) -> None:
        limit, tokens = self.setup.context_length, len(prompt.ids)
        if tokens >= limit:
            fewer = ", or take fewer images or tiles (--max-tiles)" if prompt.image_tokens else ""
            said = f"the prompt has {tokens} tokens ({prompt.image_tokens} of them image tokens), but prompt and answer"
            raise ContextFullError(f"{said} together may have at most {limit}; shorten the text{fewer}", tokens)
