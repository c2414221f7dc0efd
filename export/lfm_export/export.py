"""The main path: a checkpoint folder in, a bundle out. Reads top to bottom as one export happens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx_ir as ir
from lfm_runtime.bundle import complete_for_clients, end_tokens
from lfm_runtime.decode.sampling import GenerationSettings, not_applied
from lfm_runtime.errors import BundleError, EdgeError, PromptError, SettingError, command
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, GRAPHS, VISION_ENCODER, graph_file
from lfm_runtime.formats.files import read_json_object
from lfm_runtime.formats.manifest import GraphEntry, Manifest, lost_seal
from lfm_runtime.formats.writer import carry_over, check_replaceable, replacing
from lfm_runtime.golden import add_golden
from lfm_runtime.images.layout import ImageSettings
from lfm_runtime.installation import install_advice
from lfm_runtime.text.prompt import PromptBuilder
from lfm_runtime.text.spec import PromptSpec

from lfm_export.builder import IR_VERSION, OPSET, DataFile, GraphBuilder, Progress
from lfm_export.checkpoint.checkpoint import Checkpoint, copy_hub_files
from lfm_export.checkpoint.config import CheckpointError
from lfm_export.decoder import build_decoder, build_embed_tokens
from lfm_export.manifest import Exported, described, manifest_of
from lfm_export.prompt import compile_prompt
from lfm_export.vision import build_vision_encoder

_log = logging.getLogger(__name__)


def export(
    checkpoint_folder: Path,
    bundle: Path,
    *,
    dtype: str = "fp32",
    adapter: Path | None = None,
    graphs: Sequence[str] = (),
    portable: bool = False,
    progress: Progress = lambda *_: None,
) -> str | None:
    """Write the fp32 or fp16 variant of a checkpoint's graphs into a bundle, beside variants it already has.

    Args:
        checkpoint_folder: config.json, safetensors and tokenizer files as on the hub.
        bundle: the folder to make or to add to; it changes all at once or not at all.
        dtype: fp32 or fp16, the variant's name.
        adapter: a PEFT LoRA adapter to merge into the weights.
        graphs: stems to write anew; the others are kept from the bundle. All by default.
        portable: trace transformers' layers to standard operators, not graphs for onnxruntime's CPU kernels.
        progress: told of every tensor written.

    Returns:
        Why no golden answers could be recorded; None where they were.

    Raises:
        CheckpointError, PromptError: the input cannot be exported, or the output not written; the bundle is as before.
    """
    known = [graph.stem for graph in GRAPHS]
    if unknown := [stem for stem in graphs if stem not in known]:
        raise CheckpointError(f"unknown graph {unknown[0]}; the graphs are {', '.join(known)}")
    if portable and (dtype != "fp32" or graphs):
        raise CheckpointError("--portable writes all graphs, in fp32; leave --dtype and --graphs out")
    _check_place(bundle, checkpoint_folder, adapter)  # better now than after minutes
    tools = _portable_tools() if portable else {}
    checkpoint = Checkpoint(checkpoint_folder, adapter)
    _look_at_settings(checkpoint, bundle)
    prompt = compile_prompt(checkpoint_folder)
    image_token_id = _check_tokens(checkpoint, prompt)
    wanted = set(graphs or known)
    if wanted & {DECODER.stem, EMBED_TOKENS.stem} and checkpoint.config.text.tied_head:
        wanted |= {DECODER.stem, EMBED_TOKENS.stem}  # they share the embedding table's bytes

    with replacing(bundle) as folder:
        old = Manifest.read(bundle)
        kept = _kept_files(old, dtype, wanted)
        _check_fits(bundle, old, kept, checkpoint, dtype, set(known) - wanted)
        (folder / "onnx").mkdir()
        carry_over(bundle, folder, kept)
        copy_hub_files(checkpoint_folder, folder)
        prompt.save(folder / "prompt.json")
        entries = {name: entry for name, entry in old.graphs.items() if name in kept} if old else {}
        if portable:
            entries |= _write_portable(folder, checkpoint, progress)
        else:
            entries |= _write_graphs(folder, checkpoint, dtype, wanted, progress)
        exported = Exported(checkpoint, dtype, image_token_id, entries, tools)
        others = _judged_otherwise(bundle, folder, old, dtype) if kept and old else []
        manifest_of(folder, exported, old, kept, judged=not others).write(folder)
        complete_for_clients(folder)
        return "; ".join(filter(None, [add_golden(folder, dtype), *(_golden_again(folder, v) for v in others)])) or None


def _check_place(bundle: Path, *sources: Path | None) -> None:
    """Raise EdgeError for an output that must not be replaced, or lies in one of the folders that are read."""
    check_replaceable(bundle)
    for source in filter(None, sources):
        if source.resolve() in bundle.resolve().parents:
            raise CheckpointError(f"{bundle} lies inside {source}, which is read; choose a place outside")


def _write_graphs(
    folder: Path, checkpoint: Checkpoint, dtype: str, wanted: set[str], progress: Progress
) -> dict[str, GraphEntry]:
    """Build the graphs wanted, one after the other; the decoder's tied head points into the embeddings' data file."""
    entries = {}

    def write(stem: str, build: Callable[[GraphBuilder], Any]) -> Any:
        name = graph_file(stem, dtype)
        data = DataFile(folder / f"{name}_data", progress)
        graph = GraphBuilder(stem, data, dtype)
        try:
            result = build(graph)
        finally:
            data.close()
        graph.save(folder / name)
        entries[name] = described(graph, OPSET, IR_VERSION)
        return result

    table = None
    if VISION_ENCODER.stem in wanted:
        write(VISION_ENCODER.stem, lambda g: build_vision_encoder(g, checkpoint))
    if EMBED_TOKENS.stem in wanted:
        table = write(EMBED_TOKENS.stem, lambda g: build_embed_tokens(g, checkpoint)).const_value
    if DECODER.stem in wanted:
        shared = table if isinstance(table, ir.ExternalTensor) else None
        write(DECODER.stem, lambda g: build_decoder(g, checkpoint, shared))
    return entries


def _write_portable(folder: Path, checkpoint: Checkpoint, progress: Progress) -> dict[str, GraphEntry]:
    """Trace transformers' own layers; its imports are heavy, and wanted here alone."""
    from lfm_export.portable.portable import write_portable

    models = {path: ir.load(path) for path in write_portable(folder, checkpoint, progress)}
    return {
        f"onnx/{path.name}": described(model.graph, model.opset_imports[""], model.ir_version)
        for path, model in models.items()
    }


