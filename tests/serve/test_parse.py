"""What strangers send becomes a request, or a refusal; never anything else."""

from __future__ import annotations

import base64
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette")
from lfm_runtime.decode.guide import Grammars
from lfm_runtime.errors import SettingError
from lfm_runtime.text.messages import IMAGE
from lfm_serve.api.chat import Asked, effective, parse
from lfm_serve.api.choose import Asked as Choices
from lfm_serve.api.choose import parse_choose
from lfm_serve.api.errors import ApiError, of
from lfm_serve.api.images import image_bytes
from lfm_serve.api.ollama import only_loads, parse_chat, parse_generate
from lfm_serve.limits import Limits

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    *("model", "stream", "stream_options", "temperature", "top_p", "top_k", "seed", "stop", "max_tokens", "n"),
    *("max_completion_tokens", "min_p", "logprobs", "tools", "tool_choice", "response_format", "json_schema", "user"),
]
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "input_text", "video"]) | JSON},
    optional={"text": JSON, "image_url": JSON | st.fixed_dictionaries({"url": JSON, "detail": JSON})},
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "root"]) | JSON},
    optional={"content": JSON | st.lists(PART, max_size=3), "tool_calls": JSON},
)
BODY = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE | JSON, max_size=4) | JSON}, optional=dict.fromkeys(FIELDS, JSON)
)


@given(BODY | JSON)
@settings(max_examples=500)
@example({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]})
@example({"messages": [{"role": "user", "content": "x"}], "temperature": 10**400})
def test_anything_is_a_request_or_a_refusal(body) -> None:
    try:
        asked = parse(body)
    except ApiError as e:
        assert e.status == 400 and e.message
    else:
        assert isinstance(asked, Asked)
        assert not asked.conversation.special
        assert sum(message.images for message in asked.conversation.messages) == len(asked.pictures)


@given(st.binary(min_size=1, max_size=200), st.booleans(), st.integers(0, 60), st.booleans(), st.booleans())
def test_base64_as_clients_write_it(data, urlsafe, broken, padded, percent) -> None:
    """Both alphabets, line breaks, no padding, percent-encoding: the same bytes."""
    code = (base64.urlsafe_b64encode if urlsafe else base64.b64encode)(data).decode()
    code = code if padded else code.rstrip("=")
    code = code[:broken] + "\r\n" + code[broken:]
    code = code.replace("+", "%2B").replace("=", "%3D") if percent else code
    assert image_bytes(f"data:image/png;base64,{code}", Limits()) == data


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://169.254.169.254/latest", "fetches no URLs"),
        ("https://example.org/a.jpg", "fetches no URLs"),
        ("file:///etc/passwd", "file: URLs are not opened"),
        ("photo.jpg", "an image is base64 text, or a data URI"),
        ("/home/pi/pictures/photo.jpg", "names and paths are not opened"),
        ("data:image/png;base64,###", "not valid base64"),
        ("data:image/png;base64,", "no bytes"),
    ],
)
def test_nothing_is_fetched_and_no_file_is_opened(url, says) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        image_bytes(url, Limits())
    assert caught.value.status == 400


OLLAMA = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE | JSON, max_size=4) | JSON},
    optional={
        "options": JSON | st.dictionaries(st.sampled_from(["num_predict", "temperature", "stop", "seed"]), JSON),
        "format": JSON | st.just("json"),
        "stream": JSON,
        "tools": JSON,
        "keep_alive": JSON,
    },
)
GENERATE = st.fixed_dictionaries(
    {"prompt": st.text(max_size=5) | JSON},
    optional={
        "images": JSON | st.lists(st.text(), max_size=2),
        "system": JSON,
        "format": JSON | st.just("json"),
        "raw": JSON,
        "context": JSON,
        "suffix": JSON,
        "stream": JSON,
        "options": JSON,
    },
)
CHOOSE = st.fixed_dictionaries(
    {},
    optional={
        "images": JSON | st.lists(JSON, max_size=2),
        "question": JSON | st.text(),
        "choices": JSON | st.lists(st.text(), max_size=3),
        "questions": JSON | st.lists(st.fixed_dictionaries({"question": st.text(), "choices": JSON}), max_size=2),
        "system": JSON,
    },
)


@given(OLLAMA | JSON, GENERATE | JSON, CHOOSE | JSON)
@settings(max_examples=300)
def test_anything_is_a_request_of_the_other_apis_or_a_refusal(chat, generate, choose) -> None:
    for body in (chat, generate):
        assert isinstance(only_loads(body), bool)
    for read, body, kind in (
        (parse_chat, chat, Asked),
        (parse_generate, generate, Asked),
        (parse_choose, choose, Choices),
    ):
        try:
            assert isinstance(read(body), kind)
        except ApiError as e:  # noqa: PERF203
            assert e.status == 400 and e.message


