"""What `lfm-edge prepare` writes: the same answers, used only where it fits, never half there."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime as ort
import pytest
from lfm_profiles import cpu_features
from lfm_runtime import Model
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.engine.prepare import prepare
from lfm_runtime.engine.prepared import find, folder_of
from lfm_runtime.formats.contract import DECODER

ROOT = Path(__file__).resolve().parents[3]
PICTURE = ROOT / "demo" / "eval" / "images" / "0000.png"
QUESTION = "What is in this image?"

pytestmark = pytest.mark.skipif(
    tuple(int(n) for n in ort.__version__.split(".")[:2]) < (1, 23),
    reason="this onnxruntime cannot keep packed weights",
)


@pytest.fixture(scope="module")
def prepared_once(demo_bundle, tmp_path_factory) -> Path:
    bundle = Path(shutil.copytree(demo_bundle, tmp_path_factory.mktemp("prepared") / "bundle"))
    assert main(["prepare", str(bundle)]) == 0
    return bundle


@pytest.fixture
def prepared(prepared_once, tmp_path) -> Path:
    """A bundle and what was prepared of it, that a test may damage."""
    shutil.copytree(prepared_once.with_name("bundle.prepared"), tmp_path / "bundle.prepared")
    return Path(shutil.copytree(prepared_once, tmp_path / "bundle"))


def decoder_place(bundle: Path) -> Path:
    return folder_of(bundle) / "decoder_model_merged"


def answer(bundle: Path) -> str:
    return Model.load(bundle, threads=2).answer([PICTURE], QUESTION).text()


def test_same_answer_from_other_files(prepared, demo_model, caplog, monkeypatch) -> None:
    """The prepared graphs are what is loaded (the bundle's own weights are gone), and the text is the same."""
    monkeypatch.setattr("lfm_runtime.bundle.HASHED_AT_LOAD", 0)
    opened = Bundle.open(prepared)
    for stem in ("vision_encoder", "decoder_model_merged"):
        source = prepared / "onnx" / f"{stem}.onnx"
        assert find(opened, source).path == folder_of(prepared) / stem / source.name
        data = source.with_name(f"{source.name}_data")
        data.write_bytes(bytes(data.stat().st_size))  # zeros: whoever reads these answers nonsense
    assert answer(prepared) == demo_model.answer([PICTURE], QUESTION).text()
    assert not caplog.records


def test_nothing_else_in_the_bundle_changes(prepared, demo_bundle) -> None:
    assert {p.relative_to(prepared) for p in prepared.rglob("*")} == {
        p.relative_to(demo_bundle) for p in demo_bundle.rglob("*")
    }
    assert not list(prepared.parent.glob(".*"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("cut", "is cut off"),
        ("graph", "is damaged"),
        ("note", "prepared.json is missing or damaged"),
        ("no note", "prepared.json is missing or damaged"),
        ("other version", "prepared for another processor or onnxruntime"),
        ("older", "was prepared from an older"),
        ("wrong note", "prepared.json is missing or damaged"),
        ("protobuf", "is not used"),
        ("no files", "has other files than its prepared.json names"),
        ("one more", "has other files than its prepared.json names"),
    ],
)
def test_what_does_not_fit_is_not_used(prepared, demo_model, caplog, damage, says) -> None:
    place = decoder_place(prepared)
    data, graph, note = (
        place / "decoder_model_merged.onnx_data",
        place / "decoder_model_merged.onnx",
        place / "prepared.json",
    )
    if damage == "cut":
        os.truncate(data, data.stat().st_size // 2)
    elif damage == "graph":
        graph.write_bytes(bytes([graph.read_bytes()[0] ^ 1]) + graph.read_bytes()[1:])
    elif damage == "note":
        note.write_text("{")
    elif damage == "wrong note":
        note.write_text('{"source": [], "files": 3}')
        note.write_text(
            json.dumps(
                {
                    **json.loads(note.read_text()),
                    "source": Bundle.open(prepared).fingerprint(prepared / "onnx" / graph.name),
                }
            )
        )
    elif damage == "no files":
        note.write_text(json.dumps({**json.loads(note.read_text()), "files": {}}))
    elif damage == "one more":
        (place / "more.bin").write_bytes(b"x")
    elif damage == "no note":
        note.unlink()
    elif damage == "older":
        note.write_text(json.dumps({**json.loads(note.read_text()), "source": ["something else"]}))
    elif damage == "other version":
        folder_of(prepared).rename(folder_of(prepared).with_name("onnxruntime-1.0.0-abc"))
    else:  # consistent, and no graph
        import hashlib

        graph.write_bytes(b"no protobuf")
        entry = {"bytes": 11, "sha256": hashlib.sha256(b"no protobuf").hexdigest()}
        found = json.loads(note.read_text())
        note.write_text(json.dumps({**found, "files": {**found["files"], graph.name: entry}}))
    with caplog.at_level(logging.WARNING):
        assert answer(prepared) == demo_model.answer([PICTURE], QUESTION).text()
    messages = {record.getMessage() for record in caplog.records}
    assert any(says in message and "run: lfm-edge prepare" in message for message in messages), messages
    assert main(["prepare", str(prepared)]) == 0 or damage == "no note"
    caplog.clear()
    if damage != "no note":
        assert answer(prepared)
        assert not caplog.records


def test_bits_that_flipped_are_found_by_verify(prepared, monkeypatch) -> None:
    """Of files too large to be hashed at every load."""
    monkeypatch.setattr("lfm_runtime.engine.prepared.HASHED_AT_LOAD", 1 << 10)
    data = decoder_place(prepared) / "decoder_model_merged.onnx_data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0xFF
    data.write_bytes(content)
    source = prepared / "onnx" / "decoder_model_merged.onnx"
    assert find(Bundle.open(prepared), source).note is None
    assert "is damaged" in find(Bundle.open(prepared), source, verify=True).note


def test_foreign_folder_stays(demo_bundle, tmp_path, capsys) -> None:
    """A folder in the way that is not ours is left alone."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    place = folder_of(bundle) / "vision_encoder"
    place.mkdir(parents=True)
    (place / "diary.txt").write_text("dear")
    assert main(["prepare", str(bundle)]) == 2
    assert "was not made by lfm-edge prepare" in capsys.readouterr().err
    assert (place / "diary.txt").read_text() == "dear"


def test_two_at_once_and_one_killed(demo_bundle, demo_model, tmp_path) -> None:
    """Prepared graphs are whole after one of three processes has been killed."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    code = "import sys; from lfm_runtime.commands.cli import main; sys.exit(main(['prepare', sys.argv[1]]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", code, str(bundle)], env=environment, stderr=subprocess.DEVNULL)

    processes = [start() for _ in range(3)]
    place = folder_of(bundle)
    while not any(place.glob(".*.partial-*")) and processes[0].poll() is None:
        pass
    processes[0].kill()
    assert [p.wait() for p in processes][1:] == [0, 0]
    for stem in ("vision_encoder", "decoder_model_merged"):
        assert find(Bundle.open(bundle), bundle / "onnx" / f"{stem}.onnx", verify=True).path.parent == place / stem
    assert not list(place.glob(".*"))
    assert answer(bundle) == demo_model.answer([PICTURE], QUESTION).text()


def test_prepare_says_why_it_cannot(demo_bundle, tmp_path, capsys, monkeypatch) -> None:
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 20))
        assert main(["prepare", str(bundle)]) == 2
        assert "has 1 MiB free, preparing" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("lfm_runtime.engine.prepare.ort.__version__", "1.22.1")
        assert main(["prepare", str(bundle)]) == 2
        assert "needs 1.23" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("lfm_runtime.engine.prepare._same", lambda *_: False)
        assert main(["prepare", str(bundle)]) == 2
        assert "different results when prepared" in capsys.readouterr().err
    assert not list((tmp_path / "bundle.prepared").rglob("*.onnx"))
    with monkeypatch.context() as patch:
        shutil.rmtree(tmp_path / "bundle.prepared")
        patch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        assert main(["prepare", str(bundle)]) == 2
        assert f"change the permissions of {tmp_path}\n" in capsys.readouterr().err, "of what is there"
        patch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
        flags = 8  # of the fields of statvfs
        there = os.statvfs(tmp_path)
        patch.setattr("os.statvfs", lambda _: os.statvfs_result([*there[:flags], os.ST_RDONLY, *there[flags + 1 :]]))
        assert main(["prepare", str(bundle)]) == 2
        assert f"mount the disk of {tmp_path} for writing, or copy the bundle to another\n" in capsys.readouterr().err
    assert main(["prepare", str(bundle), "--prefill", "int8"]) == 2
    assert "has no variant 'int8'" in capsys.readouterr().err


def test_it_prepares_what_run_takes(gpu_bundle, tmp_path, capsys, caplog) -> None:
    """Without a word of the variant; what no longer fits is said once, with the command that mends it."""
    bundle = Path(shutil.copytree(gpu_bundle, tmp_path / "bundle"))
    assert main(["prepare", str(bundle)]) == 0
    variant = Model.load(bundle).setup.variant
    assert f"{variant} is prepared in" in capsys.readouterr().out
    assert not caplog.records
    for note in folder_of(bundle).glob("*/prepared.json"):
        note.write_text("{}")
    Model.load(bundle)
    (record,) = caplog.records
    assert f"; run: lfm-edge prepare {bundle} --variant {variant}" in record.getMessage()


def test_a_hub_folder_is_prepared_by_size_and_time(demo_bundle, tmp_path, caplog) -> None:
    """Without a manifest a graph is known by size and time."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    (bundle / "manifest.json").unlink()
    opened = Bundle.open(bundle)
    source = bundle / "onnx" / "decoder_model_merged.onnx"
    place = prepare(opened, DECODER, source)
    assert find(opened, source).path.parent == place
    os.utime(source, (1, 1))
    assert "was prepared from an older" in find(opened, source).note


def test_cpu_features(tmp_path) -> None:
    """x86 flags and Arm features with the core's type; what is no instruction set does not count."""
    x86, arm = tmp_path / "x86", tmp_path / "arm"
    x86.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni nopl fma\n\nprocessor\t: 1\nflags\t\t: other\n")
    arm.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp fphp\nCPU part\t: 0xd0b\n\n")
    assert {"avx2", "avx512_vnni", "fma"} < set(cpu_features(x86))
    assert not {"fpu", "nopl"} & set(cpu_features(x86))
    assert {"asimd", "asimddp", "fphp", "CPU part 0xd0b"} < set(cpu_features(arm))
    assert len(cpu_features(tmp_path / "none")) == 2


def test_damage_anywhere_in_small_files_is_seen_at_every_load(demo_bundle, demo_model, tmp_path, caplog) -> None:
    """Nothing is answered from it; and audits remove it before they measure."""
    from lfm_runtime.engine.prepared import tell_of_damage

    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    assert main(["prepare", str(bundle), "--quiet"]) == 0
    (weights,) = folder_of(bundle).glob("decoder_model_merged/*_data")
    data = bytearray(weights.read_bytes())
    at = len(data) * 3 // 4
    data[at : at + 64] = bytes(byte ^ 0xFF for byte in data[at : at + 64])
    weights.write_bytes(data)
    assert answer(bundle) == demo_model.answer([PICTURE], QUESTION).text()
    assert f"{weights} is damaged and not used" in caplog.text
    tell_of_damage(Bundle.open(bundle))
    assert "it was removed; make it again: lfm-edge prepare" in caplog.text
    assert not weights.exists()


def test_room_is_asked_for_once(demo_bundle, tmp_path, capsys, monkeypatch) -> None:
    """Whoever makes the room that is asked for need not make more for the next graph."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 20))
        assert main(["prepare", str(bundle)]) == 2
    found = re.search(r"has 1 MiB free, preparing \d graphs needs (\d+): (\d+) MiB more", capsys.readouterr().err)
    assert not list((tmp_path / "bundle.prepared").rglob("*.onnx"))
    assert main(["prepare", str(bundle)]) == 0
    taken = sum(file.stat().st_size for file in (tmp_path / "bundle.prepared").rglob("*") if file.is_file())
    assert taken <= int(found[1]) << 20 <= 1.5 * taken + (2 << 20)
    with monkeypatch.context() as patch:  # again, each replaces the one before
        patch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 20))
        assert main(["prepare", str(bundle)]) == 2
    again = re.search(r"preparing \d graphs needs (\d+)", capsys.readouterr().err)
    assert int(again[1]) < int(found[1])


def test_a_file_where_prepared_graphs_go(demo_bundle, tmp_path, capsys) -> None:
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    (tmp_path / "bundle.prepared").write_text("mine")
    assert main(["prepare", str(bundle)]) == 2
    assert "bundle.prepared is a file; move it away" in capsys.readouterr().err
    assert (tmp_path / "bundle.prepared").read_text() == "mine"
