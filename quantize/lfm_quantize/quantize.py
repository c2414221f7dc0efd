"""The main path: a bundle and images in, one more variant in the bundle out. Reads top to bottom as one run happens."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from lfm_profiles import SMALLER, VARIANTS
from lfm_runtime import __version__
from lfm_runtime.bundle import Bundle
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, VISION_ENCODER
from lfm_runtime.formats.manifest import Manifest, file_hash, outdated_files, recipe_file, variant_files
from lfm_runtime.formats.writer import carry_over, check_replaceable, replacing
from lfm_runtime.golden import add_golden
from numpy.typing import NDArray

from lfm_quantize.calibrate.answers import Progress, add_answers, features_of
from lfm_quantize.calibrate.blocks import (
    Feeds,
    Values,
    all_positions,
    blocks_of,
    image_positions,
    prompt_feeds,
    run_block,
)
from lfm_quantize.calibrate.samples import FEW_IMAGES, Question, Sample, prepare, read_questions, split_off
from lfm_quantize.graph import Graph, QuantizeError
from lfm_quantize.layer import Change, quantize_block
from lfm_quantize.passes.gpu import for_gpu, fused_biases, in_standard_operators, over_its_files
from lfm_quantize.passes.half import half, overflowing
from lfm_quantize.passes.kv import int8_kv, largest_states
from lfm_quantize.passes.rewrite import embedding_nodes, stored_as_half
from lfm_quantize.quality import Quality, check_floor, measure
from lfm_quantize.recipe import Recipe, matching
from lfm_quantize.rounding import METHODS, Rounded
from lfm_quantize.search import choose, survey
from lfm_quantize.source import Source, look_up
from lfm_quantize.variant import Graphs, check_size, check_space, save_graphs, with_graphs, with_quality
from lfm_quantize.work import Work

CALIBRATION_TOKENS = 24
"""Of each fp32 answer that calibration follows."""
MANY_IMAGES = 256
"""Beyond these a sample is used: hidden states of all of them are in memory."""
HELD_OUT = 0.25
"""Share of the images kept from calibration, to judge with."""

Float = NDArray[np.float32]
Warn = Callable[[str], None]


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
            raise QuantizeError(
                f"unknown variant {self.variant!r}; allowed: {', '.join(v for v in VARIANTS if v != 'fp32')}"
            )
        if self.method is not None and self.method not in METHODS:
            raise QuantizeError(f"unknown method {self.method!r}; allowed: {', '.join(METHODS)}")
        if not self.rounds() and (self.method or self.recipe):
            raise QuantizeError(f"--method and --recipe have no effect on {self.variant}; leave them out")
        if VARIANTS[self.variant].needs_images and not self.calibration:
            raise QuantizeError(f"{self.variant} needs --calibration: its ranges are those of the images")
        if self.keeps_weights() and self.keep:
            raise QuantizeError(
                f"--keep has no effect on {self.variant}, whose weights are another variant's; leave it out"
            )
        if self.recipe and self.method:
            raise QuantizeError("--method has no effect beside --recipe, which names the methods; leave one out")
        if self.method == "gptq" and not self.calibration:
            raise QuantizeError("--method gptq needs --calibration: it rounds weights by what images put through them")
        if self.prompts and not self.calibration:
            raise QuantizeError("--prompts has no effect without --calibration; name the images' folder")
        if self.floor is not None and not (self.calibration and self.floor > 0):
            raise QuantizeError("--floor needs --calibration and a KL divergence above 0, such as 0.01")
        if self.max_size is not None and not (
            self.calibration and self.variant == "int4" and not self.recipe and not self.method
        ):
            raise QuantizeError(
                "--max-size searches precisions: it needs --variant int4 and --calibration, and no --recipe or --method"
            )
        if self.max_size is not None and not self.max_size > 0:
            raise QuantizeError(f"--max-size {self.max_size:g} is impossible; allowed: megabytes above 0")

    def kl_floor(self) -> float:
        """Highest KL divergence allowed: the user's, or the variant's default."""
        return self.floor or VARIANTS[self.variant].floor

    def rounds(self) -> bool:
        """Whether weights become integers, by a recipe."""
        return self.variant in SMALLER

    def keeps_weights(self) -> bool:
        """Whether it is another variant's weights in other graphs."""
        return bool(VARIANTS[self.variant].bases)

    def searches(self) -> bool:
        """Whether the recipe is to be found: int4 within a size or a floor of quality."""
        given = self.recipe is not None or self.method is not None
        return self.variant == "int4" and not given and (self.max_size is not None or self.floor is not None)


