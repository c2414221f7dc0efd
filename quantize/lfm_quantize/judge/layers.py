"""Where a variant's error comes from: the hidden state after each layer, against the other variant's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
from lfm_runtime.formats.contract import DECODER, VISION_ENCODER
from lfm_runtime.questions import Question
from numpy.typing import NDArray

from lfm_quantize.calibrate.answers import Answering
from lfm_quantize.calibrate.blocks import Block, Feeds, Values, blocks_of, decoder_feeds, has_blocks
from lfm_quantize.calibrate.observe import KINDS
from lfm_quantize.calibrate.samples import Sample, to_sample
from lfm_quantize.graph import open_graph, part, session
from lfm_quantize.judge.quality import LayerError
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.passes.positions import AllPositions
from lfm_quantize.passes.widen import Widen

Float = NDArray[np.float32]


def layer_errors(exact: Answering, judged: Answering, questions: Sequence[Question]) -> list[LayerError]:
    """The error of the hidden state after each layer, both variants run as wholes. Layers whose state only one variant
    has, as one that was exported in fp16 may, are left out: their error is in the next one's. Empty for graphs that
    lfm-edge export did not build: theirs have no names to find layers by.
    """
    bundle = exact.bundle
    files = bundle.graphs(exact.variant)[1]
    vision, decoder = (Widen()(open_graph(files[stem])).model for stem in (VISION_ENCODER.stem, DECODER.stem))
    if not has_blocks(vision) or not has_blocks(decoder):
        return []
    decoder = rewritten(decoder, AllPositions())
    known = _values(exact) & _values(judged)
    blocks = [[b for b in _judged_blocks(model) if known.issuperset(b.outputs)] for model in (vision, decoder)]
    samples = [to_sample(bundle, q, split=False) for q in questions]
    views = [view for sample in samples for view in sample.views]
    image_id = bundle.prompts.image_id
    kinds = (
        [np.ones(len(view.patches), np.bool_) for view in views],
        [np.array(sample.ids) == image_id for sample in samples],
    )
    of_exact, of_judged = (_states(variant, blocks, samples) for variant in (exact, judged))
    found: list[LayerError] = []
    for between, x, y, is_image in zip(blocks, of_exact, of_judged, kinds, strict=True):
        # Image tokens come into the decoder with the error of the encoder.
        before: dict[str, float] = {"image": found[-1].image or 0.0} if found else {}
        for block in between:
            error = _relative(block.outputs, zip(x, y, is_image, strict=True))
            added = max((max(0.0, e**2 - before.get(kind, 0.0) ** 2) ** 0.5 for kind, e in error.items()), default=0.0)
            found.append(LayerError(block.name, error.get("image"), error.get("text"), added))
            before = error
    return found


def _values(variant: Answering) -> set[str]:
    """Names of all values that a variant's encoder and decoder compute."""
    files = variant.bundle.graphs(variant.variant)[1]
    graphs = (open_graph(files[stem]).graph for stem in (VISION_ENCODER.stem, DECODER.stem))
    return {str(value.name) for graph in graphs for node in graph for value in node.outputs}


def _states(
    variant: Answering, blocks: Sequence[Sequence[Block]], samples: Sequence[Sample]
) -> tuple[list[Values], list[Values]]:
    """A variant's hidden states after blocks of the encoder, by view, and of the decoder, by sample."""
    files = variant.bundle.graphs(variant.variant)[1]
    views = [view.feeds() for sample in samples for view in sample.views]
    encoded = _run(open_graph(files[VISION_ENCODER.stem]), blocks[0], views, variant.threads)
    decoding = variant.decoder()
    embeds = [
        variant.embed(decoding, sample, values["image_features"])
        for sample, values in zip(samples, encoded, strict=True)
    ]
    del decoding
    model = rewritten(open_graph(files[DECODER.stem]), AllPositions())
    feeds = [decoder_feeds(model, e) for e in embeds]
    return encoded, _run(model, blocks[1], feeds, variant.threads)


def _run(model: ir.Model, blocks: Sequence[Block], samples: Sequence[Feeds], threads: int) -> list[Values]:
    """Each sample's values at the ends of the blocks, in fp32; the graph runs as one."""
    names = list(dict.fromkeys(name for block in blocks for name in block.outputs))
    running = session(part(model, names), threads)
    taken = {i.name for i in running.get_inputs()}
    found = []
    for feeds in samples:
        values = running.run(names, {n: v for n, v in feeds.items() if n in taken})
        found.append({n: v.astype(np.float32, copy=False) for n, v in zip(names, values, strict=True)})
    return found


def _judged_blocks(model: ir.Model) -> list[Block]:
    """All blocks but the head: KL tells of the logits, and those of every position would fill the memory."""
    return [block for block in blocks_of(model) if block.name != "head"]


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
