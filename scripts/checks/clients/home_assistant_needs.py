"""Prints the packages that Home Assistant would install for the integrations that home_assistant.py tries."""

import json
from pathlib import Path

import homeassistant.components

FOLDER = Path(homeassistant.components.__path__[0])
IMPORTED = {"ai_task": ("camera", "image", "media_source")}  # without being named as dependencies

seen: set[str] = set()
waiting = ["ai_task", "conversation", "light", "llama_cpp", "ollama"]
while waiting:
    name = waiting.pop()
    if name in seen:
        continue
    seen.add(name)
    manifest = json.loads((FOLDER / name / "manifest.json").read_text())
    waiting += [*manifest.get("dependencies", ()), *IMPORTED.get(name, ())]
    for package in manifest.get("requirements", ()):
        print(package)
