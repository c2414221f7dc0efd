"""`lfm-edge audit`: measure time, memory and energy of a bundle on this machine."""

from __future__ import annotations

import argparse
import re
import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm_runtime.commands.cli import add_force_argument, add_setting_arguments, interrupt_on_termination, setting_flags
from lfm_runtime.errors import SettingError, command

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lfm_runtime.bundle import Bundle
    from lfm_runtime.setup.setup import Setup

    from lfm_audit.result import Audit
    from lfm_audit.workload import Subject, Workload

LIMIT_BROKEN, INVALID = 1, 3
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Measure time, memory, temperature and energy of a bundle here, with each start in its own process, and "
        "decide whether the measurement is valid. Exit code 0: valid; 1: a limit is broken; 3: not valid."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write everything measured as JSON")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also append a flat row for each variant and image")
    parser.add_argument(
        "--profile", default="", metavar="NAME", help="how to run: a name of lfm-edge profile list, or a .toml file"
    )
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="folder of images to ask about (default: three generated images)"
    )
    parser.add_argument("--variants", metavar="A,B", help="variants to measure, alternating (default: the profile's)")
    parser.add_argument("-p", "--prompt", metavar="QUESTION", help="default: Describe this image.")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="tokens of every answer")
    parser.add_argument("--budget", default="3m", metavar="TIME", help="time to measure: 90s, 3m, 1h")
    parser.add_argument(
        "--soak",
        type=float,
        default=0.0,
        metavar="MINUTES",
        help="afterwards, answer without a pause for at most MINUTES, or until the times are steady",
    )
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=N",
        help="exit code 1 if a figure breaks this limit: ttft_ms=500; repeatable",
    )
    parser.add_argument(
        "--meter", type=Path, metavar="CSV", help="a power meter's file with the columns time_s (Unix time) and power_w"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_force_argument(parser)
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run the audit, print its table, write the files asked for and return the exit code."""
    import tempfile

    from lfm_profiles.sensors import Sensors
    from lfm_runtime.commands.console import status_line
    from lfm_runtime.errors import SettingError
    from lfm_runtime.formats.files import check_output, write_or_rescue
    from lfm_runtime.installation import from_stick
    from lfm_runtime.setup.machine import this_machine

    from lfm_audit.audit import audit
    from lfm_audit.images import find_images, make_images
    from lfm_audit.measure.power import check_meter
    from lfm_audit.measured import keep_measured
    from lfm_audit.reading import is_audit
    from lfm_audit.table import is_csv, rows_for_csv, table

    if options.output and options.csv and options.output.resolve() == options.csv.resolve():
        raise SettingError(f"-o and --csv are both {options.csv}; name two files")
    if options.output:
        check_output(options.output, "lfm-edge audit", is_audit, force=options.force)
    if options.csv:
        check_output(options.csv, "lfm-edge audit", is_csv, force=options.force)
    if options.meter:
        check_meter(options.meter)
    interrupt_on_termination()
    progress = status_line(quiet=options.quiet)
    with tempfile.TemporaryDirectory(prefix="lfm-edge-") as folder:
        images, skipped = find_images(options.images) if options.images else (make_images(Path(folder)), [])
        work = _workload(options, images, skipped)
        if options.output:
            _check_same(options, work)
        result = audit(work, this_machine().device, Sensors(), progress)
    progress("")
    print(table(result))
    if options.output:
        output = _place(options, result)
        write_or_rescue(output, result.to_text())
        if output != options.output:
            print(f"\n{options.output} stays, since this audit ended early", end="")
        page = command("report", output, "-o", output.with_suffix(".html"))
        print(f"\nwritten: {output}; as a page{', on another machine' if from_stick() else ''}: {page}")
    if options.csv:
        header, rows = rows_for_csv(result)
        more = is_csv(options.csv)
        with options.csv.open("a" if more else "w", encoding="utf-8") as f:
            f.write("\n".join([*([] if more else [header]), *rows]) + "\n")
    keep_measured(work.bundle, result)
    if not result.verdict.valid:
        return INVALID
    return 0 if all(limit.holds for limit in result.limits) else LIMIT_BROKEN


def _place(options: argparse.Namespace, result: Audit) -> Path:
    """Where the audit is written: one that ended early replaces no other, but stands beside it."""
    output: Path = options.output
    if not result.partial or options.force or not output.exists() or not output.stat().st_size:
        return output
    names = (output.with_stem(f"{output.stem}-partial{f'-{n}' if n > 1 else ''}") for n in count(1))
    return next(name for name in names if not name.exists())


def _check_same(options: argparse.Namespace, work: Workload) -> None:
    """Raise SettingError where what would be replaced cannot be measured by this audit again: one of another bundle, of
    other weights, or of a variant that is not measured now.
    """
    from lfm_runtime.errors import SettingError

    from lfm_audit.reading import read_audit

    if options.force or not options.output.exists() or not options.output.stat().st_size:
        return
    before, now = read_audit(options.output), work.bundle
    variants = [subject.variant for subject in work.subjects]
    lost = [name for name in before.variants if name not in variants]
    if before.bundle.name != now.folder.resolve().name:
        what = f"is an audit of {before.bundle.name}, not of {now.folder.resolve().name}"
    elif lost:
        what = f"has figures of {', '.join(lost)}, which this run does not measure"
    elif any(not _has_weights(now, name, found.prefill, before) for name, found in before.variants.items()):
        what = f"is an audit of other weights than {now.folder} has now"
    else:
        return
    raise SettingError(f"{options.output} {what}; choose another output, or replace it with --force")


def _has_weights(bundle: Bundle, variant: str, prefill: str | None, before: Audit) -> bool:
    """Whether a bundle has the weights of a variant that an audit measured."""
    from lfm_runtime.errors import BundleError
    from lfm_runtime.setup.costs import fingerprint

    try:
        return fingerprint(bundle, variant, prefill) == before.bundle.fingerprint.get(variant)
    except BundleError:  # it has that prefill decoder no longer
        return False


def _workload(options: argparse.Namespace, images: Mapping[str, Path], skipped: list[dict[str, str]]) -> Workload:
    from lfm_runtime.bundle import Bundle
    from lfm_runtime.engine.prepared import tell_of_damage
    from lfm_runtime.images.pixels import image_size
    from lfm_runtime.setup.resolve import resolve
    from lfm_runtime.setup.setup import Ask

    from lfm_audit.workload import LONGEST_SOAK, QUESTION, SHORTEST_SOAK, Workload

    bundle, flags = Bundle.open(options.bundle), setting_flags(options)
    if options.variants and "variant" in flags:
        raise SettingError("--variant has no effect beside --variants; leave one out")
    tell_of_damage(bundle)
    question = QUESTION if options.prompt is None else options.prompt
    if not question.strip():
        raise SettingError(f'the question is empty; write one: -p "{QUESTION}"')
    largest = max((image_size(path) for path in images.values()), key=lambda size: size[0] * size[1])
    ask = Ask((largest,), question)
    # What cannot be here is said now, and not by the first process.
    wanted = resolve(bundle, options.profile, ask, force=True, **flags)
    profile = wanted.profile
    variants = options.variants.split(",") if options.variants else [wanted.variant]
    if len(set(variants)) < len(variants):
        raise SettingError(f"--variants {options.variants} names one twice")
    if not 1 <= options.new_tokens <= 4096:
        raise SettingError(f"new-tokens {options.new_tokens} is impossible; allowed: 1 to 4096")
    if options.soak and not SHORTEST_SOAK <= options.soak <= LONGEST_SOAK:
        raise SettingError(
            f"soak {options.soak:g} is impossible; allowed: {SHORTEST_SOAK} to {LONGEST_SOAK} minutes, which are "
            "compared with the first"
        )
    for variant in variants:
        bundle.graphs(variant)
    subjects = [_subject(resolve(bundle, profile, ask, variant=variant)) for variant in variants]
    for subject in subjects:
        for step in subject.steps:
            print(f"lfm-edge: {subject.variant}: to fit the memory: {step}", file=sys.stderr)
    return Workload(
        bundle,
        profile,
        subjects,
        images,
        skipped,
        question,
        options.new_tokens,
        _seconds(options.budget),
        options.soak,
        _limits(options.limit, profile),
        options.meter,
    )


def _subject(setup: Setup) -> Subject:
    """A variant as run would take it: what does not fit the memory has stepped down."""
    from lfm_profiles import changed
    from lfm_runtime.setup.resolve import DoesNotFitError, resolve

    from lfm_audit.workload import Subject

    too_large = None
    try:
        unprepared = changed(setup.profile, {"prepared": False}, "audit")
        steps = resolve(setup.bundle, unprepared, setup.ask).steps
        too_large = (
            f"without prepared graphs it does not fit the memory; the first step down would be: {steps[0]}"
            if steps
            else None
        )
    except DoesNotFitError as e:
        too_large = str(e)
    return Subject(setup.variant, setup.profile, setup.steps, too_large)


def _limits(given: list[str], profile: Any) -> dict[str, float]:
    """Return the limits by name: the profile's budgets, overridden by `--limit`."""
    from dataclasses import asdict

    from lfm_audit.verdict import LIMITS

    limits = {name: float(value) for name, value in asdict(profile.budget).items() if value is not None}
    for text in given:
        name, _, value = text.partition("=")
        if name not in LIMITS:
            raise SettingError(f"--limit {text}: there is no {name!r}; there are {', '.join(LIMITS)}")
        try:
            limits[name] = float(value)
        except ValueError as e:
            raise SettingError(f"--limit {text}: {value!r} is not a number; write {name}=500") from e
        if not 0 < limits[name] < float("inf"):
            raise SettingError(f"--limit {text} is impossible; allowed: above 0")
    return limits


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([\d.]+)([smh]?)", text)
    try:
        seconds = float(found[1]) * _SECONDS[found[2] or "s"] if found else 0.0
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise SettingError(f"--budget {text} is not a time; write 90s, 3m or 1h")
    return seconds
