"""A PEFT LoRA adapter merged into the weights as they stream by: W + scale · B A (Hu et al. 2021).

Expresses what changes linear weights and nothing else; DoRA, embeddings, trained biases and saved modules are refused
by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lfm_runtime.formats.files import damage_is, read_json_object

from lfm_export.checkpoint.config import CheckpointError
from lfm_export.checkpoint.tensors import Floats, TensorStore

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_HARMLESS = frozenset(
    (
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
        "init_lora_weights",
        "bias",
    )
)
"""Keys of adapter_config.json that a merge of A and B takes into account, or that training alone reads. Any other that
is set changes what the adapter does, or is of a release that is not known here.
"""
_PLAIN_STARTS = (True, False, "true", "false", "gaussian", "orthogonal")
"""Values of init_lora_weights that leave the base weights as they are."""
_PREFIX = "base_model.model."
_OFF: tuple[Any, ...] = (None, False, [], {}, "")


@dataclass
class Adapter:
    """An opened PEFT LoRA folder: its config, tensors and modules."""

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
        if not folder.is_dir():
            raise CheckpointError(f"{folder} does not exist; name a folder that PEFT saved")
        if (folder / "adapter_model.bin").exists() and not (folder / ADAPTER_WEIGHTS).exists():
            raise CheckpointError(
                f"{folder} has only adapter_model.bin; load it with peft and save it again with save_pretrained, "
                "as safetensors"
            )
        config = read_json_object(
            folder / "adapter_config.json", CheckpointError, advice="name a folder that PEFT saved"
        )
        _check_config(folder, config)
        store = TensorStore([folder / ADAPTER_WEIGHTS])
        modules: dict[str, str] = {}
        for name in store.entries:
            match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_(A|B)\.weight", name)
            if not match:
                raise CheckpointError(
                    f"{folder}: adapter tensor {name} cannot be merged; merge the adapter with peft first"
                )
            modules[_canonical(match[1])] = _PREFIX + match[1]
        if not modules:
            raise CheckpointError(
                f"{folder}: {ADAPTER_WEIGHTS} holds no tensor; was the adapter saved before it was trained?"
            )
        found = Adapter(folder, store, config, modules)
        with damage_is(CheckpointError, folder / "adapter_config.json", "save the adapter again"):
            for stem in modules.values():
                found._check_module(stem.removeprefix(_PREFIX), store.entries.get(f"{stem}.lora_A.weight"))
        found._check_it_was_trained()
        return found

    def _check_it_was_trained(self) -> None:
        """Raise CheckpointError where every B is zero, as PEFT starts it: the merge would be the checkpoint."""
        outputs = [name for name in self.store.entries if name.endswith(".lora_B.weight")]
        if outputs and not any(self.store.read(name, self.store.entries[name].shape).any() for name in outputs):
            raise CheckpointError(
                f"{self.folder}: all of its lora_B are zero, so it changes nothing; was the adapter saved before it "
                "was trained?"
            )

    def _check_module(self, module: str, a: Any) -> None:
        """Raise CheckpointError where the tensors of a module are not those that the config describes: config and
        tensors may be of two trainings, and PEFT would do something else with them.
        """
        config, mixed = self.config, "config and tensors are not of one adapter; save it again"
        told = _by_pattern(config.get("rank_pattern"), module, config.get("r"), "rank_pattern")
        if told is not None and a is not None and len(a.shape) == 2 and told != a.shape[0]:
            raise CheckpointError(
                f"{self.folder}: adapter_config.json has r = {json.dumps(told)[:20]} for {module}, its tensors have "
                f"{a.shape[0]}; {mixed}"
            )
        if not _is_targeted(config, module):
            raise CheckpointError(
                f"{self.folder}: it has tensors of {module}, which adapter_config.json does not target; {mixed}"
            )

    def check_targets(self, base: TensorStore) -> None:
        """Every adapted module must exist in the checkpoint: an adapter for another model is an error, not a no-op.
        And every listed name that the parts it adapts have must be adapted: else some of its tensors were lost.
        """
        paths = {
            _canonical(name.removesuffix(".weight")): name.removesuffix(".weight")
            for name, entry in base.entries.items()
            if name.endswith(".weight") and len(entry.shape) > 1
        }
        for module in self.modules:
            if module not in paths:
                raise CheckpointError(f"{self.folder}: adapter changes {module}, which the checkpoint does not have")
        targets = self.config.get("target_modules")
        parts = tuple({module.split(".")[0] for module in self.modules})  # of a text model alone: not the vision tower
        there = [path for module, path in paths.items() if module.startswith(parts) and _is_targeted(self.config, path)]
        for target in targets if isinstance(targets, list) else []:
            if any(_is_named([target], path, "") for path in there) and not any(
                _is_named([target], module, "") for module in self.modules
            ):
                raise CheckpointError(
                    f"{self.folder}: adapter_config.json targets {target}, and {ADAPTER_WEIGHTS} has no tensor of one; "
                    "tensors are missing, save the adapter again"
                )

    def touches(self, name: str) -> bool:
        """Whether the adapter changes this tensor."""
        return _canonical(name.removesuffix(".weight")) in self.modules

    def merge(self, name: str, weight: Floats) -> Floats:
        """`weight` [out, in] (or a depthwise convolution's [H, 1, k]) with the adapter's change added; others
        unchanged.
        """
        module = _canonical(name.removesuffix(".weight"))
        stem = self.modules.get(module)
        if stem is None or not name.endswith(".weight"):
            return weight
        if weight.ndim != 2:
            raise CheckpointError(f"{self.folder}: adapter changes {module}, a convolution; merge it with peft first")
        a_name, b_name = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
        if a_name not in self.store or b_name not in self.store:
            raise CheckpointError(f"{self.folder}: adapter module {module} lacks lora_A or lora_B; save it again")
        shape = self.store.entries[a_name].shape
        if len(shape) != 2 or not shape[0]:
            raise CheckpointError(
                f"{self.folder}: {a_name} has shape {list(shape)}, expected [rank, width]; save the adapter again"
            )
        rank = shape[0]
        a = self.store.read(a_name, (rank, weight.shape[1]))
        b = self.store.read(b_name, (weight.shape[0], rank))
        with np.errstate(over="ignore", invalid="ignore"):
            merged: Floats = weight + (b @ a) * np.float32(self._scale(stem.removeprefix(_PREFIX), rank))
        if not np.isfinite(merged).all() and np.isfinite(weight).all():
            raise CheckpointError(f"{self.folder}: with the adapter, {module} has infinite weights; train it again")
        return merged

    def _scale(self, module: str, rank: int) -> float:
        with damage_is(CheckpointError, self.folder / "adapter_config.json", "save the adapter again"):
            usual = self.config.get("lora_alpha", 8)  # peft's default
            alpha = _by_pattern(self.config.get("alpha_pattern"), module, usual, "alpha_pattern")
            if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not abs(alpha) < 1e30:
                raise CheckpointError(f"{self.folder}: lora_alpha is {alpha!r} for {module}; a number is needed")
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError for an adapter that is more than B A added to weights, or may be."""
    if config.get("peft_type", "LORA") != "LORA":
        kind = str(config["peft_type"])[:60]
        raise CheckpointError(
            f"{folder}: adapter is {kind}, not LORA; merge it with peft's merge_and_unload() and export the result"
        )
    unsupported = [
        f"{key} {json.dumps(value)[:60]}" for key, value in config.items() if key not in _HARMLESS and value not in _OFF
    ]
    start, bias = config.get("init_lora_weights"), config.get("bias")
    if start is not None and start not in _PLAIN_STARTS:
        unsupported.append(f"init_lora_weights {start} (it changes the base weights)")
    if not isinstance(config.get("use_rslora", False), bool):
        unsupported.append(f"use_rslora {config['use_rslora']!r}")
    if bias not in (None, "none"):
        unsupported.append(f"bias {bias}")
    if unsupported:
        raise CheckpointError(
            f"{folder}: adapter uses {', '.join(unsupported)}, which cannot be merged; merge it with peft's "
            "merge_and_unload() and export "
            "the result"
        )


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any, key: str) -> Any:
    """PEFT's per-module overrides: a key is a regular expression for the end of the module path."""
    return next(
        (value for pattern, value in (patterns or {}).items() if _matches(rf"(.*\.)?({pattern})", module, key)), default
    )


