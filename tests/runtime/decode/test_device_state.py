"""The decode loop of a device with memory of its own, in the CPU's memory: as the state in this process, bit for bit.

scripts/checks/check_second_device.py runs it on a device that really has its own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from lfm_runtime import Model
from lfm_runtime.bundle import Bundle
from lfm_runtime.conversation import Chat
from lfm_runtime.decode.context import Context
from lfm_runtime.decode.decoder import Decoder
from lfm_runtime.decode.device_state import DeviceState, OrtMemory
from lfm_runtime.decode.states import ConcatenatedState, SharedState
from lfm_runtime.formats.contract import DECODER, MANY_TOKENS, TOP_TOKENS

QUESTION = "What is in this image?"


def on_device(model: Model) -> Model:
    """The same model with the decode loop of a device; its memory is the CPU's."""
    model.decoder = device_decoder(model.decoder)
    return model


def device_decoder(plain: Decoder, *, fixed: bool = True) -> Decoder:
    return Decoder(lambda: replace(plain.load(), all_on_device=fixed), plain.path, memory=OrtMemory("cpu"))


@pytest.fixture(scope="module", params=["fp16", "int4-fp16"])
def pair(request, gpu_bundle) -> tuple[Decoder, Decoder]:
    model = Model.load(gpu_bundle, variant=request.param, threads=2)
    return model.decoder, device_decoder(model.decoder)


def ids(count: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(20, 300, count)]


def test_the_loop_of_a_device(pair) -> None:
    """Prompts in parts, tokens one by one, back to a mark, on from a copy in a larger state: as in this process's
    memory.
    """
    plain, other = pair
    a, b = plain.start(512), other.start(512)
    assert isinstance(a, SharedState)
    assert isinstance(b, DeviceState)
    embeds = plain.embed(ids(60))
    at = 0
    for count in (MANY_TOKENS + 20, 7, 1):
        np.testing.assert_array_equal(a.step(embeds[:, at : at + count]).copy(), b.step(embeds[:, at : at + count]))
        at += count
    marks = a.mark(), b.mark()

    def same(tokens: list[int]) -> None:
        for token in tokens:
            wanted, top = a.step_token(token).copy(), b.step_token(token)
            np.testing.assert_array_equal(top.whole(), wanted)
            assert len(top.ids) == TOP_TOKENS
            np.testing.assert_array_equal(top.logits, np.sort(wanted)[::-1][:TOP_TOKENS])
            np.testing.assert_array_equal(wanted[top.ids], top.logits)

    same(ids(9, 1))
    a.rewind(marks[0])
    b.rewind(marks[1])
    same(ids(5, 2))
    snapshots = a.snapshot(), b.snapshot()
    assert snapshots[0].length == snapshots[1].length == b.length
    for name, array in snapshots[0].values.items():
        np.testing.assert_array_equal(array, snapshots[1].values[name])
    a, b = plain.start(1100, snapshots[1]), other.start(1100, snapshots[0])  # beyond the smallest buffers
    same(ids(3, 3))
    np.testing.assert_array_equal(a.step(embeds[:, :20]).copy(), b.step(embeds[:, :20]))
    same(ids(2, 4))


def test_only_the_token_goes_in(pair, monkeypatch) -> None:
    """After the first token of an answer nothing is written but tokens, and nothing is read but the top."""
    _, other = pair
    state = other.start(512)
    state.step(other.embed(ids(20)))
    state.step_token(5)
    crossed = []
    for name in ("write", "read", "place"):
        was = getattr(OrtMemory, name)
        monkeypatch.setattr(
            OrtMemory,
            name,
            lambda self, *a, was=was, name=name: (
                crossed.append((name, np.size(a[-1]) if name != "read" else a[0].shape())),
                was(self, *a),
            )[1],
        )
    state.step_token(6)
    assert crossed == [("write", 1), ("read", [1, 1, TOP_TOKENS]), ("read", [1, 1, TOP_TOKENS])]


def test_buffers_serve_again(pair) -> None:
    """Answer after answer in the same buffers; what the one before left in them changes nothing."""
    plain, other = pair
    seen = set()
    for seed in range(4):
        state, wanted = other.start(512), plain.start(512)
        seen.add(id(state._buffers))
        for s in (state, wanted):
            s.step(plain.embed(ids(30 + seed, seed)))
        np.testing.assert_array_equal(state.step_token(seed).whole(), wanted.step_token(seed))
        del state, s
    assert len(seen) == 1
    many = [other.start(512) for _ in range(5)]
    del many
    assert len(other._loop._free) == 2
    assert other.start(100).capacity == 1024  # larger ones serve as well