CHAT = {"messages": [{"role": "user", "content": "x"}]}


def test_ollamas_requests_are_openais() -> None:
    """Images stand before the text, options have other names, a negative limit is what the context holds, the default is
    a stream. One question of /api/generate is a conversation of a turn.
    """
    asked = parse_chat(
        {
            "model": "m",
            "messages": [{"role": "user", "content": "what?", "images": ["QUJD" * 8]}],
            "options": {"num_predict": -1, "num_ctx": 8192, "temperature": 0, "repeat_penalty": 1.1, "stop": ["a"]},
            "format": {"type": "object"},
            "keep_alive": "5m",
            "think": False,
        }
    )
    assert asked.conversation.messages[0].content == (IMAGE, "what?")
    assert asked.generation == {
        "speculate": 0, "temperature": 0.0, "repetition_penalty": 1.1, "stop": ("a",), "schema": '{"type": "object"}',
        "max_new_tokens": 1 << 20
    }  # fmt: skip
    assert asked.stream and asked.model == "m" and asked.unused == ("options.num_ctx",)
    question = {"model": "m", "prompt": "what?", "system": "Be brief.", "images": ["QUJD" * 8], "raw": False}
    same = parse_generate({**question, "suffix": "", "template": "", "context": [], "options": {"presence_penalty": 1}})
    assert [m.content for m in same.conversation.messages] == ["Be brief.", (IMAGE, "what?")]
    assert same.generation == {"speculate": 0, "presence_penalty": 1.0} and same.unused == () and same.stream
    assert parse_chat({**CHAT, "options": {"num_predict": 5.0, "seed": 3.0}}).generation["max_new_tokens"] == 5
    for options, says in (
        ({"num_predict": 0.5}, r"num_predict is 0\.5; a whole"),
        ({"num_predict": 0}, "num_predict 0 is"),
    ):
        with pytest.raises(ApiError, match=says):
            parse_chat({**CHAT, "options": options})
    with pytest.raises(ApiError, match="raw is not built; send the conversation to /api/chat"):
        parse_generate({**question, "raw": True})


def test_calls_of_past_turns() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "x"]}'}}
    asked = parse(
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "3"}]},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        }
    )
    turns = asked.conversation.messages
    assert turns[1].tool_calls[0].name == "f" and turns[1].tool_calls[0].arguments == {"a": [1, "x"]}
    assert (turns[2].role, turns[2].content) == ("tool", "3")
    assert asked.conversation.tools[0]["function"] == {"name": "f"} and asked.generation["tool_choice"] == "f"
    for wrong in ({"function": {"name": "f", "arguments": "{"}}, {"function": {"name": "f", "arguments": "[1]"}}, {}):
        with pytest.raises(ApiError, match=r"tool_calls\[0\]"):
            parse({"messages": [{"role": "assistant", "tool_calls": [wrong]}]})


def test_bare_base64_is_an_image() -> None:
    assert image_bytes(base64.b64encode(b"x" * 30).decode(), Limits()) == b"x" * 30


def test_turns_as_clients_send_them() -> None:
    """System messages are one, wherever they stand; images and texts keep their order; null is an empty text."""
    asked = parse(
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "QUJD" * 8}],
                },
                {"role": "assistant", "content": None},
                {"role": "system", "content": [{"type": "text", "text": "In English."}]},
                {"role": "user", "content": "b"},
                {"role": "user", "content": "c"},
            ],
            "temperature": 0,
            "top_p": 1,
            "seed": 7,
            "max_tokens": None,
            "stop": "\n",
            "store": True,
        }
    )
    found = [(message.role, message.content) for message in asked.conversation.messages]
    assert found == [
        ("system", "Be brief.\n\nIn English."),
        ("user", ("a", IMAGE)),
        ("assistant", ""),
        ("user", "b"),
        ("user", "c"),
    ]
    assert image_bytes(asked.pictures[0].url, Limits()) == b"ABC" * 8
    assert effective(asked.generation, 1.0) == {"speculate": 0, "temperature": 0.0, "stop": ("\n",)}
    assert effective(
        parse({"messages": [{"role": "user", "content": "x"}], "seed": 3, "top_p": 0.9}).generation, 0.0
    ) == {"speculate": 0}
    assert asked.unused == ("store",)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("n", 2, "one answer a request"),
        ("logprobs", 3, "true or false is needed"),
        ("top_logprobs", 3, "no effect without logprobs"),
        ("top_logprobs", 21, "allowed: 0 to 20"),
        ("tools", [{"type": "function"}], "no function.name"),
        ("tools", [{"function": {"name": "f", "parameters": 3}}], "is not an object"),
        ("functions", [{"name": "f"}], "older name of tools"),
        ("tool_choice", "maybe", "is not known"),
        ("tool_choice", {"function": {"name": "g"}}, "none of the tools"),
        ("response_format", {"type": "xml"}, "is not known"),
        ("response_format", {"type": "json_schema"}, "has no json_schema.schema"),
        ("grammar", "root ::= x", "is not enforced"),
        ("guided_choice", ["a", "b"], "is not enforced"),
        ("presence_penalty", "some", "a number is needed"),
        ("temperature", "hot", "a number is needed"),
        ("temperature", True, "a number is needed"),
        ("stream", 1, "true or false is needed"),
        ("stop", [""], "not empty"),
        ("logit_bias", {"15043": -100}, "not applied"),
        ("stop_token_ids", [7], "not applied"),
        ("modalities", ["text", "audio"], "not applied"),
        ("mirostat", 2, "not applied"),
        ("max_image_tokens", 64, "set where the server is started"),
        ("n_predict", 0, "is impossible"),
        ("tool_choice", "required", "needs tools"),
    ],
)
def test_what_is_not_done_is_refused(field, value, says) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        parse({"messages": [{"role": "user", "content": "x"}], field: value})
    assert (caught.value.param or field).startswith(field)


