"""A variant compared with another, on images calibration never saw. The graphs run as they are, through onnxruntime, as
the runtime runs them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lfm_profiles import FINEST, Profile
from lfm_runtime.bundle import Bundle
from lfm_runtime.decode.decoder import Decoder
from lfm_runtime.images.layout import ImageSettings
from lfm_runtime.questions import Question
from lfm_runtime.setup.profile import departures
from lfm_runtime.setup.setup import settle
from numpy.typing import NDArray

from lfm_quantize.calibrate.answers import Answering, Progress, follow, greedy
from lfm_quantize.calibrate.samples import Sample, to_sample
from lfm_quantize.calibrate.spread import HERE, Cluster, Sent, SharedBundle, parts_of, received
from lfm_quantize.graph import Mapped, QuantizeError, linears, open_graph
from lfm_quantize.judge.distances import cosines, kl_divergence, standard_error
from lfm_quantize.judge.layers import layer_errors
from lfm_quantize.judge.quality import Quality

JUDGED_TOKENS = 48
"""Of each answer, at most."""
LOGIT_BYTES = 64 << 20
"""Distributions kept at a time; a question more than that waits for the next round."""
LAYER_SAMPLES = 4
"""Questions that the error is followed through the layers on."""

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Board:
    """How a device runs a variant: what a profile comes to with a bundle."""

    profile: str
    prefill: str | None
    images: ImageSettings
    changes: tuple[str, ...]  # of the checkpoint's settings
    alike: bool = False  # both variants get these image settings, so that only the variant's own loss is measured

    @staticmethod
    def of(bundle: Bundle, profile: Profile, *, alike: bool = False) -> Board:
        """What `profile` comes to with a bundle.

        Raises:
            BundleError, SettingError: the profile cannot be met.
        """
        setup = settle(bundle, profile)
        changes = departures(profile, bundle.images, bundle.generation)
        return Board(profile.name, setup.prefill, setup.images, tuple(changes), alike)

    def described(self, tokens: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """For the report. `tokens`: image tokens of the other variant and of this one, of each question."""
        before, after = (float(np.mean([pair[n] for pair in tokens])) for n in (0, 1))
        return {
            "profile": self.profile,
            "prefill": self.prefill,
            "changes": list(self.changes),
            "alike": self.alike,
            "image_tokens": after,
            "other_image_tokens": before,
        }


def measure(
    folder: Path,
    variant: str,
    against: str,
    questions: Sequence[Question],
    threads: int,
    progress: Progress = lambda *_: None,
    *,
    board: Board | None = None,
    quick: bool = False,
    cluster: Cluster = HERE,
) -> Quality:
    """Compare two variants of a bundle; this one as on a board, the other one with the checkpoint's own image settings
    or, where they are to be alike, with the board's. `quick`: shorter answers, and the layers of one question alone;
    `cluster`: where parts of the questions are compared; the numbers are those of one machine.

    Raises:
        BundleError: a variant is missing.
        QuantizeError: there are no questions.
    """
    if not questions:
        raise QuantizeError("no questions to judge with; name images with --images")
    started = time.perf_counter()
    bundle = Bundle.open(folder)
    exact = Answering(bundle, against, threads, packed=False)  # the large one: its weights stay where they are mapped
    judged = Answering(bundle, variant, threads, prefill=board.prefill if board else None)
    most = JUDGED_TOKENS // 3 if quick else JUDGED_TOKENS
    if cluster is not HERE:
        comparison = Comparison(SharedBundle.of(folder), variant, against, threads, most, board)
        found = _elsewhere(cluster, comparison, questions, progress)
    else:
        found = _compare(exact, judged, questions, most, board, progress)
    followed = 1 if quick else LAYER_SAMPLES
    few = questions[:: max(1, len(questions) // followed)][:followed]
    layers = [] if board and not board.alike else layer_errors(exact, judged, few)
    # Of images that are cut alike; what is cut in another way has other features.
    all_cosines = np.concatenate(found.cosines) if found.cosines else np.full(1, np.nan, np.float32)
    divergence = np.concatenate(found.divergence)
    return Quality(
        variant=variant,
        against=against,
        questions=len(questions),
        images=len({q.image for q in questions}),
        answer_tokens=len(divergence),
        cosine_min=float(all_cosines.min()),
        cosine_p1=float(np.percentile(all_cosines, 1)),
        cosine_mean=float(all_cosines.mean()),
        kl=float(divergence.mean()),
        kl_error=standard_error(found.divergence),
        same_top1=float(np.concatenate(found.same_token).mean()),
        same_answers=sum(found.same_answer) / len(questions),
        accuracy=found.accuracy(against, variant),
        bytes=_bytes(bundle, variant, board.prefill if board else None),
        against_bytes=_bytes(bundle, against, None),
        bits_per_weight=8 * _bytes(bundle, variant, None) / weights if (weights := _weights(bundle)) else None,
        layers=layers,
        board=None if board is None else board.described(found.tokens),
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class Comparison:
    """Two variants and how they answer, to be sent to where questions are compared."""

    shared: SharedBundle
    variant: str
    against: str
    threads: int
    most: int  # tokens of an answer
    board: Board | None

    def __call__(self, sent: Sequence[Sent]) -> Found:
        """What is found on these questions.

        Raises:
            BundleError: there is no bundle, or another one.
        """
        bundle, questions = self.shared.open(), received(sent)
        exact = Answering(bundle, self.against, self.threads, packed=False)
        judged = Answering(bundle, self.variant, self.threads, prefill=self.board.prefill if self.board else None)
        return _compare(exact, judged, questions, self.most, self.board, lambda *_: None)


def _elsewhere(cluster: Cluster, comparison: Comparison, questions: Sequence[Question], progress: Progress) -> Found:
    whole = Found()
    for part in cluster.results([cluster.call(comparison, part) for part in parts_of(questions)]):
        whole.extend(part)
        progress(f"evaluates {comparison.variant}", len(whole.same_answer), len(questions))
    return whole


def _compare(
    exact: Answering,
    judged: Answering,
    questions: Sequence[Question],
    most: int,
    board: Board | None,
    progress: Progress,
) -> Found:
    """Question by question, some at a time: the logits of answers of `most` tokens are large."""
    bundle = exact.bundle
    mine = board.images if board else bundle.images
    others = mine if board and board.alike else bundle.images
    found = Found()
    for part in _parts(questions, max(1, LOGIT_BYTES // (4 * len(bundle.prompt.vocabulary.tokens) * most))):
        samples = [to_sample(bundle, q, split=True, images=others) for q in part]
        references = _reference(exact, samples, most)
        if mine != others:
            samples = [to_sample(bundle, q, split=True, images=mine) for q in part]
        encoded = judged.features_of(samples)
        decoder = judged.decoder()
        for sample, reference, features in zip(samples, references, encoded, strict=True):
            found.add(bundle, most, sample, reference, features, decoder, judged.embed(decoder, sample, features))
            progress(f"evaluates {judged.variant}", len(found.same_answer), len(questions))
        del decoder
    return found


@dataclass
class _Reference:
    """What the other variant makes of a sample."""

    features: Float  # [tokens, H]
    answer: list[int]
    logits: Float  # [answer tokens, V]


def _reference(exact: Answering, samples: Sequence[Sample], most: int) -> list[_Reference]:
    """Features, greedy answers of at most `most` tokens, and the logits behind them."""
    features = exact.features_of(samples)
    decoder = exact.decoder()
    found = []
    for sample, mine in zip(samples, features, strict=True):
        embeds = exact.embed(decoder, sample, mine)
        found.append(_Reference(mine, *greedy(decoder, embeds, most, exact.bundle.eos)))
    return found


@dataclass
class Found:
    """What is found question by question."""

    cosines: list[Float] = field(default_factory=list)
    tokens: list[tuple[int, int]] = field(default_factory=list)  # image tokens of the other variant, of this one
    divergence: list[Float] = field(default_factory=list)
    same_token: list[NDArray[np.bool_]] = field(default_factory=list)
    same_answer: list[bool] = field(default_factory=list)
    right: dict[str, list[tuple[bool, bool]]] = field(default_factory=dict)  # task → (the other variant, this one)

    def extend(self, other: Found) -> None:
        """Put what was found on later questions behind what was found before."""
        self.cosines += other.cosines
        self.tokens += other.tokens
        self.divergence += other.divergence
        self.same_token += other.same_token
        self.same_answer += other.same_answer
        for task, right in other.right.items():
            self.right.setdefault(task, []).extend(right)

    def add(
        self,
        bundle: Bundle,
        most: int,
        sample: Sample,
        reference: _Reference,
        features: Float,
        decoder: Decoder,
        embeds: Float,
    ) -> None:
        """Compare one question: the judged decoder is led through the other's answer of at most `most` tokens."""
        self.tokens.append((len(reference.features), len(features)))
        if reference.features.shape == features.shape:
            self.cosines.append(cosines(reference.features, features))
        logits = follow(decoder, embeds, reference.answer)
        self.divergence.append(kl_divergence(reference.logits, logits))
        self.same_token.append(reference.logits.argmax(1) == logits.argmax(1))
        # Led through the same tokens and agreeing on each, the variant would have said the same by itself.
        agrees = bool(self.same_token[-1].all())
        said = reference.answer if agrees else greedy(decoder, embeds, most, bundle.eos)[0]
        self.same_answer.append(said == reference.answer)
        if sample.question.answer is not None:
            exact, judged = (_text(bundle, ids) == sample.question.answer for ids in (reference.answer, said))
            self.right.setdefault(sample.question.task, []).append((exact, judged))

    def accuracy(self, against: str, variant: str) -> dict[str, dict[str, float]]:
        """Task → number of questions, and each variant's share of exact answers."""
        return {
            task: {
                "questions": len(right),
                against: float(np.mean([a for a, _ in right])),
                variant: float(np.mean([b for _, b in right])),
            }
            for task, right in self.right.items()
        }


