"""Clients that we did not write, and the requests of those that cannot be installed here, by their contracts."""

from __future__ import annotations

import base64
import io
import json
from typing import Literal

import pytest
from PIL import Image

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("llguidance")
from lfm_runtime.images.layout import lay_out  # noqa: E402
from pydantic import BaseModel, Field  # noqa: E402
from servers import PICTURES, Server, picture, text  # noqa: E402

pytestmark = [pytest.mark.process, pytest.mark.newest_python]
QUESTION = "What is in this image?"


class Seen(BaseModel):
    """As an application would ask for it."""

    colour: Literal["red", "green", "blue"]
    count: int = Field(ge=0, le=9)
    shapes: list[Literal["circle", "cross"]] = Field(max_length=3)
    note: str | None = Field(max_length=12)


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def asked(path=PICTURES[0], question: str = QUESTION):
    return [{"role": "user", "content": [picture(path), text(question)]}]


def test_parse_with_pydantic(server) -> None:
    """`parse` sends a strict schema with $defs; the answer is a value of the class. A cut one is an error, not JSON."""
    ask = client(server).chat.completions.parse
    found = ask(model="any", messages=asked(), response_format=Seen, temperature=1.0, seed=3, max_tokens=200)
    assert isinstance(found.choices[0].message.parsed, Seen)
    assert found.choices[0].finish_reason == "stop"
    with pytest.raises(openai.LengthFinishReasonError):
        ask(model="any", messages=asked(), response_format=Seen, max_tokens=5)
    with client(server).chat.completions.stream(
        model="any", messages=asked(), response_format=Seen, max_tokens=200
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Seen)


def test_logprobs(server, demo_model) -> None:
    """By OpenAI's client, streamed and not: each token's, in order, and the likeliest."""
    words = {"model": "any", "messages": asked(), "temperature": 0, "logprobs": True, "top_logprobs": 2}
    create = client(server).chat.completions.create
    whole = create(**words).choices[0]
    found = whole.logprobs.content
    assert b"".join(bytes(one.bytes) for one in found).decode() == whole.message.content
    answer = demo_model.answer(PICTURES[0], QUESTION, temperature=0, logprobs=2)
    answer.text()
    assert [one.logprob for one in found] == pytest.approx([odds.logprob for odds in answer.odds], abs=1e-4)
    assert all(len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob >= one.logprob for one in found)
    choices = [choice for chunk in create(**words, stream=True) for choice in chunk.choices]
    streamed = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in found]
    assert create(model="any", messages=asked(), temperature=0).choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_json_in_every_spelling(server, stream) -> None:
    """response_format of OpenAI, flat as llama.cpp has it, json_object with and without a schema; also in a stream."""
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"], "additionalProperties": False}  # fmt: skip
    for form in (
        {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}},
        {"type": "json_schema", "schema": schema},
        {"type": "json_object", "schema": schema},
        {"type": "json_object"},
    ):
        more = {"response_format": form, "temperature": 0, "max_tokens": 60}
        ask = client(server).chat.completions.create
        if stream:
            chunks = list(ask(model="any", messages=asked(), stream=True, **more))
            said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            reason = [c.choices[0].finish_reason for c in chunks if c.choices][-1]
        else:
            choice = ask(model="any", messages=asked(), **more).choices[0]
            said, reason = choice.message.content, choice.finish_reason
        if reason == "stop":
            assert isinstance(json.loads(said), dict)
        if "schema" in form or "json_schema" in form:
            assert reason == "stop" and set(json.loads(said)) == {"a"}


@pytest.mark.parametrize(
    "schema", [{"not": {}}, {"type": "string", "pattern": "(?<!a)b"}, {"patternProperties": {"^a": {}}}, {"$ref": "http://x/y"}, 3]
)  # fmt: skip
def test_a_schema_that_cannot_be_enforced_is_refused_before(server, schema) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for stream in (False, True):
        status, found, _ = server.chat(text("x"), response_format=form, stream=stream)
        assert status == 400 and "schema" in found["error"]["message"]


def test_white_space_does_not_go_on(server) -> None:
    """A small model that may put white space between tokens of JSON can do it without end: here it cannot."""
    form = {"type": "json_schema", "schema": {"type": "array", "items": {"type": "null"}, "minItems": 3, "maxItems": 3}}
    found = server.chat(text("x"), response_format=form, temperature=2.0, seed=1)[1]["choices"][0]
    assert found["message"]["content"] == "[null, null, null]" and found["finish_reason"] == "stop"


def test_langchain(server) -> None:
    """Plain, streamed with usage, and with structured output."""
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="any", temperature=0, max_retries=0)
    whole = model.invoke(asked())
    assert whole.content and whole.usage_metadata["input_tokens"] > 20
    parts = list(model.stream(asked(), stream_usage=True))
    assert "".join(part.content for part in parts) == whole.content
    assert (
        sum((part.usage_metadata or {}).get("output_tokens", 0) for part in parts)
        == whole.usage_metadata["output_tokens"]
    )
    for method in ("json_schema", "json_mode"):
        structured = model.with_structured_output(Seen if method == "json_schema" else None, method=method)
        found = structured.invoke(asked())
        assert isinstance(found, Seen if method == "json_schema" else dict)


