"""The bundle as a whole: manifest, alignment, shared bytes, fp16 beside fp32, and that it appears whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from bundles import tree

pytest.importorskip("onnx_ir")

from lfm_export.checkpoint.config import CheckpointError
from lfm_export.export import export
from lfm_runtime import Model
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import EdgeError
from lfm_runtime.formats.writer import replacing

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo" / "checkpoint"


def test_manifest_is_true(demo_bundle) -> None:
    """Every file is listed with its own hash and size; every graph's edges are what onnxruntime sees; no machine path
    is in it.
    """
    import onnxruntime as ort

    text = (demo_bundle / "manifest.json").read_text()
    manifest = json.loads(text)
    files = tree(demo_bundle)
    files.pop("manifest.json")
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == files
    assert str(demo_bundle.parent) not in text
    assert manifest["source"]["name"] == "checkpoint"
    for name, described in manifest["graphs"].items():
        session = ort.InferenceSession(demo_bundle / name)
        assert {i.name: i.shape for i in session.get_inputs()} == {
            n: e["shape"] for n, e in described["inputs"].items()
        }
        assert {o.name for o in session.get_outputs()} == set(described["outputs"])
        assert all((demo_bundle / data).exists() for data in described["data"])


def test_hub_files_are_unchanged(demo_bundle) -> None:
    """But for what other programs look for, which is added to three of them: test_client_files.py."""
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (demo_bundle / name).read_bytes() == (DEMO / name).read_bytes()
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (DEMO, demo_bundle))
        assert {key: value for key, value in before.items() if key != "do_resize"}.items() <= after.items()


def test_alignment_and_sharing(demo_bundle) -> None:
    """External tensors at multiples of 64 KiB; the tied head points into the embedding's file."""
    onnx = pytest.importorskip("onnx")
    for path in (demo_bundle / "onnx").glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        where = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}
        assert where
        assert all(int(place["offset"]) % 65536 == 0 for place in where.values())
        if path.name == "decoder_model_merged.onnx":
            assert where["head.weight"]["location"] == "embed_tokens.onnx_data"
        onnx.checker.check_model(str(path)) if path.name == "embed_tokens.onnx" else None


def test_same_input_same_bytes(demo_bundle, tmp_path) -> None:
    export(DEMO, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(demo_bundle)


def test_fp16_beside_fp32(demo_bundle, tmp_path) -> None:
    """The second dtype joins the bundle; the first stays as it was; answers agree; the caches are half the size."""
    bundle = tmp_path / "bundle"
    export(DEMO, bundle)
    before = tree(bundle)
    export(DEMO, bundle, dtype="fp16")
    after = tree(bundle)
    told = ("manifest.json", "config.json")  # of both
    assert {k: v for k, v in after.items() if k in before and k not in told} == {
        k: v for k, v in before.items() if k not in told
    }
    assert list(json.loads((bundle / "manifest.json").read_text())["variants"]) == ["fp32", "fp16"]
    small = sum(p.stat().st_size for p in (bundle / "onnx").glob("*_fp16.onnx_data"))
    full = sum(p.stat().st_size for p in (bundle / "onnx").glob("*.onnx_data")) - small
    assert 0.45 < small / full < 0.55
    image = ROOT / "demo" / "eval" / "images" / "0000.png"
    texts = [
        Model.load(bundle, variant=v, threads=1).answer([image], "What is in this image?").text()
        for v in ("fp32", "fp16")
    ]
    assert texts[0] == texts[1]
    full, half = (Model.load(bundle, variant=v, threads=1) for v in ("fp32", "fp16"))
    a, b = (m.encode([m.open(image)]) for m in (full, half))
    assert ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min() > 0.9999
    embeds = full.decoder.embed(list(range(20, 60)))
    np.testing.assert_allclose(full.decoder.start(64).step(embeds), half.decoder.start(64).step(embeds), atol=0.05)
    assert Model.load(bundle, variant="fp16").decoder.info.states[0].dtype == np.float16


def test_some_graphs_only(tmp_path) -> None:
    bundle = tmp_path / "bundle"
    export(DEMO, bundle)
    before = tree(bundle)
    (bundle / "onnx" / "vision_encoder.onnx").write_bytes(b"broken")
    export(DEMO, bundle, graphs=["vision_encoder"])
    assert tree(bundle) == before
    with pytest.raises(CheckpointError, match="no fp16 decoder_model_merged"):
        export(DEMO, bundle, dtype="fp16", graphs=["vision_encoder"])
    with pytest.raises(CheckpointError, match="unknown graph embed"):
        export(DEMO, bundle, graphs=["embed"])


# --------------------------------------------------------------------------------------------------------- whole or not


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if ".partial-" in p.name]


