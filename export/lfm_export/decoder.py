"""The decoder graph and the token embedding graph.

The decoder takes embeddings, not ids, because image features and token embeddings meet there. Prefill and decoding are
one
graph: S new tokens after P past ones, state in as inputs, state out as outputs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from lfm_runtime.formats.contract import (
    BATCH,
    CONV_INPUT,
    MANY_TOKENS,
    MAX_CONTEXT,
    NEXT_MASK,
    PAST,
    POSITIONS,
    TOKENS,
    TOP_IDS,
    TOP_LOGITS,
    TOP_TOKENS,
    TOTAL,
    past_names,
    present_name,
)

from lfm_export.builder import CONTRIB, GraphBuilder
from lfm_export.checkpoint.checkpoint import Checkpoint
from lfm_export.checkpoint.config import TextConfig
from lfm_export.functions import CONVOLUTION, HEAD_NORM, convolution, head_norm

FLOAT, INT64, INT32 = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32


def context_length(text: TextConfig) -> int:
    """Return how many tokens the exported decoder has rotary tables for."""
    return min(text.max_positions, MAX_CONTEXT)


def build_embed_tokens(g: GraphBuilder, checkpoint: Checkpoint) -> ir.Value:
    """ids → embeddings; returns the table, which a tied head shares."""
    text = checkpoint.config.text
    place, shape = "text.embed_tokens.weight", [text.vocabulary, text.hidden]
    ids = g.input("input_ids", INT64, [BATCH, TOKENS])
    table = g.weight(place, shape, lambda: checkpoint.chunks(place, *shape))
    embeds = g.op("Gather", table, ids, axis=0, name="text.embed_tokens")
    g.output(g.cast(embeds, FLOAT), "inputs_embeds", FLOAT, [BATCH, TOKENS, text.hidden])
    return table


def build_decoder(g: GraphBuilder, checkpoint: Checkpoint, head_table: ir.ExternalTensor | None) -> None:
    """`head_table`: the embedding table's place when the head is tied to it and lies in a data file."""
    text = checkpoint.config.text
    embeds = g.input("inputs_embeds", FLOAT, [BATCH, TOKENS, text.hidden])
    mask = g.input("attention_mask", INT64, [BATCH, TOTAL])
    past = {name: g.input(name, g.float_type, _state_shape(name, text, PAST)) for name in past_names(text.layers)}

    # GroupQueryAttention counts: index of the last token of each row, and the total length.
    tokens = g.op("ReduceSum", mask if g.dtype == "fp32" else g.op("Cast", mask, to=int(FLOAT)), [1], keepdims=0)
    if g.dtype == "fp16":  # on a GPU; there sums of whole numbers need cuDNN
        tokens = g.op("Cast", tokens, to=int(INT64))
    last_index = g.op("Cast", g.op("Sub", tokens, 1), to=int(INT32))
    total = g.op("Cast", g.op("Shape", mask, start=1, end=2), to=int(INT32))
    rotary = _rotary_tables(g, text)
    read_from = _read_from(g, embeds)
    read: dict[str, ir.Value] = {}
    g.brings(convolution(text.kernel, bias=text.conv_bias))
    g.brings(head_norm(text.head_dim))

    x = g.cast(embeds, g.float_type)
    normed = _rms_norm(g, checkpoint, x, "text.layers.0.operator_norm")
    for i, kind in enumerate(text.layers):
        place = f"text.layers.{i}"
        if kind == "conv":
            mixed, state, read[f"{CONV_INPUT}{i}"] = _short_conv(
                g, checkpoint, normed, past[f"past_conv.{i}"], f"{place}.conv"
            )
            states = {f"past_conv.{i}": state}
        else:
            names = (f"past_key_values.{i}.key", f"past_key_values.{i}.value")
            mixed, *kv = _attention(
                g, checkpoint, normed, [past[n] for n in names], last_index, total, rotary, f"{place}.self_attn"
            )
            states = dict(zip(names, kv, strict=True))
        for name, state in states.items():
            g.output(state, present_name(name), g.float_type, _state_shape(name, text, TOTAL))
        if i + 1 == len(text.layers):  # beyond the last layer's state, only positions whose logits are wanted are read
            parts = {"text.read.mixed": mixed, "text.read.residual": x}
            mixed, x = (
                g.op("Slice", v, read_from, [np.iinfo(np.int64).max], [1], name=name) for name, v in parts.items()
            )
        normed, x = _add_and_norm(g, checkpoint, mixed, x, f"{place}.ffn_norm")
        change = _feed_forward(g, checkpoint, normed, f"{place}.feed_forward")
        after = f"text.layers.{i + 1}.operator_norm" if i + 1 < len(text.layers) else "text.embedding_norm"
        normed, x = _add_and_norm(g, checkpoint, change, x, after)

    logits = _head(g, checkpoint, normed, embeds, head_table)
    g.output(logits, "logits", FLOAT, [BATCH, POSITIONS, text.vocabulary])
    g.outputs.insert(0, g.outputs.pop())  # logits first, those last: the model card takes outputs by position
    for name, product in read.items():
        g.output(product, name, g.float_type, [BATCH, TOKENS, text.hidden])
    if g.dtype == "fp16":
        _stay_on_device(g, logits, mask, text.vocabulary)


