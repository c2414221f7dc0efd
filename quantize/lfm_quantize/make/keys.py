"""int8-kv8 and int4-kv8: another decoder over a variant's files, with keys and values in 8 bits."""

from __future__ import annotations

import numpy as np
from lfm_profiles import VARIANTS
from lfm_runtime.formats.contract import DECODER, present_name
from numpy.typing import NDArray

from lfm_quantize.calibrate.blocks import FedGraph, Values, blocks_of, prompt_feeds
from lfm_quantize.graph import nodes_between, open_graph
from lfm_quantize.passes.kv import Int8KeysAndValues
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.passes.positions import AllPositions
from lfm_quantize.run import Made, Run
from lfm_quantize.variant import NewGraph

Float = NDArray[np.float32]


def with_int8_keys(run: Run) -> Made:
    """Another variant's graphs, its decoder with int8 keys and values. Ranges are those of the fp32 decoder, so that
    they are the same over every base.
    """
    base = VARIANTS[run.settings.variant].float_keys
    kinds = run.image_positions()
    decoder = rewritten(run.source.decoder, AllPositions())
    features = run.exact.features([s.views for s in run.samples])
    feeds = prompt_feeds(decoder, run.samples, kinds, run.source.table, features)
    largest = largest_states(FedGraph(decoder, feeds, kinds, run.settings.threads))
    files = run.files(base)
    model = open_graph(run.bundle.folder / str(files[DECODER.stem]))
    quantized = NewGraph(rewritten(model, Int8KeysAndValues(largest)), over=True)
    return Made({**files, DECODER.stem: quantized}, {"base": base})


def largest_states(fed: FedGraph) -> dict[str, Float]:
    """Past input of an attention layer → largest magnitude of each channel [kv heads, head dim] over all samples,
    rotated as it is kept.
    """
    pasts = [str(v.name) for v in fed.model.graph.inputs if str(v.name).startswith("past_key_values.")]
    presents = {present_name(name): name for name in pasts}
    found: dict[str, Float] = {}

    def seen(_: int, values: Values) -> None:
        for present, past in presents.items():
            if present in values:
                most = np.abs(values[present]).max((0, 2))
                found[past] = np.maximum(found.get(past, 0), most)

    states = fed.start()
    for block in blocks_of(fed.model):
        if block.name == "head":
            break
        inside = nodes_between(fed.model, block.outputs, block.cut)
        taps = [str(v.name) for n in inside for v in n.outputs if v.name in presents]
        states = fed.run(block, states, taps, seen)
        fed.release()
    return found
