"""fp16, and what GPUs want beside it: int4's weights with fp16 activations, fp16's encoder in standard operators."""

from __future__ import annotations

from lfm_profiles import VARIANTS
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, VISION_ENCODER
from lfm_runtime.formats.manifest import Manifest

from lfm_quantize.calibrate.blocks import FedGraph, prompt_feeds
from lfm_quantize.calibrate.overflow import overflowing
from lfm_quantize.graph import QuantizeError, open_graph
from lfm_quantize.passes.biases import FusedBiases
from lfm_quantize.passes.half import Half
from lfm_quantize.passes.likeliest import Likeliest
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.passes.standard import StandardOperators
from lfm_quantize.recipe import matching
from lfm_quantize.run import Made, Run
from lfm_quantize.variant import NewGraph, VariantGraphs

_FED_WITH_FP32 = ("DynamicQuantizeMatMul", "DynamicQuantizeLinear", "MatMulIntegerToFloat")


def as_fp16(run: Run) -> Made:
    """fp16, but for nodes whose values would overflow on the calibration images, or that the user keeps."""
    source, samples, threads = run.source, run.samples, run.settings.threads
    kinds = run.image_positions()
    views = [sample.views[0] for sample in samples]
    features = run.exact.features([[view] for view in views]) if samples else []
    models = {VISION_ENCODER.stem: source.vision, EMBED_TOKENS.stem: source.embed, DECODER.stem: source.decoder}
    feeds = {
        VISION_ENCODER.stem: [view.feeds() for view in views],
        EMBED_TOKENS.stem: [],
        DECODER.stem: prompt_feeds(source.decoder, samples, kinds, source.table, features),
    }
    stay = set(matching(run.settings.keep, [str(n.name) for model in models.values() for n in model.graph]))
    for stem, model in models.items():
        stay.update(overflowing(FedGraph(model, feeds[stem], kinds, threads)))
    graphs = {
        VISION_ENCODER.stem: NewGraph(rewritten(source.vision, Half(stay), FusedBiases())),
        EMBED_TOKENS.stem: NewGraph(rewritten(source.embed, Half(stay))),
        DECODER.stem: NewGraph(rewritten(source.decoder, Half(stay), Likeliest())),
    }
    return Made(dict(graphs), {"kept_fp32": sorted(stay)})


def over_int4(run: Run) -> Made:
    """int4's weights with fp16 activations: another decoder graph over int4's file, beside fp16's encoder."""
    int4, fp16 = run.files("int4"), run.files("fp16")
    model = open_graph(run.bundle.folder / str(int4[DECODER.stem]))
    if mixed := [str(n.name) for n in model.graph if n.op_type in _FED_WITH_FP32]:
        raise QuantizeError(
            f"int4 has layers in 8 bits, such as {mixed[0]}, whose products take no fp16: a recipe or --max-size chose "
            "them; quantize int4 again without, then int4-fp16"
        )
    kept = set(Manifest.of(run.bundle.folder).quantization.get("fp16", {}).get("kept_fp32", []))
    names = [str(n.name) for n in model.graph]
    stay = [name for name in names if kept.intersection((name, name.removesuffix(".matmul")))]
    decoder = NewGraph(rewritten(model, Half(stay), Likeliest()), over=True)
    graphs: VariantGraphs = {**fp16, EMBED_TOKENS.stem: int4[EMBED_TOKENS.stem], DECODER.stem: decoder}
    return Made(graphs, {"base": list(VARIANTS[run.settings.variant].bases)})


def for_tensorrt(run: Run) -> Made:
    """fp16 with an encoder in standard operators, over fp16's file."""
    files = run.files("fp16")
    model = open_graph(run.bundle.folder / str(files[VISION_ENCODER.stem]))
    encoder = NewGraph(rewritten(model, StandardOperators()), over=True)
    return Made({**files, VISION_ENCODER.stem: encoder}, {"base": list(VARIANTS[run.settings.variant].bases)})
