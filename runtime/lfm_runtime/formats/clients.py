"""What other programs look for in a bundle's JSON files: keys that the checkpoint's own files may lack, above all for
transformers.js. The runtime reads what it needs elsewhere, and takes no notice of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfm_runtime.errors import BundleError
from lfm_runtime.formats.contract import EMBED_TOKENS, GRAPHS
from lfm_runtime.formats.files import read_json_object, to_json
from lfm_runtime.formats.manifest import Manifest

_DTYPES = {"int4": "q4", "int8": "int8", "fp32": "fp32", "fp16": "fp16"}
"""Variant → what transformers.js calls it; the first that is there is what it takes unless it is told otherwise."""
_OF_TABLE = ("int8", "fp32", "fp16")
"""The same of the embedding table: WebAssembly lacks the operator of a 4-bit one."""
_PROCESSOR, _IMAGE_PROCESSOR = "Lfm2VlProcessor", "Lfm2VlImageProcessorFast"


def client_files(
    folder: Path, manifest: Manifest, template: str, images: Mapping[str, Any], usual: Mapping[str, Any]
) -> dict[str, str]:
    """Name → new text, of the files that need one.

    Args:
        folder: the bundle.
        manifest: its graphs and variants.
        template: the chat template.
        images: all image settings, by name.
        usual: the reference processor's defaults of them.

    Raises:
        BundleError: one of the files is damaged.
    """
    before = {
        name: _read(folder, name) for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json")
    }
    config, preprocessor, tokenizer = before.values()
    nested = _read(folder, "processor_config.json").get("image_processor")
    after = {
        "config.json": _config(config, manifest),
        "preprocessor_config.json": _preprocessor(nested if isinstance(nested, dict) else preprocessor, images, usual),
        "tokenizer_config.json": {"chat_template": template, **tokenizer},
    }
    return {name: to_json(value, indent=2) + "\n" for name, value in after.items() if value != before[name]}


def _read(folder: Path, name: str) -> dict[str, Any]:
    return read_json_object(folder / name, BundleError, required=False)


def _config(config: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """With the names of today's transformers, and which graphs have a data file of their own (not under its own name,
    a browser does not find it) and which are taken by default.
    """
    own = {name: 1 for name, graph in manifest.graphs.items() if f"{name}_data" in graph.data}
    order = {graph.stem: _OF_TABLE if graph is EMBED_TOKENS else tuple(_DTYPES) for graph in GRAPHS}
    chosen = {stem: next((v for v in names if v in manifest.variants), None) for stem, names in order.items()}
    dtypes = {stem: _DTYPES[variant] for stem, variant in chosen.items() if variant}
    told = {"use_external_data_format": {name.rpartition("/")[2]: n for name, n in own.items()}, "dtype": dtypes}
    return {
        **config,
        "model_type": str(config.get("model_type", "")).replace("-", "_"),
        "image_token_id": manifest.model.image_token_id,
        "transformers.js_config": told,
    }


def _preprocessor(said: Mapping[str, Any], images: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The image settings as they hold, in one file. `do_resize` and `size` have no effect in transformers, and
    transformers.js squeezes every picture to that size.
    """
    kept = {name: value for name, value in said.items() if name not in ("do_resize", "size", "auto_map")}
    kind = str(said.get("image_processor_type", ""))
    return {
        **kept,
        **{name: value for name, value in images.items() if name in said or value != usual[name]},
        "image_processor_type": kind if kind.startswith("Lfm2Vl") else _IMAGE_PROCESSOR,
        "processor_class": _PROCESSOR,
    }
