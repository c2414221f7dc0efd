"""`lfm-edge clean`: what it removes, and what it leaves alone."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

from lfm_runtime.commands.cli import main
from lfm_runtime.engine.prepared import folder_of


def test_only_leftovers_are_removed(bundle_copy, capsys) -> None:
    place, name = bundle_copy.parent, bundle_copy.name
    here = folder_of(bundle_copy)
    gone = [place / f".{name}.int8-work", place / f".{name}.partial-abc", here.parent / "onnxruntime-1.0-0123456789ab"]
    kept = [here, place / f".{name}.int4-work", place / f".{name}2.int8-work", place / "other", here.parent / "notes"]
    kept.append(here.parent / "onnxruntime-mine")  # not of prepare: its folders have a prepared.json each
    for folder in (*gone, *kept):
        (folder / "decoder").mkdir(parents=True)
        (folder / "decoder" / "file").write_bytes(bytes(1000))
    (gone[2] / "decoder" / "prepared.json").write_text("{}")
    before = {path: path.read_bytes() for path in bundle_copy.rglob("*") if path.is_file()}
    descriptor = os.open(kept[1], os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # a run that is at it
    try:
        assert main(["clean", str(bundle_copy), "--dry-run"]) == 0
        assert all(folder.exists() for folder in gone)
        assert main(["clean", str(bundle_copy)]) == 0
    finally:
        os.close(descriptor)
    said = capsys.readouterr().out
    assert all(said.count(str(folder)) == 2 for folder in gone)
    assert not any(folder.exists() for folder in gone)
    assert all(folder.exists() for folder in kept)
    assert before == {path: path.read_bytes() for path in bundle_copy.rglob("*") if path.is_file()}


def test_what_was_prepared_of_graphs_that_are_gone(bundle_copy, capsys) -> None:
    """Another bundle was unpacked in its place, or a variant quantized again."""
    assert main(["prepare", str(bundle_copy)]) == 0
    here = folder_of(bundle_copy)
    (stays, changed) = sorted(path for path in here.iterdir() if path.is_dir())[:2]
    other = Path(shutil.copytree(stays, here / "decoder_model_merged_q4"))
    note = json.loads((changed / "prepared.json").read_text())
    (changed / "prepared.json").write_text(json.dumps({**note, "source": ["another"]}))
    capsys.readouterr()
    assert main(["clean", str(bundle_copy)]) == 0
    assert not other.exists()
    assert not changed.exists()
    assert stays.exists()


def test_what_cannot_be_removed_is_named(bundle_copy, capsys, monkeypatch) -> None:
    left = bundle_copy.parent / f".{bundle_copy.name}.partial-abc"
    left.mkdir()

    def refuse(_):
        raise PermissionError(13, "Permission denied", "tokenizer.json")  # a name without its folder, as rmtree gives

    monkeypatch.setattr("shutil.rmtree", refuse)
    assert main(["clean", str(bundle_copy)]) == 2
    assert f"{left} cannot be removed (Permission denied); change its permissions" in capsys.readouterr().err


def test_a_first_export_that_was_killed(tmp_path, capsys) -> None:
    """Its leftovers are removed although there is no bundle; a name without leftovers is no bundle's."""
    (tmp_path / ".new.partial-abc").mkdir()
    assert main(["clean", str(tmp_path / "new")]) == 0
    assert not list(tmp_path.iterdir())
    assert main(["clean", str(tmp_path / "new")]) == 2
    assert "does not exist, and nothing of a bundle of this name lies there" in capsys.readouterr().err
    (tmp_path / "photos").mkdir()
    assert main(["clean", str(tmp_path / "photos")]) == 2
    assert "is not a bundle; name the folder of one" in capsys.readouterr().err


def test_beside_a_damaged_bundle(bundle_copy, capsys) -> None:
    (bundle_copy / "onnx" / "vision_encoder.onnx").unlink()
    work = bundle_copy.with_name(f".{bundle_copy.name}.int8-work")
    work.mkdir()
    assert main(["clean", str(bundle_copy)]) == 0
    assert not work.exists()
    assert main(["clean", str(bundle_copy)]) == 0
