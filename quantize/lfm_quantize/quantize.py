"""The main path: a bundle and images in, one more variant in the bundle out. Reads top to bottom as one run happens."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from lfm_runtime import __version__
from lfm_runtime.bundle import MANIFEST, Bundle, file_hash, read_manifest
from lfm_runtime.bundle_writer import carry_over, check_replaceable, replacing
from lfm_runtime.contract import DECODER, EMBED_TOKENS, VISION_ENCODER, graph_file
from lfm_runtime.prompt import PromptBuilder
from numpy.typing import NDArray

from lfm_quantize.answers import Progress, add_answers, features_of
from lfm_quantize.blocks import Feeds, Values, all_positions, blocks_of, image_positions, prompt_feeds, run_block
from lfm_quantize.graph import Graph, Place, QuantizeError
from lfm_quantize.half import half, overflowing
from lfm_quantize.layer import Change, quantize_block
from lfm_quantize.quality import DEFAULT_FLOORS, Quality, check_floor, keep_in_manifest, measure
from lfm_quantize.recipe import Recipe
from lfm_quantize.rewrite import TABLE, embedding_nodes, halved
from lfm_quantize.rounding import METHODS, Rounded
from lfm_quantize.samples import FEW_IMAGES, Question, Sample, prepare, read_questions, split_off
from lfm_quantize.search import choose, survey
from lfm_quantize.source import Source, look_up
from lfm_quantize.work import Work

ANSWER_TOKENS = 24
"""Of each fp32 answer that calibration follows."""
MANY_IMAGES = 256
HELD_OUT = 0.25
"""Share of the images kept from calibration, to judge with."""

VARIANTS = ("int8", "int4", "fp16", "int8-static")

Float = NDArray[np.float32]
Warn = Callable[[str], None]
Graphs = dict[str, "Graph | str"]
"""Stem → a new graph, or the file of one that is there."""


@dataclass(frozen=True)
class Settings:
    """What the user asks for. Without calibration images weights are rounded blindly, and nothing can be judged."""

    variant: str
    calibration: Path | None = None
    prompts: Path | None = None
    method: str | None = None
    recipe: Path | None = None
    keep: tuple[str, ...] = ()
    floor: float | None = None
    max_size: float | None = None  # MB
    threads: int = 2

    def check(self) -> None:
        """Raise QuantizeError for what could not be done or would have no effect."""
        if self.variant not in VARIANTS:
            raise QuantizeError(f"unknown variant {self.variant!r}; allowed: {', '.join(VARIANTS)}")
        if self.method is not None and self.method not in METHODS:
            raise QuantizeError(f"unknown method {self.method!r}; allowed: {', '.join(METHODS)}")
        if self.variant in ("fp16", "int8-static") and (self.method or self.recipe):
            raise QuantizeError(f"--method and --recipe have no effect on {self.variant}; leave them out")
        if self.variant == "int8-static" and not self.calibration:
            raise QuantizeError("int8-static needs --calibration: its ranges are those of the images")
        if self.recipe and self.method:
            raise QuantizeError("--method has no effect beside --recipe, which names the methods; leave one out")
        if self.method == "gptq" and not self.calibration:
            raise QuantizeError("--method gptq needs --calibration: it rounds weights by what images put through them")
        if self.prompts and not self.calibration:
            raise QuantizeError("--prompts has no effect without --calibration; name the images' folder")
        if self.floor is not None and not (self.calibration and self.floor > 0):
            raise QuantizeError("--floor needs --calibration and a KL divergence above 0, such as 0.01")
        if self.max_size is not None and not (self.calibration and self.variant == "int4" and not self.recipe and not self.method):
            raise QuantizeError("--max-size searches precisions: it needs --variant int4 and --calibration, and no --recipe or --method")

    def searches(self) -> bool:
        """Whether the recipe is to be found: int4 within a size or a floor of quality."""
        given = self.recipe is not None or self.method is not None
        return self.variant == "int4" and not given and (self.max_size is not None or self.floor is not None)


def quantize(folder: Path, settings: Settings, progress: Progress = lambda *_: None, warn: Warn = print) -> Quality | None:
    """Write one variant into a bundle, calibrated on images, and judge it on others.

    Args:
        folder: a bundle of ours with an fp32 or fp16 variant.
        settings: see Settings.
        progress: told what is done, how much and of how much.
        warn: told what the user should know, in one line.

    Returns:
        The quality measured; None without calibration images.

    Raises:
        QuantizeError, BundleError: nothing was changed.
        GateError: the variant is below the floor; nothing was changed.
    """
    started = time.perf_counter()
    settings.check()
    folder = folder.resolve()
    bundle = Bundle.open(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise QuantizeError(f"{folder} has no manifest.json; quantize starts from a bundle made by: lfm-edge export")
    start, source = Source.open(bundle)
    if settings.variant == start:
        raise QuantizeError(f"{folder} has {start} from lfm-edge export and nothing finer to make it from")
    floor = settings.floor or DEFAULT_FLOORS[settings.variant]
    recipe = _recipe(settings, source)
    check_replaceable(folder)
    _check_space(folder, bundle, start)
    calibrate, judge, skipped = _questions(settings, warn)
    key = {
        "source": [entry for name, entry in manifest["files"].items() if name in _files(start) or "/" not in name],
        "versions": [ort.__version__, __version__], "recipe": recipe.to_list(), "questions": [str(q) for q in calibrate],
        "images": [file_hash(image) for image in sorted({q.image for q in calibrate})],
        "search": [settings.max_size, settings.floor] if settings.searches() else None,
    }  # fmt: skip
    with Work.open(folder, settings.variant, key) as work:
        samples = [prepare(bundle, q, split=False) for q in calibrate]
        add_answers(bundle, start, samples, ANSWER_TOKENS, settings.threads, progress)
        if settings.variant == "fp16":
            graphs, record = _halved(source, bundle, start, samples, settings)
        elif settings.variant == "int8-static":
            graphs, record = _static(source, bundle, start, samples, settings)
        else:
            if settings.searches():
                recipe = work.recipe() or _search(source, bundle, samples, settings, floor, progress)
                work.keep_recipe(recipe)
            graphs, record = _rounded(source, bundle, samples, recipe, work, settings.threads, progress)
        record |= {
            "from": start, "onnxruntime": ort.__version__, "lfm_edge": __version__,
            "calibration": {"images": len({q.image for q in calibrate}), "questions": len(calibrate), "skipped": skipped},
        }  # fmt: skip
        with replacing(folder) as new:
            now = read_manifest(folder)  # another variant may have been added meanwhile
            if now is None or now.get("source") != manifest.get("source"):
                raise QuantizeError(f"{folder} was exported anew from other weights while {settings.variant} was made; start again")
            manifest = now
            carry_over(folder, new, [n for n in manifest["files"] if n not in _files(settings.variant)])
            _save(new, settings.variant, graphs, source)
            if "recipe" in record:
                (new / "recipes").mkdir(exist_ok=True)
                (new / recipe_file(settings.variant)).write_text(recipe.to_toml(), encoding="utf-8")
            _check_size(new, settings)
            record["seconds"] = round(time.perf_counter() - started, 1)
            _write_manifest(new, manifest, settings.variant, start, graphs, record)
            del samples, graphs, source  # the fp32 model takes their place
            quality = None
            if judge:
                quality = measure(new, settings.variant, start, judge, settings.threads, progress)
                check_floor(quality, floor)
                if problem := keep_in_manifest(new, quality):
                    raise QuantizeError(problem)
        work.finished()
    return quality


def _check_size(folder: Path, settings: Settings) -> None:
    size = sum((folder / name).stat().st_size for name in _files(settings.variant) if name.startswith("onnx/") and (folder / name).exists())
    if settings.max_size is not None and size > settings.max_size * 1e6:
        raise QuantizeError(
            f"the files came out at {size / 1e6:.2f} MB, --max-size is {settings.max_size:g}; the bundle is as before: ask for less"
        )


def _recipe(settings: Settings, source: Source) -> Recipe:
    """What the user gave, or the variant's default; layers to keep first."""
    method = settings.method or ("gptq" if settings.calibration else "rtn")
    recipe = Recipe.read(settings.recipe) if settings.recipe else Recipe.default(settings.variant, method)
    recipe = recipe.keeping(settings.keep)
    recipe.check([*source.vision.linears(), *source.decoder.linears()])
    return recipe