def test_without_fixed_addresses(pair) -> None:
    """Where an operator is left to the CPU, inputs are bound anew at each step: the same again, and no step is
    captured.
    """
    plain, fixed = pair
    other = device_decoder(plain, fixed=False)
    a, b = other.start(512), fixed.start(512)
    assert (other._loop.is_fixed, fixed._loop.is_fixed) == (False, True)
    for state in (a, b):
        state.step(plain.embed(ids(20)))
    for token in ids(6, 5):
        np.testing.assert_array_equal(a.step_token(token).whole(), b.step_token(token).whole())
    graph_ids = [
        options.get_run_config_entry("gpu_graph_id") for _, options in (fixed._loop._look_up, *b._buffers._steps)
    ]
    assert len(set(graph_ids)) == 3
    assert not set(graph_ids) & {"-1", "0"}
    assert fixed.uncaptured.get_run_config_entry("gpu_graph_id") == "-1"


def test_a_decoder_without_the_outputs(demo_model) -> None:
    """fp32's, as any graph with attention in place: whole rows cross, and a mask for each token."""
    plain = demo_model.decoder
    other = device_decoder(plain, fixed=False)
    a, b = plain.start(512), other.start(512)
    for state in (a, b):
        state.step(plain.embed(ids(20)))
    for token in ids(5, 1):
        np.testing.assert_array_equal(a.step_token(token).copy(), b.step_token(token))
    assert not other.verifies


@pytest.mark.parametrize("variant", ["fp16", "int4-fp16"])
@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0},
        {"temperature": 1.5, "min_p": 0.02, "seed": 7},
        {"temperature": 2.0, "top_p": 0.7, "min_p": 0, "seed": 1},
    ],
)
def test_answers_of_a_device(gpu_bundle, photo, variant, how) -> None:
    """The same words, greedy and drawn, with an image, in a conversation, and from a cache."""
    load = {"variant": variant, "threads": 2, "max_image_tokens": 64, "do_image_splitting": False, "cache_mib": 64}
    said = []
    for model in (Model.load(gpu_bundle, **load), on_device(Model.load(gpu_bundle, **load))):
        chat = Chat(model)
        texts = [
            chat.ask(q, i, max_new_tokens=12, **how).text()
            for q, i in ((QUESTION, [photo]), ("What colour is it?", []))
        ]
        again = model.answer([photo], QUESTION, max_new_tokens=12, **how)
        said.append([*texts, again.text()])
        assert again.report.cached_tokens > 50
    assert said[0] == said[1]


def test_a_fork_on_a_device(gpu_bundle) -> None:
    model = on_device(Model.load(gpu_bundle, variant="fp16", threads=2))
    context = Context(model.decoder)
    context.resume(context.find(np.array(ids(8))), np.array(ids(8)), 64)
    context.feed(model.decoder.embed(ids(8)), np.array(ids(8)))
    other = context.fork()
    np.testing.assert_array_equal(context.feed_token(5).whole(), other.feed_token(5).whole())
    assert context.length == other.length == 9


def test_room_is_not_beyond_the_positions(gpu_bundle) -> None:
    """Buffers double from 1,024 tokens on, but a mask longer than there are positions is refused by attention."""
    model = Model.load(gpu_bundle, variant="fp16", threads=1)
    for longest, wanted in ((0, 1024), (300, 300), (4096, 1024)):
        decoder = Decoder(model.decoder.load, model.decoder.path, memory=OrtMemory("cpu"), longest=longest)
        context = Context(decoder)
        context.resume(context.find(np.array(ids(8))), np.array(ids(8)), 200)
        assert context._state.capacity == wanted


def test_a_decoder_with_other_edges_copies_its_past(gpu_bundle, tmp_path) -> None:
    """As the hub's fp16 ones have, embeddings and logits in fp16: the plain form, on any device, with the same words."""
    import onnx

    path = Bundle.open(gpu_bundle).graphs("fp16")[1][DECODER.stem]
    model = onnx.load(str(path))
    graph = model.graph
    for name, values in (("inputs_embeds", graph.input), ("logits", graph.output)):
        next(v for v in values if v.name == name).type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    cast_in, cast_out = (
        next(n for n in graph.node if n.op_type == "Cast" and e in (*n.input, *n.output))
        for e in ("inputs_embeds", "logits")
    )
    cast_out.attribute[0].i = cast_in.attribute[0].i = onnx.TensorProto.FLOAT16
    top = next(n for n in graph.node if n.op_type == "TopK")
    graph.node.remove(top)
    for name in ("top_logits", "top_ids"):
        graph.output.remove(next(o for o in graph.output if o.name == name))
    onnx.save(model, tmp_path / "decoder.onnx")
    plain = Model.load(gpu_bundle, variant="fp16", threads=1).decoder
    sessions_ = replace(plain.load(), decoder=ort.InferenceSession(str(tmp_path / "decoder.onnx")))
    other = Decoder(lambda: sessions_, tmp_path / "decoder.onnx", memory=OrtMemory("cpu"))
    state, wanted = other.start(64), plain.start(64)
    assert isinstance(state, ConcatenatedState)
    embeds = plain.embed(ids(20))
    np.testing.assert_allclose(state.step(embeds), wanted.step(embeds), atol=0.05)
    np.testing.assert_allclose(state.step_token(5), wanted.step_token(5), atol=0.05)
