"""`lfm-edge caption`: ask the same about every image of folders, and write a record of each."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lfm_runtime.commands.cli import add_setting_arguments
from lfm_runtime.errors import SettingError, counted

from lfm_serve.commands.asking import add_asking_arguments, add_generation_arguments, asking_of, check_asking
from lfm_serve.stopping import stopping

if TYPE_CHECKING:
    from lfm_serve.captions.alone import Maker
    from lfm_serve.captions.making import Counts
    from lfm_serve.captions.progress import Progress
    from lfm_serve.captions.watching import Watch

_EXIT_ERRORS, _EXIT_STOPPED = 3, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Ask the same about every image of folders; write a JSONL file, one record for each. Run again to go on: only "
        "what is missing or has changed is done. Exit code 0; 3 where images have an error instead of an answer, or a "
        "text of --sidecar could not be written; 130 where it was stopped."
    )
    parser.add_argument("bundle", help="folder made by lfm-edge export, or an id of the hub: owner/name[@revision]")
    parser.add_argument("places", nargs="+", metavar="FOLDER", help="folders of images, or images")
    parser.add_argument("-o", "--output", required=True, metavar="OUT.jsonl")
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
    many = parser.add_argument_group("on many processes or machines (extra fleet; docs/fleet.md)")
    many.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask cluster whose workers answer: tcp://host:8786")
    many.add_argument("--workers", type=int, metavar="N", help="answer in N processes of this machine")
    parser.add_argument("--rows", type=int, metavar="N", help="answers at once; default: 4, 2 or 1, as memory allows")
    add_generation_arguments(parser)
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Ask about every image, and return the exit code."""
    from lfm_runtime.formats.files import check_output

    from lfm_serve.asking import settings_hash, settings_of
    from lfm_serve.captions.making import Counts, keep, missing, with_room
    from lfm_serve.captions.progress import Progress
    from lfm_serve.captions.sidecars import Sidecars, check_folders
    from lfm_serve.captions.tables import check_table, write_table

    _check(options)
    if options.table:
        check_table(options.table)
    maker = _maker(options)
    bundle = maker.bundle()
    asking = asking_of(options, options.prompt, bundle)
    settings, counts = settings_of(maker.plan(bundle, asking), asking), Counts()
    watch, progress, found = _found(options, maker, counts)
    if options.sidecar:
        check_folders(found)
    with maker.output(settings, settings_hash(settings)) as output:
        if options.table:
            check_output(options.table, "this run", output.wrote_table, force=options.force)
        there = {output.key(path): path for path in found}
        sidecars = None
        if options.sidecar:
            sidecars = Sidecars(output.whole_records(), output.texts, there, progress.warn, force=options.force)
        paths: Iterable[str] = there.values()
        if watch:
            paths = watch.paths(there.values(), lambda: maker.find(progress.warn), progress.warn)
        todo: Iterable[str] = missing(output, counts, paths, maker.is_unchanged, retry_errors=options.retry_errors)
        if not watch:
            todo = list(todo)
            progress = Progress(counts, len(todo), quiet=options.quiet)

        def told(path: str, record: Mapping[str, Any]) -> None:
            if sidecars:
                with_room(partial(sidecars.write, path, record), counts, progress.warn)
            progress.told()

        def stop() -> None:
            counts.stopped = True
            maker.stop()
            if watch:
                watch.stop()

        if watch or todo:
            with stopping(stop):
                made = maker.records(todo, asking, output, progress.warn)
                keep(made, output, counts, told, progress.warn)
            progress.end()
        if sidecars:
            sidecars.end()
            output.note_texts(sidecars.older)
        if options.table:
            write_table(options.table, output.whole_records(), asking.fields)
            output.note_table(options.table)
    return _end(options, counts, unwritten=bool(sidecars and sidecars.failed))