def _rounded(
    source: Source, bundle: Bundle, samples: Sequence[Sample], recipe: Recipe, work: Work, threads: int, progress: Progress
) -> tuple[Graphs, dict[str, Any]]:
    """int8 or int4, layer by layer."""
    vision, features = _quantize_vision(source.vision, samples, recipe, work, threads, progress)
    table = _round_table(source, recipe)
    decoder = _quantize_decoder(source, samples, features, table, bundle, recipe, work, threads, progress)
    embed = source.embed
    if table:
        nodes, tensors = embedding_nodes(look_up(embed), table)
        embed = embed.replaced({look_up(embed).name: nodes}, tensors)
    graphs: Graphs = {
        VISION_ENCODER.stem: source.vision.replaced(vision.nodes, vision.tensors), EMBED_TOKENS.stem: embed,
        DECODER.stem: source.decoder.replaced(decoder.nodes, decoder.tensors),
    }  # fmt: skip
    return graphs, {"recipe": recipe.to_list(), "layers": [*vision.layers, *decoder.layers]}


def _halved(source: Source, bundle: Bundle, start: str, samples: Sequence[Sample], settings: Settings) -> tuple[Graphs, dict[str, Any]]:
    """fp16, but for nodes whose values would overflow on the calibration images, or that the user keeps."""
    threads = settings.threads
    kinds = image_positions(samples, PromptBuilder(bundle.prompt).image_id)
    views = [sample.views[0].feeds() for sample in samples]
    features = features_of(bundle, start, [s.views for s in samples], threads, packed=False) if samples else []
    feeds = prompt_feeds(source.decoder, samples, kinds, source.table, features)
    graphs: Graphs = {}
    stay = []
    for stem, graph, inputs in (
        (VISION_ENCODER.stem, source.vision, views), (EMBED_TOKENS.stem, source.embed, []), (DECODER.stem, source.decoder, feeds),
    ):  # fmt: skip
        names = overflowing(graph, inputs, threads)
        names += [n.name for n in graph.nodes if any(fnmatchcase(n.name, p) for p in settings.keep)]
        graphs[stem] = half(graph, names)
        stay += names
    return graphs, {"kept_fp32": sorted(set(stay))}


