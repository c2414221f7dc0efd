"""Mixed precision by measurement: how much each layer's rounding changes the answers, and which precision buys most for
its bytes.

Each product is rounded alone, at one reference precision, inside the fp32 model, and the effect is followed to the end:
the KL divergence of the answers for the decoder, the loss of cosine of the image features for the encoder. The effect
at other precisions scales with the error at the product's own output, which is cheap to know. Effects of several layers
add up, nearly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from lfm_runtime.bundle import Bundle
from numpy.typing import NDArray

from lfm_quantize.calibrate.answers import Progress
from lfm_quantize.calibrate.blocks import Block, FedGraph, Feeds, Values, blocks_of, image_positions, prompt_feeds
from lfm_quantize.calibrate.observe import Observed, observe
from lfm_quantize.calibrate.samples import Sample
from lfm_quantize.calibrate.smooth import InputSource, fake_rows, find_fit, sources
from lfm_quantize.graph import LARGE_BYTES, QuantizeError, linears
from lfm_quantize.judge.distances import cosines, kl_divergence
from lfm_quantize.passes.integers import Integers, Product
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.passes.positions import AllPositions
from lfm_quantize.recipe import Recipe, Rule
from lfm_quantize.rounding import Precision, Rounded, clipped, rtn
from lfm_quantize.source import Source

Float = NDArray[np.float32]
OPTIONS = (Precision(4, 128), Precision(4, 64), Precision(4, 64, zero_points=True), Precision(4, 32), Precision(8))
REFERENCE = Precision(4, 64)
SAMPLES = 8
"""Questions that effects are followed on."""
COSINE_LOSS = 5e-4
"""Mean loss of cosine of the image features that is as bad as a KL divergence at the floor."""
CAUTION = 0.7
"""Share of a budget of quality that the search plans to spend: effects add up nearly, not exactly."""
PADDING_BYTES = 1 << 15
"""Before a large constant in the data file, on average."""
NODE_BYTES = 1700
"""Of the protobuf, for a quantized product and what stands around it, at most."""


Distance = Callable[[Sequence[Values], Sequence[Values]], float]
Effects = dict[Precision, float]


@dataclass(frozen=True)
class Choice:
    """A product at a precision: its bytes, and what it is expected to cost."""

    name: str
    precision: Precision
    bytes: int
    kl: float  # nats
    cosine: float  # mean loss, 0 for the decoder's

    def loss(self, floor: float) -> float:
        """1 is as bad as allowed."""
        return self.kl / floor + self.cosine / COSINE_LOSS


WHOLE = Block("whole", (), ("logits",), ())
"""The decoder as one block."""


def survey(
    source: Source, bundle: Bundle, samples: Sequence[Sample], kept: Sequence[str], threads: int, progress: Progress
) -> list[list[Choice]]:
    """For every product, its choices from the smallest to the largest; for those in `kept`, fp32 alone.

    Raises:
        QuantizeError: there are no samples.
    """
    if not samples:
        raise QuantizeError("a search for precisions needs --calibration images")
    samples = samples[:: max(1, len(samples) // SAMPLES)][:SAMPLES]
    decoder = rewritten(source.decoder, AllPositions())
    products = {**linears(source.vision), **linears(decoder)}

    view_feeds: list[Feeds] = [sample.views[0].feeds() for sample in samples]
    every_patch = [np.ones(len(sample.views[0].patches), np.bool_) for sample in samples]
    vision = _effects(FedGraph(source.vision, view_feeds, every_patch, threads), _cosine_loss, progress)

    kinds = image_positions(samples, bundle.prompts.image_id)
    answers = [slice(sample.prompt_tokens - 1, len(sample.ids) - 1) for sample in samples]

    def fed(table: Float | Rounded, images: Sequence[Values]) -> FedGraph:
        features = [values["image_features"] for values in images]
        return FedGraph(decoder, prompt_feeds(decoder, samples, kinds, table, features), kinds, threads)

    def divergence(exact: Sequence[Values], changed: Sequence[Values]) -> float:
        parts = [
            kl_divergence(a["logits"][0, s], b["logits"][0, s]) for a, b, s in zip(exact, changed, answers, strict=True)
        ]
        return float(np.concatenate(parts).mean())

    text = _effects(fed(source.table, vision.exact), divergence, progress)
    # What a loss of cosine costs in answers, once: the decoder on the worst features seen.
    misled = fed(source.table, vision.worst)
    per_cosine = divergence(text.exact, misled.run(WHOLE, misled.start()))
    per_cosine /= max(_cosine_loss(vision.exact, vision.worst), 1e-12)
    text.effects["head"] = {
        p: divergence(text.exact, outputs)
        for p, outputs in _with_rounded_table(source, lambda table: fed(table, vision.exact))
    }

    found = []
    for name, effects in [*vision.effects.items(), *text.effects.items()]:
        n, k, of_vision = products[name].n, products[name].k, name in vision.effects
        choices = [
            Choice(name, p, _bytes(n, k, p), effect * per_cosine if of_vision else effect, effect if of_vision else 0.0)
            for p, effect in effects.items()
        ]
        fp32 = [Choice(name, Precision(32), 4 * n * k, 0.0, 0.0)]
        found.append(fp32 if name in kept else sorted(choices, key=lambda c: c.bytes))
    return found


@dataclass
class _Survey:
    """One graph surveyed."""

    exact: list[Values]  # what the exact graph gives
    effects: dict[str, Effects]  # product → precision → effect at the end
    worst: list[Values]  # the outputs with the largest effect


def _effects(fed: FedGraph, distance: Distance, progress: Progress) -> _Survey:
    """Round one product after the other and follow the effect through the blocks behind it."""
    blocks = blocks_of(fed.model)
    products, where = linears(fed.model), sources(fed.model)
    trail = [fed.start()]
    for block in blocks:
        trail.append(fed.run(block, trail[-1]))
    found = _Survey(trail[-1], {}, trail[-1])
    largest = -1.0
    for i, block in enumerate(blocks):
        names = [name for name in block.linears if name != "head"]
        seen = observe(fed, block, trail[i], dict.fromkeys(names, False))
        rest = Block("rest", block.outputs, (str(fed.model.graph.outputs[0].name),), ())
        for name in names:
            weight = products[name].weights()
            errors, plain, reference = _errors(weight, seen[name], where.get(name))
            after = fed.rewritten(Integers({name: reference})).run(block, trail[i])
            end = fed.run(rest, after) if i + 1 < len(blocks) else after
            effect = distance(found.exact, end)
            found.effects[name] = {option: effect * error / max(plain, 1e-20) for option, error in errors.items()}
            if effect > largest:
                largest, found.worst = effect, end
        progress(f"searches precisions for {fed.model.graph.name}", i + 1, len(blocks))
    return found


def _errors(weight: Float, seen: Observed, source: InputSource | None) -> tuple[Effects, float, Product]:
    """(relative output error by precision, that of the reference precision without smoothing, the product so)."""
    rows = seen.kept()
    wanted = rows @ weight.T
    power = float(np.square(wanted).sum(dtype=np.float64))
    errors: Effects = {}
    reference = None
    for p in OPTIONS:
        if p.bits == 4 and weight.shape[1] % p.block:
            continue
        fit = find_fit(weight, seen, source, p)
        rounded = rtn(weight * fit.factors, p, None)
        x = rows / fit.factors
        got = (fake_rows(x, fit.negative) if p.bits == 8 else x) @ rounded.weight().T
        errors[p] = float(np.square(got - wanted).sum(dtype=np.float64)) / power
        if reference is None or p == REFERENCE:
            reference = rtn(weight, p, None)
    assert reference is not None  # 8 bits suit any width
    plain = float(np.square(rows @ reference.weight().T - wanted).sum(dtype=np.float64)) / power
    return errors, plain, Product(reference)


def _with_rounded_table(source: Source, fed: Callable[[Rounded], FedGraph]) -> Iterator[tuple[Precision, list[Values]]]:
    """The outputs with the embedding table rounded, where it is looked up and, where the head is tied to it, in the
    head; for each precision.
    """
    for p in OPTIONS:
        if p.bits == 4 and source.table.shape[1] % p.block:
            continue
        rounded = clipped(source.table, p, None)
        changed = fed(rounded)
        if source.tied:
            changed = changed.rewritten(Integers({"head": Product(rounded)}, tied=True))
        yield p, changed.run(WHOLE, changed.start())


def _cosine_loss(exact: Sequence[Values], changed: Sequence[Values]) -> float:
    """1 - cosine of the image features, mean over all tokens."""
    pairs = [(a["image_features"], b["image_features"]) for a, b in zip(exact, changed, strict=True)]
    return float(np.mean(np.concatenate([1 - cosines(a, b) for a, b in pairs])))


def _bytes(n: int, k: int, precision: Precision) -> int:
    """Of a product's constants and nodes in the files."""
    stored = round(n * k * precision.bits_per_weight / 8) + (4 * n if precision.bits == 8 else 0)
    return stored + NODE_BYTES + (PADDING_BYTES if stored >= LARGE_BYTES else 0)


