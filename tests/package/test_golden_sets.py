"""A user's own golden set travels with a packed bundle, and is asked on the device."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from lfm_package.pack import pack
from lfm_package.unpack import unpack
from lfm_package.verify import verify
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.formats.manifest import File, Manifest, file_hash
from lfm_runtime.model import Model

EVALUATION = Path(__file__).resolve().parents[2] / "demo" / "eval" / "images"


def test_a_golden_set_travels_with_the_bundle(demo_bundle, tmp_path, capsys, caplog) -> None:
    """selftest asks its questions on the device, and fails where more than one in ten answers differ."""
    from lfm_audit import selftest
    from lfm_runtime.questions import GOLDEN_QUESTIONS, GoldenSet

    lines = [{"image": f"{n:04d}.png", "question": "What is in this image?"} for n in range(12)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["pack", str(demo_bundle), "--variant", "fp32", "--golden", str(tmp_path / "mine.jsonl")]
    assert main([*words, "-o", str(tmp_path / "cam.tar")]) == 2
    assert "mine.jsonl, line 1: 0000.png is not in" in capsys.readouterr().err
    shutil.copytree(EVALUATION, tmp_path / "images")
    lines = [{**o, "image": f"images/{o['image']}"} for o in lines]
    (tmp_path / "text.png").write_text("none")
    for odd, says in (
        ({"image": "text.png", "question": "?"}, r"mine.jsonl, line 2: .*text.png"),
        ({**lines[0], "question": "the <image>?"}, r"mine.jsonl, line 2: .* do not write <image>"),
    ):
        (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, [lines[0], odd])))
        assert main([*words, "-o", str(tmp_path / "cam.tar")]) == 2
        assert re.search(says, capsys.readouterr().err)
    lines[3]["answer"] = "seventeen elephants"
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main([*words, "-o", str(tmp_path / "cam.tar")]) == 0
    assert "answers 1 of 1 otherwise than the file" in caplog.text
    assert "line 4: " in caplog.text
    unpack(tmp_path / "cam.tar", tmp_path / "cam")
    assert verify(tmp_path / "cam") == []
    golden = GoldenSet.of(Bundle.open(tmp_path / "cam"))
    model = Model.load(demo_bundle, threads=1)
    wanted = [model.answer(tmp_path / o["image"], o["question"], temperature=0).text() for o in lines]
    assert [one.answer for one in golden.answers] == wanted

    def checked(wrong: int) -> str:
        answers = [
            *({**vars(one), "answer": "x"} for one in golden.answers[:wrong]),
            *map(vars, golden.answers[wrong:]),
        ]
        path = tmp_path / "cam" / GOLDEN_QUESTIONS
        path.write_text(json.dumps({"schema": 1, "setup": "s", "answers": answers}))
        manifest = Manifest.of(tmp_path / "cam")
        manifest.with_files({GOLDEN_QUESTIONS: File(path.stat().st_size, file_hash(path))}).write(tmp_path / "cam")
        return selftest._golden_questions(selftest.Installed(tmp_path / "cam", "generic"))

    assert checked(0) == "12 of 12 answers are those of s"
    assert "instead of 'x'" in checked(1)
    with pytest.raises(selftest.CheckError, match=r"10 of 12 answers .* at most 10% may differ"):
        checked(2)
    pack(tmp_path / "cam", ["fp32"], tmp_path / "again.tar")
    unpack(tmp_path / "again.tar", tmp_path / "again")
    assert GoldenSet.of(Bundle.open(tmp_path / "again")) is None


def test_golden_answers_are_of_what_is_packed(demo_bundle, tmp_path, capsys, monkeypatch) -> None:
    """Not of the decoder for prompts that this machine would use, and that the pack lacks."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    for variant in ("int8", "int4"):
        assert main(["quantize", str(bundle), "--variant", variant, "--quiet"]) == 0
    (tmp_path / "mine.jsonl").write_text(
        json.dumps({"image": str(EVALUATION / "0007.png"), "question": "Where is the red cross?"})
    )
    monkeypatch.setenv("LFM_EDGE_PROFILE", "x86-avx512-vnni")
    words = ["pack", str(bundle), "--variant", "int4", "--golden", str(tmp_path / "mine.jsonl")]
    for more, reader in (([], False), (["--prefill", "int8"], True), (["--prefill", "none"], False)):
        capsys.readouterr()
        assert main([*words, *more, "-o", str(tmp_path / "cam.tar"), "--force"]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("golden set"))
        assert ("prefill int8" in line) is reader
