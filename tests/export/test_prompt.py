"""Chat templates compiled and compared with jinja2; on-device compilation compared with the exported form."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from lfm_export.prompt import CONVERSATIONS, compile_chat, compile_prompt, render_template
from lfm_runtime.errors import BundleError, PromptError
from lfm_runtime.images import ImageSettings, plan_image
from lfm_runtime.prompt import Message, PromptBuilder, PromptSpec, compile_on_device

DEMO = Path(__file__).resolve().parents[2] / "demo" / "checkpoint"
SPECIALS = {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"}

PARTS = """{%- macro parts(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for item in content -%}{%- if item.type == "image" -%}{{- "<image>" -}}{%- else -%}{{- item.text -}}{%- endif -%}{%- endfor -%}
{%- endif -%}{%- endmacro -%}"""

TEMPLATES = {
    "one line": """{{bos_token}}{% for m in messages %}{{'<|im_start|>' + m['role'] + '
'}}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "system first, dropped when empty": PARTS + """
{{- bos_token -}}
{%- set ns = namespace(system_prompt="") -%}
{%- if messages[0]["role"] == "system" -%}
  {%- set ns.system_prompt = parts(messages[0]["content"]) -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if ns.system_prompt -%}{{- "<|im_start|>system\n" + ns.system_prompt + "<|im_end|>\n" -}}{%- endif -%}
{%- for m in messages -%}{{- "<|im_start|>" + m["role"] + "\n" + parts(m["content"]) + "<|im_end|>\n" -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\n" -}}{%- endif -%}""",
    "thinking dropped, generation marked": PARTS + """
{{- bos_token -}}
{%- set keep = keep_past_thinking | default(false) -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == "assistant" -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {{- "<|im_start|>" + m.role + "\n" -}}
  {%- if m.role == "assistant" -%}
    {%- generation -%}
    {%- set content = parts(m.content) -%}
    {%- if not keep and loop.index0 != ns.last and "</think>" in content -%}
      {%- set content = content.split("</think>")[-1] | trim -%}
    {%- endif -%}
    {{- content + "<|im_end|>\n" -}}
    {%- endgeneration -%}
  {%- else -%}{{- parts(m.content) + "<|im_end|>\n" -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\n" -}}{%- endif -%}""",
    "default system prompt": PARTS + """
{{- bos_token -}}
{%- if messages[0].role != "system" -%}{{- "<|im_start|>system\nYou are a helpful multimodal assistant.<|im_end|>\n" -}}{%- endif -%}
{%- for m in messages -%}{{- "<|im_start|>" + m.role + "\n" + parts(m.content) + "<|im_end|>\n" -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\n" -}}{%- endif -%}""",
    "another shape": PARTS + """
{%- for m in messages -%}{{- "[" + m.role + "] " + parts(m.content) + "\n\n" -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- "[assistant] " -}}{%- endif -%}""",
}  # fmt: skip


@pytest.fixture(scope="module", params=list(TEMPLATES), ids=lambda name: name.replace(" ", "_"))
def template(request) -> str:
    return TEMPLATES[request.param]


def test_built_in_conversations(template) -> None:
    chat = compile_chat(template, SPECIALS)
    for messages in CONVERSATIONS:
        assert chat.render(messages) == render_template(template, messages, SPECIALS)


plain_text = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20).filter(lambda s: "<think>" not in s)
turns = st.tuples(
    st.sampled_from(["", "Be brief.", None]),
    st.lists(st.tuples(plain_text, st.integers(0, 2), plain_text), min_size=1, max_size=4),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(case=turns, thinking=st.booleans())
def test_any_conversation(template, case, thinking) -> None:
    """Random conversations, alternating turns, images anywhere, thoughts in answers."""
    system, pairs = case
    messages = [Message("system", system)] if system is not None else []
    for question, images, reply in pairs:
        messages += [Message("user", question, images), Message("assistant", ("<think>hm</think> " if thinking else "") + reply)]
    messages.pop()
    assert compiled_once(template).render(messages) == render_template(template, messages, SPECIALS)


@functools.cache
def compiled_once(template: str):
    return compile_chat(template, SPECIALS)


BAD = {
    "syntax": ("{% if %}", "it fails on"),
    "raises": ("{{ raise_exception('no') }}", "it fails on"),
    "counts": ("{{ messages|length }}", "cannot be compiled"),
    "changes text": ("{% for m in messages %}[{{ m.role }}]{{ m.content|upper }}{% endfor %}", "cannot be compiled"),
    "only the last turn": ("{{ messages[-1].role }}: {{ messages[-1].content }}", "cannot be compiled"),
    "numbers the turns": ("{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}", "cannot be compiled|differs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_templates_that_cannot_be_compiled(case) -> None:
    source, says = BAD[case]
    with pytest.raises(PromptError, match=says) as caught:
        compile_chat(source, SPECIALS)
    assert "chat template" in str(caught.value)


def test_on_device_equals_exported(tmp_path) -> None:
    """Compiled without tokenizers and jinja2: the same ids for conversations with images."""
    exported, on_device = PromptBuilder(compile_prompt(DEMO)), PromptBuilder(compile_on_device(DEMO))
    plan = plan_image(900, 700, ImageSettings(tile_size=256, max_image_tokens=64, min_image_tokens=16))
    for messages in CONVERSATIONS:
        plans = [plan] * sum(m.images for m in messages)
        assert exported.render(messages, plans) == on_device.render(messages, plans)


def test_on_device_refuses_other_templates(tmp_path) -> None:
    shutil.copytree(DEMO, tmp_path / "c")
    (tmp_path / "c" / "chat_template.jinja").write_text("[{{ messages[0].content }}]")
    with pytest.raises(PromptError, match="lfm-edge export"):
        compile_on_device(tmp_path / "c")


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json", "list"])
def test_where_templates_live(tmp_path, place) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "c"))
    source = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    if place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": source}))
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": "tool", "template": "x"}, {"name": "default", "template": source}] if place == "list" else source
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
