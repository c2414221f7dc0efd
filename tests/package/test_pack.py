"""Packing: the same bytes from the same inputs, nothing but the variant, and what a profile asks for."""

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from lfm_package.pack import Extras, pack
from lfm_package.unpack import unpack
from lfm_package.verify import verify
from lfm_profiles import read
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import BundleError
from lfm_runtime.model import Model
from lfm_runtime.setup.resolve import resolve

QUESTION = "What is in this image?"


def test_unpacked_is_what_was_packed(demo_bundle, packed, tmp_path) -> None:
    unpack(packed, tmp_path / "there")
    assert verify(tmp_path / "there") == []
    there = Bundle.open(tmp_path / "there")
    assert list(there.variants) == ["fp32"]
    for name in (
        "config.json",
        "prompt.json",
        "README.md",
        "onnx/vision_encoder.onnx",
        "onnx/decoder_model_merged.onnx_data",
    ):
        if (demo_bundle / name).exists():
            assert (tmp_path / "there" / name).read_bytes() == (demo_bundle / name).read_bytes()
    said = [
        Model.load(place, profile="generic").answer([], "Hello", temperature=0, max_new_tokens=8).text()
        for place in (demo_bundle, tmp_path / "there")
    ]
    assert said[0] == said[1]
    profile = tmp_path / "there" / "profile.toml"
    assert read(str(profile)).prefill == read("pi5").prefill
    assert (
        main(["run", str(tmp_path / "there"), "-p", "Hello", "--max-new-tokens", "2", "--profile", str(profile)]) == 0
    )


