"""What a bundle can have wrong: bytes, files, links, weights elsewhere; and the reader of ONNX's protocol buffers
against the onnx package.
"""

import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lfm_package.verify import verify
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import BundleError
from lfm_runtime.formats.manifest import SUMS, file_hash
from lfm_runtime.formats.onnx_file import external_files


def rehashed(bundle: Path, name: str) -> None:
    """Write the file's hash into the manifest, as somebody would who tampers with both."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": (bundle / name).stat().st_size, "sha256": file_hash(bundle / name)}
    path.write_text(json.dumps(manifest))


def with_sums(bundle: Path) -> Path:
    names = ["manifest.json", *json.loads((bundle / "manifest.json").read_text())["files"]]
    (bundle / SUMS).write_text("".join(f"{file_hash(bundle / name)}  {name}\n" for name in sorted(names)))
    return bundle


def test_whole(demo_bundle, bundle_copy, capsys) -> None:
    seen = []
    assert verify(demo_bundle, lambda done, total: seen.append(done / total)) == []
    assert seen == sorted(seen) and seen[-1] == 1
    assert verify(with_sums(bundle_copy)) == []
    assert main(["verify", str(bundle_copy)]) == 0
    assert "is complete and verified" in capsys.readouterr().out


def test_every_flipped_byte_is_found(bundle_copy) -> None:
    """200 single bytes, in files chosen as often as they are small or large."""
    with_sums(bundle_copy)
    rng = random.Random(0)
    names = sorted(path for path in bundle_copy.rglob("*") if path.is_file())
    kept = {}
    for n in range(200):
        path = names[n % len(names)]
        kept.setdefault(path, path.read_bytes())
        data = bytearray(kept[path])
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            problems = verify(bundle_copy)
        except BundleError as e:
            problems = [str(e)]
        assert problems, f"{path.name}, byte {at}"
        path.write_bytes(kept[path])
    assert verify(bundle_copy) == []


def test_files_that_do_not_belong(bundle_copy) -> None:
    (bundle_copy / "onnx" / "extra.bin").write_text("x")
    os.mkfifo(bundle_copy / "pipe")
    (bundle_copy / "config.json").unlink()
    (bundle_copy / "config.json").symlink_to("/etc/passwd")
    (bundle_copy / "prompt.json").unlink()
    found = verify(bundle_copy)  # first of all what must not be read
    assert [problem.split()[0] for problem in found] == ["config.json", "pipe"]
    assert "is a link" in found[0] and "not a plain file" in found[1]
    for name in ("config.json", "pipe"):
        (bundle_copy / name).unlink()
    found = verify(bundle_copy)
    assert [problem.split()[0] for problem in found] == ["onnx/extra.bin", "config.json", "prompt.json"]
    assert "not named" in found[0] and "is missing" in found[1] and "is missing" in found[2]


@pytest.mark.parametrize("place", ["../../secret.bin", "/etc/passwd", "other.bin"])
def test_weights_elsewhere(bundle_copy, place) -> None:
    """The graph is tampered with, and its hash mended: what it points to gives it away."""
    onnx = pytest.importorskip("onnx")
    name = "onnx/embed_tokens.onnx"
    model = onnx.load(bundle_copy / name, load_external_data=False)
    entry = next(e for tensor in model.graph.initializer for e in tensor.external_data if e.key == "location")
    entry.value = place
    onnx.save(model, bundle_copy / name)
    rehashed(bundle_copy, name)
    assert verify(bundle_copy) == [
        f"{name} takes weights from {place}, which is not a file of the bundle; do not use it"
    ]


def test_graphs_that_do_not_load(bundle_copy) -> None:
    onnx = pytest.importorskip("onnx")
    name = "onnx/embed_tokens.onnx"
    model = onnx.load(bundle_copy / name, load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, bundle_copy / name)
    rehashed(bundle_copy, name)
    (problem,) = verify(bundle_copy)
    assert "embed_tokens.onnx does not work with onnxruntime" in problem


def test_names_outside(bundle_copy, capsys) -> None:
    path = bundle_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../outside"] = manifest["files"]["config.json"]
    path.write_text(json.dumps(manifest))
    assert main(["verify", str(bundle_copy)]) == 2
    assert "outside the bundle" in capsys.readouterr().err


def test_no_bundle(tmp_path) -> None:
    with pytest.raises(BundleError, match="is not a folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        verify(tmp_path)


def test_against_onnx(demo_bundle) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.external_data_helper import _get_all_tensors

    for path in (demo_bundle / "onnx").glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        wanted = {e.value for tensor in _get_all_tensors(model) for e in tensor.external_data if e.key == "location"}
        assert external_files(path) == wanted != set()


def test_in_every_place(tmp_path) -> None:
    """Initializers, attributes of nodes in branches of branches, sparse tensors, functions."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    def tensor(place: str) -> TensorProto:
        made = helper.make_tensor("t", TensorProto.FLOAT, [1], np.zeros(1, np.float32).tobytes(), raw=True)
        made.ClearField("raw_data")
        made.data_location = TensorProto.EXTERNAL
        for key, value in (("location", place), ("offset", "0"), ("length", "4")):
            entry = made.external_data.add()
            entry.key, entry.value = key, value
        return made

    constant = helper.make_node("Constant", [], ["c"], value=tensor("in-branch"))
    inner = helper.make_graph([constant], "inner", [], [], [tensor("inner-weights")])
    branch = helper.make_graph(
        [helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)], "branch", [], []
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)], "g", [], [], [tensor("weights")]
    )
    sparse = graph.sparse_initializer.add()
    sparse.values.CopyFrom(tensor("sparse-values"))
    sparse.indices.CopyFrom(tensor("sparse-indices"))
    function = helper.make_function(
        "d", "f", [], [], [helper.make_node("Constant", [], ["c"], value=tensor("in-function"))], []
    )
    model = helper.make_model(graph, functions=[function])
    onnx.save(model, tmp_path / "m.onnx")
    assert external_files(tmp_path / "m.onnx") == {
        "in-branch",
        "inner-weights",
        "weights",
        "sparse-values",
        "sparse-indices",
        "in-function",
    }


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_any_bytes(tmp_path_factory, data) -> None:
    """A set of names or one of our errors, whatever the bytes; no endless loop, no other exception."""
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(data)
    try:
        assert isinstance(external_files(path), set)
    except BundleError as e:
        assert "any.onnx" in str(e)