@dataclass(frozen=True)
class Run:
    """What every step of one run works with."""

    settings: Settings
    bundle: Bundle
    start: str  # the variant whose graphs `source` holds
    source: Source
    samples: list[Sample]
    work: Work
    progress: Progress

    def image_positions(self) -> list[NDArray[np.bool_]]:
        """For each sample, which of its tokens are image tokens."""
        return image_positions(self.samples, self.bundle.prompts.image_id)


def quantize(
    folder: Path, settings: Settings, progress: Progress = lambda *_: None, warn: Warn = print
) -> Quality | None:
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
    manifest = Manifest.of(folder)
    start, source = Source.open(bundle)
    if settings.variant == start:
        raise QuantizeError(f"{folder} has {start} from lfm-edge export and nothing finer to make it from")
    recipe = _recipe(settings, source) if settings.rounds() else None
    check_replaceable(folder)
    check_space(folder, bundle, start)
    calibrate, judge, skipped = _questions(settings, warn)

    with Work.open(folder, settings.variant, _key(settings, recipe, manifest, start, calibrate)) as work:
        samples = [prepare(bundle, q, split=False) for q in calibrate]
        add_answers(bundle, start, samples, CALIBRATION_TOKENS, settings.threads, progress)
        run = Run(settings, bundle, start, source, samples, work, progress)
        if recipe:
            if settings.searches():
                recipe = _search(run)
            graphs, record = _as_integers(run, recipe)
        elif settings.variant == "fp16":
            graphs, record = _as_fp16(run)
        elif VARIANTS[settings.variant].keys == "int8":
            graphs, record = _with_int8_kv(run)
        elif settings.keeps_weights():
            graphs, record = _over_other_files(run)
        else:
            graphs, record = _with_static_ranges(run)
        record |= {
            "from": start,
            "onnxruntime": ort.__version__,
            "lfm_edge": __version__,
            "calibration": {
                "images": len({q.image for q in calibrate}),
                "questions": len(calibrate),
                "skipped": skipped,
            },
        }

        with replacing(folder) as new:
            now = Manifest.of(folder)  # another variant may have been added meanwhile
            if now.source != manifest.source:
                raise QuantizeError(
                    f"{folder} was exported anew from other weights while {settings.variant} was made; start again"
                )
            carry_over(folder, new, [n for n in now.files if n not in outdated_files(settings.variant)])
            save_graphs(new, settings.variant, graphs, source)
            if recipe:
                (new / "recipes").mkdir(exist_ok=True)
                (new / recipe_file(settings.variant)).write_text(recipe.to_toml(), encoding="utf-8")
            if settings.max_size is not None:
                check_size(new, settings.variant, settings.max_size)
            record["seconds"] = round(time.perf_counter() - started, 1)
            made = with_graphs(now, new, settings.variant, start, graphs, record)
            made.write(new)
            for gone in set(VARIANTS[settings.variant].dependents).intersection(now.variants):
                warn(f"{gone} was made of the {settings.variant} before and is gone; make it again")
            del run, samples, graphs, source  # the fp32 model takes their place
            quality = None
            if judge:
                quality = measure(new, settings.variant, start, judge, settings.threads, progress)
                check_floor(quality, settings.kl_floor())
                with_quality(made, quality).write(new)
            if warning := add_golden(new, settings.variant):
                warn(warning)
        work.finished()
    return quality


def _recipe(settings: Settings, source: Source) -> Recipe:
    """What the user gave, or the variant's default; layers to keep first."""
    method = settings.method or ("gptq" if settings.calibration else "rtn")
    recipe = Recipe.read(settings.recipe) if settings.recipe else Recipe.default(settings.variant, method)
    recipe = recipe.keeping(settings.keep)
    recipe.check(source.linears())
    return recipe


def _questions(settings: Settings, warn: Warn) -> tuple[list[Question], list[Question], int]:
    """(to calibrate with, to judge with, images skipped)."""
    if settings.calibration is None:
        rounded = "weights are rounded without looking at what they do, and " if settings.rounds() else ""
        warn(f"no --calibration images: {rounded}the result is not judged")
        return [], [], 0
    questions, skipped = read_questions(settings.calibration, settings.prompts)
    images = len({q.image for q in questions})
    if settings.prompts is None and (left := sorted(settings.calibration.glob("*.jsonl"))):
        warn(f"built-in questions are asked; {left[0].name} beside the images has others: --prompts {left[0]}")
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