def _stay_on_device(g: GraphBuilder, logits: ir.Value, mask: ir.Value, vocabulary: int) -> None:
    """For GPUs: the likeliest tokens, and the mask with one token more, which is itself moved by one (padding is on the
    right).
    """
    count = min(TOP_TOKENS, vocabulary)
    values, ids = g.ops("TopK", 2, logits, [count], name="gpu.likeliest")
    there, before = g.op("Slice", mask, [0], [1], [1]), g.op("Slice", mask, [0], [-1], [1])
    g.output(values, TOP_LOGITS, FLOAT, [BATCH, POSITIONS, count])
    g.output(ids, TOP_IDS, INT64, [BATCH, POSITIONS, count])
    g.output(g.op("Concat", there, before, axis=1), NEXT_MASK, INT64, [BATCH, TOTAL])


def _read_from(g: GraphBuilder, embeds: ir.Value) -> ir.Value:
    """Where the positions begin whose logits are wanted, counted from the end [1]: all of a step of a few tokens, which
    may be guesses to be verified; the last alone of a prompt, whose logits would be 262 KB a token.
    """
    few = g.op("Less", g.op("Shape", embeds, start=1, end=2), [MANY_TOKENS])
    return g.op("Where", few, [-MANY_TOKENS], [-1])  # Slice begins at the first where there are fewer


def _state_shape(name: str, text: TextConfig, length: str) -> list[int | str]:
    if name.startswith("past_conv."):
        return [BATCH, text.hidden, text.kernel]
    return [BATCH, text.kv_heads, length, text.head_dim]


def _rms_norm(g: GraphBuilder, checkpoint: Checkpoint, x: ir.Value, place: str) -> ir.Value:
    text = checkpoint.config.text
    scale = g.weight(f"{place}.weight", [text.hidden], lambda: checkpoint.read(f"{place}.weight", text.hidden))
    return g.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=text.norm_eps, name=place)


def _add_and_norm(
    g: GraphBuilder, checkpoint: Checkpoint, change: ir.Value, x: ir.Value, place: str
) -> tuple[ir.Value, ir.Value]:
    """(norm of x + change, x + change) in one pass."""
    text = checkpoint.config.text
    scale = g.weight(f"{place}.weight", [text.hidden], lambda: checkpoint.read(f"{place}.weight", text.hidden))
    normed, _, _, total = g.ops(
        "SkipSimplifiedLayerNormalization", 4, change, x, scale, domain=CONTRIB, epsilon=text.norm_eps, name=place
    )
    return normed, total


def _linear(
    g: GraphBuilder,
    checkpoint: Checkpoint,
    x: ir.Value,
    places: list[str],
    rows: list[int],
    columns: int,
    name: str,
    bias: bool = False,
) -> ir.Value:
    """One matrix product for linear layers that read the same input; outputs side by side."""
    weight = g.weight(
        f"{name}.weight",
        [columns, sum(rows)],
        lambda: checkpoint.read_transposed([f"{p}.weight" for p in places], rows, columns),
    )
    y = g.op("MatMul", x, weight, name=name)
    if not bias:
        return y
    biases = g.weight(
        f"{name}.bias",
        [sum(rows)],
        lambda: np.concatenate([checkpoint.read(f"{p}.bias", n) for p, n in zip(places, rows, strict=True)]),
    )
    return g.op("Add", y, biases)


