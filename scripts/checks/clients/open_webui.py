"""Open WebUI between a browser's requests and the server: as a connection of OpenAI's kind, and of Ollama's."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from typing import Any

from PIL import Image

BASE = "http://127.0.0.1:8473"
START_S = 180


def call(path: str, body: Any = None, token: str = "") -> str:
    """The answer's text; raises HTTPError where it was refused."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(BASE + path, data, headers), timeout=300) as answer:
        return answer.read().decode()


def sign_in() -> str:
    """Wait until it runs; return a token."""
    ends = time.monotonic() + START_S
    while True:
        try:
            return json.loads(call("/api/v1/auths/signin", {"email": "", "password": ""}))["token"]
        except (urllib.error.URLError, ConnectionError):  # noqa: PERF203
            if time.monotonic() > ends:
                raise
            time.sleep(1)


def check(kind: str, model: str, token: str) -> None:
    """A question with an image, streamed and not, with every slider moved; what it asks behind an answer."""
    stream = io.BytesIO()
    Image.effect_mandelbrot((320, 180), (-2, -1.2, 1, 1.2), 40).convert("RGB").save(stream, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    turn = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    asked = {"model": model, "messages": [{"role": "user", "content": turn}]}
    once = json.loads(call("/api/chat/completions", {**asked, "stream": False}, token))
    assert once["choices"][0]["message"]["content"]
    assert once["usage"]["prompt_tokens"] > 10
    lines = call("/api/chat/completions", {**asked, "stream": True}, token).splitlines()
    assert "data: [DONE]" in lines
    assert sum(line.startswith("data: {") for line in lines) > 2
    moved = {"temperature": 0.7, "seed": 3, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "max_tokens": 9, "stop": ["zz"]}
    moved |= {"frequency_penalty": 0.2, "presence_penalty": 0.1, "repeat_penalty": 1.1, "num_ctx": 2048}
    few = json.loads(call("/api/chat/completions", {**asked, "stream": False, "params": moved}, token))
    assert few["usage"]["completion_tokens"] <= 9
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Good day."}]
    for task in ("title", "tags", "follow_up"):
        words = {"model": model, "messages": talk, "chat_id": "1"}
        assert json.loads(call(f"/api/v1/tasks/{task}/completions", words, token))["choices"]
    print(f"{kind}: answered")


def main() -> None:
    """Both kinds; raises AssertionError or HTTPError where anything was refused."""
    token = sign_in()
    assert json.loads(call("/openai/verify", {"url": "http://127.0.0.1:8471/v1", "key": "a-key"}, token))["data"]
    assert json.loads(call("/ollama/verify", {"url": "http://127.0.0.1:8472", "key": ""}, token))["version"]
    assert json.loads(call("/ollama/api/ps", token=token))
    for kind, off in (("Ollama", "openai"), ("OpenAI", "ollama")):  # two models of one name: one kind at a time
        for one in ("openai", "ollama"):
            config = json.loads(call(f"/{one}/config", token=token))
            config[f"ENABLE_{one.upper()}_API"] = one != off
            call(f"/{one}/config/update", config, token)
        (model,) = (m["id"] for m in json.loads(call("/api/models?refresh=true", token=token))["data"] if m["owned_by"] != "arena")  # fmt: skip
        check(kind, model, token)


if __name__ == "__main__":
    main()