def _key(
    settings: Settings, recipe: Recipe | None, manifest: Manifest, start: str, calibrate: list[Question]
) -> dict[str, Any]:
    """Everything the blocks depend on: a run that was killed goes on only with the same."""
    return {
        "source": [
            asdict(file) for name, file in manifest.files.items() if name in variant_files(start) or "/" not in name
        ],
        "versions": [ort.__version__, __version__],
        "recipe": recipe.to_list() if recipe else list(settings.keep),
        "questions": [str(q) for q in calibrate],
        "images": [file_hash(image) for image in sorted({q.image for q in calibrate})],
        "search": [settings.max_size, settings.floor] if settings.searches() else None,
    }


# ---------------------------------------------------------------------------------------------------- int8 and int4


def _search(run: Run) -> Recipe:
    """The best recipe for the size or floor asked for; the one found before the run was killed, if it was."""
    if recipe := run.work.recipe():
        return recipe
    kept = matching(run.settings.keep, run.source.linears())
    choices = survey(run.source, run.bundle, run.samples, kept, run.settings.threads, run.progress)
    size = run.settings.max_size
    recipe = choose(choices, run.settings.kl_floor(), None if size is None else size * 1e6 - run.source.other_bytes())
    run.work.keep_recipe(recipe)
    return recipe


def _as_integers(run: Run, recipe: Recipe) -> tuple[Graphs, dict[str, Any]]:
    """Vision, then the table, then the decoder, which is fed what the first two give."""
    source = run.source
    vision, features = _quantize_vision(run, recipe)
    table = _round_table(source, recipe)
    decoder = _quantize_decoder(run, recipe, features, table)
    embed = source.embed
    if table:
        nodes, tensors = embedding_nodes(look_up(embed), table)
        embed = embed.replaced({look_up(embed).name: nodes}, tensors)
    graphs: Graphs = {
        VISION_ENCODER.stem: source.vision.replaced(vision.nodes, vision.tensors),
        EMBED_TOKENS.stem: embed,
        DECODER.stem: source.decoder.replaced(decoder.nodes, decoder.tensors),
    }
    return graphs, {"recipe": recipe.to_list(), "layers": [*vision.layers, *decoder.layers]}


def _quantize_vision(run: Run, recipe: Recipe) -> tuple[Change, list[Float]]:
    """The changes, and the image features that the quantized encoder gives each sample."""
    graph, samples = run.source.vision, run.samples
    first = {sample.question.image: sample for sample in reversed(samples)}  # several questions may be about one image
    whole = {image: i for i, image in enumerate(first)}
    views = [sample.views[0] for sample in first.values()] + [
        view for sample in first.values() for view in sample.extra
    ]
    feeds: list[Feeds] = [view.feeds() for view in views]
    kinds = [np.ones(len(view.patches), np.bool_) for view in views]
    change, end = _through_blocks(run, recipe, graph, feeds, kinds, None)
    if any(precision.bits < 32 for precision in map(recipe.precision, graph.linears())):
        change.add(Change(*stored_as_half(graph, "vision.embeddings.position_embedding.weight")))
    return change, [end[whole[s.question.image]]["image_features"] for s in samples]


def _quantize_decoder(run: Run, recipe: Recipe, features: list[Float], table: Rounded | None) -> Change:
    """The changes; `table` is the embedding table rounded, None where it stays fp32."""
    graph, kinds = all_positions(run.source.decoder), run.image_positions()
    feeds = prompt_feeds(graph, run.samples, kinds, table.weight() if table else run.source.table, features)
    return _through_blocks(run, recipe, graph, feeds, kinds, (run.source.tied, table))[0]


def _through_blocks(
    run: Run,
    recipe: Recipe,
    graph: Graph,
    feeds: list[Feeds],
    kinds: list[NDArray[np.bool_]],
    head: tuple[bool, Rounded | None] | None,
) -> tuple[Change, list[Values]]:
    """Quantize block after block, each on the inputs that the quantized blocks before it produce; also what the last
    one gives.
    """
    blocks, threads = blocks_of(graph), run.settings.threads
    states: list[Values] = [{} for _ in feeds]
    total = Change()
    for i, block in enumerate(blocks):
        change = run.work.load(block.name) or quantize_block(graph, block, feeds, states, kinds, recipe, threads, head)
        run.work.save(block.name, change)
        if feeds and block.name != "head":  # nobody reads the logits of every position, and they are large
            quantized = graph.replaced(change.nodes, change.tensors)
            states = run_block(quantized, block, feeds, states, threads)
            quantized.release()
        graph.release()
        total.add(change)
        run.progress(f"quantizes {graph.name}", i + 1, len(blocks))
    return total, states


