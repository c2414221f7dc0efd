"""`lfm-edge run` and `chat` on the demo bundle: text, table, JSON; what bad input and damaged bundles get."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from lfm_runtime import BundleError, EdgeError, GraphContractError, ImageError, Model, PromptError, SettingError
from lfm_runtime.commands.cli import main


def run(capsys, *words) -> tuple[int, str, str]:
    code = main([str(w) for w in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_run_prints_text_then_table(demo_bundle, drawing, capsys) -> None:
    code, out, err = run(capsys, "run", demo_bundle, drawing, "-p", "What is in this image?", "--threads", 1)
    assert code == 0
    assert len(out.strip().splitlines()) == 1
    for word in ("ttft", "vision", "per token", "tok/s", "MiB", "peak"):
        assert word in err


def test_run_json(demo_bundle, drawing, capsys) -> None:
    code, out, err = run(
        capsys, "run", demo_bundle, drawing, "-p", "How many shapes?", "--json", "--threads", 1, "--temperature", 0
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert set(report) == {
        "text",
        "finish_reason",
        "prompt_tokens",
        "cached_tokens",
        "image_tokens",
        "tiles",
        "encoded_tiles",
        "new_tokens",
        "speculative_tokens",
        "accepted_tokens",
        "timing_ms",
        "throughput",
        "memory_mib",
    }
    assert set(report["throughput"]) == {"prefill_tok_s", "decode_tok_s"}
    assert set(report["memory_mib"]) == {"rss", "rss_anon", "rss_file", "peak"}


def test_flags_arrive(demo_bundle, photo, capsys) -> None:
    """Each image flag changes the plan as it should."""

    def tiles(*flags) -> tuple[int, int]:
        _, out, _ = run(
            capsys, "run", demo_bundle, photo, "-p", "x", "--json", "--max-new-tokens", 1, "--threads", 1, *flags
        )
        report = json.loads(out)
        return report["tiles"], report["image_tokens"]

    views, tokens = tiles()
    assert tiles("--no-use-thumbnail")[0] == views - 1
    assert tiles("--no-do-image-splitting")[0] == 1
    assert tiles("--no-do-image-splitting", "--max-image-tokens", 16)[1] <= 16
    assert tiles("--max-tiles", 2)[0] == 3
    assert tiles("--min-image-tokens", 60)[1] >= tokens - 64 + 60 - 16


def test_chat_answers_each_line(demo_bundle, drawing, capsys, monkeypatch) -> None:

    monkeypatch.setattr(sys, "stdin", io.StringIO("How many shapes?\nWhat is in this image?\n\n"))
    code, out, err = run(capsys, "chat", demo_bundle, drawing, "--threads", 1)
    assert code == 0
    assert len(out.strip()) > 2
    assert err.count("generated, first token after") == 2


BAD = {
    "no bundle": (["run", "nowhere", "-p", "x"], "does not exist"),
    "not a bundle": (["run", "{tmp}", "-p", "x"], "it has no manifest.json and no config.json"),
    "no image": (["run", "{bundle}", "nope.png", "-p", "x"], "does not exist"),
    "not an image": (["run", "{bundle}", "{bundle}/manifest.json", "-p", "x"], "not a readable image"),
    "variant": (["run", "{bundle}", "-p", "x", "--variant", "int4"], "no variant 'int4'; it has fp32"),
    "useless image flag": (["run", "{bundle}", "-p", "x", "--max-tiles", "3"], "no effect without an image"),
    "useless tile flag": (
        ["run", "{bundle}", "{image}", "-p", "x", "--no-do-image-splitting", "--max-tiles", "3"],
        "no effect while",
    ),
    "useless seed": (
        ["run", "{bundle}", "{image}", "-p", "x", "--temperature", "0", "--seed", "1"],
        "no effect at temperature 0",
    ),
    "impossible": (["run", "{bundle}", "{image}", "-p", "x", "--min-p", "7"], "min_p 7.0 is impossible"),
    "impossible tiles": (["run", "{bundle}", "{image}", "-p", "x", "--max-tiles", "0"], "max_tiles 0"),
    "threads": (["run", "{bundle}", "{image}", "-p", "x", "--threads", "-1"], "threads -1"),
    "image in text": (["run", "{bundle}", "{image}", "-p", "<image>"], "2 places for 1 images"),
    "image in text alone": (["run", "{bundle}", "-p", "<image>"], "1 places for 0 images"),
    "long prompt": (
        ["run", "{bundle}", "{image}", "-p", "word " * 5000],
        "prompt and answer together may have at most",
    ),
    "negative seed": (
        ["run", "{bundle}", "{image}", "-p", "x", "--temperature", "1", "--seed", "-1"],
        "seed -1 is impossible",
    ),
    "useless limit": (["run", "{bundle}", "-p", "x", "--max-megapixels", "5"], "no effect without an image"),
    "bomb": (["run", "{bundle}", "{image}", "-p", "x", "--max-megapixels", "0.001"], "megapixels"),
}


@pytest.mark.parametrize("case", BAD, ids=lambda name: name.replace(" ", "_"))
def test_bad_input_is_one_line_and_exit_code_2(case, demo_bundle, drawing, tmp_path, capsys) -> None:
    """One line on stderr, exit code 2, nothing on stdout, nothing left behind."""
    words, says = BAD[case]
    before = sorted(p.name for p in demo_bundle.rglob("*"))
    code, out, err = run(capsys, *(w.format(bundle=demo_bundle, image=drawing, tmp=tmp_path) for w in words))
    assert (code, out) == (2, "")
    assert err.startswith("lfm-edge: ")
    assert err.count("\n") == 1
    assert says in err
    assert sorted(p.name for p in demo_bundle.rglob("*")) == before


def damage(bundle: Path, what: str) -> None:
    data = bundle / "onnx" / "decoder_model_merged.onnx_data"
    graph = bundle / "onnx" / "vision_encoder.onnx"
    manifest = bundle / "manifest.json"
    if what == "graph":
        graph.write_bytes(graph.read_bytes()[:-100])
    elif what == "graph byte":
        content = bytearray(graph.read_bytes())
        content[len(content) // 2] ^= 1
        graph.write_bytes(content)
    elif what == "data":
        os.truncate(data, data.stat().st_size // 2)
    elif what == "data byte":
        content = bytearray(data.read_bytes())
        content[1000] ^= 1
        data.write_bytes(content)
    elif what == "missing":
        data.unlink()
    elif what == "newer":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 99}))
    elif what == "manifest":
        manifest.write_text(manifest.read_text()[:200])
    elif what == "outside":
        raw = json.loads(manifest.read_text())
        raw["variants"]["fp32"]["vision_encoder"] = "../../etc/passwd"
        manifest.write_text(json.dumps(raw))
    elif what == "prompt":
        (bundle / "prompt.json").write_text("{}")
        raw = json.loads(manifest.read_text())
        raw["files"].pop("prompt.json")
        manifest.write_text(json.dumps(raw))


MANIFEST_DAMAGE = {
    "variants list": lambda m: m.update(variants={"fp32": ["x"]}),
    "file int": lambda m: m["variants"]["fp32"].update(embed_tokens=7),
    "no context": lambda m: m["model"].pop("context_length"),
    "context text": lambda m: m["model"].update(context_length="many"),
    "entry int": lambda m: m["files"].update(x=7),
    "entry empty": lambda m: m["files"].update(x={}),
    "schema text": lambda m: m.update(schema="one"),
    "no files": lambda m: m.pop("files"),
    "absolute": lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}),
}


@pytest.mark.parametrize("case", MANIFEST_DAMAGE)
def test_damaged_manifest(case, bundle_copy, capsys) -> None:
    """Valid JSON with wrong content: still one line and exit code 2."""
    path = bundle_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    MANIFEST_DAMAGE[case](manifest)
    path.write_text(json.dumps(manifest))
    code, out, err = run(capsys, "run", bundle_copy, "-p", "x")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "manifest.json" in err


OTHER_DAMAGE = {
    "generation_config.json": ['{"eos_token_id": "x"}', "[]", '{"temperature": "hot"}'],
    "config.json": ["[]", '{"text_config": 7}'],
    "preprocessor_config.json": [
        "[]",
        '{"encoder_patch_size": 0}',
        '{"tile_size": "big"}',
        '{"do_normalize": false}',
        '{"rescale_factor": 1}',
    ],
    "prompt.json": ["{}", "[]", '{"schema": 1, "vocabulary": [], "chat": {}, "image_tokens": {}}'],
}


@pytest.mark.parametrize(("name", "content"), [(n, c) for n, cs in OTHER_DAMAGE.items() for c in cs])
def test_damaged_settings(name, content, bundle_copy, capsys) -> None:
    (bundle_copy / name).write_text(content)
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["files"].pop(name)
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    code, out, err = run(capsys, "run", bundle_copy, "-p", "x")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert name in err or "encoder_patch_size" in err or "image setting" in err


def test_verify_finds_what_size_does_not(bundle_copy, monkeypatch) -> None:
    """A large file with a flipped byte loads; with verify it does not."""
    import lfm_runtime.bundle

    monkeypatch.setattr(lfm_runtime.bundle, "HASHED_AT_LOAD", 1000)
    damage(bundle_copy, "data byte")
    Model.load(bundle_copy)
    with pytest.raises(BundleError, match="SHA-256"):
        Model.load(bundle_copy, verify=True)


def test_missing_extra(capsys, monkeypatch, tmp_path) -> None:
    """Without the export extra, `export` says what to install."""
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    for name in [n for n in sys.modules if n.startswith("lfm_export") and n != "lfm_export.cli"]:
        monkeypatch.delitem(sys.modules, name)
    code, _, err = run(capsys, "export", tmp_path, "-o", tmp_path / "b")
    assert code == 2
    assert "needs the Python package" in err and " -m pip install " in err


def test_flags_before_images(demo_bundle, drawing, capsys) -> None:
    code, out, _ = run(capsys, "run", demo_bundle, "-p", "How many shapes?", drawing, "--json", "--threads", 1)
    assert code == 0
    assert json.loads(out)["tiles"] == 1


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("graph", "bytes, the manifest says"),
        ("graph byte", "SHA-256"),
        ("data", "bytes, the manifest says"),
        ("data byte", "SHA-256"),
        ("missing", "is missing"),
        ("newer", "update lfm-edge"),
        ("manifest", "damaged"),
        ("outside", "outside the bundle"),
        ("prompt", "prompt.json"),
    ],
)
def test_damaged_bundle(what, says, bundle_copy) -> None:
    damage(bundle_copy, what)
    with pytest.raises(BundleError, match=says):
        Model.load(bundle_copy)


def test_damaged_hub_folder(bundle_copy) -> None:
    """Without a manifest there are no hashes; what the file itself tells becomes one line."""
    (bundle_copy / "manifest.json").unlink()
    damage(bundle_copy, "graph")
    with pytest.raises(BundleError, match="is not an ONNX graph, or is cut off"):
        Model.load(bundle_copy)


def test_graph_that_fails_at_run_time(demo_bundle, drawing, capsys, monkeypatch) -> None:
    """An error of onnxruntime in the middle of an answer is one line, too."""
    from lfm_runtime.decode.decoder import Decoder

    embed = Decoder.embed
    monkeypatch.setattr(Decoder, "embed", lambda self, ids: embed(self, [10**6 for _ in ids]))
    code, out, err = run(capsys, "run", demo_bundle, drawing, "-p", "x")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "does not work with onnxruntime" in err


def test_wrong_graph(bundle_copy) -> None:
    """A decoder in the place of the vision encoder is named as such."""
    (bundle_copy / "manifest.json").unlink()
    shutil.copy(bundle_copy / "onnx" / "embed_tokens.onnx", bundle_copy / "onnx" / "vision_encoder.onnx")
    with pytest.raises(GraphContractError, match="lacks"):
        Model.load(bundle_copy)


def test_errors_are_standard_errors() -> None:
    for error in (BundleError, GraphContractError, ImageError, PromptError, SettingError):
        assert issubclass(error, EdgeError)
        assert issubclass(error, ValueError)


@pytest.mark.parametrize("text", ["[" * 50_000, "[yes", "[1, 2]"])
def test_choices_that_are_none(demo_bundle, capsys, text) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", str(demo_bundle), "-p", "x", "--choices", text])
    said = capsys.readouterr().err
    assert 'write yes,no or ["a, b", "c"]' in said and said.count("\n") == 1


def test_choosing_says_that_nothing_was_generated(demo_bundle, capsys) -> None:
    assert main(["run", str(demo_bundle), "-p", "Is it red?", "--choices", "yes,no"]) == 0
    assert ", 0 new; prefill " in capsys.readouterr().err


def test_what_is_missing_is_named(capsys) -> None:
    """A question needs no image."""
    with pytest.raises(SystemExit, match="2"):
        main(["run"])
    assert "the following arguments are required: bundle;" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["stick", "bundle", "--targt", "pi5", "-o", "x"])
    assert "unrecognized arguments: --targt; did you mean --target?" in capsys.readouterr().err