def _short_conv(
    g: GraphBuilder, checkpoint: Checkpoint, x: ir.Value, past: ir.Value, place: str
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Gated depthwise causal convolution: out_proj(C · conv(B · x)). Returns (output, state [batch, H, kernel], what
    the convolution read of these tokens [batch, tokens, H]).

    The state holds the convolution's last `kernel` inputs, channels first (the hub's shape). Its oldest entry has no
    effect: kernel - 1 past inputs suffice.
    """
    text = checkpoint.config.text
    hidden, kernel = text.hidden, text.kernel
    projected = _linear(
        g, checkpoint, x, [f"{place}.in_proj"], [3 * hidden], hidden, f"{place}.in_proj", text.conv_bias
    )
    b, c, signal = g.ops("Split", 3, projected, axis=2, num_outputs=3)
    read = g.op("Mul", b, signal)
    taps = g.weight(
        f"{place}.conv.weight",
        [hidden, 1, 1 + kernel],
        lambda: np.pad(checkpoint.read(f"{place}.conv.weight", hidden, 1, kernel), ((0, 0), (0, 0), (1, 0))),
    )
    bias = None
    if text.conv_bias:
        bias = g.weight(f"{place}.conv.bias", [hidden], lambda: checkpoint.read(f"{place}.conv.bias", hidden))
    channels = g.op("Transpose", read, perm=[0, 2, 1])
    convolved, state = g.ops(CONVOLUTION, 2, channels, taps, bias, past, domain=CONTRIB, name=f"{place}.conv")
    gated = g.op("Mul", c, g.op("Transpose", convolved, perm=[0, 2, 1]))
    out = _linear(g, checkpoint, gated, [f"{place}.out_proj"], [hidden], hidden, f"{place}.out_proj", text.conv_bias)
    return out, state, read


def _attention(
    g: GraphBuilder,
    checkpoint: Checkpoint,
    x: ir.Value,
    past: list[ir.Value],
    last_index: ir.Value,
    total: ir.Value,
    rotary: tuple[ir.Value, ir.Value],
    place: str,
) -> list[ir.Value]:
    """Grouped-query attention with RMSNorm on every query and key head. Returns [output, key state, value state].

    The norms stay nodes of their own: GroupQueryAttention's q_norm_weight has no CPU kernel (onnxruntime 1.32).
    """
    text = checkpoint.config.text
    d, rows = text.head_dim, [text.heads * text.head_dim, text.kv_heads * text.head_dim, text.kv_heads * text.head_dim]
    names = [f"{place}.{p}_proj" for p in "qkv"]
    packed = _linear(g, checkpoint, x, names, rows, text.hidden, f"{place}.qkv_proj")
    query, key, value = g.ops("Split", 3, packed, np.array(rows, np.int64), axis=2)

    def norm(heads: ir.Value, count: int, name: str) -> ir.Value:
        label = f"{place}.{name}_layernorm"
        scale = g.weight(f"{label}.weight", [d], lambda: checkpoint.read(f"{label}.weight", d))
        return g.op(HEAD_NORM, heads, scale, domain=CONTRIB, num_branches=count, epsilon=text.norm_eps, name=label)

    attended, key_state, value_state = g.ops(
        "GroupQueryAttention",
        3,
        norm(query, text.heads, "q"),
        norm(key, text.kv_heads, "k"),
        value,
        *past,
        last_index,
        total,
        *rotary,
        domain=CONTRIB,
        num_heads=text.heads,
        kv_num_heads=text.kv_heads,
        do_rotary=1,
        rotary_interleaved=0,
        name=place,
    )
    out = _linear(g, checkpoint, attended, [f"{place}.out_proj"], [text.hidden], rows[0], f"{place}.out_proj")
    return [out, key_state, value_state]


def _rotary_tables(g: GraphBuilder, text: TextConfig) -> tuple[ir.Value, ir.Value]:
    """cos and sin [context, head dim / 2], in float32 arithmetic as transformers computes them.

    Computed from constants, so onnxruntime folds them into tables when it loads the graph (27 ms for 32,768 positions
    on a server core): 8 MB less in every decoder file of the 450M.
    """
    exponents = np.arange(0, text.head_dim, 2, dtype=np.float32) / text.head_dim
    inverse = (np.float32(1) / np.float32(text.rope_theta) ** exponents).astype(np.float32)
    positions = g.op("Unsqueeze", g.op("Cast", g.op("Range", 0, context_length(text), 1), to=int(FLOAT)), [1])
    angles = g.op("Mul", positions, g.constant(inverse[None], "rotary.inverse_frequencies"))
    return g.cast(g.op("Cos", angles), g.float_type), g.cast(g.op("Sin", angles), g.float_type)


def _feed_forward(g: GraphBuilder, checkpoint: Checkpoint, x: ir.Value, place: str) -> ir.Value:
    """SwiGLU: w2(silu(w1 x) · w3 x), w1 and w3 in one product."""
    text = checkpoint.config.text
    width = text.feed_forward
    both = _linear(g, checkpoint, x, [f"{place}.w1", f"{place}.w3"], [width, width], text.hidden, f"{place}.w1_w3")
    gate, up = g.ops("Split", 2, both, axis=2, num_outputs=2)
    active = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
    return _linear(g, checkpoint, active, [f"{place}.w2"], [text.hidden], width, f"{place}.w2")


def _head(
    g: GraphBuilder, checkpoint: Checkpoint, normed: ir.Value, embeds: ir.Value, table: ir.ExternalTensor | None
) -> ir.Value:
    """normed [batch, positions, H] → logits float32 [batch, positions, V]. Gemm reads the table as it is stored, [V,
    H].
    """
    text = checkpoint.config.text
    shape = [text.vocabulary, text.hidden]
    place = "text.embed_tokens.weight" if text.tied_head else "head"
    if table is not None and text.tied_head:
        weight = g.shared_weight("head.weight", shape, table)
    else:
        weight = g.weight("head.weight", shape, lambda: checkpoint.chunks(place, *shape))
    logits = g.op("Gemm", g.op("Reshape", normed, [-1, text.hidden]), weight, transB=1, name="head")
    batch = g.op("Shape", embeds, start=0, end=1)
    return g.op("Reshape", g.cast(logits, FLOAT), g.op("Concat", batch, [-1, text.vocabulary], axis=0))