def test_settings_that_change_nothing_are_taken() -> None:
    """llama.cpp's page sends all of its samplers, with what they are without effect; OpenAI's client null."""
    sent = {"typ_p": 1, "dry_multiplier": 0, "xtc_probability": 0.0, "dynatemp_range": 0, "modalities": ["text"]}
    more = {"logit_bias": None, "n_predict": -1, "mirostat": False, "samplers": ["top_k"], "num_ctx": 4096}
    asked = parse({"messages": [{"role": "user", "content": "x"}], **sent, **more})
    assert asked.unused == ("num_ctx", "samplers")
    assert asked.generation["max_new_tokens"] == 1 << 20, "no limit but the context's"
    assert parse({"messages": [{"role": "user", "content": "x"}], "n_predict": 5}).generation["max_new_tokens"] == 5


def test_json_is_cut_by_the_limit_of_the_client_alone() -> None:
    """The model's own limit is for text: JSON that it cuts is of no use."""
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}
    assert parse(body).generation["max_new_tokens"] == 1 << 20
    assert parse({**body, "max_tokens": 9}).generation["max_new_tokens"] == 9
    assert parse({**body, "max_tokens": 10**12}).generation["max_new_tokens"] == 1 << 20, "the context ends before"
    assert "max_new_tokens" not in parse({"messages": body["messages"]}).generation


def test_ollamas_options_too() -> None:
    asked = {"messages": [{"role": "user", "content": "x"}], "options": {"num_ctx": 8192, "mirostat": 0, "tfs_z": 1.0}}
    assert parse_chat(asked)
    with pytest.raises(ApiError, match="mirostat is not applied"):
        parse_chat({**asked, "options": {"mirostat": 1}})


def test_two_limits_that_differ() -> None:
    asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    with pytest.raises(ApiError, match="max_completion_tokens 5 contradicts another limit, 2"):
        parse({**asked, "max_completion_tokens": 5})
    assert parse({**asked, "max_completion_tokens": 2}).generation["max_new_tokens"] == 2


def test_fields_that_change_nothing_are_named() -> None:
    """So that the log can say once that they are ignored."""
    choices = {"question": "Is it red?", "choices": ["yes", "no"]}
    assert parse_choose({**choices, "temperature": 3, "model": "m"}).unused == ("temperature",)
    with pytest.raises(ApiError, match="image is unknown; did you mean images"):
        parse_choose({**choices, "image": "data:,"})
    for questions in ([], [{"question": "x", "choices": ["a", "b"]}]):
        with pytest.raises(ApiError, match="send one of them"):
            parse_choose({**choices, "question": "x", "questions": questions})
    asked = {"messages": [{"role": "user", "content": "x"}], "options": {"num_ctx": 100, "top_k": 3}, "keep_alive": 1}
    assert parse_chat(asked).unused == ("options.num_ctx",)
    with pytest.raises(ApiError, match=r"max_tokens is 3\.5; a whole number is needed"):
        parse({"messages": [{"role": "user", "content": "x"}], "max_tokens": 3.5})


def test_how_to_install_is_not_for_clients(monkeypatch) -> None:
    """They have no shell here, and the server's paths are none of theirs."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SettingError, match="-m pip install") as caught:
        Grammars(None, ())
    assert of(caught.value).message == "answers in a schema need llguidance, which is not installed on this server"
