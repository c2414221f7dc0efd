"""prompt.json: what is compiled from a checkpoint's files, and folders without one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from lfm_export.prompt import CONVERSATIONS, NEEDED, compile_prompt
from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import BundleError, EdgeError, PromptError
from lfm_runtime.images.layout import ImageSettings, lay_out
from lfm_runtime.text.messages import Conversation, Message
from lfm_runtime.text.prompt import PromptBuilder
from lfm_runtime.text.spec import PromptSpec, compile_on_device

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo" / "checkpoint"


def test_a_folder_without_prompt_json_gives_the_same_ids(tmp_path) -> None:
    exported, on_device = PromptBuilder(compile_prompt(DEMO)), PromptBuilder(compile_on_device(DEMO))
    plan = lay_out(900, 700, ImageSettings(tile_size=256, max_image_tokens=64, min_image_tokens=16))
    for chat in (*NEEDED, *CONVERSATIONS[:8]):
        plans = [plan] * sum(m.images for m in chat.messages)
        assert exported.render(chat, plans) == on_device.render(chat, plans)
    shutil.copytree(DEMO, tmp_path / "c")
    (tmp_path / "c" / "chat_template.jinja").unlink()
    without = PromptBuilder(compile_on_device(tmp_path / "c"))
    assert without.render([Message.user("Hi", 1)], [plan]) == exported.render([Message.user("Hi", 1)], [plan])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw["image_tokens"].update(start="zzz"), "the tokenizer has no zzz token"),
        (lambda raw: raw["image_tokens"].update(tile="zz{row}{column}"), "the tokenizer has no zz12 token"),
        (lambda raw: raw["image_tokens"].update(image="<image>x"), "the tokenizer has no <image>x token"),
        (lambda raw: raw["chat"].update(template=""), "the chat template is empty"),
    ],
)
def test_a_prompt_json_that_cannot_be_is_named(demo_bundle, tmp_path, change, says) -> None:
    """Where no manifest has its hash."""
    folder = Path(shutil.copytree(demo_bundle, tmp_path / "hub"))
    (folder / "manifest.json").unlink()
    raw = json.loads((folder / "prompt.json").read_text())
    change(raw)
    (folder / "prompt.json").write_text(json.dumps(raw))
    with pytest.raises(EdgeError) as caught:
        Bundle.open(folder).prompts  # noqa: B018
    assert says in str(caught.value)
    assert "prompt.json" in str(caught.value)


@pytest.mark.parametrize("length", [0, -1])
def test_a_context_that_cannot_be(demo_bundle, tmp_path, length) -> None:
    folder = Path(shutil.copytree(demo_bundle, tmp_path / "hub"))
    (folder / "manifest.json").unlink()
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["max_position_embeddings"] = length
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=rf"config.json has .*max_position_embeddings is {length}"):
        Bundle.open(folder)


@pytest.mark.parametrize("compile_it", [compile_prompt, compile_on_device])
def test_what_makes_prompts_other_than_the_models_is_refused(tmp_path, compile_it) -> None:
    """A start token that no file defines, and an image token that the tokenizer takes for text."""
    shutil.copytree(DEMO, tmp_path / "c")
    (tmp_path / "c" / "tokenizer_config.json").unlink()
    with pytest.raises(PromptError, match=r"has no tokenizer_config.json, which defines the bos_token"):
        compile_it(tmp_path / "c")
    shutil.copytree(DEMO, tmp_path / "d")
    spec = json.loads((tmp_path / "d" / "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<image>"]
    spec["model"]["vocab"]["<image>"] = max(spec["model"]["vocab"].values()) + 1000
    (tmp_path / "d" / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(PromptError, match="<image>"):
        PromptBuilder(compile_it(tmp_path / "d"))


def test_a_bundle_of_the_first_schema_is_read(tmp_path) -> None:
    """prompt.json as it was before the template was in it: tokens and merges as lists, other stand-ins, three lists of
    ranges.
    """
    spec = compile_prompt(DEMO)
    old = dict(zip("\ue001\ue002\ue003\ue000", "ª²\xa0§", strict=True))
    splits = [
        "".join(old.get(c, "" if "\ue000" < c < "\ue010" else c) for c in split) for split in spec.vocabulary.splits
    ]
    v = spec.vocabulary
    (tmp_path / "prompt.json").write_text(
        json.dumps(
            {
                "schema": 1,
                "chat": {"begin": "", "before": {}},
                "vocabulary": {
                    "tokens": v.tokens,
                    "merges": v.merges.tolist(),
                    "ignore_merges": v.ignore_merges,
                    "splits": splits,
                    "added": v.added,
                    "special": v.special,
                    "letters": v.classes["L"],
                    "numbers": v.classes["N"],
                    "spaces": v.classes["s"],
                },
                "image_tokens": {
                    "image": "<image>",
                    "start": "<|image_start|>",
                    "end": "<|image_end|>",
                    "thumbnail": None,
                    "tile": None,
                },
            }
        )
    )
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / name, tmp_path / name)
    read, new = PromptBuilder(PromptSpec.load(tmp_path / "prompt.json")), PromptBuilder(spec)
    for chat in (
        NEEDED[0],
        Conversation([Message("user", "Größe: 12 ½ kg, 日本\u3000x"), Message("assistant", "٣ #")]),
    ):
        assert read.render(chat, []) == new.render(chat, [])


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json", "list"])
def test_where_templates_live(tmp_path, place) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "c"))
    source = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    if place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": source}))
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = (
            [{"name": "tool", "template": "x"}, {"name": "default", "template": source}] if place == "list" else source
        )
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert compile_prompt(folder) == compile_prompt(DEMO)


def test_round_trip_and_schema(tmp_path) -> None:
    spec = compile_prompt(DEMO)
    spec.save(tmp_path / "prompt.json")
    assert PromptSpec.load(tmp_path / "prompt.json") == spec
    raw = json.loads((tmp_path / "prompt.json").read_text())
    (tmp_path / "prompt.json").write_text(json.dumps({**raw, "schema": 99}))
    with pytest.raises(BundleError, match="update lfm-edge"):
        PromptSpec.load(tmp_path / "prompt.json")
