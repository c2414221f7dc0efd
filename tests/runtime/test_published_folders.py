"""ONNX folders as others publish them: each convention on the demo model's own graphs, with the answers that it gives.

The graphs are changed with the onnx package; nothing of lfm-edge writes them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundles import cached
from lfm_runtime import Model
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import BundleError

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

VISION, EMBED, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
QUESTIONS = ("What is in this image?", "How many shapes?")
INT32, BOOL, FP16, INT64, FP32 = (
    TensorProto.INT32,
    TensorProto.BOOL,
    TensorProto.FLOAT16,
    TensorProto.INT64,
    TensorProto.FLOAT,
)


class Folder:
    """A folder as a hub repository: the bundle's files without what is lfm-edge's own."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.path, self.onnx = folder, folder / "onnx"
        shutil.copytree(bundle, folder)
        for name in ("manifest.json", "prompt.json"):
            (folder / name).unlink()

    def change(self, stem: str, change: Callable[[onnx.ModelProto], None]) -> None:
        """Rewrite one graph, its weights in a file of its own: the table's is the decoder's head as well."""
        file = self.onnx / f"{stem}.onnx"
        model = onnx.load(file)
        change(model)
        file.unlink()
        (self.onnx / f"{stem}.own_data").unlink(missing_ok=True)
        onnx.save(model, file, save_as_external_data=True, location=f"{stem}.own_data", size_threshold=1024)

    def rename(self, stem: str, name: str) -> None:
        """Give a graph's file another name; its data keep theirs, which the graph names."""
        (self.onnx / f"{stem}.onnx").rename(self.onnx / f"{name}.onnx")


def typed(*names: str, kind: int) -> Callable[[onnx.ModelProto], None]:
    """These inputs and outputs in another type, with a cast behind or before."""

    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        for value in [*graph.input, *graph.output]:
            if not any(value.name == n or (n.endswith("*") and value.name.startswith(n[:-1])) for n in names):
                continue
            old, inner = value.type.tensor_type.elem_type, f"{value.name}.as_it_was"
            is_input = value in graph.input
            for node in graph.node:
                for names_of in (node.input, node.output):
                    for n, name in enumerate(names_of):
                        if name == value.name:
                            names_of[n] = inner
            value.type.tensor_type.elem_type = kind
            if is_input:
                graph.node.insert(0, helper.make_node("Cast", [value.name], [inner], to=old))
            else:
                graph.node.append(helper.make_node("Cast", [inner], [value.name], to=kind))

    return change


def with_position_ids(model: onnx.ModelProto) -> None:
    """Whoever gives other positions than those behind the past gets garbage."""
    graph = model.graph
    graph.input.append(helper.make_tensor_value_info("position_ids", INT64, ["batch", "tokens"]))
    constants = {"zero": 0, "one": 1}
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), f"ids.{name}"))
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "ids.axis"))
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "ids.first"))
    graph.initializer.append(numpy_helper.from_array(np.float32(1e6), "ids.much"))
    for node in graph.node:
        for n, name in enumerate(node.input):
            if name == "inputs_embeds":
                node.input[n] = "ids.embeds"
    new = [
        helper.make_node("Shape", ["attention_mask"], ["ids.all_shape"]),
        helper.make_node("Gather", ["ids.all_shape", "ids.one"], ["ids.all"], axis=0),
        helper.make_node("Shape", ["inputs_embeds"], ["ids.new_shape"]),
        helper.make_node("Gather", ["ids.new_shape", "ids.one"], ["ids.new"], axis=0),
        helper.make_node("Sub", ["ids.all", "ids.new"], ["ids.past"]),
        helper.make_node("Range", ["ids.past", "ids.all", "ids.one"], ["ids.wanted"]),
        helper.make_node("Sub", ["position_ids", "ids.wanted"], ["ids.wrong"]),
        helper.make_node("Cast", ["ids.wrong"], ["ids.wrong_float"], to=FP32),
        helper.make_node("Mul", ["ids.wrong_float", "ids.much"], ["ids.shift"]),
        helper.make_node("Unsqueeze", ["ids.shift", "ids.last_axis"], ["ids.shift_3d"]),
        helper.make_node("Add", ["inputs_embeds", "ids.shift_3d"], ["ids.embeds"]),
    ]
    graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), "ids.last_axis"))
    for node in reversed(new):
        graph.node.insert(0, node)


