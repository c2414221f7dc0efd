"""A variant answering: features, greedy answers and the distributions behind them. One graph is loaded at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from lfm_runtime.bundle import Bundle
from lfm_runtime.decode.decoder import Decoder
from lfm_runtime.decode.graphs import DecoderSessions
from lfm_runtime.engine.execution import Execution
from lfm_runtime.engine.loader import load_session
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, VISION_ENCODER
from numpy.typing import NDArray

from lfm_quantize.calibrate.samples import MOST_ANSWER_TOKENS, Sample, View, to_sample
from lfm_quantize.calibrate.spread import HERE, Cluster, Sent, SharedBundle, parts_of, received
from lfm_quantize.graph import QuantizeError

Float = NDArray[np.float32]
Progress = Callable[[str, int, int], None]
"""Told (what, how many done, how many in all)."""


@dataclass(frozen=True)
class Answering:
    """A variant that answers. Without `packed`, weights stay where their file is mapped: for the large variants."""

    bundle: Bundle
    variant: str
    threads: int
    packed: bool = True
    prefill: str | None = None  # the variant whose decoder processes prompts

    def features(self, views: Sequence[Sequence[View]], progress: Progress = lambda *_: None) -> list[Float]:
        """Image features [tokens, H] of each sample's views."""
        graph = self.bundle.graphs(self.variant)[1][VISION_ENCODER.stem]
        session = load_session(graph, VISION_ENCODER, Execution(self.threads, packed=self.packed))
        found = []
        for i, sample in enumerate(views):
            parts = [session.run(["image_features"], view.feeds())[0].astype(np.float32, copy=False) for view in sample]
            found.append(np.concatenate(parts))
            progress(f"{self.variant} encodes images", i + 1, len(views))
        return found

    def features_of(self, samples: Sequence[Sample]) -> list[Float]:
        """Of each sample's image; an image that several questions are about is encoded once."""
        first = {sample.question.image: sample for sample in samples}
        found = dict(zip(first, self.features([s.views for s in first.values()]), strict=True))
        return [found[sample.question.image] for sample in samples]

    def decoder(self) -> Decoder:
        """Load the decoder and the embeddings."""
        graphs = self.bundle.graphs(self.variant)[1]
        decoder = load_session(graphs[DECODER.stem], DECODER, Execution(self.threads, packed=self.packed))
        prefill = None
        if self.prefill:
            other = self.bundle.graphs(self.prefill)[1][DECODER.stem]
            prefill = load_session(other, DECODER, Execution(self.threads, packed=self.packed))
        embed = load_session(graphs[EMBED_TOKENS.stem], EMBED_TOKENS, Execution(1))
        sessions = DecoderSessions(decoder, embed, prefill)
        return Decoder(lambda: sessions, graphs[DECODER.stem])

    def embed(self, decoder: Decoder, sample: Sample, features: Float) -> Float:
        """A sample's prompt as the decoder takes it [1, S, H]."""
        return decoder.embed_prompt(sample.ids, features, self.bundle.prompts.image_id)


def greedy(decoder: Decoder, embeds: Float, limit: int, eos: Iterable[int]) -> tuple[list[int], Float]:
    """The greedy answer, eos included where it came, and the logits [tokens, V] behind each of its tokens."""
    state = decoder.start(embeds.shape[1] + limit)
    logits, ends = state.step(embeds), set(eos)
    ids: list[int] = []
    behind = []
    while True:
        behind.append(np.array(logits, np.float32))
        ids.append(int(logits.argmax()))
        if ids[-1] in ends or len(ids) == limit:
            return ids, np.stack(behind)
        logits = state.step(decoder.embed(ids[-1:]))


def follow(decoder: Decoder, embeds: Float, answer: Sequence[int]) -> Float:
    """Logits [tokens, V] before each token of a given answer (teacher forcing)."""
    state = decoder.start(embeds.shape[1] + len(answer))
    first = np.array(state.step(embeds), np.float32)
    return np.stack([first, *(np.array(state.step(decoder.embed([token])), np.float32) for token in answer[:-1])])


@dataclass(frozen=True)
class Greedy:
    """Greedy answers of a variant, to be sent to where questions are answered."""

    shared: SharedBundle
    variant: str
    threads: int
    limit: int  # tokens of an answer

    def __call__(self, sent: Sequence[Sent]) -> list[list[int]]:
        """The answers' tokens.

        Raises:
            BundleError: there is no bundle, or another one.
        """
        bundle = self.shared.open()
        samples = [to_sample(bundle, question, split=False) for question in received(sent)]
        answering = Answering(bundle, self.variant, self.threads, packed=False)
        return list(_greedy_answers(answering, samples, self.limit, lambda *_: None))


def add_answers(
    answering: Answering, samples: Sequence[Sample], limit: int, progress: Progress, cluster: Cluster = HERE
) -> None:
    """Give each sample its answer: the known one, else the greedy one of at most `limit` tokens, of the workers where
    there is a cluster.

    Raises:
        QuantizeError: a known answer is too long or holds an image token.
    """
    bundle = answering.bundle
    builder = bundle.prompts
    unknown = []
    for sample in samples:
        if sample.question.answer is None:
            unknown.append(sample)
            continue
        answer = [*builder.tokenizer.encode(sample.question.answer), bundle.eos[0]]
        if builder.image_id in answer or len(answer) > MOST_ANSWER_TOKENS:
            raise QuantizeError(
                f"the answer to {sample.question.text!r} about {sample.question.image} is too long or holds an "
                "image token"
            )
        sample.ids += answer
    if not unknown:
        return
    if cluster is not HERE:
        ask = Greedy(SharedBundle.of(bundle.folder), answering.variant, answering.threads, limit)
        asked = [cluster.call(ask, part) for part in parts_of([sample.question for sample in unknown])]
        answers: Iterable[list[int]] = (ids for part in cluster.results(asked) for ids in part)
    else:
        answers = _greedy_answers(answering, unknown, limit, progress)
    for i, (sample, ids) in enumerate(zip(unknown, answers, strict=True)):
        sample.ids += ids
        progress(f"{answering.variant} answers", i + 1, len(unknown))


def _greedy_answers(
    answering: Answering, samples: Sequence[Sample], limit: int, progress: Progress
) -> Iterator[list[int]]:
    features = answering.features([s.views for s in samples], progress)
    decoder = answering.decoder()
    for sample, found in zip(samples, features, strict=True):
        yield greedy(decoder, answering.embed(decoder, sample, found), limit, answering.bundle.eos)[0]
