"""A bundle folder opened: which file is which graph of which variant, checked against the manifest.

Two kinds of folder: one of ours, with manifest.json; or one with only the hub's files, where graphs are found by name.
No onnxruntime here: a bundle can be looked at on a machine that could not run it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePath

from lfm_profiles import FINEST, VARIANTS, Variant

from lfm_runtime.decode.sampling import GenerationSettings
from lfm_runtime.errors import BundleError, PromptError, command
from lfm_runtime.formats import clients
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, GRAPHS, VISION_ENCODER, GraphSpec
from lfm_runtime.formats.facts import context_length, contradictions, facts_of
from lfm_runtime.formats.files import (
    check_no_pointer,
    check_plain,
    damage_is,
    holds_a_model,
    read_json_object,
    write_whole,
)
from lfm_runtime.formats.genai import Genai
from lfm_runtime.formats.manifest import MANIFEST, SUMS, File, Manifest, ModelFacts, file_hash, hashed, unlike_sums
from lfm_runtime.formats.onnx_file import check_external_files, external_files
from lfm_runtime.images.layout import ImageSettings
from lfm_runtime.images.names import is_image
from lfm_runtime.text.prompt import PromptBuilder
from lfm_runtime.text.spec import PromptSpec, compile_on_device, token_text

HASHED_AT_LOAD = 32 << 20
"""Files up to this size are hashed at every load; of larger ones the size is known: 1 GB takes seconds on a Pi."""
FETCHED = "fetched"
"""The folder in which bundles lie that were fetched by URL, by the hash of their manifest."""


@dataclass(frozen=True)
class Bundle:
    """Where everything lies. A hub folder has no manifest: nothing is known to check against."""

    folder: Path
    variants: Mapping[str, Mapping[str, Path]]  # variant → graph stem → .onnx file
    manifest: Manifest | None
    context_length: int
    eos: tuple[int, ...]
    prompt: PromptSpec
    images: ImageSettings
    generation: GenerationSettings

    @staticmethod
    def open(folder: Path, replaced: Collection[str] = ()) -> Bundle:
        """Read what describes the bundle; graphs are looked for but not loaded. `replaced`: files that are about to be
        written anew, so that damage in them does no harm.

        Raises:
            BundleError: not a bundle, damaged, or of a newer schema.
        """
        if folder.is_file() and folder.suffix == ".tar":
            unpack = command("unpack", folder, "-o", folder.with_suffix(""))
            raise BundleError(f"{folder} is a packed bundle; unpack it first: {unpack}")
        if folder.is_file():
            raise BundleError(f"{folder} is a file; give the bundle folder first, then the images")
        if not folder.is_dir():
            raise BundleError(f"{folder} does not exist; {_how_to_get(folder)}")
        if not os.access(folder, os.R_OK | os.X_OK):
            raise BundleError(f"{folder} cannot be read; change its permissions")
        if (folder / "install.sh").is_file() and (folder / "stick.conf").is_file():
            install = shlex.join(["sh", str(folder / "install.sh")])
            raise BundleError(f"{folder} is a stick, not a bundle; install it: {install}")
        check_names(folder)
        check_plain((*folder.iterdir(), *(folder / "onnx").glob("*")), BundleError)
        if folder.name == "onnx" and holds_a_model(folder.resolve().parent):
            folder = folder.resolve().parent  # of the graphs in it
        if not holds_a_model(folder):
            raise BundleError(
                f"{folder} is not a bundle: it has no {MANIFEST} and no config.json; {_what_else(folder)}"
            )
        manifest = Manifest.read(folder)
        if manifest is None and (folder / SUMS).exists():
            raise BundleError(f"{folder / MANIFEST} is missing, and {SUMS} names it; copy the bundle again")
        if manifest and in_a_cache(folder):
            manifest = manifest.of_whole_variants(folder)
        generation = read_json_object(folder / "generation_config.json", BundleError, required=False)
        genai = None if manifest else Genai.read(folder)
        config = read_json_object(folder / "config.json", BundleError, required=not (manifest or genai))
        with damage_is(BundleError, folder / "config.json", "copy it from the checkpoint again"):
            context = context_length(config)
        if genai:
            variants: Mapping[str, Mapping[str, Path]] = {genai.variant: genai.graphs}
            context = min(context, genai.facts.context_length)
        elif manifest is None:
            variants = _hub_variants(folder)
        else:
            variants = _known_variants(folder, manifest)
            context = manifest.model.context_length
            _check_files(folder, {name: file for name, file in manifest.files.items() if name not in replaced})
        has_prompt = manifest is not None or (folder / "prompt.json").exists()
        prompt = PromptSpec.load(folder / "prompt.json") if has_prompt else compile_on_device(folder)
        return Bundle(
            folder,
            variants,
            manifest,
            context,
            end_tokens(folder, prompt),
            prompt,
            ImageSettings.from_folder(folder),
            GenerationSettings.from_config(generation, folder / "generation_config.json"),
        )

    @cached_property
    def facts(self) -> ModelFacts | None:
        """Sizes of the model: the manifest's, of a hub folder config.json's; None where that does not tell them."""
        if self.manifest:
            return self.manifest.model
        if genai := Genai.read(self.folder):
            return genai.facts
        path = self.folder / "config.json"
        try:
            text = read_json_object(path, BundleError).get("text_config")
            with damage_is(BundleError, path, "copy it from the checkpoint"):
                return facts_of(text, self.context_length)
        except BundleError:
            return None

    def contradictions(self) -> list[str]:
        """What manifest.json says that SHA256SUMS, config.json, the tokenizer or its own graphs say differently; each a
        message.
        """
        if not self.manifest:
            return []
        sums = unlike_sums(self.folder, self.manifest.files)
        return sums or [*contradictions(self.folder, self.manifest, self.prompts.image_id)]

    @property
    def files(self) -> Mapping[str, File]:
        """Files that the manifest names; none for a hub folder."""
        return self.manifest.files if self.manifest else {}

    def min_onnxruntime(self, graph: Path) -> str:
        """The oldest release that runs a graph, as the manifest says."""
        entry = self.manifest.graphs.get(self.name_of(graph)) if self.manifest else None
        return entry.min_onnxruntime if entry else "0.0"

    def name_of(self, path: Path) -> str:
        """Return a file's name in the manifest: its path relative to the bundle."""
        return path.relative_to(self.folder).as_posix()

    @cached_property
    def prompts(self) -> PromptBuilder:
        """Renders conversations; made once, which takes 20 ms for 65,536 tokens. Raises BundleError for a damaged
        prompt.json.
        """
        path = self.folder / "prompt.json"
        try:
            with damage_is(BundleError, path, "export the bundle again"):
                return PromptBuilder(self.prompt)
        except PromptError as e:
            raise BundleError(f"{path if path.exists() else self.folder}: {e}") from e

    def graphs(self, variant: str | None) -> tuple[str, Mapping[str, Path]]:
        """(variant, its files by stem); None takes the first the bundle names.

        Raises:
            BundleError: the bundle lacks the variant or one of its graphs; says which it has.
        """
        name = variant or next(iter(self.variants))
        if name not in VARIANTS:
            raise BundleError(f"there is no variant {name!r}; {self.folder} has {', '.join(self.variants)}")
        if name not in self.variants:
            how = f"make it: {command('quantize', self.folder, '--variant', name)}"
            if not set(FINEST).intersection(self.variants):  # packed, or somebody else's
                how = "none can be made of these: take the whole bundle, which has fp32 or fp16"
                if name in FINEST:
                    how = f"make it: {command('export', 'CHECKPOINT', '-o', self.folder, '--dtype', name)}"
            raise BundleError(f"{self.folder} has no variant {name!r}; it has {', '.join(self.variants)}; {how}")
        graphs = self.variants[name]
        for graph in GRAPHS:
            if graph.stem not in graphs or not graphs[graph.stem].exists():
                how = command("export", "CHECKPOINT", "-o", self.folder, "--graphs", graph.stem)
                raise BundleError(f"{self.folder}: variant {name} has no {graph.stem}; create it with: {how}")
            if not self.manifest:
                check_external_files(graphs[graph.stem])
        return name, graphs

    def graphs_read(self, variant: str, prefill: str | None = None) -> list[Path]:
        """Each graph that a run of a variant reads once: its own, and the decoder of the variant that reads prompts."""
        paths = set(self.graphs(variant)[1].values())
        return sorted({*paths, self.graphs(prefill)[1][DECODER.stem]} if prefill else paths)

    def fingerprint(self, graph: Path) -> list[str]:
        """Tells a graph and its weights, whose files they may be, from others: hashes where the manifest has them, else
        sizes and times.
        """
        found = []
        entry = self.manifest.graphs.get(self.name_of(graph)) if self.manifest else None
        place, data = (self.folder, entry.data) if entry else (graph.parent, external_files(graph))
        for path in (graph, *sorted(place / name for name in data)):
            if path.exists():
                name, status = path.relative_to(self.folder).as_posix(), path.stat()
                found.append(
                    self.files[name].sha256 if name in self.files else f"{name} {status.st_size} {status.st_mtime_ns}"
                )
        return found

    def verify(self) -> None:
        """Hash every file the manifest names.

        Raises:
            BundleError: naming the first file that differs.
        """
        for name, wanted in self.files.items():
            _check_hash(self.folder / name, wanted.sha256)


