"""The quality gate: what a variant costs in cosines, distributions and answers, against the fp32 one, on images
calibration never saw.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from lfm_profiles import FINEST, VARIANTS
from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import EdgeError
from lfm_runtime.formats.contract import DECODER, VISION_ENCODER
from numpy.typing import NDArray

from lfm_quantize.calibrate.answers import Progress, features_of, follow, greedy, open_decoder
from lfm_quantize.calibrate.blocks import Block, Feeds, Values, all_positions, blocks_of, decoder_feeds
from lfm_quantize.calibrate.observe import KINDS
from lfm_quantize.calibrate.samples import Question, Sample, prepare
from lfm_quantize.graph import Graph, QuantizeError

COSINE_FLOOR = 0.99
"""Lowest allowed 1st percentile of the image features' cosines."""
JUDGED_TOKENS = 48
"""Of each answer, at most."""
LOGIT_BYTES = 64 << 20
"""Distributions kept at a time; a question more than that waits for the next round."""

LAYER_SAMPLES = 4
"""Questions that the error is followed through the layers on."""

Float = NDArray[np.float32]


class GateError(EdgeError, ValueError):
    """A variant was made and is not good enough; the bundle is as before."""

    exit_code = 3


@dataclass(frozen=True)
class LayerError:
    """How far the hidden state after a layer is from the other variant's: |difference| / |state|, and what this layer
    added to it.
    """

    name: str
    image: float | None  # over image tokens (patches, in the encoder)
    text: float | None
    added: float  # root of the difference of squares with the layer before, the larger of both kinds


