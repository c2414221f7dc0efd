"""The schema of audit.json, against the types that it is generated from and the numbers that it had."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lfm_audit import result
from lfm_audit.result import SCHEMA as SCHEMA_NUMBER
from lfm_audit.result import audit_schema

SCHEMA = Path(result.__file__).with_name("audit.schema.json")


def test_the_schema_is_the_types() -> None:
    schema = json.loads(SCHEMA.read_text())
    assert schema["properties"]["schema"]["enum"][-1] == SCHEMA_NUMBER
    assert schema == audit_schema(), "make it again: python -m lfm_audit.result > audit/lfm_audit/audit.schema.json"


def test_a_changed_field_is_another_schema() -> None:
    """Whoever adds, removes or renames a field gives the schema another number, and adds a line here."""
    schema = json.loads(SCHEMA.read_text())

    def fields(node, path: str = ""):
        if isinstance(node, dict):
            node = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
            for name, inner in node.get("properties", {}).items():
                yield f"{path}.{name}"
                yield from fields(inner, f"{path}.{name}")
            for key in ("additionalProperties", "items"):
                yield from fields(node.get(key), f"{path}[]")
            for inner in node.get("anyOf", []):
                yield from fields(inner, path)

    names = sorted(fields(schema))
    known = {1: "b976301d7d8a8919", 2: "336da23586959a5b", 3: "7485b7e51363e4d4"}
    found = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    assert found == known.get(SCHEMA_NUMBER), (
        f"raise SCHEMA in result.py, make the schema again, and add {found} to known"
    )
