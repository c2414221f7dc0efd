"""Mixed precision by measurement: how much each layer's rounding changes the answers, and which precision buys most for
its bytes.

Each product is rounded alone, at one reference precision, inside the fp32 model, and the effect is followed to the end:
the KL divergence of the answers for the decoder, the loss of cosine of the image features for the encoder. The effect
at other precisions scales with the error at the product's own output, which is cheap to know. Effects of several layers
add up, nearly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from lfm_runtime.bundle import Bundle
from numpy.typing import NDArray

from lfm_quantize.calibrate.answers import Progress
from lfm_quantize.calibrate.blocks import (
    Block,
    Feeds,
    Values,
    all_positions,
    blocks_of,
    image_positions,
    prompt_feeds,
    run_block,
)
from lfm_quantize.calibrate.samples import Sample
from lfm_quantize.graph import LARGE_BYTES, Graph, QuantizeError
from lfm_quantize.layer import observe
from lfm_quantize.passes.rewrite import quantized_nodes
from lfm_quantize.passes.smooth import fake_rows, find_fit, sources
from lfm_quantize.quality import cosines, kl_divergence
from lfm_quantize.recipe import Recipe, Rule
from lfm_quantize.rounding import Precision, clipped, rtn
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
NODE_BYTES = 900
"""Of the protobuf, for a quantized product."""


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


def survey(
    source: Source, bundle: Bundle, samples: Sequence[Sample], kept: Sequence[str], threads: int, progress: Progress
) -> list[list[Choice]]:
    """For every product, its choices from the smallest to the largest; for those in `kept`, fp32 alone."""
    if not samples:
        raise QuantizeError("a search for precisions needs --calibration images")
    samples = samples[:: max(1, len(samples) // SAMPLES)][:SAMPLES]
    graph = all_positions(source.decoder)
    linears = {**source.vision.linears(), **graph.linears()}

    view_feeds: list[Feeds] = [sample.views[0].feeds() for sample in samples]
    every_patch = [np.ones(len(sample.views[0].patches), np.bool_) for sample in samples]
    features, losses, worst = _effects(source.vision, view_feeds, every_patch, _cosine_loss, threads, progress)

    kinds = image_positions(samples, bundle.prompts.image_id)
    answers = [slice(sample.prompt_tokens - 1, len(sample.ids) - 1) for sample in samples]

    def feeds(table: Float, images: Sequence[Values]) -> list[Feeds]:
        return prompt_feeds(graph, samples, kinds, table, [values["image_features"] for values in images])

    def divergence(exact: Sequence[Values], changed: Sequence[Values]) -> float:
        parts = [
            kl_divergence(a["logits"][0, s], b["logits"][0, s]) for a, b, s in zip(exact, changed, answers, strict=True)
        ]
        return float(np.concatenate(parts).mean())

    exact_feeds = feeds(source.table, features)
    logits, divergences, _ = _effects(graph, exact_feeds, kinds, divergence, threads, progress)
    # What a loss of cosine costs in answers, once: the decoder on the worst features seen.
    whole = Block("whole", (), ("logits",), ())
    per_cosine = divergence(logits, run_block(graph, whole, feeds(source.table, worst), [{} for _ in samples], threads))
    per_cosine /= max(_cosine_loss(features, worst), 1e-12)
    divergences["head"] = _table_effects(source, graph, whole, feeds, features, logits, divergence, threads)

    found = []
    for name, effects in [*losses.items(), *divergences.items()]:
        linear, vision = linears[name], name in losses
        choices = [
            Choice(
                name,
                p,
                _bytes(linear.n, linear.k, p),
                effect * per_cosine if vision else effect,
                effect if vision else 0.0,
            )
            for p, effect in effects.items()
        ]
        fp32 = [Choice(name, Precision(32), 4 * linear.n * linear.k, 0.0, 0.0)]
        found.append(fp32 if name in kept else sorted(choices, key=lambda c: c.bytes))
    return found


def _effects(
    graph: Graph,
    feeds: list[Feeds],
    kinds: list[NDArray[np.bool_]],
    distance: Distance,
    threads: int,
    progress: Progress,
) -> tuple[list[Values], dict[str, Effects], list[Values]]:
    """(what the exact graph gives, product → precision → effect at the end, the outputs with the largest effect)."""
    blocks = blocks_of(graph)
    linears, where = graph.linears(), sources(graph)
    exact: list[Values] = [{} for _ in feeds]
    trail = [exact]
    for block in blocks:
        exact = run_block(graph, block, feeds, exact, threads)
        trail.append(exact)
    effects: dict[str, Effects] = {}
    largest, worst = -1.0, exact
    for i, block in enumerate(blocks):
        names = [name for name in block.linears if name != "head"]
        seen = observe(graph, block, feeds, trail[i], kinds, dict.fromkeys(names, False), threads)
        rest = Block("rest", block.outputs, tuple(v.name for v in graph.outputs[:1]), ())
        for name in names:
            linear, weight = linears[name], graph.weight(linears[name])
            rows = seen[name].kept()
            wanted = rows @ weight.T
            power = float(np.square(wanted).sum(dtype=np.float64))
            errors: Effects = {}
            reference = None
            for p in OPTIONS:
                if p.bits == 4 and linear.k % p.block:
                    continue
                fit = find_fit(weight, seen[name], where.get(name), p)
                rounded = rtn(weight * fit.factors, p, None)
                x = rows / fit.factors
                got = (fake_rows(x, fit.negative) if p.bits == 8 else x) @ rounded.weight().T
                errors[p] = float(np.square(got - wanted).sum(dtype=np.float64)) / power
                if reference is None or p == REFERENCE:
                    reference = rtn(weight, p, None)
            assert reference is not None  # 8 bits suit any width
            rounded = reference
            nodes, tensors = quantized_nodes(linear, rounded)
            after = run_block(graph.replaced({name: nodes}, tensors), block, feeds, trail[i], threads)
            end = run_block(graph, rest, feeds, after, threads) if i + 1 < len(blocks) else after
            effect = distance(exact, end)
            plain = float(np.square(rows @ rounded.weight().T - wanted).sum(dtype=np.float64)) / power
            effects[name] = {option: effect * error / max(plain, 1e-20) for option, error in errors.items()}
            if effect > largest:
                largest, worst = effect, end
        progress(f"surveys {graph.name}", i + 1, len(blocks))
    return exact, effects, worst


def _table_effects(
    source: Source,
    graph: Graph,
    whole: Block,
    feeds: Callable[[Float, Sequence[Values]], list[Feeds]],
    features: Sequence[Values],
    logits: Sequence[Values],
    divergence: Distance,
    threads: int,
) -> Effects:
    """The embedding table, rounded where it is looked up and, where the head is tied to it, in the head."""
    effects = {}
    head = graph.linears()["head"]
    for p in OPTIONS:
        if p.bits == 4 and source.table.shape[1] % p.block:
            continue
        rounded = clipped(source.table, p, None)
        nodes, tensors = quantized_nodes(head, rounded, tied=True)
        changed = graph.replaced({"head": nodes}, tensors) if source.tied else graph
        made = feeds(rounded.weight(), features)
        effects[p] = divergence(logits, run_block(changed, whole, made, [{} for _ in made], threads))
    return effects


def _cosine_loss(exact: Sequence[Values], changed: Sequence[Values]) -> float:
    """1 - cosine of the image features, mean over all tokens."""
    pairs = [(a["image_features"], b["image_features"]) for a, b in zip(exact, changed, strict=True)]
    return float(np.mean(np.concatenate([1 - cosines(a, b) for a, b in pairs])))


def _bytes(n: int, k: int, precision: Precision) -> int:
    """Of a product's constants and nodes in the files."""
    stored = round(n * k * precision.bits_per_weight / 8) + (4 * n if precision.bits == 8 else 0)
    return stored + NODE_BYTES + (PADDING_BYTES if stored >= LARGE_BYTES else 0)


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
            raise QuantizeError(
                f"--max-size cannot be met: the layers alone take {size / 1e6:.1f} MB at 4 bits; allow more"
            )
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
