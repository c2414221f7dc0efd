"""Archives that were damaged, tampered with or never packed by us: nothing of them is believed, what was there stays."""

import io
import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
from lfm_package.unpack import unpack
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import BundleError


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
    with pytest.raises(BundleError, match=r"there is read-only; change the permissions of .*there"):
        unpack(packed, tmp_path / "there")
    assert not list(tmp_path.glob(".there.*"))


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