def _static(source: Source, bundle: Bundle, start: str, samples: Sequence[Sample], settings: Settings) -> tuple[Graphs, dict[str, Any]]:
    """The encoder with fixed ranges; the other graphs are those of int8, where the bundle has it."""
    from lfm_quantize.static import static_int8  # onnxruntime.quantization wants more packages than the rest

    feeds = [view.feeds() for sample in samples for view in (*sample.views, *sample.extra)]
    keep = [name for name in source.vision.linears() if any(fnmatchcase(name, p) for p in settings.keep)]
    rest = bundle.graphs("int8" if "int8" in bundle.variants else start)[1]
    others = {stem: path.relative_to(bundle.folder).as_posix() for stem, path in rest.items() if stem != VISION_ENCODER.stem}
    return {VISION_ENCODER.stem: static_int8(source.vision, feeds, keep), **others}, {"kept_fp32": keep}


def _search(
    source: Source, bundle: Bundle, samples: Sequence[Sample], settings: Settings, floor: float, progress: Progress
) -> Recipe:
    """The best recipe for the size or floor asked for."""
    kept = [name for name in [*source.vision.linears(), *source.decoder.linears()] if any(fnmatchcase(name, p) for p in settings.keep)]
    choices = survey(source, bundle, samples, kept, settings.threads, progress)
    return choose(choices, floor, None if settings.max_size is None else settings.max_size * 1e6 - source.other_bytes())


