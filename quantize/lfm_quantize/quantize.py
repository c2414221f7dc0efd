"""The main path: a bundle and images in, one more variant in the bundle out. Reads top to bottom as one run happens."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
from lfm_profiles import VARIANTS
from lfm_runtime import __version__
from lfm_runtime.bundle import Bundle, complete_for_clients
from lfm_runtime.engine.ort_release import onnxruntime_is
from lfm_runtime.formats.manifest import Manifest, file_hash, lost_seal, outdated_files, recipe_file, variant_files
from lfm_runtime.formats.writer import carry_over, check_replaceable, replacing
from lfm_runtime.golden import add_golden
from lfm_runtime.questions import Question

from lfm_quantize.calibrate.answers import Progress, add_answers
from lfm_quantize.calibrate.samples import FEW_IMAGES, named, read_questions, split_off, to_sample
from lfm_quantize.calibrate.spread import cluster_of
from lfm_quantize.graph import QuantizeError
from lfm_quantize.judge.measure import Board, measure
from lfm_quantize.judge.quality import GateError, Quality, check_floor
from lfm_quantize.make.floats import as_fp16, for_tensorrt, over_int4
from lfm_quantize.make.integers import as_integers
from lfm_quantize.make.keys import with_int8_keys
from lfm_quantize.make.static import with_static_ranges
from lfm_quantize.passes.attention import attentions
from lfm_quantize.passes.kv import FIRST_ONNXRUNTIME
from lfm_quantize.recipe import Recipe
from lfm_quantize.run import Made, Run
from lfm_quantize.settings import Settings
from lfm_quantize.source import Source
from lfm_quantize.variant import calibration_marks, check_size, check_space, save_graphs, with_graphs, with_quality
from lfm_quantize.work import Work

MAKERS: Mapping[str, Callable[[Run], Made]] = {
    "fp16": as_fp16,
    "int8": as_integers,
    "int4": as_integers,
    "int8-static": with_static_ranges,
    "int8-kv8": with_int8_keys,
    "int4-kv8": with_int8_keys,
    "int4-fp16": over_int4,
    "fp16-trt": for_tensorrt,
}
"""What makes each variant but fp32."""
CALIBRATION_TOKENS, QUICK_TOKENS = 24, 8
"""Of each fp32 answer that calibration follows."""
MANY_IMAGES = 256
"""Beyond these a sample is used: hidden states of all of them are in memory."""
QUICK_IMAGES, QUICK_JUDGED = 8, 4
"""Images that a quick run calibrates and judges with."""
HELD_OUT = 0.25
"""Share of the images kept from calibration, to judge with."""

Warn = Callable[[str], None]


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
    bundle, manifest = Bundle.open(folder, replaced=outdated_files(settings.variant)), Manifest.of(folder)
    source = Source.open(bundle, settings.variant)
    recipe = _recipe(settings, source) if settings.rounds() else None
    _check_place(bundle, manifest, settings, source.variant, warn)
    questions = _questions(settings, manifest, warn)

    key = _key(settings, recipe, manifest, source, questions)
    with Work.open(folder, settings.variant, key) as work, cluster_of(settings.scheduler) as cluster:
        # Calibrate: questions and answers that the source's variant is led through.
        samples = [to_sample(bundle, q, split=False) for q in questions.calibrate]
        run = Run(settings, bundle, source, recipe, samples, work, progress, cluster)
        add_answers(run.exact, samples, _answer_tokens(settings), progress, cluster)
        # Smooth and round, or rewrite.
        made = MAKERS[settings.variant](run)
        made.record.update(_origin(source, questions))

        with replacing(folder) as new:
            now = Manifest.of(folder)  # another variant may have been added meanwhile
            if now.source != manifest.source:
                raise QuantizeError(f"{folder} was exported again from other weights meanwhile; start again")
            carry_over(folder, new, [n for n in now.files if n not in outdated_files(settings.variant)])
            written = _write(new, now, made, run, time.perf_counter() - started)
            for gone in sorted(set(VARIANTS[settings.variant].dependents).intersection(now.variants)):
                warn(f"{gone} used the old {settings.variant} weights and was removed; quantize it again")
            start = source.variant
            # The model to judge against takes their place. Graphs refer to themselves: they go when they are collected.
            del run, samples, made, source
            gc.collect()
            # Judge: below the floor, the bundle stays as it was.
            quality = None
            if questions.judge:
                quality = _judge(new, start, questions.judge, settings, progress)
                _check(quality, settings, work)
                with_quality(written, quality).write(new)
            if warning := add_golden(new, settings.variant):
                warn(warning)
        work.finished()  # the new files are in the bundle
    return quality


def _answer_tokens(settings: Settings) -> int:
    return QUICK_TOKENS if settings.quick else CALIBRATION_TOKENS


def _check_place(bundle: Bundle, manifest: Manifest, settings: Settings, start: str, warn: Warn) -> None:
    """Raise BundleError or QuantizeError where the variant must not, or cannot, be written into the bundle."""
    check_replaceable(bundle.folder)
    if VARIANTS[settings.variant].keys == "int8" and not onnxruntime_is(FIRST_ONNXRUNTIME):
        needs = f"needs onnxruntime {FIRST_ONNXRUNTIME}, this is {ort.__version__}"
        raise QuantizeError(f"{settings.variant} {needs}; update it, or take another variant")
    for base in VARIANTS[settings.variant].bases:
        bundle.graphs(base)
    _check_better(manifest, settings)
    _check_dependents(manifest, settings)
    check_space(bundle.folder, bundle, start)
    if lost := lost_seal(bundle.folder):
        warn(lost)


def _check_better(manifest: Manifest, settings: Settings) -> None:
    """Raise QuantizeError where a variant that is there was made with more care than this run would take."""
    variant, there = settings.variant, manifest.quantization.get(settings.variant, {})
    if settings.force or not settings.rounds() or not (there.get("calibration") or {}).get("images"):
        return
    judged = manifest.quality.get(variant, {}).get("kl")
    known = f"calibrated{f' and judged (KL {judged:.2g})' if isinstance(judged, float) else ''}"
    if not settings.calibration:
        raise QuantizeError(f"{variant} is there, {known}; name --calibration images, or replace it with --force")
    if settings.quick and not there.get("quick", False):
        raise QuantizeError(f"{variant} is there, {known} in full; leave --quick out, or replace it with --force")


def _check_dependents(manifest: Manifest, settings: Settings) -> None:
    """Raise QuantizeError where calibrated variants that use this one's weights would go."""
    for variant in sorted(set(VARIANTS[settings.variant].dependents).intersection(manifest.variants)):
        if VARIANTS[variant].needs_images and not settings.force:
            raise QuantizeError(
                f"{variant} is there, calibrated, and uses {settings.variant}'s weights: it would be removed; go on "
                f"with --force, and quantize {variant} again"
            )


