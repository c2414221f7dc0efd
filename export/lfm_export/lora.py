"""A PEFT LoRA adapter merged into the weights as they stream by: W + scale · B A (Hu et al. 2021).

Expresses what changes linear weights and nothing else; DoRA, embeddings, trained biases and saved modules are refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lfm_runtime.files import damage_is, read_json_object

from lfm_export.config import CheckpointError
from lfm_export.tensors import Floats, TensorStore

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass
class Adapter:
    """An adapter folder, opened."""

    folder: Path
    store: TensorStore
    config: dict[str, Any]
    modules: dict[str, str]  # module path without the model prefix → tensor name stem in the adapter file

    @staticmethod
    def load(folder: Path) -> Adapter:
        """Read adapter_config.json and adapter_model.safetensors.

        Raises:
            CheckpointError: a file is missing, or the adapter does something a weight merge cannot express.
        """
        config = read_json_object(folder / "adapter_config.json", CheckpointError)
        unsupported = [
            key
            for key, neutral in (
                ("use_dora", False), ("bias", "none"), ("modules_to_save", None), ("fan_in_fan_out", False),
                ("layer_replication", None), ("trainable_token_indices", None), ("lora_bias", False),
            )
            if config.get(key, neutral) not in (neutral, None, [], False)
        ]  # fmt: skip
        if str(config.get("init_lora_weights")).lower().split("_")[0] in ("pissa", "olora", "corda", "loftq", "eva"):
            unsupported.append(f"init_lora_weights {config['init_lora_weights']}")  # they change the base weights as well
        if config.get("peft_type", "LORA") != "LORA" or unsupported:
            raise CheckpointError(
                f"{folder}: adapter uses {', '.join(unsupported) or config.get('peft_type')}, which cannot be merged; "
                "merge it with peft's merge_and_unload() and export the result"
            )
        store = TensorStore([folder / ADAPTER_WEIGHTS])
        modules: dict[str, str] = {}
        for name in store.entries:
            match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_(A|B)\.weight", name)
            if not match:
                raise CheckpointError(f"{folder}: adapter tensor {name} cannot be merged; merge the adapter with peft first")
            modules[_canonical(match[1])] = _PREFIX + match[1]
        return Adapter(folder, store, config, modules)

    def check_targets(self, base: TensorStore) -> None:
        """Every adapted module must exist in the checkpoint: an adapter for another model is an error, not a no-op."""
        known = {_canonical(name.removesuffix(".weight")) for name in base.entries}
        for module in self.modules:
            if module not in known:
                raise CheckpointError(f"{self.folder}: adapter changes {module}, which the checkpoint does not have")

    def touches(self, name: str) -> bool:
        """Whether the adapter changes this tensor."""
        return _canonical(name.removesuffix(".weight")) in self.modules

    def merge(self, name: str, weight: Floats) -> Floats:
        """`weight` [out, in] (or a depthwise convolution's [H, 1, k]) with the adapter's change added; others unchanged."""
        module = _canonical(name.removesuffix(".weight"))
        stem = self.modules.get(module)
        if stem is None or not name.endswith(".weight"):
            return weight
        if weight.ndim != 2:
            raise CheckpointError(f"{self.folder}: adapter changes {module}, a convolution; merge it with peft first")
        a_name, b_name = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
        if a_name not in self.store or b_name not in self.store:
            raise CheckpointError(f"{self.folder}: adapter module {module} lacks lora_A or lora_B; save it again")
        rank = self.store.entries[a_name].shape[0]
        a = self.store.read(a_name, (rank, weight.shape[1]))
        b = self.store.read(b_name, (weight.shape[0], rank))
        change: Floats = (b @ a) * np.float32(self._scale(stem.removeprefix(_PREFIX), rank))
        return weight + change

    def _scale(self, module: str, rank: int) -> float:
        with damage_is(CheckpointError, self.folder / "adapter_config.json", "save the adapter again"):
            alpha = float(_by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", rank)))
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's per-module overrides: a key is a regular expression for the end of the module path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _canonical(module: str) -> str:
    """One spelling for module paths of transformers 4 and 5."""
    module = module.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")
    return module.replace("language_model.model.", "language_model.")