def _questions(settings: Settings, warn: Warn) -> tuple[list[Question], list[Question], int]:
    """(to calibrate with, to judge with, images skipped)."""
    if settings.calibration is None:
        warn("no --calibration images: weights are rounded without looking at what they do, and the result is not judged")
        return [], [], 0
    questions, skipped = read_questions(settings.calibration, settings.prompts)
    images = len({q.image for q in questions})
    if skipped:
        warn(f"{skipped} of {images + skipped} images could not be opened and are left out")
    if images > MANY_IMAGES:
        chosen = set(random.Random(0).sample(sorted({q.image for q in questions}), MANY_IMAGES))  # noqa: S311
        questions = [q for q in questions if q.image in chosen]
        warn(f"{MANY_IMAGES} of {images} images are used; more would not make a better calibration")
    if images < FEW_IMAGES:
        warn(f"only {images} usable images; with fewer than {FEW_IMAGES} the calibration and its judgement mean little")
    calibrate, judge = split_off(questions, HELD_OUT, seed=0)
    if not judge:
        if settings.floor is not None:
            raise QuantizeError(f"--floor needs a second image to judge with; {settings.calibration} has one")
        warn("with one image nothing is left to judge with: the result is not judged")
    return calibrate, judge, skipped


def _quantize_vision(
    graph: Graph, samples: Sequence[Sample], recipe: Recipe, work: Work, threads: int, progress: Progress
) -> tuple[Change, list[Float]]:
    """The changes, and the image features that the quantized encoder gives each sample."""
    first = {sample.question.image: sample for sample in reversed(samples)}  # several questions may be about one image
    whole = {image: i for i, image in enumerate(first)}
    views = [sample.views[0] for sample in first.values()] + [view for sample in first.values() for view in sample.extra]
    feeds: list[Feeds] = [view.feeds() for view in views]
    kinds = [np.ones(len(view.patches), np.bool_) for view in views]
    change, end = _through_blocks(graph, feeds, kinds, recipe, work, threads, progress, None)
    if any(precision.bits < 32 for precision in map(recipe.precision, graph.linears())):
        change.add(Change(*halved(graph, "vision.embeddings.position_embedding.weight")))
    return change, [end[whole[s.question.image]]["image_features"] for s in samples]


def _quantize_decoder(
    source: Source, samples: Sequence[Sample], features: Sequence[Float], table: Rounded | None, bundle: Bundle,
    recipe: Recipe, work: Work, threads: int, progress: Progress,
) -> Change:  # fmt: skip
    graph = all_positions(source.decoder)
    kinds = image_positions(samples, PromptBuilder(bundle.prompt).image_id)
    feeds = prompt_feeds(graph, samples, kinds, table.weight() if table else source.table, features)
    return _through_blocks(graph, feeds, kinds, recipe, work, threads, progress, (source.tied, table))[0]


def _through_blocks(
    graph: Graph, feeds: list[Feeds], kinds: list[NDArray[np.bool_]], recipe: Recipe, work: Work, threads: int, progress: Progress,
    head: tuple[bool, Rounded | None] | None,
) -> tuple[Change, list[Values]]:  # fmt: skip
    """Quantize block after block, each on the inputs that the quantized blocks before it produce; also what the last one gives."""
    blocks = blocks_of(graph)
    states: list[Values] = [{} for _ in feeds]
    total = Change()
    for i, block in enumerate(blocks):
        change = work.load(block.name) or quantize_block(graph, block, feeds, states, kinds, recipe, threads, head)
        work.save(block.name, change)
        if feeds and block.name != "head":  # nobody reads the logits of every position, and they are large
            quantized = graph.replaced(change.nodes, change.tensors)
            states = run_block(quantized, block, feeds, states, threads)
            quantized.release()
        graph.release()
        total.add(change)
        progress(f"quantizes {graph.name}", i + 1, len(blocks))
    return total, states