def _check_as_many(manifest: Manifest, settings: Settings, questions: _Questions) -> None:
    """As _check_better, for the number of images, which is known once they are read."""
    there = manifest.quantization.get(settings.variant, {}).get("calibration") or {}
    known, now = there.get("images", 0), _images(questions.calibrate)
    if not settings.force and settings.rounds() and isinstance(known, int) and now < known:
        raise QuantizeError(
            f"{settings.variant} is there, calibrated with {known} images, and this run has {now}; name more, or "
            "replace it with --force"
        )


def _images(questions: list[Question]) -> int:
    return len({question.image for question in questions})


def _judge(folder: Path, against: str, questions: list[Question], settings: Settings, progress: Progress) -> Quality:
    """The new variant against another: with the checkpoint's image settings, or as a device runs both."""
    board = Board.of(Bundle.open(folder), settings.profile, alike=True) if settings.profile else None
    quick, threads = settings.quick, settings.threads
    return measure(folder, settings.variant, against, questions, threads, progress, board=board, quick=quick)


def _check(quality: Quality, settings: Settings, work: Work) -> None:
    """Raise GateError below the floor; nothing is kept then, as the same command would come to the same."""
    try:
        check_floor(quality, settings.kl_floor(), quick=settings.quick, kept=settings.keep)
    except GateError:
        work.finished()
        raise


@dataclass(frozen=True)
class _Questions:
    """What is asked: to calibrate with, and to judge with, about other images."""

    calibrate: list[Question]
    judge: list[Question]
    skipped: int = 0  # images that could not be opened


def _recipe(settings: Settings, source: Source) -> Recipe:
    """What the user gave, or the variant's default; layers to keep first."""
    method = settings.method or ("gptq" if settings.calibration else "rtn")
    if not settings.recipe:
        recipe = Recipe.default(settings.variant, method, quick=settings.quick)
    else:
        recipe = Recipe.read(settings.recipe)
        if not settings.calibration and any(map(recipe.attends_in_integers, attentions(source.vision))):
            raise QuantizeError(f"{settings.recipe}: attention in 8 bits is tried on images; name --calibration")
        try:
            recipe.check(source.layers())
        except QuantizeError as e:
            raise QuantizeError(f"{settings.recipe}: {e}") from e
    recipe = recipe.keeping(settings.keep)
    recipe.check(source.layers())
    return recipe


