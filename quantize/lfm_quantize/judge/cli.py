"""`lfm-edge quality`: measure the quality of an existing variant on your own images."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lfm_runtime.commands.cli import add_image_arguments, given_flags
from lfm_runtime.errors import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lfm_runtime.formats.manifest import Manifest
    from lfm_runtime.questions import Question

    from lfm_quantize.judge.measure import Board

DEMO_SET = Path(__file__).resolve().parents[3] / "demo" / "eval" / "eval.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description = (
        "Compare a variant of a bundle with another: cosines, KL divergence, answers, accuracy, size. With --profile "
        "or image flags, the variant runs as on that device, the other with the checkpoint's own settings."
    )
    parser.add_argument("bundle", type=Path, help="folder made by lfm-edge export and quantize")
    parser.add_argument("--variant", metavar="NAME", help="variant to evaluate; default with --profile: its choice")
    parser.add_argument(
        "--profile", default="", metavar="NAME", help="use the image settings and the prefill decoder of this profile"
    )
    parser.add_argument("--against", default="fp32", metavar="NAME", help="what to compare with")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="IMAGES",
        help="folder, text file of paths, or JSONL {image, question, answer, task}; default: demo/eval",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="questions for the images, one a line")
    parser.add_argument("--layers", action="store_true", help="print the error after each layer, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the error after each layer: .svg, .png or .pdf")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--threads", type=int, metavar="N", help="default: physical cores")
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="compare on the workers of a Dask cluster (extra fleet; docs/fleet.md)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_image_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Measure, print, and keep the numbers in the manifest."""
    from lfm_profiles import default_threads
    from lfm_runtime.commands.console import print_json
    from lfm_runtime.engine.execution import check_threads
    from lfm_runtime.engine.failures import failures_are_ours
    from lfm_runtime.formats.files import check_output
    from lfm_runtime.formats.manifest import MANIFEST, Manifest

    from lfm_quantize.calibrate.samples import named
    from lfm_quantize.calibrate.spread import cluster_of
    from lfm_quantize.cli import Printer
    from lfm_quantize.graph import QuantizeError
    from lfm_quantize.judge.measure import measure
    from lfm_quantize.variant import keep_quality

    if options.plot:
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a HOME that cannot be written
        from lfm_quantize.judge.plot import error_plot, is_plot

        if options.plot.suffix not in (".svg", ".png", ".pdf"):
            raise QuantizeError(f"--plot {options.plot}: name a .svg, .png or .pdf")
        check_output(options.plot, "lfm-edge quality", is_plot, force=None)
    questions, skipped = _questions(options)
    variant, board = _judged(options)
    measured = Manifest.read(options.bundle) if options.bundle.is_dir() else None
    printer = Printer(not options.quiet)
    if skipped:
        printer.warn(f"{counted(len(skipped), 'image')} left out: {named(skipped)}")
    try:
        threads = default_threads() if options.threads is None else check_threads(options.threads)
        with failures_are_ours(options.bundle), cluster_of(options.scheduler) as cluster:
            quality = measure(
                options.bundle,
                variant,
                options.against,
                questions,
                threads,
                printer.progress,
                board=board,
                cluster=cluster,
            )
    finally:
        printer.clear()
    if options.json:
        print_json(quality.to_dict())
    else:
        print(quality.table() + (f"\n\n{quality.layer_table()}" if options.layers else ""))
    images = [question.image for question in questions]
    if board is None:
        problem = keep_quality(options.bundle, quality, images, measured)
    else:
        problem = _seen(measured, (variant, board.prefill), images)
    if problem:
        printer.warn(problem)
    elif board is None and not options.quiet:
        print(f"the numbers are kept in {options.bundle / MANIFEST}", file=sys.stderr)
    if options.plot:
        error_plot(quality, options.plot)
    return 0


def _seen(measured: Manifest | None, variants: Sequence[str | None], images: Sequence[Path]) -> str | None:
    """That some of the images calibrated one of the variants that run."""
    from lfm_quantize.variant import seen_before

    if measured is None:
        return None
    return next((said for name in variants if name and (said := seen_before(measured, name, images))), None)


def _questions(options: argparse.Namespace) -> tuple[list[Question], dict[Path, str]]:
    """The questions to judge with, and why other images are left out."""
    from lfm_quantize.calibrate.samples import read_questions
    from lfm_quantize.graph import QuantizeError

    images, prompts = options.images or DEMO_SET, options.prompts
    if options.images is None and not DEMO_SET.exists():
        raise QuantizeError("--images is needed: a folder, a text file of paths or a JSONL file of questions")
    if options.images is None and prompts:
        raise QuantizeError("--prompts has no effect without --images; name the images' folder")
    if images.suffix == ".jsonl":
        if prompts:
            raise QuantizeError("--prompts has no effect beside a JSONL file, which has the questions; leave it out")
        images, prompts = None, images
    return read_questions(images, prompts)


def _judged(options: argparse.Namespace) -> tuple[str, Board | None]:
    """The variant, and how a device runs it where a profile or an image flag says so."""
    from lfm_profiles.schema import IMAGE_SETTINGS
    from lfm_runtime.bundle import Bundle
    from lfm_runtime.setup.profile import find_profile
    from lfm_runtime.setup.variants import choose_variant, made_with, unmet

    from lfm_quantize.graph import QuantizeError
    from lfm_quantize.judge.measure import Board

    flags = given_flags(options, IMAGE_SETTINGS)
    if not options.profile and not flags:
        if options.variant is None:
            raise QuantizeError("--variant is needed, or --profile, which chooses one")
        return options.variant, None
    if options.layers or options.plot:
        raise QuantizeError("--layers and --plot have no effect with --profile or image flags; leave them out")
    bundle = Bundle.open(options.bundle)
    profile = find_profile(options.profile or "generic", variant=options.variant, **flags)
    for wish in unmet(bundle, profile) if not options.quiet else ():
        how = f"which the bundle lacks: {made_with(bundle, wish)}"
        print(f"profile {profile.name} would also use {wish}, {how}", file=sys.stderr)
    return choose_variant(bundle.variants, profile), Board.of(bundle, profile)
