"""int8 and int4: weights become integers, block by block; each block sees what the quantized ones before it give."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, VISION_ENCODER

from lfm_quantize.calibrate.block import Change, quantize_block
from lfm_quantize.calibrate.blocks import blocks_of
from lfm_quantize.calibrate.trail import Graphs, Trail, into_encoder
from lfm_quantize.graph import POSITION_TABLE, linears, release
from lfm_quantize.passes.constants import StoredAsHalf
from lfm_quantize.passes.gates import Gates
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.passes.table import QuantizedTable
from lfm_quantize.recipe import Recipe, matching
from lfm_quantize.rounding import COMPENSATING, METHODS, Rounded
from lfm_quantize.run import Made, Run
from lfm_quantize.search import check_reachable, choose, room_for_padding, survey
from lfm_quantize.variant import NewGraph, VariantGraphs


def as_integers(run: Run) -> Made:
    """Every product rounded as the recipe says."""
    source = run.source
    recipe = _search(run) if run.settings.searches() else run.recipe
    assert recipe is not None  # a run that rounds has one
    # Vision, then the table, then the decoder, whose samples are fed what the first two give.
    graphs = Graphs.of(source)
    trail = into_encoder(run.cluster, run.bundle, run.settings.variant, graphs, run.samples, run.settings.threads)
    vision, trail = _through_blocks(run, recipe, graphs.vision, trail)
    table = _round_table(run, recipe)
    trail = trail.into_decoder(len(run.samples), table, run.bundle.prompts.image_id)
    decoder, _ = _through_blocks(run, recipe, graphs.decoder, trail, table if source.tied else None)
    encoder = rewritten(source.vision, *vision.passes(tied=False))
    if any(recipe.precision(name).bits < 32 for name in linears(source.vision)):
        encoder = rewritten(encoder, StoredAsHalf(POSITION_TABLE))
    made: VariantGraphs = {
        VISION_ENCODER.stem: NewGraph(encoder),
        EMBED_TOKENS.stem: NewGraph(rewritten(source.embed, QuantizedTable(table)) if table else source.embed),
        DECODER.stem: NewGraph(rewritten(source.decoder, *decoder.passes(tied=source.tied), Gates())),
    }
    layers = [*vision.layers, *decoder.layers]
    return Made(made, {"recipe": recipe.to_list(), "layers": layers, "attentions": vision.attentions}, recipe)


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


def _through_blocks(
    run: Run, recipe: Recipe, model: ir.Model, trail: Trail, table: Rounded | None = None
) -> tuple[Change, Trail]:
    """Quantize block after block, each on the inputs that the quantized blocks before it produce; also the samples
    behind the last one. `table`: the embedding table rounded, where the head is tied to it.
    """
    blocks = blocks_of(model)
    total = Change()
    for i, block in enumerate(blocks):
        change = run.work.load(block.name)
        if change is None:
            change = run.work.save(block.name, quantize_block(model, block, trail, recipe, table))
        if block.name != "head":  # nobody reads the logits of every position, and they are large
            trail = trail.advance(block, change.passes(tied=False))
        change.release()
        release(model)
        total.add(change)
        run.progress(f"quantizes {model.graph.name}", i + 1, len(blocks))
    return total, trail


def _round_table(run: Run, recipe: Recipe) -> Rounded | None:
    """The embedding table at the head's precision; None where that stays fp32."""
    precision = recipe.precision("head")
    if precision.bits == 32:
        return None
    if precision.method in COMPENSATING:
        # Both a look-up and a product read it: each row is to be near itself, whatever meets it.
        precision = replace(precision, method="clipped")
    return METHODS[precision.method](run.source.table, precision, None)
