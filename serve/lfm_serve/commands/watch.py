"""`lfm-edge watch`: ask the same about a camera's newest picture, again and again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm_runtime.commands.cli import add_setting_arguments, bundle_of, setting_flags
from lfm_runtime.errors import SettingError, counted

from lfm_serve.commands.asking import add_asking_arguments, add_generation_arguments, asking_of, check_asking
from lfm_serve.stopping import stopping

if TYPE_CHECKING:
    from lfm_runtime.bundle import Bundle
    from lfm_runtime.setup.setup import Setup

    from lfm_serve.asking import Asking
    from lfm_serve.cameras.looking import Look, Seen
    from lfm_serve.cameras.records import Records

_EXIT_NOT_SAID, _EXIT_ERRORS, _EXIT_STOPPED = 1, 3, 130
_CAMERA_MIB = 64
"""What reading a camera of 1080 lines takes: ffmpeg's libraries, a decoder's frames, the newest picture."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Ask the same about the newest picture of a camera, again and again, until Ctrl-C; or about the pictures of a "
        "video or a folder. Writes a JSON record of each answer. Tiles that have not changed are not computed again. "
        "Exit code 0; 1 where --until answer:TEXT was not answered; 3 where pictures of a video or a folder have an "
        "error, or no picture of a camera came until --until; 130 where a signal ended a video or a folder."
    )
    parser.add_argument("bundle", help="folder made by lfm-edge export, or an id of the hub: owner/name[@revision]")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="rtsp://…, /dev/video0, a video, an image or a folder of them, or exec:'COMMAND' that writes JPEG or PNG",
    )
    add_asking_arguments(parser, several=True)
    which = parser.add_argument_group("which pictures")
    which.add_argument("--every", metavar="TIME", help="2s, 500ms, 10m: at most one in so long (of a video, its time)")
    which.add_argument(
        "--changed",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="only those of which so much (0.05 is 5 %%) differs from the one that was last asked about",
    )
    which.add_argument("--roi", metavar="X,Y,W,H", help="this region alone, in pixels or in shares (0.25,0.0,0.5,1.0)")
    which.add_argument(
        "--until",
        action="append",
        default=[],
        metavar="END",
        help="30m, 18:00, or answer:TEXT: the first answer with these words; given several times, what comes first",
    )
    which.add_argument("--stall", metavar="TIME", help="a camera without a picture for so long is lost (default 10s)")
    which.add_argument(
        "--tile-tolerance",
        type=float,
        default=0.0,
        metavar="N",
        help="a tile is unchanged where no 16×16 patch's mean differs by more than N of 255 (default 0: no pixel may)",
    )
    out = parser.add_argument_group("where records go (default: standard output)")
    out.add_argument("-o", "--output", type=Path, metavar="OUT.jsonl", help="to the end of this file")
    out.add_argument("--mqtt", metavar="URL", help="to mqtt://[USER:PASSWORD@]HOST[:PORT]/TOPIC (needs the extra mqtt)")
    add_generation_arguments(parser)
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Look until the end, and return the exit code."""
    from lfm_serve.steady import keep_memory_steady

    keep_memory_steady()  # before onnxruntime starts threads
    from lfm_runtime.bundle import Bundle
    from lfm_runtime.model import Model

    from lfm_serve.cameras.looking import Look, Seen, look
    from lfm_serve.cameras.scene import Scene
    from lfm_serve.cameras.settings import Roi, Until, seconds
    from lfm_serve.cameras.sources import SourceError, source_of
    from lfm_serve.cameras.stills import Stills

    _check(options)
    every = 0.0 if options.every is None else seconds(options.every, "--every")
    roi = None if options.roi is None else Roi.parse(options.roi)
    until = Until.parse(options.until)
    if (stall := seconds("10s" if options.stall is None else options.stall, "--stall")) <= 0:
        raise SettingError("--stall 0 is impossible; allowed: above 0")
    source = source_of(options.source, every=every, stall=stall)
    _check_source(options, live=source.live)
    bundle = Bundle.open(Path(bundle_of(options)))
    asked = [asking_of(options, question, bundle) for question in options.prompt or [""]]
    until.check(asked)
    seen, what = Seen(), Look(source, asked, every, options.changed, roi, until)
    with _records(options) as records:
        setup = _setup(options, bundle, asked, 0 if isinstance(source, Stills) else _CAMERA_MIB)
        scene = Scene(Model.of(setup, cache_mib=setup.pictures_mib), tolerance=options.tile_tolerance)
        if not options.quiet:
            print(f"{setup.summary}; watching {source.shown}", file=sys.stderr)
            seen.told = _status(options)
        failed = ""
        try:
            with stopping(seen.stop):
                look(scene, what, records, seen)
        except SourceError as e:
            failed = f"{source.shown}: {e}"
    return _end(options, what, seen, failed, records)


def _setup(options: argparse.Namespace, bundle: Bundle, asked: list[Asking], camera_mib: int) -> Setup:
    """How it will run: memory is foreseen for the longest question about a large picture, for what is kept of two, and
    for reading the camera.
    """
    from lfm_runtime.setup.resolve import resolve

    from lfm_serve.cameras.scene import KEPT
    from lfm_serve.setup import spins_briefly

    flags = {**setting_flags(options), "max_new_tokens": options.max_new_tokens}
    large = resolve(bundle, options.profile, force=True, **flags).ask
    longest = max((f"{one.system} {one.question}" for one in asked), key=len)
    ask = replace(large, question=longest, pictures=KEPT, beside_mib=camera_mib)
    setup = resolve(bundle, options.profile, ask, **flags)
    for line in setup.reductions:
        print(f"lfm-edge: {line}", file=sys.stderr)
    return setup if flags.get("spinning") is not None else spins_briefly(setup)


@contextmanager
def _records(options: argparse.Namespace) -> Iterator[list[Records]]:
    """Where records go, opened before anything is loaded."""
    from lfm_serve.cameras.records import Appended, Printed, Told

    def warn(text: str) -> None:
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)  # a stranger's program may say anything
        print(f"{clear}lfm-edge: {plain}", file=sys.stderr, flush=True)

    with ExitStack() as opened:
        found: list[Records] = [Told(warn)]
        if options.output:
            found.append(opened.enter_context(closing(Appended(options.output, warn))))
        if options.mqtt:
            try:
                from lfm_serve.cameras.mqtt import Published
            except ImportError as e:
                from lfm_runtime.installation import install_advice

                raise SettingError(f"--mqtt needs the extra mqtt: {install_advice('mqtt')}") from e
            found.append(opened.enter_context(closing(Published(options.mqtt, warn))))
        yield found if found[1:] else [*found, Printed()]


def _status(options: argparse.Namespace) -> Any:
    """On a terminal that records are not written to, how far it is."""
    from lfm_runtime.commands.console import status_line

    say = status_line(quiet=not sys.stderr.isatty() or not (options.output or options.mqtt))
    return lambda seen: say(_summary(seen))


def _summary(seen: Seen) -> str:
    parts = [counted(seen.answered, "answer")]
    parts += [f"{counted(seen.unchanged, 'picture')} unchanged"] if seen.unchanged else []
    parts += [counted(seen.errors, "error")] if seen.errors else []
    parts += [f"lost {counted(seen.lost, 'time')}"] if seen.lost else []
    return ", ".join(parts)


def _end(options: argparse.Namespace, what: Look, seen: Seen, failed: str, records: list[Records]) -> int:
    if not options.quiet:
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        print(f"{clear}{what.source.shown}: {_summary(seen)}", file=sys.stderr)
    if failed:
        print(f"lfm-edge: {failed}", file=sys.stderr)
        return _EXIT_ERRORS if seen.answered else 2
    if what.until.answers and not seen.said:
        return _EXIT_STOPPED if seen.stopped else _EXIT_NOT_SAID
    if seen.stopped and not what.source.live:
        return _EXIT_STOPPED
    lost = any(place.lost for place in records)
    if what.source.live:
        never = not (seen.answered or seen.unchanged or seen.errors or seen.stopped)  # no picture came
        return _EXIT_ERRORS if lost or never else 0
    return _EXIT_ERRORS if lost or seen.errors else 0


def _check(options: argparse.Namespace) -> None:
    """Raise SettingError for what cannot be, before anything is opened."""
    check_asking(options, options.prompt or [None], "Is the gate open?")
    if not 0 <= options.changed <= 1:
        raise SettingError(f"--changed {options.changed:g} is impossible; allowed: 0 to 1, the share of the picture")
    if not 0 <= options.tile_tolerance <= 255:
        raise SettingError(f"--tile-tolerance {options.tile_tolerance:g} is impossible; allowed: 0 to 255")
    if options.output and options.output.suffix != ".jsonl":
        raise SettingError(f"-o {options.output}: records are JSONL; name it OUT.jsonl")


def _check_source(options: argparse.Namespace, *, live: bool) -> None:
    if options.stall and not live:
        raise SettingError("--stall is about cameras, and has no effect here; leave it out")
    if options.every and Path(options.source).is_dir():
        raise SettingError("--every has no effect on a folder, each still of which is looked at; leave it out")
