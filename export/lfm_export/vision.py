"""The vision encoder graph: SigLIP2 NaFlex patches → pixel unshuffle → projector → image tokens.

The cut is here because this part runs once an image and its output is all the decoder needs of it. Every tile may have
its own grid: a batch is padded to the longest with a mask, as the hub contract says; without padding no mask is built
and the cost follows the patches.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from lfm_runtime.formats.contract import BATCH, IMAGE_TOKENS, PATCHES

from lfm_export.builder import CONTRIB, GraphBuilder
from lfm_export.checkpoint.checkpoint import Checkpoint

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def build_vision_encoder(g: GraphBuilder, checkpoint: Checkpoint) -> None:
    """Add the whole encoder to `g`; weights stream through from the checkpoint."""
    config = checkpoint.config
    vision, hidden = config.vision, config.vision.hidden
    pixel_size = vision.patch * vision.patch * vision.channels
    pixels = g.input("pixel_values", FLOAT, [BATCH, PATCHES, pixel_size])
    mask = g.input("pixel_attention_mask", INT64, [BATCH, PATCHES])
    grids = g.input("spatial_shapes", INT64, [BATCH, 2])  # rows, cols of patches

    views = g.op("Shape", pixels, start=0, end=1)
    patches = g.op("Shape", pixels, start=1, end=2)
    heights, widths = g.ops("Split", 2, grids, axis=1, num_outputs=2)  # [views, 1] each

    x = _linear(
        g,
        checkpoint,
        g.op("Reshape", g.cast(pixels, g.float_type), [-1, pixel_size]),
        "vision.embeddings.patch_embedding",
        pixel_size,
        hidden,
    )
    x = g.op("Add", x, _positions(g, checkpoint, patches, heights, widths))  # [views·patches, hidden] from here on

    whole = g.op("Equal", g.op("ReduceMin", mask, keepdims=0), 1)  # no padding anywhere
    # What padding adds to the scores, [views, 1, 1, patches]: as onnxruntime's own mask, which WebGPU does not know.
    hidden_keys = g.op("Mul", g.op("Cast", g.op("Sub", mask, 1), to=int(FLOAT)), np.array(10000, np.float32))
    padding = g.op("Unsqueeze", g.cast(hidden_keys, g.float_type), [1, 2])
    spread = g.op("Concat", views, [1], patches, patches, axis=0)
    normed = _layer_norm(g, checkpoint, x, "vision.encoder.layers.0.layer_norm1", hidden)
    for i in range(vision.layers):
        place = f"vision.encoder.layers.{i}"
        attended = _attention(g, checkpoint, normed, f"{place}.self_attn", views, patches, whole, (padding, spread))
        normed, x = _add_and_norm(g, checkpoint, attended, x, f"{place}.layer_norm2", hidden)
        wide = _linear(g, checkpoint, normed, f"{place}.mlp.fc1", hidden, vision.feed_forward)
        wide = g.op("Gelu", wide, approximate="tanh")
        narrow = _linear(g, checkpoint, wide, f"{place}.mlp.fc2", vision.feed_forward, hidden)
        last = i + 1 == vision.layers
        after = "vision.post_layernorm" if last else f"vision.encoder.layers.{i + 1}.layer_norm1"
        normed, x = _add_and_norm(g, checkpoint, narrow, x, after, hidden)

    tokens = _pixel_unshuffle(g, normed, views, patches, heights, widths, hidden, config.projector.factor)
    features = _projector(g, checkpoint, tokens)
    g.output(g.cast(features, FLOAT), "image_features", FLOAT, [IMAGE_TOKENS, config.text.hidden])


def _linear(
    g: GraphBuilder, checkpoint: Checkpoint, x: ir.Value, place: str, inputs: int, outputs: int, bias: bool = True
) -> ir.Value:
    """x [rows, inputs] → [rows, outputs]. Gemm rather than MatMul and Add: one pass less over the activations."""
    weight = g.weight(
        f"{place}.weight", [inputs, outputs], lambda: checkpoint.read_transposed([f"{place}.weight"], [outputs], inputs)
    )
    if not bias:
        return g.op("MatMul", x, weight, name=place)
    return g.op(
        "Gemm",
        x,
        weight,
        g.weight(f"{place}.bias", [outputs], lambda: checkpoint.read(f"{place}.bias", outputs)),
        name=place,
    )


def _norm_weights(g: GraphBuilder, checkpoint: Checkpoint, place: str, width: int) -> tuple[ir.Value, ir.Value]:
    scale = g.weight(f"{place}.weight", [width], lambda: checkpoint.read(f"{place}.weight", width))
    return scale, g.weight(f"{place}.bias", [width], lambda: checkpoint.read(f"{place}.bias", width))


def _layer_norm(
    g: GraphBuilder, checkpoint: Checkpoint, x: ir.Value, place: str, width: int, eps: float | None = None
) -> ir.Value:
    scale, bias = _norm_weights(g, checkpoint, place, width)
    return g.op(
        "LayerNormalization", x, scale, bias, axis=-1, epsilon=eps or checkpoint.config.vision.norm_eps, name=place
    )


def _add_and_norm(
    g: GraphBuilder, checkpoint: Checkpoint, change: ir.Value, x: ir.Value, place: str, width: int
) -> tuple[ir.Value, ir.Value]:
    """(norm of x + change, x + change). SkipLayerNormalization does both in one node and takes twice as long on the
    CPU.
    """
    total = g.op("Add", x, change)
    return _layer_norm(g, checkpoint, total, place, width), total


def _positions(
    g: GraphBuilder, checkpoint: Checkpoint, patches: ir.Value, heights: ir.Value, widths: ir.Value
) -> ir.Value:
    """The position table resized to each view's grid: [views·patches, hidden].

    Bilinear with antialias, separable: position p of a side of n cells takes table entry j with the triangle weight
    max(0, 1 - |j + 0.5 - (p + 0.5)·s| / max(s, 1)), s = side / n, normalised: what torch's interpolate(antialias=True)
    does. Both axes' weights multiply to [patches, side²], one matrix product with the table: 0.2 % of the encoder's
    work.
    """
    side, hidden = checkpoint.config.vision.table_side, checkpoint.config.vision.hidden
    place = "vision.embeddings.position_embedding.weight"
    table = g.weight(place, [side * side, hidden], lambda: checkpoint.read(place, side * side, hidden))
    index = g.op("Unsqueeze", g.op("Range", 0, g.op("Squeeze", patches), 1), [0])  # [1, patches]
    rows = g.op("Min", g.op("Div", index, widths), g.op("Sub", heights, 1))  # padding repeats the last row: no 0/0
    columns = g.op("Mod", index, widths)

    def weights(position: ir.Value, length: ir.Value) -> ir.Value:
        """[views, patches, side] float32, rows sum to 1; computed in float32 also in fp16 graphs."""
        scale = g.op("Div", np.array(side, np.float32), g.op("Cast", length, to=int(FLOAT)))
        spread = g.op("Max", scale, np.array(1, np.float32))
        center = g.op("Mul", g.op("Add", g.op("Cast", position, to=int(FLOAT)), np.array(0.5, np.float32)), scale)
        distance = g.op("Sub", np.arange(side, dtype=np.float32) + np.float32(0.5), g.op("Unsqueeze", center, [2]))
        distance = g.op("Div", g.op("Abs", distance), g.op("Unsqueeze", spread, [2]))
        triangle = g.op("Relu", g.op("Sub", np.array(1, np.float32), distance))
        return g.op("Div", triangle, g.op("ReduceSum", triangle, [2], keepdims=1))

    by_row = g.op("Unsqueeze", weights(rows, heights), [3])
    by_column = g.op("Unsqueeze", weights(columns, widths), [2])
    both = g.op("Reshape", g.op("Mul", by_row, by_column), [-1, side * side])
    return g.op("MatMul", g.cast(both, g.float_type), table, name="vision.positions")


def _attention(
    g: GraphBuilder,
    checkpoint: Checkpoint,
    normed: ir.Value,
    place: str,
    views: ir.Value,
    patches: ir.Value,
    whole: ir.Value,
    padding: tuple[ir.Value, ir.Value],
) -> ir.Value:
    """Multi-head self-attention on [views·patches, hidden]. `padding`: what is added to the scores, and the shape that
    it is spread to; it costs only where there is padding.
    """
    vision = checkpoint.config.vision
    hidden, names = vision.hidden, [f"{place}.{p}_proj" for p in "qkv"]
    weight = g.weight(
        f"{place}.qkv.weight",
        [hidden, 3 * hidden],
        lambda: checkpoint.read_transposed([f"{n}.weight" for n in names], [hidden] * 3, hidden),
    )
    bias = g.weight(
        f"{place}.qkv.bias", [3 * hidden], lambda: np.concatenate([checkpoint.read(f"{n}.bias", hidden) for n in names])
    )
    packed = g.op("Gemm", normed, weight, bias, name=f"{place}.qkv")
    shape = g.op("Concat", views, patches, [-1], axis=0)
    packed = g.op("Reshape", packed, shape)  # [views, patches, 3·hidden]
    query, key, value = g.ops("Split", 3, packed, axis=2, num_outputs=3)

    def attend(name: str, *bias: ir.Value | None) -> ir.Value:
        return g.op("MultiHeadAttention", query, key, value, *bias, domain=CONTRIB, num_heads=vision.heads, name=name)

    def padded() -> ir.Value:
        return attend(f"{place}.attend_masked", None, None, g.op("Expand", *padding, name=f"{place}.padding"))

    attended = g.op(
        "If",
        whole,
        name=f"{place}.attention",
        then_branch=g.subgraph(f"{place}.whole", lambda: attend(f"{place}.attend")),
        else_branch=g.subgraph(f"{place}.padded", padded),
    )
    return _linear(g, checkpoint, g.op("Reshape", attended, [-1, hidden]), f"{place}.out_proj", hidden, hidden)


def _pixel_unshuffle(
    g: GraphBuilder,
    x: ir.Value,
    views: ir.Value,
    patches: ir.Value,
    heights: ir.Value,
    widths: ir.Value,
    hidden: int,
    factor: int,
) -> ir.Value:
    """[views·patches, hidden] → [image tokens, factor²·hidden], padding dropped.

    Token (r, c) of a view is its patches (factor·r + dr, factor·c + dc), dr major: gathered by row number, for all
    views at once, so that grids may differ.
    """
    token_columns = g.op("Div", widths, factor)
    counts = g.op("Mul", g.op("Div", heights, factor), token_columns)  # tokens of each view [views, 1]
    most = g.op("Div", patches, factor * factor)
    index = g.op("Unsqueeze", g.op("Range", 0, g.op("Squeeze", most), 1), [0])  # [1, most]
    row, column = g.op("Div", index, token_columns), g.op("Mod", index, token_columns)
    first = g.op("Add", g.op("Mul", g.op("Mul", row, widths), factor), g.op("Mul", column, factor))  # [views, most]
    view_start = g.op("Mul", g.op("Unsqueeze", g.op("Range", 0, g.op("Squeeze", views), 1), [1]), patches)
    inner = np.array([[dr, dc] for dr in range(factor) for dc in range(factor)], np.int64)
    offsets = g.op("Add", g.op("Mul", widths, inner[:, 0].copy()), inner[:, 1].copy())  # [views, factor²]
    rows = g.op("Add", g.op("Unsqueeze", g.op("Add", first, view_start), [2]), g.op("Unsqueeze", offsets, [1]))
    real = g.op("Reshape", g.op("Less", index, counts), [-1])
    rows = g.op("Compress", g.op("Reshape", rows, [-1, factor * factor]), real, axis=0)  # [tokens, factor²]
    return g.op("Reshape", g.op("Gather", x, rows, axis=0), [-1, factor * factor * hidden])


def _projector(g: GraphBuilder, checkpoint: Checkpoint, tokens: ir.Value) -> ir.Value:
    projector = checkpoint.config.projector
    width = checkpoint.config.vision.hidden * projector.factor**2
    if projector.layernorm:
        tokens = _layer_norm(g, checkpoint, tokens, "projector.layer_norm", width, eps=1e-5)  # torch's default
    wide = _linear(g, checkpoint, tokens, "projector.linear_1", width, projector.hidden, projector.bias)
    wide = g.op("Gelu", wide, approximate="none")
    return _linear(
        g, checkpoint, wide, "projector.linear_2", projector.hidden, checkpoint.config.text.hidden, projector.bias
    )