def test_copied_half(demo_bundle, tmp_path) -> None:
    half = Path(shutil.copytree(demo_bundle, tmp_path / "half"))
    weights = half / "onnx" / "decoder_model_merged.onnx_data"
    weights.write_bytes(weights.read_bytes()[:1000])
    (problem,) = verify(half)
    assert "has 1000 bytes" in problem


def test_graphs_that_need_a_newer_onnxruntime(bundle_copy) -> None:
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    for graph in manifest["graphs"].values():
        graph["min_onnxruntime"] = "9.9.0"
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    found = verify(bundle_copy)
    assert len(found) == 3
    assert all("needs onnxruntime 9.9.0, this is" in problem for problem in found)


def test_prepared_graphs_are_hashed_and_damaged_ones_removed(bundle_copy, photo, capsys, monkeypatch) -> None:
    """What runs is what is checked: after a flipped byte nothing is answered from it, and prepare makes it again."""
    from lfm_audit import selftest  # noqa: F401  (the command)

    question = ["run", str(bundle_copy), str(photo), "-p", "What is this?", "--variant", "fp32", "--temperature", "0"]
    question += ["--max-new-tokens", "4"]

    def prepared() -> tuple[str, Path]:
        assert main(["prepare", str(bundle_copy), "--variant", "fp32"]) == 0
        capsys.readouterr()
        assert main(question) == 0
        return capsys.readouterr().out, next(kept.rglob("decoder_model_merged.onnx_data"))

    kept = bundle_copy.with_name(f"{bundle_copy.name}.prepared")
    answer, weights = prepared()
    for command in (
        ["verify", str(bundle_copy)],
        ["doctor", str(bundle_copy), "--profile", "generic"],
        ["selftest", str(bundle_copy)],
    ):
        data = bytearray(weights.read_bytes())
        data[:: 1 << 14] = bytes(255 - byte for byte in data[:: 1 << 14])
        weights.write_bytes(data)
        code = main(command)
        said = capsys.readouterr().out
        assert code == 1 or command[0] == "doctor", said
        assert "is damaged" in said
        assert re.search("lfm-edge prepare .* --variant fp32", said)
        assert not weights.exists()
        assert main(question) == 0
        assert capsys.readouterr().out == answer
        assert prepared()[0] == answer
        assert main(["verify", str(bundle_copy)]) == 0
    weights.with_name("prepared.json").write_text("{}")
    capsys.readouterr()
    assert main(["verify", str(bundle_copy), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "prepared.json is missing or damaged" in problem


def test_what_is_written_as_json(demo_bundle, tmp_path, capsys) -> None:
    """One object and nothing else on standard output."""
    pytest.importorskip("cyclonedx")
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    assert main(["prepare", str(bundle), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert {graph["graph"] for graph in made["graphs"]} == {"vision_encoder.onnx", "decoder_model_merged.onnx"}
    assert Path(made["folder"]).is_dir()
    assert main(["pack", str(bundle), "--profile", "pi5", "-o", str(tmp_path / "cam.tar"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["variants"] == ["fp32"]
    assert all(Path(file["path"]).stat().st_size == file["bytes"] for file in made["files"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers", ["conv"] * 3),
        ("hidden", 64),
        ("kv_heads", 3),
        ("head_dim", 8),
        ("conv_kernel", 5),
        ("vocabulary", 4711),
        ("context_length", 77),
        ("image_token_id", 1),
    ],
)
def test_sizes_of_the_model_are_those_of_the_other_files(key, value, bundle_copy, capsys) -> None:
    path = bundle_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"][key] = value
    path.write_text(json.dumps(manifest))
    assert [f"model.{key} is" in problem for problem in verify(bundle_copy)][:1] == [True]
    assert main(["doctor", str(bundle_copy), "--profile", "generic"]) == 1
    assert f"model.{key} is" in capsys.readouterr().out
    assert main(["plan", str(bundle_copy), "--profile", "generic"]) == 2
    assert f"model.{key} is" in capsys.readouterr().err


def test_the_first_release_is_a_version_that_graphs_allow(bundle_copy) -> None:
    path = bundle_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "min_onnxruntime": "9.0.0"}))
    assert "min_onnxruntime is 9.0.0, a graph says" in verify(bundle_copy)[0]
    path.write_text(json.dumps({**manifest, "min_onnxruntime": "abc"}))
    with pytest.raises(BundleError, match="min_onnxruntime is 'abc', not a version"):
        verify(bundle_copy)


def test_a_graph_is_what_the_manifest_describes(bundle_copy) -> None:
    path = bundle_copy / "manifest.json"
    text = path.read_text()
    for stem, edge in (("decoder_model_merged", "attention_mask"), ("vision_encoder", "pixel_values")):
        manifest = json.loads(text)
        manifest["graphs"][f"onnx/{stem}.onnx"]["inputs"][edge]["shape"] += [3]
        path.write_text(json.dumps(manifest))
        assert f"describes {edge} of onnx/{stem}.onnx otherwise" in verify(bundle_copy)[0]


def test_doctor_and_selftest_read_the_sums(bundle_copy, capsys) -> None:
    sums = with_sums(bundle_copy) / SUMS
    assert main(["doctor", str(bundle_copy), "--profile", "generic"]) == 0
    sums.write_text(sums.read_text().replace("  manifest.json", "0  manifest.json"))
    capsys.readouterr()
    assert main(["doctor", str(bundle_copy), "--profile", "generic"]) == 1
    assert f"manifest.json is not what {SUMS} says" in capsys.readouterr().out
    assert main(["selftest", str(bundle_copy), "--profile", "generic"]) == 1
    assert f"manifest.json is not what {SUMS} says" in capsys.readouterr().out
