"""`lfm-edge quantize`: add int8, int4 and fp16 variants to a bundle, and measure their quality."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from lfm_profiles import VARIANTS
from lfm_runtime.errors import command, counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description = (
        "Make a smaller variant of a bundle, calibrated with images and judged on images it was not calibrated with."
    )
    parser.add_argument("bundle", type=Path, help="folder made by lfm-edge export, with fp32 or fp16 weights")
    parser.add_argument("--variant", required=True, metavar="NAME", help=", ".join(v for v in VARIANTS if v != "fp32"))
    parser.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        default=[],
        metavar="IMAGES",
        help="folders of images, image files, or text files of paths; a few dozen images",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="questions, one a line, or JSONL {image, question, answer, task}"
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="rounding: gptq (default with --calibration), gptq-local, clipped, rtn (default without)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few minutes for a 450M: 8 of the images, short answers, GPTQ for 4-bit weights alone",
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="TOML: which layer at which precision (see quantize/README.md)"
    )
    parser.add_argument(
        "--max-size",
        type=float,
        metavar="MB",
        help="largest size of the variant's files; searches the best precision for each layer",
    )
    parser.add_argument(
        "--floor", type=float, metavar="KL", help="highest KL divergence allowed, nats (default int8 0.01, int4 0.1)"
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="LAYER",
        help="leave these layers fp32; * matches all; repeatable",
    )
    _add_running_arguments(parser)


def _add_running_arguments(parser: argparse.ArgumentParser) -> None:
    """How it is judged, where it runs, and what it prints."""
    parser.add_argument(
        "--profile",
        default="",
        metavar="NAME",
        help="judge with the image settings and the prefill decoder of this profile; default: the checkpoint's, none",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: physical cores")
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="calibrate on the workers of a Dask cluster (extra fleet; docs/fleet.md)"
    )
    parser.add_argument("--force", action="store_true", help="replace a variant that was made with more care")
    parser.add_argument("--json", action="store_true", help="print the quality as JSON; null if not measured")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(options: argparse.Namespace) -> int:
    """Quantize and say what it cost."""
    from lfm_profiles import default_threads
    from lfm_runtime.commands.console import print_json
    from lfm_runtime.engine.execution import check_threads
    from lfm_runtime.engine.failures import failures_are_ours
    from lfm_runtime.setup.profile import find_profile

    from lfm_quantize.judge.quality import check_floor
    from lfm_quantize.quantize import quantize
    from lfm_quantize.settings import Settings
    from lfm_quantize.work import work_folder

    settings = Settings(
        options.variant,
        tuple(options.calibration),
        options.prompts,
        options.method,
        options.recipe,
        tuple(options.keep),
        options.floor,
        options.max_size,
        default_threads() if options.threads is None else check_threads(options.threads),
        options.quick,
        options.force,
        options.scheduler,
        find_profile(options.profile, variant=options.variant) if options.profile else None,
    )
    printer = Printer(not options.quiet)
    try:
        with failures_are_ours(options.bundle):
            quality = quantize(options.bundle, settings, printer.progress, printer.warn)
    except KeyboardInterrupt:
        left = work_folder(options.bundle, options.variant)
        if not left.is_dir():
            raise
        remove = command("clean", options.bundle)
        said = f"interrupted; the same command goes on from {left}, which {remove} removes"
        raise KeyboardInterrupt(said) from None
    finally:
        printer.clear()
    if options.json:
        print_json(quality.to_dict() if quality else None)
    elif quality:
        print(quality.table())
        if other := other_run(options.bundle, options.variant):
            print(f"  {other}")
        print(f"  {check_floor(quality, settings.kl_floor(), quick=settings.quick)}")
    elif not options.quiet:
        print(f"{options.bundle} has {options.variant} now; lfm-edge quality measures what it lost")
    return 0


def other_run(bundle: Path, variant: str) -> str | None:
    """One line on the quick run where this one was not quick, or on the full one where it was."""
    from lfm_runtime.formats.manifest import Manifest

    from lfm_quantize.judge.quality import with_error

    found = Manifest.of(bundle.resolve()).quantization[variant].get("other_run")
    if not found:
        return None
    kind = "quick" if found["quick"] else "full"
    return (
        f"{f'{kind} run before':16s} KL {with_error(found['kl'], found['kl_error'])} nats  "
        f"{found['same_answers']:.1%} identical  "
        f"({counted(found['questions'], 'question')}, {found['seconds']:.0f} s to make)"
    )


class Printer:
    """Progress on stderr: one line overwritten on a terminal, a line a stage and every half minute in a log. With the
    time left.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.live = enabled and sys.stderr.isatty()
        self._stage, self._since, self._last = "", 0.0, 0.0

    def progress(self, what: str, done: int, total: int) -> None:
        """`done` of `total` parts of a stage."""
        now = time.monotonic()
        if what != self._stage:
            self._stage, self._since, self._last = what, now, now - 60
        if not self.enabled:
            return
        line = f"{what}: {done} of {total}"
        if 1 < done < total:
            left = (
                (now - self._since) / (done - 1) * (total - done)
            )  # the stage's clock starts when its first part is done
            time_left = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min"
            line += f", about {time_left} left of this part"
        if self.live:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif done == total or now - self._last > 30:
            print(line, file=sys.stderr, flush=True)
            self._last = now

    def warn(self, message: str) -> None:
        """One line that the user should see, quiet or not."""
        self.clear()
        print(f"lfm-edge: warning: {message}", file=sys.stderr)

    def clear(self) -> None:
        """Take the line away."""
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
