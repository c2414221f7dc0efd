"""Time foreseen on boards: counts against the graphs themselves, ranges against what is published."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from lfm_profiles import ProfileError, read
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.formats.contract import DECODER, VISION_ENCODER
from lfm_runtime.formats.files import read_json_object
from lfm_runtime.formats.onnx_file import node_count
from lfm_runtime.setup.forecast import Memory
from lfm_runtime.setup.roofline import Vision, products_ms, reading_ms, text_weights

LFM2_350M = ("conv", "conv", "full_attention") * 3 + ("conv", "full_attention") * 3 + ("conv",)


def weights_in(path) -> dict[str, int]:
    """Elements of each product's weight, by node name."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(path), load_external_data=False).graph
    sizes = {t.name: t.dims for t in graph.initializer}
    products = [n for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in sizes]
    return {n.name: sizes[n.input[1]][0] * sizes[n.input[1]][1] for n in products}


def test_counts_are_those_of_the_graphs(demo_bundle) -> None:
    bundle = Bundle.open(demo_bundle)
    paths = bundle.graphs("fp32")[1]
    decoder = weights_in(paths[DECODER.stem])
    assert text_weights(bundle.facts) == sum(size for name, size in decoder.items() if name != "head")
    vision = Vision.of(read_json_object(demo_bundle / "config.json", ValueError))
    encoder = weights_in(paths[VISION_ENCODER.stem])
    tower = sum(size for name, size in encoder.items() if name.startswith("vision.") and name != "vision.positions")
    projector = sum(size for name, size in encoder.items() if name.startswith("projector."))
    assert vision.products(64, bundle.facts.hidden) == 2 * (64 * tower + 64 / vision.factor**2 * projector)


def test_what_is_published_for_a_pi_5_is_inside_the_range(demo_bundle) -> None:
    """LFM2.5-350M int8: 200 tok/s of a prompt and 30 tok/s; LFM2.5-230M 42 tok/s. No range is wider than two."""
    facts = replace(
        Bundle.open(demo_bundle).facts, layers=LFM2_350M, hidden=1024, kv_heads=8, head_dim=64, feed_forward=4608
    )
    board, weights, head = read("pi5").board, text_weights(facts), 1024 * 65536
    assert weights + head == pytest.approx(354.5e6, rel=0.01)
    prompt = products_ms(2.0 * weights, "int8", board)
    assert prompt.least <= 1e3 / 200 <= prompt.most == pytest.approx(2 * prompt.least)
    for size, rate in ((weights + head, 30), (230e6, 42)):
        token = reading_ms(size, board)
        assert token.least <= 1e3 / rate <= token.most == pytest.approx(2 * token.least)


def test_4_bit_weights_take_what_their_counted_instructions_say() -> None:
    """docs/log/2026-11-28.md, millions: on a Cortex-A76 941 for a prompt of 32 tokens, in int8 937; on a Cortex-A72, which
    begins three a cycle at most, 3,499, in int8 2,279, and 873 for a token.
    """
    pi5, pi4, all_weights = read("pi5").board, read("pi4").board, 2.0 * 354.5e6
    prompts = {board: [products_ms(1e12, n, board).most for n in ("int4", "int8")] for board in (pi5, pi4)}
    assert prompts[pi5][0] / prompts[pi5][1] == pytest.approx(941 / 937, rel=0.1)
    assert prompts[pi4][0] / prompts[pi4][1] == pytest.approx(3499 / 2279, rel=0.15)
    token = products_ms(all_weights, "int4", pi4, "token")
    assert token.least > 873e6 / 3 / (4 * 1.5e9) * 1e3
    assert products_ms(all_weights, "int4", pi5, "token").most < token.least


def test_a_small_model_is_not_foreseen_faster_than_its_nodes(demo_bundle, photo, capsys, monkeypatch) -> None:
    """The demo's weights are read in less time than its operators are called."""
    monkeypatch.setattr(Memory, "of_this_process", staticmethod(lambda: Memory(40.0, 27.0)))  # other tests' is larger
    onnx = pytest.importorskip("onnx")
    path = Bundle.open(demo_bundle).graphs("fp32")[1][DECODER.stem]
    nodes = len(onnx.load(str(path), load_external_data=False).graph.node)
    assert nodes == node_count(path)
    words = ["plan", str(demo_bundle), str(photo), "--variant", "fp32", "--json", "--profile"]
    tokens = []
    for name in ("pi5", "pi3"):
        assert main([*words, name]) == 0
        tokens.append(json.loads(capsys.readouterr().out)["foreseen_ms"]["per_token"])
    assert tokens[0][0] >= nodes * 0.002
    assert tokens[1][0] > 2 * tokens[0][0], "a slower core calls more slowly"


def test_plan_says_it_is_foreseen(demo_bundle, photo, capsys) -> None:
    assert main(["plan", str(demo_bundle), str(photo), "--profile", "pi5"]) == 0
    said = capsys.readouterr().out
    assert "foreseen" in said
    assert "counted, not measured" in said
    assert main(["plan", str(demo_bundle), str(photo), "--profile", "pi5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["foreseen_ms"]["vision"][0] < found["foreseen_ms"]["vision"][1]
    assert main(["plan", str(demo_bundle), str(photo), "--profile", "generic"]) == 0
    assert "foreseen" not in capsys.readouterr().out


def test_every_board_tells_its_source_and_small_ones_inherit_it() -> None:
    assert read("pi5-2gb").board == read("pi5").board
    for name in ("pi-zero2w", "pi3", "pi4", "pi4-1gb", "pi5", "jetson-orin-cpu"):
        assert read(name).board.source


@pytest.mark.parametrize("line", ["int8_gops = 0", 'read_gb_s = "fast"', 'source = ""', "tops = 40"])
def test_impossible_boards(tmp_path, line) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"[board]\n{line}\n")
    with pytest.raises(ProfileError, match=r"mine\.toml.*2"):
        read(str(path))