def test_output_that_is_not_a_bundle(tmp_path, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for target in ("mine", "file"):
        assert main(["export", str(DEMO), "-o", str(tmp_path / target), "--quiet"]) == 2
        assert "choose another output" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "command",
    [
        ["export", str(DEMO), "-o", "{bundle}/more"],
        ["export", "{bundle}", "--web", "-o", "{bundle}/web"],
        ["export", "{bundle}", "--genai", "-o", "{bundle}/genai"],
        ["export", "{bundle}", "--static", "-o", "{bundle}/static"],
        ["pack", "{bundle}", "--variant", "fp32", "-o", "{bundle}/cam.tar"],
        ["stick", "{bundle}", "--target", "pi5", "-o", "{bundle}/onnx/stick"],
        ["run", "{bundle}", "-p", "x", "--cache", "{bundle}/onnx"],
        ["audit", "{bundle}", "-o", "{bundle}/audit.json"],
        ["tune", "{bundle}", str(ROOT / "demo" / "photos" / "coffee.jpg"), "-o", "{bundle}/tuned.toml"],
        ["make", str(DEMO), "--target", "pi5", "-o", "{bundle}/stick"],
    ],
    ids=lambda words: words[0] + "".join(w for w in words if w.startswith("--")),
)
def test_outputs_inside_a_bundle(demo_bundle, capsys, command) -> None:
    """What lies in a bundle is part of it, or would be lost when it is replaced."""
    before = tree(demo_bundle)
    assert main([word.format(bundle=demo_bundle) for word in command]) == 2
    assert re.fullmatch(r"lfm-edge: .* lies inside the bundle .*; choose a place outside\n", capsys.readouterr().err)
    assert tree(demo_bundle) == before


def test_where_an_output_lies_is_its_real_place(bundle_copy, tmp_path, capsys) -> None:
    """Through a link it is inside; beside it, by way of it, it is not. A cache may not be the bundle itself."""
    (tmp_path / "link").symlink_to(bundle_copy / "onnx")
    pack = ["pack", str(bundle_copy), "--variant", "fp32", "-o"]
    assert main([*pack, str(tmp_path / "link" / "x.tar")]) == 2
    assert "lies inside the bundle" in capsys.readouterr().err
    assert main([*pack, str(bundle_copy / ".." / "x.tar")]) == 0
    assert (tmp_path / "x.tar").exists()
    assert main(["run", str(bundle_copy), "-p", "x", "--cache", str(bundle_copy)]) == 2
    assert f"lfm-edge: {bundle_copy} lies inside the bundle" in capsys.readouterr().err


def test_outputs_inside_a_checkpoint(tmp_path, capsys) -> None:
    shutil.copytree(DEMO, tmp_path / "checkpoint")
    before = tree(tmp_path)
    assert main(["export", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "checkpoint" / "bundle")]) == 2
    assert "lies inside" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_unwritable_output(tmp_path, capsys) -> None:
    """A parent that is a file; root may write anywhere, so permissions alone prove nothing here."""
    (tmp_path / "file").write_text("x")
    assert main(["export", str(DEMO), "-o", str(tmp_path / "file" / "bundle"), "--quiet"]) == 2
    assert "cannot write" in capsys.readouterr().err
    if Path("/proc").exists():
        assert main(["export", str(DEMO), "-o", "/proc/bundle", "--quiet"]) == 2
        assert "cannot write" in capsys.readouterr().err


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
from lfm_runtime.commands.cli import main
sys.exit(main(["export", sys.argv[1], "-o", sys.argv[2], "--quiet"]))
"""


def test_write_that_fails_midway(tmp_path) -> None:
    """A limit on file size fails writes as a full disk does: exit 2, one line, old bundle intact, nothing beside it."""
    bundle = tmp_path / "bundle"
    export(DEMO, bundle)
    before = tree(bundle)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(DEMO), str(bundle)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert done.stderr.count("\n") == 1
    assert tree(bundle) == before
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (Path.unlink, "which manifest.json names; copy the bundle again, or remove it to make it anew"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "is damaged"),
    ],
    ids=["missing", "damaged"],
)
def test_another_variants_file_that_is_missing_or_damaged_is_named(bundle_copy, capsys, harm, says) -> None:
    """By its place in the bundle, not in the folder that is being written."""
    add_int8 = ["quantize", str(bundle_copy), "--variant", "int8", "--calibration", str(DEMO.parent / "photos")]
    assert main([*add_int8, "--quiet", "--floor", "9"]) == 0
    path = next((bundle_copy / "onnx").glob("decoder*int8.onnx"))
    harm(path)
    capsys.readouterr()
    assert main(["export", str(DEMO), "-o", str(bundle_copy), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert says in said
    assert ".partial-" not in said


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_full_disk(tmp_path, capsys) -> None:
    """A real full disk: 8 MB of tmpfs for a 22 MB bundle."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], capture_output=True, check=False
    ).returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        assert main(["export", str(DEMO), "-o", str(small / "bundle"), "--quiet"]) == 2
        assert "No space left" in capsys.readouterr().err
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "limit_mib"), [("450m", 700), ("1.6b", 1300)])
def test_export_memory(full_size, peak_mib, tmp_path, size, limit_mib) -> None:
    """Of exporting a full-size random checkpoint. Needs 3 GB and 10 GB of disk."""
    code = "import sys; from pathlib import Path; from lfm_export.export import export; export(Path(sys.argv[1]), Path(sys.argv[2]))"
    assert peak_mib(code, full_size(size), tmp_path / "bundle") <= limit_mib