def client_files(bundle: Bundle, manifest: Manifest) -> dict[str, str]:
    """Name → new text, of a bundle's files that lack what other programs look for, where it has these variants."""
    images, usual = asdict(bundle.images), asdict(ImageSettings())
    return clients.client_files(bundle.folder, manifest, bundle.prompt.chat.template, images, usual)


def complete_for_clients(folder: Path) -> Manifest:
    """Write what other programs look for into a folder whose manifest is written, and that nobody else reads yet;
    returns its manifest with the new hashes.
    """
    manifest = Manifest.of(folder)
    texts = client_files(Bundle.open(folder), manifest)
    for name, text in texts.items():
        write_whole(folder / name, text)  # not into the file, which an older bundle may have as well
    manifest = manifest.with_files(hashed(folder, texts))
    manifest.write(folder)
    return manifest


def end_tokens(folder: Path, prompt: PromptSpec) -> tuple[int, ...]:
    """The ids that end an answer: of generation_config.json, else config.json's text_config, else its top level, else
    the id of tokenizer_config.json's eos_token.

    Raises:
        BundleError: none is said anywhere, or one is no id of the tokenizer.
    """
    generation = read_json_object(folder / "generation_config.json", BundleError, required=False)
    config = read_json_object(folder / "config.json", BundleError, required=False)
    text = inner if isinstance(inner := config.get("text_config"), dict) else {}
    said = {"generation_config.json": generation, "config.json's text_config": text, "config.json": config}
    for place, section in said.items():
        found = section.get("eos_token_id")
        if found is None or found == []:
            continue
        ids = found if isinstance(found, list) else [found]
        size = len(prompt.vocabulary.tokens)
        if not all(type(i) is int and 0 <= i < size for i in ids):
            raise BundleError(f"{folder}: eos_token_id in {place} is {found!r:.60}; it must be a token id below {size}")
        image = prompt.image_tokens.image
        if any(prompt.vocabulary.tokens[i] == image for i in ids):
            raise BundleError(f"{folder}: eos_token_id in {place} is the image token {image}; copy the file again")
        return tuple(ids)
    if genai := Genai.read(folder):
        return tuple(genai.eos)
    name = token_text(read_json_object(folder / "tokenizer_config.json", BundleError, required=False).get("eos_token"))
    if name is None or name not in prompt.vocabulary.tokens:
        raise BundleError(f"{folder}: no file defines the end token; add eos_token_id to generation_config.json")
    return (prompt.vocabulary.tokens.index(name),)


