"""int8 and int4: weights become integers, block by block; each block sees what the quantized ones before it give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, VISION_ENCODER
from numpy.typing import NDArray

from lfm_quantize.calibrate.block import Change, quantize_block
from lfm_quantize.calibrate.blocks import FedGraph, Values, blocks_of, prompt_feeds
from lfm_quantize.graph import POSITION_TABLE, linears
from lfm_quantize.passes.constants import StoredAsHalf
from lfm_quantize.passes.gates import Gates
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.passes.positions import AllPositions
from lfm_quantize.passes.table import QuantizedTable
from lfm_quantize.recipe import Recipe, matching
from lfm_quantize.rounding import COMPENSATING, METHODS, Rounded
from lfm_quantize.run import Made, Run
from lfm_quantize.search import check_reachable, choose, room_for_padding, survey
from lfm_quantize.variant import NewGraph, VariantGraphs

Float = NDArray[np.float32]


def as_integers(run: Run) -> Made:
    """Vision, then the table, then the decoder, which is fed what the first two give."""
    source = run.source
    recipe = _search(run) if run.settings.searches() else run.recipe
    assert recipe is not None  # a run that rounds has one
    vision, features = _quantize_vision(run, recipe)
    table = _round_table(run, recipe)
    decoder = _quantize_decoder(run, recipe, features, table)
    encoder = rewritten(source.vision, *vision.passes(tied=False))
    if any(recipe.precision(name).bits < 32 for name in linears(source.vision)):
        encoder = rewritten(encoder, StoredAsHalf(POSITION_TABLE))
    graphs: VariantGraphs = {
        VISION_ENCODER.stem: NewGraph(encoder),
        EMBED_TOKENS.stem: NewGraph(rewritten(source.embed, QuantizedTable(table)) if table else source.embed),
        DECODER.stem: NewGraph(rewritten(source.decoder, *decoder.passes(tied=source.tied), Gates())),
    }
    layers = [*vision.layers, *decoder.layers]
    return Made(graphs, {"recipe": recipe.to_list(), "layers": layers, "attentions": vision.attentions}, recipe)


def _search(run: Run) -> Recipe:
    """The best recipe for the size or floor asked for; the one found before the run was killed, if it was."""
    if recipe := run.work.recipe():
        return recipe
    kept = matching(run.settings.keep, run.source.layers())
    megabytes = run.settings.max_size
    size = None if megabytes is None else megabytes * 1e6 - run.source.other_bytes() - room_for_padding(run.source)
    if size is not None:
        check_reachable(run.source, kept, size)
    choices = survey(run.source, run.bundle, run.samples, kept, run.settings.threads, run.progress)
    recipe = choose(choices, run.settings.kl_floor(), size)
    run.work.keep_recipe(recipe)
    return recipe


def _quantize_vision(run: Run, recipe: Recipe) -> tuple[Change, list[Float]]:
    """The changes, and the image features that the quantized encoder gives each sample."""
    first = {sample.question.image: sample for sample in reversed(run.samples)}  # several questions may be about one
    whole = {image: i for i, image in enumerate(first)}
    views = [sample.views[0] for sample in first.values()]
    views += [view for sample in first.values() for view in sample.extra]
    kinds = [np.ones(len(view.patches), np.bool_) for view in views]
    fed = FedGraph(run.source.vision, [view.feeds() for view in views], kinds, run.settings.threads)
    change, end = _through_blocks(run, recipe, fed, None)
    return change, [end[whole[s.question.image]]["image_features"] for s in run.samples]


def _quantize_decoder(run: Run, recipe: Recipe, features: list[Float], table: Rounded | None) -> Change:
    """The changes; `table` is the embedding table rounded, None where it stays fp32."""
    model, kinds = rewritten(run.source.decoder, AllPositions()), run.image_positions()
    rows = run.source.table if table is None else table
    feeds = prompt_feeds(model, run.samples, kinds, rows, features)
    fed = FedGraph(model, feeds, kinds, run.settings.threads)
    return _through_blocks(run, recipe, fed, table if run.source.tied else None)[0]


def _through_blocks(run: Run, recipe: Recipe, fed: FedGraph, table: Rounded | None) -> tuple[Change, list[Values]]:
    """Quantize block after block, each on the inputs that the quantized blocks before it produce; also what the last
    one gives.
    """
    blocks = blocks_of(fed.model)
    states = fed.start()
    total = Change()
    for i, block in enumerate(blocks):
        change = run.work.load(block.name)
        if change is None:
            change = run.work.save(block.name, quantize_block(fed, block, states, recipe, table))
        if fed.feeds and block.name != "head":  # nobody reads the logits of every position, and they are large
            quantized = fed.rewritten(*change.passes(tied=False))
            states = quantized.run(block, states)
        change.release()
        fed.release()
        total.add(change)
        run.progress(f"quantizes {fed.model.graph.name}", i + 1, len(blocks))
    return total, states


def _round_table(run: Run, recipe: Recipe) -> Rounded | None:
    """The embedding table at the head's precision; None where that stays fp32."""
    precision = recipe.precision("head")
    if precision.bits == 32:
        return None
    if precision.method in COMPENSATING:
        # Both a look-up and a product read it: each row is to be near itself, whatever meets it.
        precision = replace(precision, method="clipped")
    return METHODS[precision.method](run.source.table, precision, None)