def test_the_ollama_package(server, demo_model) -> None:
    ollama = pytest.importorskip("ollama")
    ask = ollama.Client(host=server.url)
    name = ask.list().models[0].model
    assert "vision" in ask.show(name).capabilities and ask.show(name).modelinfo["lfm2_vl.context_length"] == 4096
    messages = [{"role": "user", "content": QUESTION, "images": [PICTURES[0].read_bytes()]}]
    wanted = demo_model.answer([PICTURES[0]], QUESTION, special=False, temperature=0)
    wanted.text()
    whole = ask.chat(model=name, messages=messages, options={"temperature": 0, "num_ctx": 2048}, keep_alive="1m")
    assert whole.message.content == wanted.report.text
    assert (whole.prompt_eval_count, whole.eval_count) == (wanted.report.prompt_tokens, wanted.report.new_tokens)
    assert whole.done_reason == "stop" and whole.total_duration > 0
    parts = list(ask.chat(model=name, messages=messages, options={"temperature": 0}, stream=True))
    assert "".join(part.message.content for part in parts) == whole.message.content and parts[-1].done
    found = ask.chat(model=name, messages=messages, format=Seen.model_json_schema(), options={"temperature": 0})
    assert Seen.model_validate_json(found.message.content)
    odds = ask.chat(model=name, messages=messages, options={"temperature": 0}, logprobs=True, top_logprobs=3).logprobs
    assert "".join(one.token for one in odds) == whole.message.content
    assert all(len(one.top_logprobs) == 3 for one in odds)
    with pytest.raises(ollama.ResponseError, match="num_predict 0") as caught:
        ask.chat(model=name, messages=messages, options={"num_predict": 0})
    assert caught.value.status_code == 400
    assert server.ask("/api/version")[1]["version"].count(".") == 2
    for call in (lambda: ask.embed(name, "x"), lambda: ask.pull(name)):
        with pytest.raises(ollama.ResponseError, match=r"^there is no (POST|GET) /api/\w+; of Ollama's API there are"):
            call()
    bundle = demo_model.bundle
    files = {bundle.folder / name for path in bundle.graphs("fp32")[1].values() for name in data_of(bundle, path)}
    assert ask.list().models[0].size == sum(path.stat().st_size for path in files)


def test_one_question_of_the_ollama_package(server, demo_model) -> None:
    """generate: Frigate's way, with the options that it sends always; ps; loading and unloading ask for no answer."""
    ollama = pytest.importorskip("ollama")
    ask = ollama.Client(host=server.url)
    (loaded,) = ask.ps().models
    assert (loaded.name, loaded.context_length, loaded.size) == (ask.list().models[0].model, 4096, loaded.size)
    name, image = loaded.name, PICTURES[0].read_bytes()
    whole = ask.generate(name, QUESTION, images=[image], options={"temperature": 0})
    assert (
        whole.response
        == ask.chat(
            name, [{"role": "user", "content": QUESTION, "images": [image]}], options={"temperature": 0}
        ).message.content
    )
    assert whole.done_reason == "stop" and whole.eval_count and whole.prompt_eval_count
    parts = list(ask.generate(name, QUESTION, images=[image], options={"temperature": 0}, stream=True))
    assert "".join(part.response for part in parts) == whole.response and parts[-1].done
    frigates = {"temperature": 0.5, "repeat_penalty": 1.05, "presence_penalty": 0.3}
    review = ask.generate(name, "Describe.", images=[image, image], format=Seen.model_json_schema(), options=frigates)
    assert Seen.model_validate_json(review.response)
    assert ask.generate(name).done_reason == ask.chat(name).done_reason == "load"
    assert ask.generate(name, keep_alive=0).done_reason == "unload"
    with pytest.raises(ollama.ResponseError, match="suffix is not built"):
        ask.generate(name, "def f(", suffix="return")


def data_of(bundle, graph) -> list[str]:
    return json.loads((bundle.folder / "manifest.json").read_text())["graphs"][f"onnx/{graph.name}"]["data"]


class ReviewMetadata(BaseModel):
    """Frigate's, of its data_processing/post/types.py."""

    scene: str
    confidence: float = Field(ge=0, le=1)
    potential_threat_level: int | None = Field(default=None, ge=1, le=3)


