"""Home Assistant's core with LLM Vision, by three of its providers, and with its own Ollama integration.

Run by pytest in an environment that has pytest-homeassistant-custom-component.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import pytest_socket
from homeassistant.components import conversation
from homeassistant.core import Context
from homeassistant.setup import async_setup_component
from PIL import Image
from pytest_homeassistant_custom_component.common import MockConfigEntry

BOARD = {"ip_address": "127.0.0.1", "port": "8472", "https": False}
PROVIDERS = {
    "Custom OpenAI": {"custom_openai_endpoint": "http://127.0.0.1:8471/v1", "api_key": "a-key"},
    "Ollama": {**BOARD, "keep_alive": 5, "context_window": 2048, "think": False},
    "LocalAI": BOARD,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"type": "string", "enum": ["circle", "star"]},
        "title": {"type": "string", "maxLength": 8},
    },
    "required": ["shape", "title"],
}


@pytest.fixture(autouse=True)
def loopback(socket_enabled, enable_custom_integrations) -> None:  # noqa: ARG001
    """The server, and nothing else."""
    pytest_socket.socket_allow_hosts(["127.0.0.1"], allow_unix_socket=True)


@pytest.mark.parametrize("name", PROVIDERS)
async def test_llm_vision(hass, name, tmp_path: Path) -> None:
    """Its setup check, a text, a title, a structure."""
    photo = tmp_path / "photo.jpg"
    Image.effect_mandelbrot((320, 180), (-2, -1.2, 1, 1.2), 40).convert("RGB").save(photo)
    hass.config.allowlist_external_dirs = {str(tmp_path)}
    assert await async_setup_component(hass, "http", {})
    from custom_components.llmvision.config_flow import llmvisionConfigFlow
    from custom_components.llmvision.providers import ProviderFactory

    config = {"provider": name, "default_model": "bundle", "request_timeout": 60, **PROVIDERS[name]}
    MockConfigEntry(
        domain="llmvision", version=4, data={"provider": "Settings", "fallback_provider": "no_fallback"}
    ).add_to_hass(hass)
    MockConfigEntry(
        domain="llmvision", entry_id="board", version=llmvisionConfigFlow.VERSION, title=name, data=config
    ).add_to_hass(hass)
    assert await hass.config_entries.async_setup("board")
    if name != "LocalAI":  # it asks for LocalAI's own /readyz
        await ProviderFactory.create(hass=hass, provider_name=name, config=config, model="bundle").validate()

    async def analyse(**more) -> dict:
        asked = {"provider": "board", "message": "What is it?", "image_file": str(photo), "max_tokens": 80, **more}
        return await hass.services.async_call("llmvision", "image_analyzer", asked, blocking=True, return_response=True)

    assert "Couldn't generate" not in (await analyse())["response_text"]
    assert (await analyse(generate_title=True))["title"] != "Event Detected"
    answer = await analyse(response_format="json", structure=json.dumps(SCHEMA), title_field="title")
    assert answer["structured_response"]["shape"] in ("circle", "star")


async def test_ollama_integration(hass) -> None:
    """Its dialogue, as a user goes through it, and a conversation."""
    for component in ("homeassistant", "conversation"):
        assert await async_setup_component(hass, component, {})
    flow = await hass.config_entries.flow.async_init("ollama", context={"source": "user"})
    flow = await hass.config_entries.flow.async_configure(flow["flow_id"], {"url": "http://127.0.0.1:8472"})
    model = flow["data_schema"].schema["model"].config["options"][0]["value"]
    flow = await hass.config_entries.flow.async_configure(flow["flow_id"], {"model": model})
    assert flow["type"] == "create_entry"
    await hass.async_block_till_done()
    (agent,) = (name for name in hass.states.async_entity_ids("conversation") if "home_assistant" not in name)
    answer = await conversation.async_converse(hass, "hello", None, Context(), agent_id=agent)
    assert answer.response.error_code is None
    assert answer.response.speech["plain"]["speech"]