def _look_at_settings(checkpoint: Checkpoint, bundle: Path) -> None:
    """Raise SettingError for image and generation settings that cannot be, or are not of these weights; a checkpoint
    without image settings is exported with the reference processor's. Warns of what the bundle will lack.
    """
    for note in filter(None, (*checkpoint.notes, lost_seal(bundle))):
        _log.warning("lfm-edge: %s", note)
    folder = checkpoint.folder
    images, config = ImageSettings.from_folder(folder), checkpoint.config
    for name, said, needed in (
        ("encoder_patch_size", images.encoder_patch_size, config.vision.patch),
        ("downsample_factor", images.downsample_factor, config.projector.factor),
    ):
        if said != needed:
            raise SettingError(
                f"{folder}: the image settings say {name} {said}, the weights are for {needed}; correct them"
            )
    path = folder / "generation_config.json"
    raw = read_json_object(path, SettingError, required=False)
    GenerationSettings.from_config(raw, path)
    if names := not_applied(raw):
        _log.warning("lfm-edge: %s: %s: not applied by lfm-edge; answers may differ for it", path, ", ".join(names))
    in_config = "max_image_tokens" in (folder / "config.json").read_text(encoding="utf-8", errors="replace")
    if not in_config and not any(
        (folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")
    ):
        do = "copy it from the base model"
        _log.warning(
            "lfm-edge: %s has no preprocessor_config.json, so Hugging Face's default image settings are used; %s",
            folder,
            do,
        )


def _check_tokens(checkpoint: Checkpoint, prompt: PromptSpec) -> int:
    """Tokenizer, settings and weights must belong together; returns the image token's id."""
    folder, tokens, config = checkpoint.folder, prompt.vocabulary.tokens, checkpoint.config
    if len(tokens) > config.text.vocabulary:
        sizes = f"{len(tokens)} tokens, config.json's vocab_size is {config.text.vocabulary}"
        raise CheckpointError(f"{folder}: the tokenizer has {sizes}")
    image = prompt.image_tokens.image
    try:
        found = PromptBuilder(prompt).image_id
    except PromptError as e:
        raise PromptError(f"{folder}: {e}") from e
    if config.image_token_id not in (None, found):
        raise CheckpointError(
            f"{folder}: config.json's image token is {config.image_token_id}, the tokenizer's {image} is {found}"
        )
    end_tokens(folder, prompt)
    return found


def _kept_files(old: Manifest | None, dtype: str, wanted: set[str]) -> list[str]:
    """Files of the old bundle that this export does not write: other variants and other graphs."""
    replaced = {graph_file(stem, dtype) for stem in wanted}
    replaced |= {f"{name}_data" for name in replaced}
    files = old.files if old else {}
    return [name for name in files if name.startswith(("onnx/", "recipes/")) and name not in replaced]


def _check_fits(
    bundle: Path, old: Manifest | None, kept: list[str], checkpoint: Checkpoint, dtype: str, rest: set[str]
) -> None:
    """What is kept must be of the same weights, and together with what is written make a whole variant."""
    if kept and old and old.source.weights != checkpoint.fingerprint:
        raise CheckpointError(
            f"{bundle} holds graphs of another checkpoint or adapter; choose another output, or remove it first"
        )
    for stem in sorted(rest):
        if graph_file(stem, dtype) not in (old.files if old else {}):
            raise CheckpointError(f"{bundle} has no {dtype} {stem} to keep; leave --graphs out to export all graphs")


def _judged_otherwise(before: Path, now: Path, old: Manifest, dtype: str) -> list[str]:
    """The other variants, whose graphs stay, where the settings that all run with are others than before; warns of what
    was measured of them.
    """

    def same(read: Callable[[Path], Any]) -> bool:
        try:
            return bool(read(before) == read(now))
        except EdgeError:  # it was damaged
            return False

    images, texts = same(ImageSettings.from_folder), same(lambda folder: PromptSpec.load(folder / "prompt.json"))
    others = [variant for variant in old.variants if variant != dtype]
    if images and texts:
        return []
    if judged := [variant for variant in others if variant in old.quality]:
        _log.warning(
            "lfm-edge: other %s than before: %s stay, but not what was measured of them; measure it with: %s",
            " and ".join(["image settings"] * (not images) + ["tokenizer or chat template"] * (not texts)),
            ", ".join(judged),
            command("quality", before, "--variant", judged[0], "--images", "PHOTOS"),
        )
    return others


def _golden_again(folder: Path, variant: str) -> str | None:
    """As add_golden, for a variant that is not exported now: where it does not run here, that is no reason to stop."""
    try:
        return add_golden(folder, variant)
    except BundleError as e:
        return str(e)


def _portable_tools() -> dict[str, str]:
    """The versions of what traces portable graphs, name → version.

    Raises:
        CheckpointError: something is missing, or of a version that does not fit.
    """
    try:
        found = {name: version(name) for name in ("torch", "transformers", "optimum", "optimum-onnx")}
    except PackageNotFoundError as e:
        raise CheckpointError(
            f"--portable needs the Python package {e.name}; install it with: {install_advice('optimum')}"
        ) from e
    if not found["transformers"].startswith("4.57."):
        have = found["transformers"]
        raise CheckpointError(
            f"--portable needs transformers 4.57, but {have} is installed; install it with: {install_advice('optimum')}"
        )
    try:
        import lfm_export.portable.portable  # noqa: F401
    except ImportError as e:
        cause: BaseException = e
        while cause.__cause__:
            cause = cause.__cause__
        said = f"{type(cause).__name__}: {cause}"
        do = f"install it anew: {install_advice('optimum')}"
        if "torchvision" in said:
            do = (
                "torchvision does not match torch: install the matching release, or uninstall torchvision "
                "(lfm-edge does not need it)"
            )
        raise CheckpointError(f"--portable cannot import what it needs ({said}); {do}") from e
    return found