def test_swap_without_exchange(tmp_path, monkeypatch) -> None:
    """Where the kernel cannot exchange two folders, two renames do."""
    import ctypes

    class NoExchange:
        def __init__(self, *_, **__):
            pass

    monkeypatch.setattr(ctypes, "CDLL", NoExchange)
    for text in ("one", "two"):
        with replacing(tmp_path / "bundle") as folder:
            write_manifest(folder, note=text)
        assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["note"] == text
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_leftovers_of_the_dead_go(tmp_path) -> None:
    (tmp_path / ".bundle.partial-abc").mkdir()
    (tmp_path / ".other.partial-abc").mkdir()
    with replacing(tmp_path / "bundle") as folder:
        write_manifest(folder)
    assert leftovers(tmp_path) == [".other.partial-abc"]


def test_recovery_between_two_renames(tmp_path) -> None:
    """Killed between the renames of the fallback: the next export, even a failing one, puts the old bundle back first."""
    old = tmp_path / ".bundle.partial-abc.old"
    old.mkdir()
    write_manifest(old, note="old")
    with pytest.raises(CheckpointError, match="model_type"):
        fail_inside(tmp_path / "bundle")
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["note"] == "old"
    assert not leftovers(tmp_path)


def fail_inside(bundle: Path) -> None:
    with replacing(bundle):
        raise CheckpointError("model_type")


SIZES = ("hidden", "kv_heads", "head_dim", "conv_kernel", "vocabulary", "image_token_id")


def write_manifest(folder: Path, **more) -> None:
    """Write the smallest manifest that counts as lfm-edge's."""
    value = {
        "schema": 1,
        "tool": {"name": "lfm-edge"},
        "min_onnxruntime": "1.20",
        "source": {"name": "x", "revision": None, "license": None, "adapter": None, "weights": ""},
        "model": {"layers": ["conv"], "context_length": 1, **dict.fromkeys(SIZES, 1)},
        "variants": {"fp32": {}},
        "graphs": {},
        **more,
    }
    value["files"] = {"x": {"bytes": 1, "sha256": ""}}
    (folder / "manifest.json").write_text(json.dumps(value))


@pytest.mark.parametrize("case", ["web app", "list", "extra file", "newer"])
def test_folders_that_must_survive(tmp_path, case) -> None:
    """A manifest.json alone makes no bundle; a stranger's file in a bundle is not thrown away; a newer bundle is not
    replaced.
    """
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    if case == "web app":
        (bundle / "manifest.json").write_text('{"name": "my app"}')
        (bundle / "index.html").write_text("<html>")
    elif case == "list":
        (bundle / "manifest.json").write_text("[]")
    else:
        write_manifest(bundle, schema=99 if case == "newer" else 1)
        if case == "extra file":
            (bundle / "notes.txt").write_text("mine")
    before = tree(bundle)
    with pytest.raises(EdgeError):
        export(DEMO, bundle)
    assert tree(bundle) == before
    assert not leftovers(tmp_path)


def test_variants_of_other_weights_do_not_mix(tmp_path) -> None:
    """fp16 of one checkpoint cannot join fp32 of another; replacing everything can."""
    other = Path(shutil.copytree(DEMO, tmp_path / "other"))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1  # a fine-tune may leave both ends as they were
    (other / "model.safetensors").write_bytes(weights)
    bundle = tmp_path / "bundle"
    export(DEMO, bundle)
    before = tree(bundle)
    for options in ({"dtype": "fp16"}, {"graphs": ["vision_encoder"]}):
        with pytest.raises(CheckpointError, match="another checkpoint"):
            export(other, bundle, **options)
    assert tree(bundle) == before
    export(other, bundle)
    assert tree(bundle) != before


def test_relative_outputs(tmp_path, monkeypatch) -> None:
    """`-o bundle/` and `-o .` name a folder as well."""
    monkeypatch.chdir(tmp_path)
    export(DEMO, Path("bundle/"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(DEMO, Path())
    assert tree(tmp_path / "here") == tree(tmp_path / "bundle")


def test_two_exports_at_once(tmp_path) -> None:
    """fp32 and fp16 into one bundle from two threads: neither variant is lost."""
    threads = [
        threading.Thread(target=export, args=(DEMO, tmp_path / "bundle"), kwargs={"dtype": d}) for d in ("fp32", "fp16")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(json.loads((tmp_path / "bundle" / "manifest.json").read_text())["variants"]) == {"fp32", "fp16"}
    Model.load(tmp_path / "bundle", variant="fp16", verify=True)