@dataclass
class Quality:
    """A variant against another on the same questions."""

    variant: str
    against: str
    questions: int
    images: int
    answer_tokens: int
    cosine_min: float
    cosine_p1: float
    cosine_mean: float
    kl: float  # nats, mean over the answer tokens of `against`, which both are led through
    same_top1: float  # share of those tokens
    same_answers: float  # share of questions whose greedy answers are identical
    accuracy: dict[
        str, dict[str, float]
    ]  # task → {"questions", variant names: share of exact answers}; where answers are known
    bytes: int
    against_bytes: int
    bits_per_weight: float
    layers: list[LayerError]
    seconds: float
    onnxruntime: str = field(default_factory=lambda: str(ort.__version__))

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers in five digits."""
        return {k: _five_digits(v) for k, v in asdict(self).items()}

    def accuracy_lost(self) -> float | None:
        """Points of exact answers lost, mean over all questions with a known answer."""
        total = sum(t["questions"] for t in self.accuracy.values())
        if not total:
            return None
        return 100 * sum((t[self.against] - t[self.variant]) * t["questions"] for t in self.accuracy.values()) / total

    def layer_table(self) -> str:
        """Where the error comes from."""
        lines = ["layer                         error: image      text     added here"]
        for layer in self.layers:
            image, text = (f"{v:10.5f}" if v is not None else " " * 9 + "–" for v in (layer.image, layer.text))
            lines.append(f"{layer.name:30s}      {image}{text}     {layer.added:10.5f}")
        return "\n".join(lines)

    def table(self) -> str:
        """For people."""
        lines = [
            f"{self.variant} against {self.against}: {self.questions} questions about {self.images} images, "
            f"{self.answer_tokens} answer tokens",
            f"  image features   cosine min {self.cosine_min:.5f}  1st percentile {self.cosine_p1:.5f}  mean "
            f"{self.cosine_mean:.5f}",
            f"  next token       KL {self.kl:.5f} nats  same first choice {self.same_top1:.2%}",
            f"  greedy answers   {self.same_answers:.1%} identical",
        ]
        for task, found in sorted(self.accuracy.items()):
            a, b = found[self.against], found[self.variant]
            lost, asked = 100 * (a - b), found["questions"]
            lines.append(
                f"  exact, {task:9s} {b:.2%}, {self.against} {a:.2%}, lost {lost:+.2f} points ({asked:.0f} questions)"
            )
        if len(self.accuracy) > 1:
            lines.append(f"  exact, all       lost {self.accuracy_lost():+.2f} points")
        lines.append(
            f"  size             {self.bytes / 1e6:.1f} MB, {self.bytes / self.against_bytes:.3f} of {self.against}, "
            f"{self.bits_per_weight:.2f} bits a weight, all files"
        )
        return "\n".join(lines)


def measure(
    folder: Path,
    variant: str,
    against: str,
    questions: Sequence[Question],
    threads: int,
    progress: Progress = lambda *_: None,
) -> Quality:
    """Compare two variants of a bundle. The graphs run as they are, through onnxruntime, as the runtime runs them.

    Raises:
        BundleError: a variant is missing. QuantizeError: no questions.
    """
    if not questions:
        raise QuantizeError("no questions to judge with; name images with --images")
    started = time.perf_counter()
    bundle = Bundle.open(folder)
    builder = bundle.prompts
    tokenizer, image_id = builder.tokenizer, builder.image_id
    vocabulary = len(bundle.prompt.vocabulary.tokens)
    token_cosines: list[Float] = []
    divergence: list[Float] = []
    same_token: list[NDArray[np.bool_]] = []
    same_answer = 0
    right: dict[str, list[tuple[bool, bool]]] = {}
    done = 0
    for part in _parts(questions, max(1, LOGIT_BYTES // (4 * vocabulary * JUDGED_TOKENS))):
        samples = [prepare(bundle, q, split=True) for q in part]
        features, answers, behind = _reference(bundle, against, samples, image_id, threads)
        found = _features(bundle, variant, samples, threads, packed=True)
        token_cosines += [cosines(a, b) for a, b in zip(features, found, strict=True)]
        decoder = open_decoder(bundle, variant, threads)
        for sample, mine, ids, logits in zip(samples, found, answers, behind, strict=True):
            embeds = decoder.embed_prompt(sample.ids, mine, image_id)
            other = follow(decoder, embeds, ids)
            divergence.append(kl_divergence(logits, other))
            same_token.append(logits.argmax(1) == other.argmax(1))
            # Led through the same tokens and agreeing on each, the variant would have said the same by itself.
            said = ids if same_token[-1].all() else greedy(decoder, embeds, JUDGED_TOKENS, bundle.eos)[0]
            same_answer += said == ids
            if sample.question.answer is not None:
                exact = tuple(_text(tokenizer, i, bundle.eos) == sample.question.answer for i in (ids, said))
                right.setdefault(sample.question.task, []).append((exact[0], exact[1]))
            done += 1
            progress(f"judges {variant}", done, len(questions))
        del decoder
    layers = layer_errors(
        bundle, variant, against, questions[:: max(1, len(questions) // LAYER_SAMPLES)][:LAYER_SAMPLES], threads
    )
    accuracy = {
        task: {
            "questions": len(r),
            against: float(np.mean([a for a, _ in r])),
            variant: float(np.mean([b for _, b in r])),
        }
        for task, r in right.items()
    }
    all_cosines, all_kl = np.concatenate(token_cosines), np.concatenate(divergence)
    size = _bytes(bundle, variant)
    return Quality(
        variant=variant,
        against=against,
        questions=len(questions),
        images=len({q.image for q in questions}),
        answer_tokens=len(all_kl),
        cosine_min=float(all_cosines.min()),
        cosine_p1=float(np.percentile(all_cosines, 1)),
        cosine_mean=float(all_cosines.mean()),
        kl=float(all_kl.mean()),
        same_top1=float(np.concatenate(same_token).mean()),
        same_answers=same_answer / len(questions),
        accuracy=accuracy,
        bytes=size,
        against_bytes=_bytes(bundle, against),
        bits_per_weight=8 * size / _weights(bundle),
        layers=layers,
        seconds=time.perf_counter() - started,
    )


def _reference(
    bundle: Bundle, against: str, samples: Sequence[Sample], image_id: int, threads: int
) -> tuple[list[Float], list[list[int]], list[Float]]:
    """Features, greedy answers and the logits behind them. Weights stay where the file is mapped: this variant is the
    large one.
    """
    features = _features(bundle, against, samples, threads, packed=False)
    decoder = open_decoder(bundle, against, threads, packed=False)
    embeds = (decoder.embed_prompt(s.ids, f, image_id) for s, f in zip(samples, features, strict=True))
    pairs = [greedy(decoder, e, JUDGED_TOKENS, bundle.eos) for e in embeds]
    return features, [ids for ids, _ in pairs], [logits for _, logits in pairs]


def layer_errors(
    bundle: Bundle, variant: str, against: str, questions: Sequence[Question], threads: int
) -> list[LayerError]:
    """The error of the hidden state after each layer, both variants run as wholes. Empty for graphs that lfm-edge did
    not make.
    """
    found: list[LayerError] = []
    samples = [prepare(bundle, q, split=False) for q in questions]
    ours = [Graph.open(bundle.graphs(against)[1][stem]) for stem in (VISION_ENCODER.stem, DECODER.stem)]
    if ours[0].name != VISION_ENCODER.stem or ours[1].name != DECODER.stem:
        return found
    views = [view for sample in samples for view in sample.views]
    image_id = bundle.prompts.image_id
    states: dict[str, list[list[Values]]] = {}
    for name in (against, variant):
        vision = _states(bundle, name, ours[0], [view.feeds() for view in views], threads)
        decoder = open_decoder(bundle, name, threads, packed=name != against)
        embeds = [
            decoder.embed_prompt(s.ids, v["image_features"], image_id) for s, v in zip(samples, vision, strict=True)
        ]
        del decoder
        states[name] = [vision, _states(bundle, name, ours[1], embeds, threads)]
    kinds = (
        [np.ones(len(view.patches), np.bool_) for view in views],
        [np.array(sample.ids) == image_id for sample in samples],
    )
    for which, graph in enumerate(ours):
        # Image tokens come into the decoder with the error of the encoder.
        before: dict[str, float] = {"image": found[-1].image or 0.0} if found else {}
        for block in _judged(graph if which == 0 else all_positions(graph)):
            pairs = zip(states[against][which], states[variant][which], kinds[which], strict=True)
            error = _relative(block.outputs, pairs)
            added = max((max(0.0, e**2 - before.get(kind, 0.0) ** 2) ** 0.5 for kind, e in error.items()), default=0.0)
            found.append(LayerError(block.name, error.get("image"), error.get("text"), added))
            before = error
    return found


def _states(
    bundle: Bundle, variant: str, like: Graph, samples: Sequence[Feeds] | Sequence[Float], threads: int
) -> list[Values]:
    """The hidden states between all blocks of a variant's graph for each sample: the encoder's inputs, or prompt
    embeddings.
    """
    graph = Graph.open(bundle.graphs(variant)[1][like.name], widen=False)
    if like.name == DECODER.stem:
        graph, like = all_positions(graph), all_positions(like)
    names = list(dict.fromkeys(name for block in _judged(like) for name in block.outputs))
    session = graph.part(names).session(threads)
    taken = {i.name for i in session.get_inputs()}
    found = []
    for sample in samples:
        feeds = sample if isinstance(sample, dict) else decoder_feeds(graph, sample)
        values = session.run(names, {n: v for n, v in feeds.items() if n in taken})
        found.append({n: v.astype(np.float32, copy=False) for n, v in zip(names, values, strict=True)})
    return found


def _judged(graph: Graph) -> list[Block]:
    """All blocks but the head: KL tells of the logits, and those of every position would fill the memory."""
    return [block for block in blocks_of(graph) if block.name != "head"]


def _relative(names: Sequence[str], pairs: Iterable[tuple[Values, Values, NDArray[np.bool_]]]) -> dict[str, float]:
    """|y - x| / |x| over all samples, by kind of token; the values `names` are added up first (a residual may be in two
    parts).
    """
    sums = {kind: [0.0, 0.0] for kind in KINDS}
    for a, b, is_image in pairs:
        x, y = (np.sum([v[n].reshape(-1, v[n].shape[-1]) for n in names], axis=0) for v in (a, b))
        chosen = is_image if len(is_image) == len(x) else np.ones(len(x), np.bool_)  # the projector joins patches
        for kind, mask in zip(KINDS, (chosen, ~chosen), strict=True):
            sums[kind][0] += float(np.square(y[mask] - x[mask]).sum(dtype=np.float64))
            sums[kind][1] += float(np.square(x[mask]).sum(dtype=np.float64))
    return {kind: (num / den) ** 0.5 for kind, (num, den) in sums.items() if den}


def _features(bundle: Bundle, variant: str, samples: Sequence[Sample], threads: int, *, packed: bool) -> list[Float]:
    """Of each sample's image; an image that several questions are about is encoded once."""
    first = {sample.question.image: sample for sample in samples}
    found = dict(
        zip(first, features_of(bundle, variant, [s.views for s in first.values()], threads, packed=packed), strict=True)
    )
    return [found[sample.question.image] for sample in samples]