def _maker(options: argparse.Namespace) -> Maker:
    """What makes the answers: this process, or the workers of a cluster."""
    if options.scheduler or options.workers:
        (cluster,) = entry_points(group="lfm_edge.clusters", name="caption")
        return cast("Maker", cluster.load()(options))
    from lfm_serve.captions.alone import Alone

    return Alone(options)


def _found(options: argparse.Namespace, maker: Maker, counts: Counts) -> tuple[Watch | None, Progress, list[str]]:
    """What brings new images with --watch, what tells of the run, and the images that are there."""
    from lfm_serve.captions.progress import Progress

    progress, watch = Progress(counts, None, quiet=options.quiet), None
    if options.watch:  # before what is there is listed: none is missed
        from lfm_serve.captions.watching import Watch

        watch = Watch(options.places, recursive=options.recursive, match=options.match)
    found = list(maker.find(progress.warn))
    if not (found or watch):
        below = not options.recursive and any(map(_has_folders, options.places))
        do = "those in folders below are found with --recursive" if below else ""
        do = f"none matches {' or '.join(options.match)}; try without --match" if options.match else do
        raise SettingError(
            f"there are no images in {' '.join(options.places)}; {do or 'name other folders, or the files'}"
        )
    return watch, progress, found


def _has_folders(place: str) -> bool:
    """Whether there may be folders in it: of an URL nobody knows."""
    return "://" in place or (Path(place).is_dir() and any(path.is_dir() for path in Path(place).iterdir()))


def _end(options: argparse.Namespace, counts: Counts, *, unwritten: bool) -> int:
    if not options.quiet:
        parts = [f"{counts.answered:,} answered"]
        parts += [counted(counts.errors, "error")] if counts.errors else []
        failed = f", {counts.failed:,} with an error (--retry-errors does those again)" if counts.failed else ""
        parts += [f"{counts.unchanged:,} there already{failed}"] if counts.unchanged and not options.watch else []
        print(f"{options.output}: {', '.join(parts)}", file=sys.stderr)
    if counts.stopped and not options.watch:
        print("lfm-edge: stopped; run it again to go on", file=sys.stderr)
        return _EXIT_STOPPED
    return _EXIT_ERRORS if counts.errors or counts.failed or unwritten else 0


def _check(options: argparse.Namespace) -> None:
    """Raise SettingError for what cannot be, before anything is opened."""
    if not options.output.endswith(".jsonl"):
        raise SettingError(f"-o {options.output}: records are JSONL; name it OUT.jsonl")
    check_asking(options, [options.prompt], "Describe this image.")
    if options.force and not (options.sidecar or options.table):
        raise SettingError("--force is about --sidecar and --table, and has no effect without them; leave it out")
    if options.match and all(map(os.path.isfile, options.places)):
        raise SettingError("--match chooses from folders, and has no effect on files that are named; leave it out")
    if not 0 < options.max_megapixels < float("inf"):
        raise SettingError(f"--max-megapixels {options.max_megapixels:g} is impossible; allowed: above 0")
    if os.path.lexists(options.output) and not os.path.isfile(options.output):  # noqa: PTH113  (may be an URL)
        raise SettingError(f"-o {options.output} is not a file; name one")
    if options.scheduler and options.workers is not None:
        raise SettingError("--scheduler and --workers exclude each other; give one")
    if options.workers is not None and options.workers < 1:
        raise SettingError(f"--workers {options.workers} is impossible; allowed: 1 and above")
    cluster = options.scheduler or options.workers
    if cluster and options.watch:
        raise SettingError("--watch is for one process; leave it out, or leave out --scheduler and --workers")
    if url := next((place for place in (options.bundle, options.output, *options.places) if "://" in place), None):
        if not cluster:
            raise SettingError(f"{url} is an URL, which is read on a cluster: --scheduler ADDRESS, or --workers N")
        if options.sidecar:
            raise SettingError("--sidecar writes beside image files, not to URLs; leave it out")
