"""What the manifest says of an export: graphs, where the weights are from, their licence, files and hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from lfm_runtime import __version__
from lfm_runtime.formats.contract import GRAPHS, SCHEMA_VERSION, graph_file
from lfm_runtime.formats.manifest import TOOL, Edge, File, GraphEntry, Manifest, ModelFacts, Source
from lfm_runtime.setup.hub import HubId

from lfm_export.builder import GraphBuilder
from lfm_export.checkpoint.checkpoint import Checkpoint
from lfm_export.decoder import context_length

MIN_ONNXRUNTIME = "1.20.0"


@dataclass(frozen=True)
class Exported:
    """What an export wrote, for the manifest."""

    checkpoint: Checkpoint
    dtype: str  # the variant's name
    image_token_id: int
    graphs: Mapping[str, GraphEntry]  # by file, those kept from before included
    tools: Mapping[str, str]  # versions of what traced the graphs, by name; empty for built ones


def described(graph: GraphBuilder | ir.Graph, opset: int, ir_version: int) -> GraphEntry:
    """A graph's entry: its edges, opset, and the data files that its constants lie in."""

    def edges(values: Sequence[ir.Value]) -> dict[str, Edge]:
        return {
            str(v.name): Edge(
                v.dtype.name if v.dtype else None, tuple(n if isinstance(n, int) else str(n) for n in v.shape or ())
            )
            for v in values
        }

    constants = (value.const_value for value in graph.initializers.values())
    data = sorted({f"onnx/{t.location}" for t in constants if isinstance(t, ir.ExternalTensor)})
    return GraphEntry(edges(graph.inputs), edges(graph.outputs), opset, ir_version, MIN_ONNXRUNTIME, tuple(data))


def manifest_of(
    folder: Path, exported: Exported, old: Manifest | None, kept: list[str], *, judged: bool = True
) -> Manifest:
    """The manifest of a bundle folder whose files are written.

    Args:
        folder: the new folder.
        exported: what was written.
        old: the bundle's manifest before; None for a new bundle.
        kept: files carried over from it, which are of the same weights.
        judged: whether what was measured of other variants is still true: they run with the same settings.
    """
    checkpoint, dtype = exported.checkpoint, exported.dtype
    text = checkpoint.config.text
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    # A kept file keeps its hash: hashing it again would make a damaged one look sound.
    known = {name: old.files[name] for name in kept} if old else {}

    def others(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """What quantize wrote about the other variants stays true: they are of the same weights."""
        return {v: entry for v, entry in entries.items() if v != dtype and kept}

    return Manifest(
        SCHEMA_VERSION,
        {"name": TOOL, "version": __version__, "onnx_ir": ir.__version__, **exported.tools},
        MIN_ONNXRUNTIME,
        Source(
            _name(checkpoint.folder),
            hub.revision if (hub := HubId.of_cache(checkpoint.folder)) else None,
            _license(checkpoint.folder),
            _name(checkpoint.adapter.folder) if checkpoint.adapter else None,
            checkpoint.fingerprint,
        ),
        ModelFacts(
            text.layers,
            text.hidden,
            text.kv_heads,
            text.head_dim,
            text.kernel,
            text.vocabulary,
            context_length(text),
            exported.image_token_id,
            text.feed_forward,
        ),
        {**(old.variants if old else {}), dtype: {graph.stem: graph_file(graph.stem, dtype) for graph in GRAPHS}},
        dict(sorted(exported.graphs.items())),
        {name: known.get(name) or File.of(folder / name) for name in names},
        others(old.quantization) if old else {},
        others(old.quality) if old and judged else {},
        others(old.golden) if old and judged else {},
    )


def _name(folder: Path) -> str:
    """The repository's id for a snapshot in the hub's cache, else the folder's name."""
    found = HubId.of_cache(folder)
    return found.name if found else folder.resolve().name


def _license(folder: Path) -> str | None:
    """The `license` of the model card's front matter (`license_name` where it says "other")."""
    card = folder / "README.md"
    if not card.exists():
        return None
    found: dict[str, str] = {}
    for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[1:60]:
        if line.strip() == "---":
            break
        key, _, value = line.partition(":")
        if key in ("license", "license_name"):
            found[key] = value.strip()
    return found.get("license_name") or found.get("license")