def _round_table(source: Source, recipe: Recipe) -> Rounded | None:
    """The embedding table at the head's precision; None where that stays fp32."""
    precision = recipe.precision("head")
    if precision.bits == 32:
        return None
    if precision.method == "gptq":  # both a look-up and a product read it: each row is to be near itself, whatever meets it
        precision = replace(precision, method="clipped")
    return METHODS[precision.method](source.table, precision, None)


def _save(folder: Path, variant: str, graphs: Graphs, source: Source) -> None:
    """Write the graphs that are new. A head tied to the embedding table points into the table's file."""
    places: dict[str, Place] = {}
    for stem in (VISION_ENCODER.stem, EMBED_TOKENS.stem, DECODER.stem):
        graph = graphs[stem]
        if isinstance(graph, str):
            continue
        if stem == DECODER.stem and source.tied:
            same = {n: n for n in places if n.startswith(TABLE)} | {source.head: look_up(source.embed).input[0]}
            graph.tensors = {
                n: replace(t, place=places[same[n]]) if n in same and same[n] in places and places[same[n]].size == t.array.nbytes else t
                for n, t in graph.tensors.items()
            }  # fmt: skip
        written = graph.save(folder / graph_file(stem, variant))
        places = written if stem == EMBED_TOKENS.stem else places


def _files(variant: str) -> set[str]:
    """Files a variant may write."""
    names = {graph_file(graph.stem, variant) for graph in (VISION_ENCODER, EMBED_TOKENS, DECODER)}
    return names | {f"{name}_data" for name in names} | {recipe_file(variant), MANIFEST}


def recipe_file(variant: str) -> str:
    """Where a variant's recipe lies in a bundle, to be read and to be given to --recipe."""
    return f"recipes/{variant}.toml"


def _write_manifest(
    folder: Path, old: dict[str, Any], variant: str, start: str, graphs: Graphs, record: dict[str, Any]
) -> None:
    """The old manifest with the variant's files and recipe in it, and no word on its quality yet."""
    manifest = json.loads(json.dumps(old))
    written = {name for name in _files(variant) if name != MANIFEST and (folder / name).exists()}
    manifest["files"] = {n: e for n, e in old["files"].items() if n not in _files(variant)}
    manifest["files"] |= {n: {"bytes": (folder / n).stat().st_size, "sha256": file_hash(folder / n)} for n in sorted(written)}
    names = {stem: graph if isinstance(graph, str) else graph_file(stem, variant) for stem, graph in graphs.items()}
    manifest["variants"][variant] = names
    for stem, graph in graphs.items():
        if isinstance(graph, Graph):
            described = {**old["graphs"][graph_file(stem, start)], **graph.edges()}
            data = sorted(f"onnx/{file}" for file in graph.data_files(Path(names[stem]).name))
            manifest["graphs"][names[stem]] = {**described, "data": data}
    manifest.setdefault("quantization", {})[variant] = record
    manifest.setdefault("quality", {}).pop(variant, None)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _check_space(folder: Path, bundle: Bundle, start: str) -> None:
    """Room for the work folder and the new files: a third of the weights each, roughly."""
    weights = sum(int(e["bytes"]) for n, e in bundle.files.items() if n.startswith("onnx/") and n in _files(start))
    free, wanted = shutil.disk_usage(folder.resolve().parent).free, int(weights * 0.7)
    if free < wanted:
        raise QuantizeError(f"{folder.resolve().parent} has {free >> 20} MiB free, quantizing needs about {wanted >> 20}; make room")