def with_num_logits(*shape: int) -> Callable[[onnx.ModelProto], None]:
    """The last so many of the positions; none for 0."""

    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        graph.input.append(helper.make_tensor_value_info("num_logits_to_keep", INT64, list(shape)))
        for node in graph.node:
            for n, name in enumerate(node.output):
                if name == "logits":
                    node.output[n] = "keep.logits"
        for name, value in (("axis", [1]), ("end", [1 << 60]), ("list", [-1])):
            graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), f"keep.{name}"))
        graph.node.extend(
            [
                helper.make_node("Reshape", ["num_logits_to_keep", "keep.list"], ["keep.count"]),
                helper.make_node("Neg", ["keep.count"], ["keep.start"]),
                helper.make_node("Slice", ["keep.logits", "keep.start", "keep.end", "keep.axis"], ["logits"]),
            ]
        )

    return change


def renamed(old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    """An output by another name."""

    def change(model: onnx.ModelProto) -> None:
        for value in model.graph.output:
            value.name = new if value.name == old else value.name
        for node in model.graph.node:
            for n, name in enumerate(node.output):
                node.output[n] = new if name == old else name

    return change


def in_three_dimensions(model: onnx.ModelProto) -> None:
    """Features [1, tokens, H]."""
    graph = model.graph
    renamed("image_features", "flat")(model)
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "three.axis"))
    graph.node.append(helper.make_node("Unsqueeze", ["flat", "three.axis"], ["image_features"]))
    graph.output[0].CopyFrom(helper.make_tensor_value_info("image_features", FP32, [1, "tokens", "hidden"]))


def with_symbols(model: onnx.ModelProto) -> None:
    """No size of the model is written into the decoder's edges."""
    for value in [*model.graph.input, *model.graph.output]:
        for n, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value > 1:
                dim.dim_param = f"{value.name}.{n}"


def with_all_logits(model: onnx.ModelProto) -> None:
    """Logits of every position, as most exporters write it."""
    sliced = [n for n in model.graph.node if n.op_type == "Slice" and n.name.startswith("text.read.")]
    assert len(sliced) == 2
    for gone in sliced:
        for node in model.graph.node:
            for n, name in enumerate(node.input):
                node.input[n] = gone.input[0] if name == gone.output[0] else name
        model.graph.node.remove(gone)
    logits = next(value for value in model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "sequence_length"


def in_several_files(folder: Folder) -> None:
    """A data file for each tensor."""
    models = {path: onnx.load(path) for path in folder.onnx.glob("*.onnx")}
    shutil.rmtree(folder.onnx)
    folder.onnx.mkdir()
    for file, model in models.items():
        onnx.save(model, file, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=1024)


def beside_config(folder: Folder) -> None:
    for path in folder.onnx.iterdir():
        path.rename(folder.path / path.name)
    folder.onnx.rmdir()


def suffixed(suffix: str) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        for stem in (VISION, EMBED, DECODER):
            folder.rename(stem, f"{stem}{suffix}")

    return change


def older_names(folder: Folder) -> None:
    folder.rename(VISION, "embed_images")
    folder.rename(DECODER, "decoder")


CONVENTIONS: dict[str, Callable[[Folder], None]] = {
    "position_ids": lambda f: f.change(DECODER, with_position_ids),
    "position_ids int32": lambda f: (
        f.change(DECODER, with_position_ids),
        f.change(DECODER, typed("position_ids", kind=INT32)),
    )[0],
    "all logits": lambda f: f.change(DECODER, with_all_logits),
    "older names": older_names,
    "no onnx folder": beside_config,
    "several data files": in_several_files,
    "int32 ids and masks": lambda f: (
        f.change(EMBED, typed("input_ids", kind=INT32)),
        f.change(DECODER, typed("attention_mask", kind=INT32)),
        f.change(VISION, typed("pixel_attention_mask", "spatial_shapes", kind=INT32)),
    )[0],
    "bool masks": lambda f: (
        f.change(DECODER, typed("attention_mask", kind=BOOL)),
        f.change(VISION, typed("pixel_attention_mask", kind=BOOL)),
    )[0],
    "fp16 pixels": lambda f: f.change(VISION, typed("pixel_values", kind=FP16)),
    "features in three dimensions": lambda f: f.change(VISION, in_three_dimensions),
    "image_embeddings": lambda f: f.change(VISION, renamed("image_features", "image_embeddings")),
    "the only output of the encoder": lambda f: f.change(VISION, renamed("image_features", "last_hidden_state")),
    "the only output of the embeddings": lambda f: f.change(EMBED, renamed("inputs_embeds", "embeddings")),
    "fp16 caches": lambda f: f.change(DECODER, typed("past_*", "present*", kind=FP16)),
    "fp16 edges": lambda f: (
        f.change(DECODER, typed("past_*", "present*", "logits", "inputs_embeds", kind=FP16)),
        f.change(EMBED, typed("inputs_embeds", kind=FP16)),
        f.change(VISION, typed("image_features", kind=FP16)),
    )[0],
    "num_logits_to_keep": lambda f: f.change(DECODER, with_num_logits()),
    "num_logits_to_keep in a list": lambda f: f.change(DECODER, with_num_logits(1)),
    "symbolic sizes": lambda f: f.change(DECODER, with_symbols),
    "q8": suffixed("_q8"),
    "quantized": suffixed("_quantized"),
    "uint8": suffixed("_uint8"),
}


@pytest.fixture(scope="module")
def answers(demo_model, photo_path) -> list[str]:
    return [demo_model.answer([photo_path], q, temperature=0).text() for q in QUESTIONS]


@pytest.fixture(scope="module")
def photo_path() -> Path:
    return Path(__file__).resolve().parents[2] / "demo" / "eval" / "images" / "0000.png"


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda name: name.replace(" ", "_"))
def test_published_folders_answer(convention, demo_bundle, answers, photo_path, tmp_path) -> None:
    folder = Folder(demo_bundle, tmp_path / "hub")
    CONVENTIONS[convention](folder)
    model = Model.load(folder.path, threads=1)
    assert [model.answer([photo_path], q, temperature=0).text() for q in QUESTIONS] == answers


