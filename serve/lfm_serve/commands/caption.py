"""`lfm-edge caption`: ask the same about every image of folders, and write a record of each."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm_runtime.commands.cli import add_setting_arguments, bundle_of, setting_flags
from lfm_runtime.errors import SettingError

from lfm_serve.commands.asking import (
    add_asking_arguments,
    add_generation_arguments,
    asking_of,
    check_asking,
    generation_of,
)
from lfm_serve.stopping import stopping

if TYPE_CHECKING:
    from lfm_serve.captions.images import ReadImage
    from lfm_serve.captions.making import Captions, Counts
    from lfm_serve.captions.progress import Progress
    from lfm_serve.captions.setup import Plan
    from lfm_serve.captions.sidecars import Sidecars
    from lfm_serve.captions.watching import Watch

_EXIT_ERRORS, _EXIT_STOPPED = 3, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Ask the same about every image of folders; write a JSONL file, one record for each. Run again to go on: only "
        "what is missing or has changed is done. Exit code 0; 3 where images have an error instead of an answer; 130 "
        "where it was stopped."
    )
    parser.add_argument("bundle", help="folder made by lfm-edge export, or an id of the hub: owner/name[@revision]")
    parser.add_argument("places", nargs="+", metavar="FOLDER", help="folders of images, or images")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.jsonl")
    add_asking_arguments(parser, several=False)
    which = parser.add_argument_group("which images")
    which.add_argument("-r", "--recursive", action="store_true", help="of folders in folders too")
    which.add_argument(
        "--match", action="append", default=[], metavar="PATTERN", help="only these: '*.jpg', 'scans/*'; repeatable"
    )
    which.add_argument("--watch", action="store_true", help="then wait for new images, until Ctrl-C")
    which.add_argument("--retry-errors", action="store_true", help="do those again that have an error")
    which.add_argument("--max-megapixels", type=float, default=100.0, metavar="N", help="larger ones are errors")
    out = parser.add_argument_group("what is written beside the records")
    out.add_argument("--sidecar", choices=("txt",), help="the text beside each image, as NAME.txt")
    out.add_argument("--table", type=Path, metavar="FILE", help="all records as .csv, or .parquet (needs pyarrow)")
    out.add_argument("--force", action="store_true", help="replace NAME.txt and tables that lfm-edge did not write")
    parser.add_argument("--rows", type=int, metavar="N", help="answers at once; default: 4, 2 or 1, as memory allows")
    add_generation_arguments(parser)
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Ask about every image, and return the exit code."""
    from lfm_runtime.bundle import Bundle
    from lfm_runtime.formats.files import check_output
    from lfm_runtime.model import Model

    from lfm_serve.asking import settings_hash, settings_of
    from lfm_serve.captions.journal import Journal
    from lfm_serve.captions.making import Captions, Counts, missing
    from lfm_serve.captions.progress import Progress
    from lfm_serve.captions.setup import plan
    from lfm_serve.captions.sidecars import Sidecars
    from lfm_serve.captions.tables import check_table, write_table

    _check(options)
    if options.table:
        check_table(options.table)
    bundle = Bundle.open(Path(bundle_of(options)))
    asking, generation = asking_of(options, options.prompt, bundle), generation_of(options)
    flags = {**setting_flags(options), "max_new_tokens": options.max_new_tokens}
    how = plan(bundle, options.profile, asking, rows=options.rows, **flags)
    for step in how.setup.steps:
        print(f"lfm-edge: reduced to fit the memory ({how.setup.free_mib} MiB are free): {step}", file=sys.stderr)
    settings, counts = settings_of(how.setup, asking, generation), Counts()
    watch, progress, found = _found(options, counts)
    with Journal.open(options.output, settings, settings_hash(settings), remembers=options.watch) as journal:
        if options.table:
            check_output(options.table, "this run", journal.wrote_table, force=options.force)
        there = {journal.key(path): path for path in found}
        sidecars = None
        if options.sidecar:
            sidecars = Sidecars(journal.whole_records(), there, progress.warn, force=options.force)
        paths = watch.paths(there.values(), progress.warn) if watch else there.values()
        todo: Iterable[str] = missing(journal, counts, paths, retry_errors=options.retry_errors)
        if not watch:
            todo = list(todo)
            progress = Progress(counts, len(todo), quiet=options.quiet)
        if watch or todo:
            captions = Captions(Model.of(how.setup), asking, generation, journal, counts)
            _make(options, captions, how, watch, progress, sidecars, todo)
        if options.table:
            write_table(options.table, journal.whole_records(), asking.fields)
            journal.note_table(options.table)
    return _end(options, counts)