def _round_table(source: Source, recipe: Recipe) -> Rounded | None:
    """The embedding table at the head's precision; None where that stays fp32."""
    precision = recipe.precision("head")
    if precision.bits == 32:
        return None
    if (
        precision.method == "gptq"
    ):  # both a look-up and a product read it: each row is to be near itself, whatever meets it
        precision = replace(precision, method="clipped")
    return METHODS[precision.method](source.table, precision, None)


# ------------------------------------------------------------------------------------- fp16, int8-static, int8 pasts


def _as_fp16(run: Run) -> tuple[Graphs, dict[str, Any]]:
    """fp16, but for nodes whose values would overflow on the calibration images, or that the user keeps."""
    source, threads = run.source, run.settings.threads
    features = (
        features_of(run.bundle, run.start, [s.views for s in run.samples], threads, packed=False) if run.samples else []
    )
    inputs = {
        VISION_ENCODER.stem: [sample.views[0].feeds() for sample in run.samples],
        DECODER.stem: prompt_feeds(source.decoder, run.samples, run.image_positions(), source.table, features),
    }
    originals = {VISION_ENCODER.stem: source.vision, EMBED_TOKENS.stem: source.embed, DECODER.stem: source.decoder}
    stay = set(matching(run.settings.keep, [node.name for graph in originals.values() for node in graph.nodes]))
    for stem, graph in originals.items():
        stay.update(overflowing(graph, inputs.get(stem, []), threads))
    graphs: Graphs = {
        VISION_ENCODER.stem: fused_biases(half(source.vision, stay)),
        EMBED_TOKENS.stem: half(source.embed, stay),
        DECODER.stem: for_gpu(half(source.decoder, stay)),
    }
    return graphs, {"kept_fp32": sorted(stay)}


def _with_static_ranges(run: Run) -> tuple[Graphs, dict[str, Any]]:
    """The encoder with fixed ranges; the other graphs are those of int8, where the bundle has it."""
    from lfm_quantize.passes.static import static_int8  # onnxruntime.quantization wants more packages than the rest

    feeds = [view.feeds() for sample in run.samples for view in (*sample.views, *sample.extra)]
    keep = matching(run.settings.keep, run.source.vision.linears())
    rest = run.bundle.graphs("int8" if "int8" in run.bundle.variants else run.start)[1]
    others = {
        stem: path.relative_to(run.bundle.folder).as_posix()
        for stem, path in rest.items()
        if stem != VISION_ENCODER.stem
    }
    return {VISION_ENCODER.stem: static_int8(run.source.vision, feeds, keep), **others}, {"kept_fp32": keep}


def _with_int8_kv(run: Run) -> tuple[Graphs, dict[str, Any]]:
    """Another variant's graphs, its decoder with keys and values in 8 bits."""
    base = VARIANTS[run.settings.variant].float_keys
    features = features_of(run.bundle, run.start, [s.views for s in run.samples], run.settings.threads, packed=False)
    decoder = all_positions(run.source.decoder)
    feeds = prompt_feeds(decoder, run.samples, run.image_positions(), run.source.table, features)
    largest = largest_states(decoder, feeds, run.settings.threads)  # of the start: scales are the same for every base
    paths = run.bundle.graphs(base)[1]
    others = {
        stem: path.relative_to(run.bundle.folder).as_posix() for stem, path in paths.items() if stem != DECODER.stem
    }
    return {DECODER.stem: int8_kv(Graph.open(paths[DECODER.stem], widen=False), largest), **others}, {"base": base}


def _over_other_files(run: Run) -> tuple[Graphs, dict[str, Any]]:
    """What GPUs want beside fp16: int4's weights with fp16 activations, or fp16's encoder in standard operators for
    TensorRT.
    """
    variant = run.settings.variant
    files = {stem: path for base in VARIANTS[variant].bases for stem, path in run.bundle.graphs(base)[1].items()}
    if variant == "fp16-trt":
        original = Graph.open(files[VISION_ENCODER.stem], widen=False)
        made: Graphs = {VISION_ENCODER.stem: over_its_files(in_standard_operators(original), original)}
    else:
        int4 = run.bundle.graphs("int4")[1]
        original = Graph.open(int4[DECODER.stem], widen=False)
        kept = set(Manifest.of(run.bundle.folder).quantization.get("fp16", {}).get("kept_fp32", []))
        stay = [
            node.name for node in original.nodes if kept.intersection((node.name, node.name.removesuffix(".matmul")))
        ]
        made = {DECODER.stem: over_its_files(for_gpu(half(original, stay)), original)}
        files[EMBED_TOKENS.stem] = int4[EMBED_TOKENS.stem]
    others = {stem: path.relative_to(run.bundle.folder).as_posix() for stem, path in files.items() if stem not in made}
    return {**others, **made}, {"base": list(VARIANTS[variant].bases)}
