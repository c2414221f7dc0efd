"""Pages that mkdocs (mkdocs.yml) makes of files outside docs/: READMEs, the command line, the schema of audits; and the
model for the page that asks it in the browser. Called by mkdocs, as a hook.

Links between Markdown files are written for the repository, where they work too; here they are changed to the pages'
places. A link to a file that is no page becomes its text.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import posixpath
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lfm_runtime.commands.cli import main
from lfm_runtime.commands.parser import Parser
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
STAGES = (
    "export",
    "quantize",
    "runtime",
    "profiles",
    "package",
    "serve",
    "fleet",
    "audit",
    "device_tests",
    "examples",
    "demo",
)
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    **{f"{stage}/README.md": f"stages/{stage}.md" for stage in STAGES},
}
"""File of the repository → page."""
_ORIGINS = {page: origin for origin, page in PAGES.items()}
TRANSFORMERS = ROOT / "build" / "node" / "node_modules" / "@huggingface" / "transformers" / "dist"
TRY = ROOT / "build" / "try"
CALIBRATION = ROOT / "demo" / "calibration" / "images"
PICTURES = (0, 1, 4, 9, 13)
"""Of demo/eval/images."""
_SCHEMA = ROOT / "audit" / "lfm_audit" / "audit.schema.json"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that docs/ does not have."""
    for origin, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / origin).read_text(encoding="utf-8")))
    files.append(File.generated(config, "cli.md", content=command_line()))
    files.append(File.generated(config, "audit-schema.md", content=audit_schema()))
    return files


def on_post_build(config: MkDocsConfig) -> None:
    """Put what docs/try/ask.js loads beside it, where transformers.js is installed."""
    if (TRANSFORMERS / "transformers.min.js").exists():
        shutil.copytree(try_assets(), Path(config.site_dir) / "try" / "assets", dirs_exist_ok=True)


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links of the repository → links of the site."""
    place = page.file.src_uri
    origin = _ORIGINS.get(place, f"docs/{place}")

    def moved(link: re.Match[str]) -> str:
        text, target, anchor = link["text"], link["target"], link["anchor"] or ""
        if not target or ":" in target:
            return link[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        found = PAGES.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
        if found is None or not found.endswith(".md"):
            return text
        return f"[{text}]({posixpath.relpath(found, posixpath.dirname(place) or '.')}{anchor})"

    return re.sub(r"\[(?P<text>[^\]\n]+)\]\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)", moved, markdown)


# --------------------------------------------------------------------------------- the model on the page, docs/try.md


def try_assets() -> Path:
    """The folder with the demo model in int8 for browsers, transformers.js with its WebAssembly, and pictures. It is
    made once; to make it anew, remove it.
    """
    if (TRY / "pictures.json").exists():
        return TRY
    shutil.rmtree(TRY, ignore_errors=True)
    TRY.mkdir(parents=True)
    bundle = TRY / "bundle"
    for words in (
        ["export", str(ROOT / "demo" / "checkpoint"), "-o", str(bundle), "--quiet"],
        ["quantize", str(bundle), "--variant", "int8", "--calibration", str(CALIBRATION), "--quiet"],
        ["pack", str(bundle), "--variant", "int8", "-o", str(TRY / "int8.tar")],
        ["unpack", str(TRY / "int8.tar"), "-o", str(TRY / "int8")],
        ["export", str(TRY / "int8"), "--web", "-o", str(TRY / "model"), "--quiet"],
    ):
        with contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
        if code:
            raise RuntimeError(f"lfm-edge {' '.join(words)} ended with exit code {code}")
    for name in ("bundle", "int8"):
        shutil.rmtree(TRY / name)
    for path in TRY.glob("int8.*"):
        path.unlink()
    runtime = TRANSFORMERS.parents[2] / "onnxruntime-web" / "dist"
    wasm = [runtime / f"ort-wasm-simd-threaded.asyncify.{kind}" for kind in ("mjs", "wasm")]
    pictures = [ROOT / "demo" / "eval" / "images" / f"{n:04d}.png" for n in PICTURES]
    for path in (TRANSFORMERS / "transformers.min.js", *wasm, *pictures):
        shutil.copy(path, TRY)
    (TRY / "pictures.json").write_text(json.dumps([path.name for path in pictures]))
    return TRY


# ------------------------------------------------------------------------------------------------------- command line


def command_line() -> str:
    """A section for each command, from its own argument parser."""
    parts = ["# Command line", "`lfm-edge COMMAND --help` prints the same in a terminal."]
    for point in sorted(entry_points(group="lfm_edge.commands")):
        parser = Parser(prog=f"lfm-edge {point.name}")
        importlib.import_module(point.value).add_arguments(parser)
        parts += [f"## lfm-edge {point.name}", parser.description or "", *_arguments(parser)]
        if parser.epilog:
            parts.append(f"```text\n{parser.epilog.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _arguments(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield f"### {parser.prog} {name}"
                yield inner.description or ""
                yield from _arguments(inner)
    rows = [row for action in parser._actions if (row := _row(parser, action))]
    if rows:
        yield f"```text\n{parser.format_usage().removeprefix('usage: ').strip()}\n```"
        yield "\n".join(["| argument | meaning |", "| --- | --- |", *rows])


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str | None:
    if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
        return None
    formatter = parser._get_formatter()
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    if not names or action.nargs != 0:
        value = formatter._format_args(action, action.metavar or action.dest)
        names = f"{names} `{value}`".strip()
    meaning = formatter._expand_help(action) if action.help else ""
    return f"| {names} | {meaning.replace('|', chr(92) + '|').replace('<', '&lt;')} |"


# -------------------------------------------------------------------------------------------------------------- audits


def audit_schema() -> str:
    """Every object of an audit, from the JSON schema that is made of the types."""
    schema = json.loads(_SCHEMA.read_text(encoding="utf-8"))
    parts = ["# Audit schema", "What `lfm-edge audit -o audit.json` writes; the types are in `lfm_audit/result.py`."]
    parts += [_object("Audit", schema)]
    parts += [_object(name, found) for name, found in schema.get("$defs", {}).items()]
    return "\n\n".join(parts) + "\n"


def _object(name: str, schema: dict[str, Any]) -> str:
    rows = [
        f"| `{key}` | {_kind(found)} | {'yes' if key in schema.get('required', ()) else ''} | "
        f"{found.get('description', '')} |"
        for key, found in schema.get("properties", {}).items()
    ]
    head = [
        f"## {name}",
        "",
        schema.get("description", ""),
        "",
        "| key | type | always there | |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *rows])


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return " or ".join(_kind(part) for part in schema[word])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "any")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        return f"array of {_kind(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_kind(schema['additionalProperties'])}"
    return str(kind)