def test_one_variant_alone(demo_bundle, tmp_path) -> None:
    """Of a bundle with two variants, one; the manifest says no word of the other."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "two"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    for stem, name in list(manifest["variants"]["fp32"].items()):
        other = name.replace(".onnx", "_int8.onnx")
        for suffix in ("", "_data"):
            shutil.copy(bundle / (name + suffix), bundle / (other + suffix))
            manifest["files"][other + suffix] = manifest["files"][name + suffix]
        manifest["variants"].setdefault("int8", {})[stem] = other
        manifest["graphs"][other] = {**manifest["graphs"][name], "data": [f"{other}_data"]}
    manifest["quality"] = {"int8": {"kl": 0.1}}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    pack(bundle, ["fp32"], tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        names = tar.getnames()
        found = json.loads(tar.extractfile("a/manifest.json").read())
    assert not [name for name in names if "int8" in name]
    said = json.dumps({key: value for key, value in found.items() if key != "files"})
    assert "int8" not in said.replace("amx_int8", ""), "but what the processor has that made its golden values"
    assert list(found["golden"]) == ["fp32"]
    before = sorted(bundle.rglob("*"))
    with pytest.raises(BundleError, match=r"int8\.onnx and 2 more, which the archive lacks and would be lost"):
        unpack(tmp_path / "a.tar", bundle)
    assert sorted(bundle.rglob("*")) == before


def test_a_loss_that_was_measured_otherwise_is_told(bundle_copy, tmp_path, capsys) -> None:
    """For another board, or with the checkpoint's image settings where the board's are others."""
    path = bundle_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    words = ["pack", str(bundle_copy), "--variant", "fp32", "--force", "-o", str(tmp_path / "cam.tar"), "--profile"]

    def said(profile: str, board: dict | None) -> str:
        found = {"kl": 0.1, "against": "fp32", **({"board": board} if board else {})}
        path.write_text(json.dumps({**manifest, "quality": {"fp32": found}}))
        assert main([*words, profile]) == 0
        return capsys.readouterr().out

    tiles = {"profile": "pi5", "prefill": None, "changes": ["do_image_splitting off instead of on"]}
    how = "as pi5 (do_image_splitting off instead of on)"
    again = f"lfm-edge quality {bundle_copy} --variant fp32 --profile x86-avx2 --images PHOTOS"
    assert f"  the bundle knows fp32's loss as measured otherwise, {how}; as here: {again}\n" in said("x86-avx2", tiles)
    assert "measured otherwise, with the checkpoint's image settings; as here: " in said("pi5", None)
    assert "measured otherwise" not in said("pi4", tiles), "it has the same image settings"
    assert "measured otherwise" not in said("x86-avx2", None)
    tiles |= {"prefill": "int8", "changes": ["max_new_tokens 64 instead of 128"]}
    assert "measured otherwise, with int8 for the prefill; as here: " in said("x86-avx2", tiles)


def test_the_same_bytes(demo_bundle, tmp_path) -> None:
    """From a copy with other times and permissions, in another order, at another place."""
    other = Path(shutil.copytree(demo_bundle, tmp_path / "elsewhere", copy_function=shutil.copy))
    for n, path in enumerate(sorted(other.rglob("*"), reverse=True)):
        os.utime(path, (n, n))
        if path.is_file():
            path.chmod(0o600)
    (tmp_path / "b").mkdir()
    pack(demo_bundle, ["fp32"], tmp_path / "cam.tar")
    pack(other, ["fp32"], tmp_path / "b" / "cam.tar")
    assert (tmp_path / "cam.tar").read_bytes() == (tmp_path / "b" / "cam.tar").read_bytes()
    with tarfile.open(tmp_path / "cam.tar") as tar:
        assert {(e.mtime, e.uid, e.gid, e.uname, e.mode) for e in tar} == {(0, 0, 0, "", 0o644)}
    digest = hashlib.sha256((tmp_path / "cam.tar").read_bytes()).hexdigest()
    assert (tmp_path / "cam.tar.sha256").read_text() == f"{digest}  cam.tar\n"


def test_parts(demo_bundle, packed, tmp_path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "cam.tar.099").write_text("of an earlier one")
    written = pack(demo_bundle, ["fp32"], folder / "cam.tar", Extras(profile=read("pi5"), split=10_000_000))
    names = ["cam.tar.000", "cam.tar.001", "cam.tar.002", "cam.tar.sha256", "cam.cdx.json"]
    assert [p.name for p in written] == names
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)
    assert all(path.stat().st_size <= 10_000_000 for path in written)
    assert b"".join(path.read_bytes() for path in written[:3]) == packed.read_bytes()
    for name in names[3:]:
        assert (folder / name).read_text() == (tmp_path / name).read_text()
    unpack(folder / "cam.tar", tmp_path / "joined")
    unpack(packed, tmp_path / "whole")
    assert (tmp_path / "joined" / "SHA256SUMS").read_bytes() == (tmp_path / "whole" / "SHA256SUMS").read_bytes()
    written[2].write_bytes(written[2].read_bytes()[:-50_000])
    with pytest.raises(BundleError, match=r"is not a tar file, or is cut off|copy"):
        unpack(folder / "cam.tar", tmp_path / "joined")
    written[2].unlink()
    with pytest.raises(BundleError, match=r"is cut off: its last part is cam.tar.001; copy the parts after it"):
        unpack(folder / "cam.tar", tmp_path / "joined")
    written[2].write_bytes(b"")
    written[1].unlink()
    with pytest.raises(BundleError, match=r"cam.tar.001 is missing between the parts"):
        unpack(folder / "cam.tar", tmp_path / "joined")
    assert verify(tmp_path / "joined") == []


def test_packed_and_unpacked_by_command_is_whole(demo_bundle, tmp_path, capsys) -> None:
    assert main(["pack", str(demo_bundle), "--variant", "fp32", "-o", str(tmp_path / "x.tar")]) == 0
    assert "x.tar.sha256" in capsys.readouterr().out
    assert main(["unpack", str(tmp_path / "x.tar"), "-o", str(tmp_path / "x")]) == 0
    assert main(["unpack", str(tmp_path / "x.tar"), "-o", str(tmp_path / "x")]) == 0, "again: the same"
    assert main(["verify", str(tmp_path / "x")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variant", "int4", "-o", "x.tar"], "has no variant 'int4'"),
        (["--variant", "fp32", "-o", "x.zip"], "is not a .tar"),
        (["--variant", "fp32", "-o", "."], ". is a folder; name a file, such as cam.tar"),
        (["--variant", "fp32", "-o", "/"], "/ is a folder; name a file, such as /cam.tar"),
        (["--variant", "fp32", "-o", "nowhere/x.tar"], "is not a folder"),
        (["--variant", "fp32", "-o", "x.tar", "--split", "7"], "--split 7 is impossible"),
        (["--variant", "fp32", "-o", "x.tar", "--split", "0"], "--split 0 is impossible"),
        (["--variant", "fp32", "-o", "x.tar", "--split", "much"], "--split much is impossible"),
        (
            ["--variant", "fp32", "--prefill", "fp32", "-o", "x.tar"],
            "prefill fp32 has no effect beside the variant fp32",
        ),
        (["--variant", "fp32", "--profile", "zzz", "-o", "x.tar"], "there is no profile 'zzz'"),
    ],
)
def test_a_pack_that_cannot_be_leaves_nothing_behind(
    demo_bundle, tmp_path, monkeypatch, capsys, words, message
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pack", str(demo_bundle), *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_damaged_weights_are_not_packed(bundle_copy, tmp_path) -> None:
    weights = bundle_copy / "onnx" / "decoder_model_merged.onnx_data"
    (tmp_path / "x.tar").write_text("before")
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match="is damaged"):
        pack(bundle_copy, ["fp32"], tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_text() == "before"


def test_only_what_pack_wrote_is_replaced(demo_bundle, tmp_path, capsys) -> None:
    words = ["pack", str(demo_bundle), "--variant", "fp32", "-o", str(tmp_path / "cam.tar")]
    (tmp_path / "cam.tar").write_bytes(b"my backup")
    assert main(words) == 2
    assert "exists, and lfm-edge pack did not write it" in capsys.readouterr().err
    assert (tmp_path / "cam.tar").read_bytes() == b"my backup"
    assert main([*words, "--force"]) == 0
    assert main(words) == 0


def test_what_the_profile_would_choose_is_packed(demo_bundle, tmp_path, capsys) -> None:
    """Without --variant; and what the profile changes of the checkpoint's settings is said, and what it lacks."""
    assert main(["pack", str(demo_bundle), "-o", str(tmp_path / "cam.tar")]) == 2
    assert "name --variant, or the profile of the device" in capsys.readouterr().err
    assert main(["pack", str(demo_bundle), "--profile", "pi5", "-o", str(tmp_path / "cam.tar")]) == 0
    said = capsys.readouterr().out
    assert "profile pi5: fp32\n" in said
    assert "do_image_splitting off instead of on" in said
    assert "it would also use int4, which the bundle lacks: lfm-edge quantize" in said
    unpack(tmp_path / "cam.tar", tmp_path / "cam")
    assert read(str(tmp_path / "cam" / "profile.toml")).name == "pi5"