def check_floor(quality: Quality, floor: float) -> None:
    """Raise GateError when KL or the cosines are beyond the floor; says which layers to keep."""
    reasons = []
    if not quality.kl <= floor:
        reasons.append(f"KL {quality.kl:.4g} is above {floor:g}")
    if not quality.cosine_p1 >= COSINE_FLOOR:
        reasons.append(f"the image features' cosine (1st percentile) {quality.cosine_p1:.4f} is below {COSINE_FLOOR}")
    if reasons:
        parts = (
            ("vision.", "projector") if VARIANTS[quality.variant].static else ("vision.", "projector", "text.layers.")
        )
        worst = sorted(
            (layer for layer in quality.layers if layer.name.startswith(parts)), key=lambda layer: -layer.added
        )[:3]
        keep = " ".join(f"--keep '{layer.name}.*'" for layer in worst)
        raise GateError(
            f"{quality.variant} is not good enough: {' and '.join(reasons)}; the bundle is as before. Try {keep}"
        )


def kl_divergence(logits: Float, other: Float) -> Float:
    """KL(softmax(logits) ‖ softmax(other)) in nats, for each row."""
    p, q = _log_softmax(logits), _log_softmax(other)
    divergence: Float = (np.exp(p) * (p - q)).sum(1)
    return divergence


