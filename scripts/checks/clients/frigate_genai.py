"""Frigate's own providers against the server: what they ask at the start, reviews, summaries, tools, streams.

Any request that was refused is logged by Frigate as a warning, and fails the check.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging

from frigate.config import GenAIConfig, GenAIProviderEnum
from frigate.genai import PROVIDERS, GenAIClient, load_providers
from frigate.test.test_genai_providers import MULTIMODAL_MESSAGES, SIMPLE_MESSAGES, TOOLS
from PIL import Image

SIDES = {
    "openai": ("http://127.0.0.1:8471/v1", "a-key"),
    "llamacpp": ("http://127.0.0.1:8471", "a-key"),
    "ollama": ("http://127.0.0.1:8472", None),
}
REVIEW = {
    "id": "1",
    "camera": "front",
    "start": 1.7e9,
    "duration": 12.0,
    "zones": ["yard"],
    "unified_objects": ["Person", "Car"],
    "type": "alert",
    "timestamp": "Friday 10:00",
}


class Refusals(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one, unless it is about the answer's sense, which a random model has none of."""
        if "parse review description" not in record.getMessage():
            self.said.append(record.getMessage())


def photo() -> bytes:
    """A JPEG of 320 x 180."""
    stream = io.BytesIO()
    Image.effect_mandelbrot((320, 180), (-2, -1.2, 1, 1.2), 40).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


async def streamed(client: GenAIClient, messages: list) -> dict:
    """The last message of a stream."""
    return [value async for kind, value in client.chat_with_tools_stream(messages, TOOLS) if kind == "message"][-1]


def check(kind: str, image: bytes) -> None:
    """All that a provider does."""
    url, key = SIDES[kind]
    probe = PROVIDERS[GenAIProviderEnum(kind)](
        GenAIConfig(provider=kind, base_url=url, api_key=key, model=""), validate_model=False
    )
    (name,) = probe.list_models()
    client = PROVIDERS[GenAIProviderEnum(kind)](GenAIConfig(provider=kind, base_url=url, api_key=key, model=name), 300)
    assert client.get_context_size() == 4096
    assert client.supports_vision
    assert client.estimate_image_tokens(320, 180) > 10
    client.generate_review_description(dict(REVIEW), [image, image], ["a parcel"], None, False, "People walk by.")
    assert client.generate_review_summary(1.0, 2.0, [{"title": "A", "scene": "B", "start": 1.0}], None, False)
    assert client._send("What is this?", [image])
    for choice in ("auto", "none", "required"):
        assert client.chat_with_tools(SIMPLE_MESSAGES, TOOLS, choice)["finish_reason"] != "error"
    for messages in (SIMPLE_MESSAGES, MULTIMODAL_MESSAGES):
        assert client.chat_with_tools(messages, TOOLS)["finish_reason"] != "error"
        assert asyncio.run(streamed(client, messages))["finish_reason"] != "error"


def main() -> None:
    """Each provider; raises AssertionError where anything was refused."""
    load_providers()
    image = photo()
    MULTIMODAL_MESSAGES[-1]["content"][1]["image_url"]["url"] = (
        f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    )
    refusals = Refusals()
    logging.getLogger("frigate.genai").addHandler(refusals)
    for kind in SIDES:
        check(kind, image)
        assert not refusals.said, (kind, refusals.said)
        print(f"{kind}: answered")


if __name__ == "__main__":
    main()