@pytest.mark.parametrize(("images", "more"), [(3, " --calibration PHOTOS\n"), (0, "\n"), (None, "\n")])
def test_what_is_lacking_is_made_as_the_others_were(bundle_copy, tmp_path, capsys, images, more) -> None:
    path = bundle_copy / "manifest.json"
    made = {"fp32": {"calibration": images if images is None else {"images": images}}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization": made}))
    assert main(["pack", str(bundle_copy), "--profile", "pi5", "-o", str(tmp_path / "cam.tar")]) == 0
    assert f"lacks: lfm-edge quantize {bundle_copy} --variant int4{more}" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS"])
def test_a_manifest_that_is_a_pipe(bundle_copy, name, capsys) -> None:
    (bundle_copy / name).unlink(missing_ok=True)
    os.mkfifo(bundle_copy / name)
    assert main(["verify", str(bundle_copy)]) == 1
    assert f"{name} is not a plain file" in capsys.readouterr().out


def test_a_whole_one_beside_parts_of_another(demo_bundle, tmp_path) -> None:
    """Packing again removes the other form; what is copied together all the same is not guessed at."""
    pack(demo_bundle, ["fp32"], tmp_path / "g[1].tar")
    pack(demo_bundle, ["fp32"], tmp_path / "g[1].tar", Extras(split=10_000_000))
    assert not (tmp_path / "g[1].tar").exists()
    unpack(tmp_path / "g[1].tar", tmp_path / "there")
    (tmp_path / "g[1].tar").write_bytes(b"")
    with pytest.raises(BundleError, match="exist, perhaps from different runs"):
        unpack(tmp_path / "g[1].tar", tmp_path / "there")
    pack(demo_bundle, ["fp32"], tmp_path / "g[1].tar")
    assert sorted(p.name for p in tmp_path.glob("*.tar*")) == ["g[1].tar", "g[1].tar.sha256"]


def test_the_profile_says_what_is_packed(demo_bundle, tmp_path) -> None:
    """pi5 prefers other variants; the one that was packed is meant."""
    assert main(["pack", str(demo_bundle), "--variant", "fp32", "--profile", "pi5", "-o", str(tmp_path / "x.tar")]) == 0
    unpack(tmp_path / "x.tar", tmp_path / "there")
    assert read(str(tmp_path / "there" / "profile.toml")).variant == ("fp32",)


def test_a_packed_profile_is_what_runs(demo_bundle, tmp_path, capsys, monkeypatch) -> None:
    """By default; another one that is named comes first. What lies there without the manifest's word does nothing."""
    monkeypatch.delenv("LFM_EDGE_PROFILE", raising=False)
    (tmp_path / "mine.toml").write_text("max_image_tokens = 32\nmin_image_tokens = 16\ndo_image_splitting = false\n")
    words = ["pack", str(demo_bundle), "--profile", str(tmp_path / "mine.toml"), "--variant", "fp32"]
    assert main([*words, "-o", str(tmp_path / "cam.tar")]) == 0
    capsys.readouterr()
    assert main(["unpack", str(tmp_path / "cam.tar"), "-o", str(tmp_path / "cam")]) == 0
    assert f"packed with it, {tmp_path / 'cam' / 'profile.toml'}" in capsys.readouterr().out
    assert resolve(tmp_path / "cam").images.max_image_tokens == 32
    assert resolve(tmp_path / "cam", "auto").images.max_image_tokens == 64
    shutil.copytree(tmp_path / "cam", tmp_path / "without")
    (tmp_path / "without" / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"manifest.json is missing, and SHA256SUMS names it"):
        resolve(tmp_path / "without")
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "without")]) == 2
    assert "manifest.json is missing, and SHA256SUMS names it; copy the bundle again" in capsys.readouterr().err
    monkeypatch.setenv("LFM_EDGE_PROFILE", "generic")
    assert resolve(tmp_path / "cam").images.max_image_tokens == 64
    monkeypatch.delenv("LFM_EDGE_PROFILE")
    shutil.copytree(demo_bundle, tmp_path / "plain")
    shutil.copy(tmp_path / "mine.toml", tmp_path / "plain" / "profile.toml")
    assert resolve(tmp_path / "plain").images.max_image_tokens == 64