def room_for_padding(source: Source) -> float:
    """Bytes that constants may need before them beyond the average: three standard deviations, all of it at most."""
    large = sum(of.n * of.k >= LARGE_BYTES for of in source.linears().values())
    return float(min(large * PADDING_BYTES, 3 * 2 * PADDING_BYTES * (large / 12) ** 0.5))  # each is even


def check_reachable(source: Source, kept: Sequence[str], max_bytes: float) -> None:
    """Before the survey, which takes minutes: raise QuantizeError where not even the smallest choices fit."""
    products = {**linears(source.vision), **linears(source.decoder)}
    least = sum(
        4 * of.n * of.k if name in kept else min(_bytes(of.n, of.k, precision) for precision in OPTIONS)
        for name, of in products.items()
    )
    if least > max_bytes:
        raise _too_small(least)


def _too_small(least: float) -> QuantizeError:
    return QuantizeError(f"--max-size cannot be met: the layers alone take {least / 1e6:.1f} MB at 4 bits; allow more")


def choose(choices: Sequence[Sequence[Choice]], floor: float, max_bytes: float | None) -> Recipe:
    """The recipe that costs least quality within a size; or, without a size, the smallest that is expected to keep the
    floor.

    Starts from the largest choice everywhere and goes, product by product, where the least quality is lost for the
    bytes saved. Where even the largest choices are not expected to keep the floor, they are the recipe, and the gate
    will tell.

    Raises:
        QuantizeError: no choice is small enough.
    """
    ladders = [_hull(found, floor) for found in choices]
    at = [0] * len(ladders)
    size = float(sum(ladder[0].bytes for ladder in ladders))
    loss = sum(ladder[0].loss(floor) for ladder in ladders)
    while max_bytes is None or size > max_bytes:
        steps = [
            ((ladder[i + 1].loss(floor) - ladder[i].loss(floor)) / (ladder[i].bytes - ladder[i + 1].bytes), which)
            for which, (ladder, i) in enumerate(zip(ladders, at, strict=True))
            if i + 1 < len(ladder)
        ]
        if not steps:
            if max_bytes is None:
                break
            raise _too_small(size)
        _, which = min(steps)
        old, new = ladders[which][at[which]], ladders[which][at[which] + 1]
        if max_bytes is None and loss + new.loss(floor) - old.loss(floor) > CAUTION:
            break
        at[which] += 1
        size += new.bytes - old.bytes
        loss += new.loss(floor) - old.loss(floor)
    picked = [ladder[i] for ladder, i in zip(ladders, at, strict=True)]
    return Recipe(
        tuple(
            Rule(c.name, replace(c.precision, method="gptq") if c.precision.bits < 32 else c.precision) for c in picked
        )
    )


def _hull(choices: Sequence[Choice], floor: float) -> list[Choice]:
    """Largest first; only choices from which each further step saves bytes at a growing price."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (-c.bytes, c.loss(floor))):
        if kept and choice.bytes == kept[-1].bytes:
            continue
        while kept and choice.loss(floor) <= kept[-1].loss(floor):
            kept.pop()  # smaller and no worse
        while len(kept) > 1 and _price(kept[-2], kept[-1], floor) >= _price(kept[-1], choice, floor):
            kept.pop()
        kept.append(choice)
    return kept


def _price(old: Choice, new: Choice, floor: float) -> float:
    return (new.loss(floor) - old.loss(floor)) / (old.bytes - new.bytes)