def test_frigate_as_llama_cpp(server, demo_model) -> None:
    """What its provider asks at the start, its probe of an image's tokens, its review, and its chat."""
    models = server.ask("/v1/models")[1]["data"]
    name = models[0]["id"]
    assert models[0]["aliases"] == [] and "image" in models[0]["architecture"]["input_modalities"]
    props = server.ask(f"/props?model={name}")[1]
    assert models[0]["meta"]["n_ctx"] == props["default_generation_settings"]["n_ctx"] == 4096
    assert props["modalities"]["vision"] and props["chat_template_caps"] == {"supports_tools": False}
    for width, height in ((320, 320), (640, 360)):
        stream = io.BytesIO()
        Image.new("RGB", (width, height), (128, 128, 128)).save(stream, "jpeg", quality=60)
        image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"}}  # fmt: skip
        baseline, probe = (
            server.chat(*parts, model=name, max_tokens=1)[1]["usage"]["prompt_tokens"] for parts in ((text("."),), (text("."), image))
        )  # fmt: skip
        layout = lay_out(width, height, demo_model.setup.images)
        marks = 2 + (layout.rows * layout.columns + 1 if layout.tiled else 0)
        assert probe - baseline == layout.tokens + marks
    form = {
        "type": "json_schema",
        "json_schema": {"name": "review", "strict": True, "schema": ReviewMetadata.model_json_schema()},
    }
    found = server.chat(
        text("Describe."), picture(PICTURES[1]), model=name, response_format=form, temperature=0.2, max_tokens=400
    )[1]
    if found["choices"][0]["finish_reason"] == "stop":
        assert ReviewMetadata.model_validate_json(found["choices"][0]["message"]["content"])
    asked_ = {"stream": True, "stream_options": {"include_usage": True}, "timings_per_token": True, "max_tokens": 5}
    lines = server.chat(picture(PICTURES[0]), text(QUESTION), **asked_)[1].split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    timings = [chunk["timings"] for chunk in chunks if chunk.get("timings")]
    assert [t["predicted_n"] for t in timings] == sorted(t["predicted_n"] for t in timings) and len(timings) > 1
    assert chunks[-1]["usage"]["completion_tokens"] == timings[-1]["predicted_n"]


def test_llm_vision(server) -> None:
    """Home Assistant's integration: a setup check with text alone, labelled images with detail, a title of two user
    messages in a row.
    """
    hello = {"model": "m", "messages": [{"role": "user", "content": [text("Hi")]}]}
    assert isinstance(server.ask("/v1/chat/completions", hello)[1]["choices"][0]["message"]["content"], str)
    image = picture(PICTURES[0])
    image["image_url"]["detail"] = "high"
    body = {
        "model": "gpt-4o-mini",
        "messages": [
            {"role": "system", "content": "You watch a door."},
            {
                "role": "user",
                "content": [text("Image 1:"), image, text("Image 2:"), picture(PICTURES[1]), text(QUESTION)],
            },
        ],
        "max_completion_tokens": 20,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    status, found, _ = server.ask("/v1/chat/completions", body)
    assert status == 200 and found["choices"][0]["message"]["content"] is not None
    title = [{"role": "user", "content": "Make a title."}, {"role": "user", "content": "A car."}]
    assert server.ask("/v1/chat/completions", {"model": "m", "messages": title, "max_tokens": 20})[0] == 200


def test_open_webui(server) -> None:
    """The list of models with a key nobody needs; the chat as a stream; the title and tags behind it, not streamed."""
    assert server.ask("/v1/models", Authorization="Bearer x")[1]["object"] == "list"
    chat = {"stream": True, "model": "m", "messages": asked(), "stream_options": {"include_usage": True}, "params": {}}
    said = server.ask("/v1/chat/completions", chat)[1]
    assert said.endswith("data: [DONE]\n\n") and '"choices":[],"usage"' in said
    task = 'Generate a concise title. JSON format: { "title": "…" }'
    found = server.ask("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": task}], "stream": False, "max_completion_tokens": 30})  # fmt: skip
    assert found[0] == 200


def test_choose(server, demo_model) -> None:
    """The figures are the model's; several questions about one image; what is no choice."""
    url = picture(PICTURES[0])["image_url"]["url"]
    status, found, _ = server.ask(
        "/v1/choose", {"images": [url], "question": "Red?", "choices": ["yes", "no", "maybe"]}
    )
    wanted = demo_model.choose([PICTURES[0]], "Red?", ["yes", "no", "maybe"], special=False)
    assert status == 200 and found["best"] == wanted.best
    assert [a["log_likelihood"] for a in found["answers"]] == pytest.approx(wanted.log_likelihoods, abs=1e-4)
    assert found["usage"]["prompt_tokens"] == wanted.report.prompt_tokens and found["usage"]["completion_tokens"] == 0
    questions = [
        {"question": "Red?", "choices": ["yes", "no"]},
        {"question": QUESTION, "choices": ["A dog.", "A cross."]},
    ]
    several = server.ask("/choose", {"images": [{"url": url, "detail": "high"}], "questions": questions})[1]
    assert [r["question"] for r in several["results"]] == ["Red?", QUESTION]
    for body, said in (
        ({"question": "x", "choices": ["a"]}, "two or more"),
        ({"question": "x", "choices": ["a", "a"]}, "there twice"),
        ({"question": " ", "choices": ["a", "b"]}, "question is missing"),
        ({"questions": []}, "questions is empty"),
        ({"question": "x", "choices": "a"}, "a list is needed"),
        ({"question": "word " * 5000, "choices": ["a", "b"]}, "at most 4096"),
    ):
        status, found, _ = server.ask("/v1/choose", body)
        assert status == 400 and said in found["error"]["message"]