def _known_variants(folder: Path, manifest: Manifest) -> dict[str, dict[str, Path]]:
    """Return the graphs of the manifest's variants that this release knows; raises BundleError where there are none."""
    found = {
        name: {stem: folder / file for stem, file in graphs.items()}
        for name, graphs in manifest.variants.items()
        if name in VARIANTS
    }
    if not found:
        names = ", ".join(manifest.variants)
        raise BundleError(f"{folder} has only variants that this lfm-edge does not know ({names}); update lfm-edge")
    return found


def _check_files(folder: Path, files: Mapping[str, File]) -> None:
    for name, wanted in files.items():
        path = folder / name
        if not path.exists():
            raise BundleError(f"{path} is missing; the manifest names it: copy the bundle again or export it again")
        check_no_pointer(path, BundleError)
        size = path.stat().st_size
        if size != wanted.bytes:
            raise BundleError(f"{path} has {size} bytes, the manifest says {wanted.bytes}: {_what_to_do(path)}")
        if size <= HASHED_AT_LOAD:
            _check_hash(path, wanted.sha256)


def _check_hash(path: Path, wanted: str) -> None:
    if file_hash(path) != wanted:
        raise BundleError(f"{path} is damaged or was edited (its SHA-256 is not the manifest's); {_what_to_do(path)}")


