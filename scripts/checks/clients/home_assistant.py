"""Home Assistant as it is, with the integrations that people point at the server.

LLM Vision by three of its providers; its own Ollama integration (a conversation, one that may control the house, an AI
task with a photo and a structure); its own llama.cpp integration. Run by pytest in an environment that has
pytest-homeassistant-custom-component.
"""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import pytest
import pytest_socket
from homeassistant.components import conversation
from homeassistant.const import CONF_LLM_HASS_API
from homeassistant.core import Context
from homeassistant.helpers import entity_registry
from homeassistant.setup import async_setup_component
from PIL import Image
from pytest_homeassistant_custom_component.common import MockConfigEntry

KEYED, OPEN = "http://127.0.0.1:8471", "http://127.0.0.1:8472"
BOARD = {"ip_address": "127.0.0.1", "port": "8472", "https": False}
PROVIDERS = {
    "Custom OpenAI": {"custom_openai_endpoint": f"{KEYED}/v1", "api_key": "a-key"},
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


@pytest.fixture
async def house(hass, tmp_path: Path):
    """A light that Assist may switch, and a photo among the media, whose path this is."""
    photo = tmp_path / "photo.jpg"
    Image.effect_mandelbrot((320, 180), (-2, -1.2, 1, 1.2), 40).convert("RGB").save(photo)
    hass.config.allowlist_external_dirs = {str(tmp_path)}
    hass.config.media_dirs = {"local": str(tmp_path)}
    for component in ("homeassistant", "http", "conversation", "media_source", "ai_task", "light"):
        assert await async_setup_component(hass, component, {})
    hass.states.async_set("light.kitchen", "off", {"friendly_name": "Kitchen"})
    return photo


async def said(hass, agent: str, words: str) -> str:
    """An agent's answer."""
    answer = await conversation.async_converse(hass, words, None, Context(), agent_id=agent)
    assert answer.response.error_code is None, answer.response.speech
    return answer.response.speech["plain"]["speech"]


async def known_tokens(hass) -> float:
    """Of all prompts so far, the tokens that the server did not read again."""
    request = urllib.request.Request(f"{KEYED}/metrics", headers={"Authorization": "Bearer a-key"})
    page = await hass.async_add_executor_job(lambda: urllib.request.urlopen(request).read().decode())
    return float(re.search(r'^lfm_tokens_total\{kind="cached"\} (\S+)', page, re.MULTILINE)[1])


def agents(hass, domain: str, entry) -> list[str]:
    """The entities that an integration's entry made."""
    found = entity_registry.async_entries_for_config_entry(entity_registry.async_get(hass), entry.entry_id)
    return [entity.entity_id for entity in found if entity.domain == domain]


@pytest.mark.usefixtures("house")
@pytest.mark.parametrize("key", [None, "a-key"])
async def test_ollama(hass, key) -> None:
    """Its dialogue as a user goes through it; then a conversation, one with Assist, and AI tasks with a photo."""
    flow = await hass.config_entries.flow.async_init("ollama", context={"source": "user"})
    place = {"url": KEYED, "api_key": key} if key else {"url": OPEN}
    if key:
        refused = await hass.config_entries.flow.async_configure(flow["flow_id"], {"url": KEYED, "api_key": "wrong"})
        assert refused["errors"] == {"base": "invalid_auth"}
    made = await hass.config_entries.flow.async_configure(flow["flow_id"], place)
    assert made["type"] == "create_entry"
    entry = made["result"]
    await hass.async_block_till_done()
    for kind, more in (("conversation", {}), ("conversation", {CONF_LLM_HASS_API: ["assist"]}), ("ai_task_data", {})):
        flow = await hass.config_entries.subentries.async_init((entry.entry_id, kind), context={"source": "user"})
        model = flow["data_schema"].schema["model"].config["options"][0]
        assert model["label"].endswith("(downloaded)")
        asked = {"name": f"board {kind} {len(more)}", "model": model["value"], **more}
        flow = await hass.config_entries.subentries.async_configure(flow["flow_id"], asked)
        assert flow["type"] == "create_entry"
        await hass.async_block_till_done()
    plain, assist = agents(hass, "conversation", entry)
    assert await said(hass, plain, "hello")
    assert await said(hass, assist, "turn on the kitchen light")
    (task,) = agents(hass, "ai_task", entry)

    async def generated(**more):
        asked = {"entity_id": task, "task_name": "see", "instructions": "What is in it?", **more}
        return (await hass.services.async_call("ai_task", "generate_data", asked, blocking=True, return_response=True))[
            "data"
        ]

    photo = {"media_content_id": "media-source://media_source/local/photo.jpg", "media_content_type": "image/jpeg"}
    assert await generated(attachments=[photo])
    fields = {
        "shape": {"selector": {"select": {"options": ["circle", "star"]}}, "required": True},
        "count": {"selector": {"number": {"min": 0, "max": 9}}, "required": True},
        "broken": {"selector": {"boolean": {}}, "required": True},
    }
    data = await generated(attachments=[photo], structure=fields)
    assert data["shape"] in ("circle", "star")
    assert 0 <= data["count"] <= 9
    assert data["broken"] in (True, False)


@pytest.mark.usefixtures("house")
async def test_llama_cpp(hass) -> None:
    """Its dialogue, a wrong key, a conversation that may control the house."""
    flow = await hass.config_entries.flow.async_init("llama_cpp", context={"source": "user"})
    place = {"base_url": f"{KEYED}/v1", "api_key": "wrong"}
    refused = await hass.config_entries.flow.async_configure(flow["flow_id"], place)
    assert refused["errors"] == {"base": "invalid_auth"}
    flow = await hass.config_entries.flow.async_configure(flow["flow_id"], {**place, "api_key": "a-key"})
    (model,) = flow["data_schema"].schema["chat_model"].config["options"]
    flow = await hass.config_entries.flow.async_configure(flow["flow_id"], {"chat_model": model})
    assert flow["type"] == "create_entry", flow
    assert flow["result"].data["streaming"] is True
    await hass.async_block_till_done()
    (agent,) = agents(hass, "conversation", flow["result"])
    assert await said(hass, agent, "turn on the kitchen light")
    before = await known_tokens(hass)
    assert await said(hass, agent, "is the kitchen light on?")
    assert await known_tokens(hass) - before > 1000  # Assist's instructions and tools were read with the first sentence


@pytest.mark.parametrize("name", PROVIDERS)
async def test_llm_vision(hass, house, name) -> None:
    """Its setup check, a text, a title, a structure."""
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
        asked = {"provider": "board", "message": "What is it?", "image_file": str(house), "max_tokens": 80, **more}
        return await hass.services.async_call("llmvision", "image_analyzer", asked, blocking=True, return_response=True)

    assert "Couldn't generate" not in (await analyse())["response_text"]
    assert (await analyse(generate_title=True))["title"] != "Event Detected"
    answer = await analyse(response_format="json", structure=json.dumps(SCHEMA), title_field="title")
    assert answer["structured_response"]["shape"] in ("circle", "star")