def _text(bundle: Bundle, ids: Sequence[int]) -> str:
    return str(bundle.prompts.tokenizer.decode([i for i in ids if i not in bundle.eos]))


def _parts(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


def _bytes(bundle: Bundle, variant: str, prefill: str | None) -> int:
    """Of all files that a run reads, those a variant shares with another included."""
    graphs = bundle.graphs_read(variant, prefill)
    constants = [v.const_value for path in graphs for v in open_graph(path).graph.initializers.values()]
    data = {tensor.file for tensor in constants if isinstance(tensor, Mapped)}
    return sum(path.stat().st_size for path in {*graphs, *data})


def _weights(bundle: Bundle) -> int | None:
    """How many weights the model has, the shared table counted once; None where no variant has them as floats."""
    variant = next((v for v in FINEST if v in bundle.variants), None)
    if variant is None:
        return None
    total = head = table = 0
    for path in set(bundle.graphs(variant)[1].values()):
        model = open_graph(path)
        for linear in linears(model).values():
            if linear.name == "head":
                head = linear.k * linear.n
            else:
                total += linear.k * linear.n
        if model.graph.name == "embed_tokens":
            constants = [v.const_value for v in model.graph.initializers.values()]
            table += sum(t.size for t in constants if t is not None and len(t.shape) == 2)
    return total + max(table, head)