def test_an_edited_profile_is_not_replaced(demo_bundle, tmp_path) -> None:
    """The archive's own is written again; what the user made of it is kept."""
    assert main(["pack", str(demo_bundle), "--profile", "pi5", "-o", str(tmp_path / "cam.tar")]) == 0
    for _ in range(2):
        unpack(tmp_path / "cam.tar", tmp_path / "cam")
    edited = tmp_path / "cam" / "profile.toml"
    edited.write_text(edited.read_text() + "\nthreads = 2\n")
    with pytest.raises(BundleError, match=r"profile\.toml was edited and would be lost"):
        unpack(tmp_path / "cam.tar", tmp_path / "cam")
    assert "threads = 2" in edited.read_text()
    edited.rename(tmp_path / "mine.toml")
    unpack(tmp_path / "cam.tar", tmp_path / "cam")


@pytest.mark.parametrize("name", ["cam.tar", "cam.tar.sha256", "cam.cdx.json", "cam.tar.000", "cam.tar.001"])
def test_what_is_the_users_beside_a_pack_stays(name, demo_bundle, tmp_path, capsys) -> None:
    """The sum and the bill of materials are outputs too, and parts of an archive are removed: of ours alone."""
    words = ["pack", str(demo_bundle), "--variant", "fp32", "-o", str(tmp_path / "cam.tar")]
    (tmp_path / name).write_text("mine")
    assert main(words) == 2
    assert f"{name} exists, and lfm-edge pack did not write it" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "mine")]
    assert main([*words, "--force"]) == 0
    assert main(words) == 0
    assert main([*words, "--split", "9M"]) == 0
    assert main(words) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cam.cdx.json", "cam.tar", "cam.tar.sha256"]
    (tmp_path / "link.tar").symlink_to("cam.tar")
    assert main([*words[:-1], str(tmp_path / "link.tar"), "--force"]) == 2
    assert "link.tar is a link; name what it leads to" in capsys.readouterr().err
    assert (tmp_path / "link.tar").is_symlink()
