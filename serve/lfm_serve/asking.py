"""What is asked about every image, and what comes of an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lfm_runtime.answer.choice import Choice, Chosen, check_answers
from lfm_runtime.answer.reply import Job, Opened
from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import SettingError
from lfm_runtime.formats.files import to_json
from lfm_runtime.model import Model
from lfm_runtime.report import Report
from lfm_runtime.setup.setup import Setup
from lfm_runtime.text.messages import IMAGE, Conversation, Message

from lfm_serve.jsonl import is_json

_EXTRACT = (
    "Extract the following from the image:\n\n{fields}\n\nRespond with only a JSON object. Do not include any text "
    "outside the JSON."
)
"""The system prompt that LFM2.5-VL's Extract checkpoints were trained with; their user turn is the image alone."""
_MOST_FIELDS = 200
_NO_PART_OF_AN_ANSWER = ("schema", "tool_choice", "ignore_eos", "speculate", "logprobs")
"""Generation settings that records of the same file may differ in, or that they name elsewhere."""


@dataclass(frozen=True)
class Asking:
    """A question, in which form the answer is wanted (text, JSON of a schema, or one of given answers), and how it is
    generated.
    """

    question: str  # "": the image alone
    system: str = ""
    schema: str | None = None  # JSON
    choices: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()  # of the schema, where it was made of them
    generation: Mapping[str, Any] = field(default_factory=dict)  # settings other than the bundle's

    def __post_init__(self) -> None:
        """Raise SettingError for choices that are none."""
        if self.choices:
            check_answers(self.choices)

    def work(self, model: Model, image: Opened) -> Job | Sequence[Choice]:
        """What a batch does for one image.

        Raises:
            EdgeError: it cannot be asked about this image.
        """
        turns = [Message("system", self.system)] if self.system else []
        chat = Conversation([*turns, Message("user", (IMAGE, self.question) if self.question else (IMAGE,))])
        if self.choices:
            return [model.prepare_choice(chat, [image], self.choices)]
        schema = {} if self.schema is None else {"schema": self.schema}
        return model.prepare_answer(chat, [image], **schema, **self.generation)  # type: ignore[arg-type]

    def outcome(self, found: Report | Chosen) -> dict[str, Any]:
        """What a record says of an answer; with an error beside it, where JSON was wanted and it is not whole."""
        if isinstance(found, Chosen):
            return {
                "text": found.best,
                "probabilities": {a: round(p, 6) for a, p in zip(found.answers, found.probabilities, strict=True)},
                **_cost(found.report),
            }
        said: dict[str, Any] = {"text": found.text, "finish_reason": found.finish_reason}
        if self.fields:
            said["fields"] = _fields(found.text, self.fields)
        if self.schema is not None and not is_json(found.text):
            said["error"] = (
                f"the answer ended ({found.finish_reason}) before its JSON was whole: give a larger "
                "--max-new-tokens, and another output"
            )
        return {**said, **_cost(found)}


def with_fields(bundle: Bundle, path: Path) -> Asking:
    """Asks for the fields of a YAML file, name: description. An Extract checkpoint gets the prompt that it was trained
    with, any other one a question; the answer is a JSON object of the fields in any case, a text or null each.

    Raises:
        SettingError: the file cannot be read, or is no mapping of names to descriptions.
    """
    wanted = read_fields(path)
    listed = "\n".join(f"{name}: {description}" for name, description in wanted.items())
    schema = {
        "type": "object",
        "properties": {name: {"type": ["string", "null"]} for name in wanted},
        "required": list(wanted),
        "additionalProperties": False,
    }
    if is_extract(bundle):
        return Asking("", _EXTRACT.format(fields=listed), json.dumps(schema), fields=tuple(wanted))
    question = (
        f"Read these fields from the image:\n{listed}\nAnswer with a JSON object; null where it is not to be seen."
    )
    return Asking(question, "", json.dumps(schema), fields=tuple(wanted))