def test_int8_is_found_by_the_names_of_others(demo_bundle, tmp_path) -> None:
    for suffix in ("_q8", "_quantized", "_uint8"):
        folder = Folder(demo_bundle, tmp_path / f"hub{suffix}")
        suffixed(suffix)(folder)
        assert list(Bundle.open(folder.path).variants) == ["int8"]


def test_what_is_not_run_is_named(demo_bundle, tmp_path, capsys) -> None:
    folder = Folder(demo_bundle, tmp_path / "hub")
    suffixed("_bnb4")(folder)
    assert main(["run", str(folder.path), "-p", "x"]) == 2
    said = capsys.readouterr().err
    assert "decoder_model_merged_bnb4.onnx, and no set of graphs that lfm-edge runs" in said
    assert "_q4" in said
    assert said.count("\n") == 1


def test_sizes_are_those_of_config_json(demo_bundle, tmp_path) -> None:
    folder = Folder(demo_bundle, tmp_path / "hub")
    config = json.loads((folder.path / "config.json").read_text())
    config["text_config"] |= {"conv_L_cache": 5, "vocab_size": 77}
    (folder.path / "config.json").write_text(json.dumps(config))
    facts = Bundle.open(folder.path).facts
    assert (facts.conv_kernel, facts.vocabulary) == (5, 77)


def test_a_size_that_nothing_tells(demo_bundle, tmp_path) -> None:
    folder = Folder(demo_bundle, tmp_path / "hub")
    folder.change(DECODER, with_symbols)
    (folder.path / "config.json").write_text('{"model_type": "lfm2_vl"}')
    with pytest.raises((BundleError, ValueError), match=r"config\.json"):
        Model.load(folder.path, threads=1)


@pytest.mark.parametrize("convention", ["position_ids", "bool masks", "fp16 caches", "symbolic sizes"])
def test_published_graphs_can_be_prepared(convention, demo_bundle, answers, photo_path, tmp_path) -> None:
    folder = Folder(demo_bundle, tmp_path / "hub")
    CONVENTIONS[convention](folder)
    assert main(["prepare", str(folder.path)]) == 0
    model = Model.load(folder.path, threads=1)
    assert model.sessions.is_prepared
    assert model.answer([photo_path], QUESTIONS[0], temperature=0).text() == answers[0]


def test_a_folder_of_the_hubs_cache_is_whole(demo_bundle, answers, photo_path, tmp_path, capsys) -> None:
    """A link that leads anywhere else is still refused."""
    snapshot = cached(demo_bundle, tmp_path / "cache")
    model = Model.load(snapshot, threads=1)
    assert model.answer([photo_path], QUESTIONS[0], temperature=0).text() == answers[0]
    assert main(["verify", str(snapshot)]) == 0
    (tmp_path / "other").write_bytes((snapshot / "config.json").read_bytes())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "other")
    capsys.readouterr()
    assert main(["verify", str(snapshot)]) == 1
    assert "config.json is a link" in capsys.readouterr().out


def test_an_onnxruntime_that_refuses_links_is_named(monkeypatch) -> None:
    """What 1.24.1 says of a folder of the cache; it was run by hand with that release."""
    from lfm_runtime.engine import failures
    from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

    said = 'External data path: "x.onnx_data" escapes model directory: "/a/onnx"'
    monkeypatch.setattr(failures, "refuses_links", lambda: True)
    with (
        pytest.raises(
            BundleError, match=r"weights behind a link.*pip install 'onnxruntime!=1\.24\.0,!=1\.24\.1'.*cp -rL"
        ),
        failures.failures_are_ours("x.onnx"),
    ):
        raise RuntimeException(said)