def _questions(settings: Settings, manifest: Manifest, warn: Warn) -> _Questions:
    """Read the questions and set some apart; warn of what makes them few. Raises QuantizeError where a variant that is
    there was made with more.
    """
    if not settings.calibration:
        rounded = "weights are rounded without calibration, and " if settings.rounds() else ""
        warn(f"no --calibration images: {rounded}the quality is not measured")
        return _Questions([], [])
    questions, skipped = read_questions(settings.calibration, settings.prompts)
    images = len({q.image for q in questions})
    given = [place.resolve() for place in settings.calibration]
    if questions[0].place and not any(
        place in (image, *image.parents) for image in {q.image.resolve() for q in questions} for place in given
    ):
        where = ", ".join(map(str, settings.calibration))
        warn(f"{settings.prompts} asks about images beside it, and none in {where}: that is not calibrated with")
    if settings.prompts is None and (
        left := [file for place in settings.calibration for file in sorted(place.glob("*.jsonl"))]
    ):
        warn(f"the built-in questions are used; to use those in {left[0].name}: --prompts {left[0]}")
    if skipped:
        warn(f"{len(skipped)} of {images + len(skipped)} images are left out: {named(skipped)}")
    if images > MANY_IMAGES:
        questions = _some(questions, MANY_IMAGES)
        warn(f"{MANY_IMAGES} of {images} images are used; more would not make a better calibration")
    asked = {q.image for q in questions}
    images = len({file_hash(image) for image in asked})
    if copies := len(asked) - images:
        warn(f"{copies} of {len(asked)} images are copies: they add nothing, and may judge what they calibrated")
    if images < FEW_IMAGES:
        where = (
            f"--prompts asks about {images} images"
            if questions[0].place
            else f"only {images} usable image{'s' * (images > 1)}"
        )
        warn(f"{where}; with fewer than {FEW_IMAGES} the calibration and its judgement mean little")
    calibrate, judge = split_off(questions, HELD_OUT, seed=0)
    if not judge:
        if settings.floor is not None:
            raise QuantizeError("--floor needs a second image to measure the quality with; there is one")
        warn("there is only one image, so none is held out: the quality is not measured")
    if settings.quick:
        calibrate, judge = _some(calibrate, QUICK_IMAGES), _some(judge, QUICK_JUDGED)
    found = _Questions(calibrate, judge, len(skipped))
    _check_as_many(manifest, settings, found)
    return found


def _some(questions: list[Question], most: int) -> list[Question]:
    """The questions about `most` of the images."""
    images = sorted({q.image for q in questions})
    chosen = set(random.Random(0).sample(images, min(most, len(images))))  # noqa: S311
    return [q for q in questions if q.image in chosen]


def _key(
    settings: Settings, recipe: Recipe | None, manifest: Manifest, source: Source, questions: _Questions
) -> dict[str, Any]:
    """Everything the blocks depend on: a run that was killed goes on only with the same."""
    used = variant_files(source.variant)
    return {
        "source": [asdict(file) for name, file in manifest.files.items() if name in used or "/" not in name],
        "versions": [ort.__version__, __version__],
        "recipe": recipe.to_list() if recipe else list(settings.keep),
        "questions": [str(q) for q in questions.calibrate],
        "images": [file_hash(image) for image in sorted({q.image for q in questions.calibrate})],
        "search": [settings.max_size, settings.floor] if settings.searches() else None,
    }


def _origin(source: Source, questions: _Questions) -> dict[str, Any]:
    """For the manifest: what the variant was made of and with."""
    return {
        "from": source.variant,
        "onnxruntime": ort.__version__,
        "lfm_edge": __version__,
        "calibration": {
            "images": _images(questions.calibrate),
            "sha256": calibration_marks(question.image for question in questions.calibrate),
            "questions": len(questions.calibrate),
            "skipped": questions.skipped,
        },
    }


def _other_run(manifest: Manifest, settings: Settings) -> dict[str, Any] | None:
    """What the quick run lost where this one is not quick, and the other way round, as far as the bundle knows."""
    record = manifest.quantization.get(settings.variant, {})
    if record.get("quick", False) == settings.quick:
        found = record.get("other_run")
    else:
        found = {**manifest.quality.get(settings.variant, {}), "seconds": record.get("seconds")}
    kept = ("questions", "kl", "kl_error", "same_answers", "seconds")
    if not isinstance(found, Mapping) or not all(isinstance(found.get(key), float | int) for key in kept):
        return None
    return {"quick": not settings.quick, **{key: found[key] for key in kept}}


def _write(new: Path, manifest: Manifest, made: Made, run: Run, seconds: float) -> Manifest:
    """Write the graphs, the recipe and the manifest into the new folder; returns the manifest."""
    variant, settings = run.settings.variant, run.settings
    files = save_graphs(new, variant, made.graphs, run.source)
    if made.recipe:
        (new / "recipes").mkdir(exist_ok=True)
        (new / recipe_file(variant)).write_text(made.recipe.to_toml(), encoding="utf-8")
    if settings.max_size is not None:
        check_size(new, variant, settings.max_size)
    written = with_graphs(manifest, new, variant, run.source.variant, made.graphs, files)
    record = {**made.record, "quick": settings.quick, "seconds": round(seconds, 1)}
    if other := _other_run(manifest, settings):
        record["other_run"] = other
    written = replace(written, quantization={**written.quantization, variant: record})
    written.write(new)
    return complete_for_clients(new)