def _is_targeted(config: dict[str, Any], module: str) -> bool:
    """Whether PEFT would change a module: by target_modules, exclude_modules and layers_to_transform, as
    `peft.tuners.tuners_utils.check_target_module_exists` reads them.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded and _is_named(excluded, module, "exclude_modules"):
        return False
    if targets is not None and targets != "all-linear" and not _is_named(targets, module, "target_modules"):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str):
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = (re.match(rf".*\.{pattern}\.(\d+)\.", module) for pattern in patterns)
    index = next((int(match[1]) for match in found if match), None)
    return index in ([layers] if isinstance(layers, int) else layers)


def _is_named(names: str | Sequence[str], module: str, key: str) -> bool:
    """By a regular expression for all of its path, or by a list of ends."""
    if isinstance(names, str):
        return _matches(names, module, key)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _matches(pattern: str, module: str, key: str) -> bool:
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error as e:
        raise CheckpointError(
            f"adapter_config.json: {key} has {e.pattern!r}, which is not a regular expression ({e})"
        ) from e


def _canonical(module: str) -> str:
    """One spelling for module paths of transformers 4 and 5, and of the text model alone."""
    module = module.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")
    module = module.replace("language_model.model.", "language_model.").replace("language_model.lm_head", "lm_head")
    return f"language_model.{module}" if module.startswith(("layers.", "embed_tokens", "embedding_norm")) else module