def is_extract(bundle: Bundle) -> bool:
    """Whether a checkpoint is one of the published Extract models, by its name."""
    name = bundle.manifest.source.name if bundle.manifest else bundle.folder.resolve().name
    return name.lower().endswith("-extract")


def read_fields(path: Path) -> dict[str, str]:
    """The fields of a YAML file and their descriptions.

    Raises:
        SettingError: as `with_fields`.
    """
    import yaml

    advice = "write one field a line, name: description"
    try:
        text = path.read_text(encoding="utf-8-sig")
        raw, names = yaml.safe_load(text), _names(yaml.compose(text, yaml.SafeLoader))
    except OSError as e:
        raise SettingError(f"--fields {path} cannot be read ({e.strerror}); {advice}") from e
    except (ValueError, yaml.YAMLError, RecursionError) as e:
        raise SettingError(f"--fields {path} is not YAML ({' '.join(str(e).split())[:160]}); {advice}") from e
    if not isinstance(raw, dict) or not raw or len(raw) > _MOST_FIELDS:
        raise SettingError(f"--fields {path} is no mapping of 1 to {_MOST_FIELDS} names; {advice}")
    if twice := next((name for n, name in enumerate(names) if name in names[:n]), None):
        raise SettingError(f"--fields {path}: {twice!r:.40} stands there twice; leave one out")
    found = {}
    for name, description in raw.items():
        if isinstance(name, str) and not name.strip():
            raise SettingError(f"--fields {path}: a field has no name, {name!r:.20}; give it one")
        if not isinstance(name, str):
            raise SettingError(f"--fields {path}: {name!r:.40} is no name of a field; put it in quotes")
        if isinstance(description, dict | list):
            raise SettingError(f"--fields {path}: what {name!r:.40} means is no text; {advice}")
        found[name] = " ".join(("" if description is None else str(description)).split())
    return found


def _names(node: Any) -> list[str]:
    """The keys of a mapping as they are written, of which YAML's reader keeps the last of two."""
    pairs = node.value if getattr(node, "id", "") == "mapping" else []
    return [str(key.value) for key, _ in pairs]


def settings_of(setup: Setup, asking: Asking) -> dict[str, Any]:
    """All that an answer depends on, but for the image: two records with the same settings can stand in one file."""
    chosen = setup.generation.with_changes(asking.generation)
    names = [f.name for f in fields(chosen) if f.name not in _NO_PART_OF_AN_ANSWER]
    paths = setup.bundle.graphs_read(setup.variant, setup.prefill)
    weights = "\n".join(part for path in paths for part in setup.bundle.fingerprint(path))
    return {
        "bundle": setup.bundle.manifest.source.name if setup.bundle.manifest else setup.bundle.folder.resolve().name,
        "weights": hashlib.sha256(weights.encode()).hexdigest()[:12],
        "variant": setup.variant,
        "prefill": setup.prefill,
        "question": asking.question,
        "system": asking.system,
        "schema": None if asking.schema is None else json.loads(asking.schema),
        "choices": list(asking.choices),
        "generation": {name: getattr(chosen, name) for name in names},
        "images": asdict(setup.images),
    }


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Twelve digits that tell settings from others."""
    return hashlib.sha256(to_json(settings).encode()).hexdigest()[:12]


def _fields(text: str, names: Sequence[str]) -> dict[str, Any] | None:
    """The fields of an answer; None where it was cut off before its end."""
    found = json.loads(text) if is_json(text) else None
    return {name: found.get(name) for name in names} if isinstance(found, dict) else None


def _cost(report: Report) -> dict[str, Any]:
    ms = {name: None if value is None else round(value, 1) for name, value in report.timing_ms.items()}
    return {
        "prompt_tokens": report.prompt_tokens,
        "image_tokens": report.image_tokens,
        "new_tokens": report.new_tokens,
        "ms": {name: ms[name] or 0.0 for name in ("vision", "prefill")}
        | {name: ms[name] for name in ("ttft", "total")},
        "peak_mib": round(report.memory_mib.get("peak") or 0.0, 1),
    }