def _log_softmax(logits: Float) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def cosines(a: Float, b: Float) -> Float:
    """Of each row."""
    result: Float = (a * b).sum(1, dtype=np.float64) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)).astype(
        np.float64
    )
    return result


def _text(tokenizer: Any, ids: Sequence[int], eos: Sequence[int]) -> str:
    return str(tokenizer.decode([i for i in ids if i not in eos]))


def _parts(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


def _bytes(bundle: Bundle, variant: str) -> int:
    """Of all files of a variant's graphs, those it shares with another variant included."""
    graphs = set(bundle.graphs(variant)[1].values())
    data = {t.source for path in graphs for t in Graph.open(path, widen=False).tensors.values() if t.source}
    return sum(path.stat().st_size for path in graphs | data)


def _weights(bundle: Bundle) -> int:
    """How many weights the model has, the shared table counted once; counted where they are floats."""
    variant = next((v for v in FINEST if v in bundle.variants), None)
    graphs = [Graph.open(f) for f in set(bundle.graphs(variant)[1].values())]
    linears = [linear for g in graphs for linear in g.linears().values()]
    tables = [t for g in graphs if g.name == "embed_tokens" for t in g.tensors.values() if len(t.shape) == 2]
    head = [linear for linear in linears if linear.name == "head"]
    table = sum(int(np.prod(t.shape)) for t in tables)
    return sum(linear.k * linear.n for linear in linears if linear.name != "head") + max(
        table, sum(h.k * h.n for h in head)
    )


def _five_digits(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < 0.9 else round(value, 6)
    if isinstance(value, dict):
        return {k: _five_digits(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_five_digits(v) for v in value]
    return value