def _what_to_do(path: Path) -> str:
    """About a file that is not the manifest's."""
    do = "copy the bundle again"
    return f"{do}; settings are changed by flags or a profile" if path.suffix in (".json", ".toml") else do


def in_a_cache(folder: Path) -> bool:
    """Whether a folder is in the hub's cache or in ours, where files of other variants may not be fetched."""
    return folder.resolve().parent.name in ("snapshots", FETCHED)


def find_variants(names: Collection[str]) -> dict[str, dict[str, str]]:
    """Variant → graph stem → file, of files named as hub repositories name them, in onnx/ or beside config.json."""
    variants: dict[str, dict[str, str]] = {}
    for variant, row in VARIANTS.items():
        decoder = _find(names, DECODER, row)
        if decoder is None:
            continue
        # Hub repositories often quantize the decoder alone: the others may have their own suffix, the nearest first.
        rest = {graph.stem: _nearest(names, graph, row) for graph in (VISION_ENCODER, EMBED_TOKENS)}
        found = {DECODER.stem: decoder, **{stem: name for stem, name in rest.items() if name is not None}}
        if len(found) == len(GRAPHS):
            variants[variant] = found
    return variants


def _hub_variants(folder: Path) -> dict[str, dict[str, Path]]:
    """The variants of a folder without a manifest; raises BundleError where there are none."""
    names = {path.relative_to(folder).as_posix() for path in (*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx"))}
    variants = {
        variant: {stem: folder / name for stem, name in graphs.items()}
        for variant, graphs in find_variants(names).items()
    }
    if not variants:
        if strange := sorted(PurePath(name).name for name in names if "decoder" in name):
            known = ", ".join(s or "no suffix" for row in VARIANTS.values() for s in row.suffixes)
            raise BundleError(
                f"{folder} has {', '.join(strange)}, and no set of graphs that lfm-edge runs; it runs those with the "
                f"suffixes {known}"
            )
        missing = "no manifest.json, and no set of vision_encoder, embed_tokens and decoder_model_merged graphs"
        checkpoint = any(folder.glob("*.safetensors"))
        what = "a checkpoint, not a bundle" if checkpoint else f"not a bundle: {missing}"
        how = command("export", folder if checkpoint else "CHECKPOINT", "-o", "bundle")
        raise BundleError(f"{folder} is {what}; make a bundle with: {how}")
    return variants


def _nearest(names: Collection[str], graph: GraphSpec, variant: Variant) -> str | None:
    others = ("fp16", "fp32", "int8", "int4") if variant.activations == "fp16" else ("int8", "fp16", "fp32", "int4")
    rows = [variant, *(VARIANTS[name] for name in others)]
    return next((name for row in rows if (name := _find(names, graph, row)) is not None), None)


def _find(names: Collection[str], graph: GraphSpec, variant: Variant) -> str | None:
    wanted = [
        f"{place}{name}{suffix}.onnx"
        for place in ("onnx/", "")
        for suffix in variant.suffixes
        for name in graph.aliases
    ]
    return next((name for name in wanted if name in names), None)


def _what_else(folder: Path) -> str:
    """What to do about a folder that is no bundle, by what it holds."""
    names = [path.name.lower() for path in folder.iterdir()]
    if not names:
        return "it is empty"
    if any(name.endswith((".safetensors", ".gguf", ".bin")) for name in names):
        return "copy config.json and the tokenizer's files beside the weights, and export it: lfm-edge export"
    if any(map(is_image, names)):
        return "it holds images: name the bundle first, then the images"
    if found := next((path.parent for path in sorted(folder.glob("*/config.json"))), None):
        return f"did you mean {found}?"
    return "name a folder made by lfm-edge export"


def _how_to_get(folder: Path) -> str:
    """What to do about a bundle that is not there; `owner/name` is a checkpoint of the hub."""
    if len(folder.parts) == 2 and not folder.is_absolute() and not folder.parent.is_dir():
        export = command("export", folder, "-o", "bundle")
        return f"if it is an id of the hub: {command('run', folder)}, or for a checkpoint {export}"
    return f"make a bundle with: {command('export', 'CHECKPOINT', '-o', folder)}"


def check_names(folder: Path) -> None:
    """Raise BundleError for a bundle whose files are named in capitals: an old FAT mount shows them so."""
    if not (folder / MANIFEST).exists() and (folder / MANIFEST.upper()).exists():
        raise BundleError(
            f"{folder} has names in capitals, as a FAT file system shows them without long names; copy it as one file: "
            f"lfm-edge pack, then lfm-edge unpack"
        )
