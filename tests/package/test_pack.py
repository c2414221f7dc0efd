"""Packing: the same bytes from the same inputs, nothing but the variant; unpacking: everything or nothing, whatever the
archive holds.
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
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


@pytest.fixture
def packed(demo_bundle, tmp_path) -> Path:
    pack(demo_bundle, ["fp32"], tmp_path / "cam.tar", Extras(profile=read("pi5")))
    return tmp_path / "cam.tar"


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
    assert "int8" not in json.dumps({key: value for key, value in found.items() if key != "files"})
    assert list(found["golden"]) == ["fp32"]
    before = sorted(bundle.rglob("*"))
    with pytest.raises(BundleError, match=r"int8\.onnx and 2 more, which the archive lacks and would be lost"):
        unpack(tmp_path / "a.tar", bundle)
    assert sorted(bundle.rglob("*")) == before


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


# ---------------------------------------------------------------------------------------------------- not to be trusted


def entry(name: str, data: bytes = b"x", **more) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def tampered(packed: Path, added: list[tuple[tarfile.TarInfo, bytes]], without: str = "") -> Path:
    out = packed.with_name("bad.tar")
    with tarfile.open(packed) as old, tarfile.open(out, "w") as new:
        for e in old:
            if e.name != without:
                new.addfile(e, old.extractfile(e))
        for info, data in added:
            new.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return out


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ([entry("../evil")], "outside of its folder"),
        ([entry("cam/../../evil")], "outside of its folder"),
        ([entry("/tmp/evil")], "outside of its folder"),
        ([entry("evil")], "outside of its folder"),
        ([entry("cam\\..\\evil")], "outside of its folder"),
        ([entry("other/file")], "no manifest.json in one folder"),
        ([entry("cam/link", b"", type=tarfile.SYMTYPE, linkname="/etc")], "is a link, a device or sparse"),
        ([entry("cam/hard", b"", type=tarfile.LNKTYPE, linkname="cam/config.json")], "is a link, a device or sparse"),
        ([entry("cam/null", b"", type=tarfile.CHRTYPE)], "is a link, a device or sparse"),
        ([entry("cam/pipe", b"", type=tarfile.FIFOTYPE)], "is a link, a device or sparse"),
        ([entry("cam/config.json")], "twice"),
        ([entry("cam/./config.json")], "twice"),
        ([entry("cam/extra")], "its manifest.json says nothing"),
    ],
)
def test_tampered(packed, tmp_path, added, message) -> None:
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    bad = tampered(packed, added)
    with pytest.raises(BundleError, match=message.replace("(", "\\(")):
        unpack(bad, tmp_path / "there")
    assert not (tmp_path / "there").exists() and not Path("/tmp/evil").exists()
    assert sorted(str(p) for p in tmp_path.rglob("*") if p != bad) == before


def test_huge_sparse_file(packed, tmp_path) -> None:
    """A header that promises a terabyte: refused by the manifest's size, before a byte is written."""
    info, _ = entry("cam/onnx/decoder_model_merged.onnx_data")
    with tarfile.open(packed) as old, (tmp_path / "bad.tar").open("wb") as f, tarfile.open(fileobj=f, mode="w") as new:
        for e in old:
            if e.name != info.name:
                new.addfile(e, old.extractfile(e))
    info.size = 1 << 40
    data = (tmp_path / "bad.tar").read_bytes().rstrip(b"\0")
    data += b"\0" * (-len(data) % 512) + info.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(BundleError, match=r"bytes|cut off"):
        unpack(tmp_path / "bad.tar", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_missing_cut_and_damaged(packed, tmp_path) -> None:
    with pytest.raises(BundleError, match=r"lacks config\.json"):
        unpack(tampered(packed, [], without="cam/config.json"), tmp_path / "there")
    whole = packed.read_bytes()
    for size in (0, 100, 5000, len(whole) // 2, len(whole) - 20_000):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(BundleError):
            unpack(tmp_path / "cut.tar", tmp_path / "there")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    (tmp_path / "flipped.tar").write_bytes(flipped)
    with pytest.raises(BundleError, match="is damaged"):
        unpack(tmp_path / "flipped.tar", tmp_path / "there")
    with pytest.raises(BundleError, match="does not exist"):
        unpack(tmp_path / "nowhere.tar", tmp_path / "there")
    assert not (tmp_path / "there").exists()
    assert not list(tmp_path.glob(".there*"))


def test_what_was_there_stays(packed, tmp_path, demo_bundle) -> None:
    unpack(packed, tmp_path / "there")
    before = (tmp_path / "there" / "manifest.json").read_bytes()
    with pytest.raises(BundleError):
        unpack(tampered(packed, [entry("cam/extra")]), tmp_path / "there")
    assert (tmp_path / "there" / "manifest.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(BundleError, match="is a folder that lfm-edge did not make"):
        unpack(packed, tmp_path / "mine")
    (tmp_path / "there" / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match=r"not valid JSON.* so what is in .*there is not known; remove it"):
        unpack(packed, tmp_path / "there")


def test_a_read_only_bundle_is_not_replaced(packed, tmp_path, monkeypatch) -> None:
    unpack(packed, tmp_path / "there")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))  # root may always
    with pytest.raises(BundleError, match="there is read-only; change its permissions"):
        unpack(packed, tmp_path / "there")
    assert not list(tmp_path.glob(".there.*"))


# ------------------------------------------------------------------------------------------------ hostile archives


def test_an_archive_that_describes_itself_endlessly(tmp_path) -> None:
    """Python would read what describes an entry whole into memory, however long it says it is."""
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.XHDTYPE, 1 << 31
    (tmp_path / "bad.tar").write_bytes(entry.tobuf(tarfile.USTAR_FORMAT) + b"\0" * 1024)
    with pytest.raises(BundleError, match="is not a tar file"):
        unpack(tmp_path / "bad.tar", tmp_path / "there")


@pytest.mark.parametrize(
    "manifest",
    [b"[" * 200_000, b'{"files": {"x": {"bytes": 1e999}}}', b'{"files": []}', b"\xff\xfe", b"{}"],
    ids=["deep", "infinite", "list", "bytes", "empty"],
)
def test_manifests_that_break_readers(manifest, tmp_path, capsys) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        entry = tarfile.TarInfo("cam/manifest.json")
        entry.size = len(manifest)
        tar.addfile(entry, io.BytesIO(manifest))
    assert main(["unpack", str(tmp_path / "bad.tar"), "-o", str(tmp_path / "there")]) == 2
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "manifest.json").write_bytes(manifest)
    assert main(["verify", str(tmp_path / "folder")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "there").exists()


def test_compressed_by_something_else(packed, tmp_path) -> None:
    """Only what `pack` writes is opened: damage in other formats has errors of its own, and little can become much."""
    import gzip

    (tmp_path / "cam.tar.gz").write_bytes(gzip.compress(packed.read_bytes(), 1))
    with pytest.raises(BundleError, match="is compressed; unpack it first: gunzip"):
        unpack(tmp_path / "cam.tar.gz", tmp_path / "there")


@pytest.mark.parametrize(
    ("name", "begins", "do"),
    [
        ("cam.tar.zst", b"\x28\xb5\x2f\xfd", "zstd -d"),
        ("cam.tar.gz", b"\x1f\x8b\x08", "gunzip"),
        ("cam.tar.xz", b"\xfd7zXZ\0", "unxz"),
        ("cam.tar.000", b"", "is one part of several; name the whole"),
        ("cam.tar", b"<html>", "is not a tar file, or is cut off; copy it again"),
    ],
)
def test_what_is_no_tar_is_told_from_a_damaged_one(tmp_path, name, begins, do) -> None:
    (tmp_path / name).write_bytes(begins + bytes(range(256)) * 8)
    with pytest.raises(BundleError, match=re.escape(do)):
        unpack(tmp_path / name, tmp_path / "there")


def test_an_archive_of_tar_itself(packed, tmp_path) -> None:
    """`tar cf` names folders as well, and may begin names with ./; that is honest."""
    unpack(packed, tmp_path / "cam")
    for words in (["cam"], ["./cam"]):
        subprocess.run(["tar", "cf", "own.tar", *words], cwd=tmp_path, check=True)
        unpack(tmp_path / "own.tar", tmp_path / "again")
        assert list(Bundle.open(tmp_path / "again").variants) == ["fp32"]
    subprocess.run(
        ["tar", "cf", "flat.tar", "-C", "cam", *sorted(p.name for p in (tmp_path / "cam").iterdir())],
        cwd=tmp_path,
        check=True,
    )
    with pytest.raises(BundleError, match=r"outside of a folder; make it with .*tar cf cam\.tar cam"):
        unpack(tmp_path / "flat.tar", tmp_path / "flat")


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
    assert "it would also use int8, which the bundle lacks: lfm-edge quantize" in said
    unpack(tmp_path / "cam.tar", tmp_path / "cam")
    assert read(str(tmp_path / "cam" / "profile.toml")).name == "pi5"


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