def _found(options: argparse.Namespace, counts: Counts) -> tuple[Watch | None, Progress, list[str]]:
    """What brings new images with --watch, what tells of the run, and the images that are there."""
    from lfm_serve.captions.images import find
    from lfm_serve.captions.progress import Progress

    kind = {"recursive": options.recursive, "match": options.match}
    progress, watch = Progress(counts, None, quiet=options.quiet), None
    if options.watch:  # before what is there is listed: none is missed
        from lfm_serve.captions.watching import Watch

        watch = Watch(options.places, **kind)
    found = list(find(options.places, **kind, warn=progress.warn))
    if not (found or watch):
        do = "" if options.recursive else "those in folders below are found with --recursive"
        do = f"none matches {' or '.join(options.match)}; try without --match" if options.match else do
        raise SettingError(f"there are no images in {' '.join(options.places)}; {do or 'name other folders'}")
    return watch, progress, found


def _make(
    options: argparse.Namespace,
    captions: Captions,
    how: Plan,
    watch: Watch | None,
    progress: Progress,
    sidecars: Sidecars | None,
    todo: Iterable[str],
) -> None:
    """Do what is missing, and with --watch what comes."""
    rows = how.rows if captions.model.decoder.info.shares_kv else 1
    if not options.quiet:
        print(f"{how.setup.summary}, {rows} at once", file=sys.stderr)

    def told(image: ReadImage, record: Mapping[str, Any]) -> None:
        if sidecars:
            sidecars.write(image.path, record, progress.warn)
        progress.told()

    def stop() -> None:
        captions.stop()
        if watch:
            watch.stop()

    most = options.max_megapixels
    with stopping(stop):
        captions.make(todo, rows=rows, capacity=how.capacity, max_megapixels=most, told=told, warn=progress.warn)
    progress.end()


def _end(options: argparse.Namespace, counts: Counts) -> int:
    if not options.quiet:
        parts = [f"{counts.answered:,} answered"]
        parts += [f"{counts.errors:,} errors"] if counts.errors else []
        parts += [f"{counts.unchanged:,} there already"] if counts.unchanged and not options.watch else []
        print(f"{options.output}: {', '.join(parts)}", file=sys.stderr)
    if counts.stopped and not options.watch:
        print("lfm-edge: stopped; run it again to go on", file=sys.stderr)
        return _EXIT_STOPPED
    return _EXIT_ERRORS if counts.errors else 0


def _check(options: argparse.Namespace) -> None:
    """Raise SettingError for what cannot be, before anything is opened."""
    if options.output.suffix != ".jsonl":
        raise SettingError(f"-o {options.output}: records are JSONL; name it OUT.jsonl")
    check_asking(options, [options.prompt], "Describe this image.")
    if options.force and not (options.sidecar or options.table):
        raise SettingError("--force is about --sidecar and --table, and has no effect without them; leave it out")
    if not 0 < options.max_megapixels < float("inf"):
        raise SettingError(f"--max-megapixels {options.max_megapixels:g} is impossible; allowed: above 0")
    if os.path.lexists(options.output) and not options.output.is_file():
        raise SettingError(f"-o {options.output} is not a file; name one")
