"""The `lfm-edge` command. `run` and `chat` live here; commands of other packages are found by entry points and loaded
only when asked for, so that this file never imports them.

A command is a module with `add_arguments(parser)` and `run(options) -> exit code`.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import mmap
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from lfm_profiles import VARIANTS

from lfm_runtime import __version__
from lfm_runtime.commands.parser import Help, Parser
from lfm_runtime.errors import EdgeError, OutOfMemoryError, is_out_of_memory, more_memory

if TYPE_CHECKING:
    from pathlib import Path

    from lfm_runtime.engine.vision import Progress
    from lfm_runtime.model import Model

_GROUP = "lfm_edge.commands"
_GROUPS = {
    "make, on a PC": ("make", "export", "quantize", "quality", "pack", "stick", "wheelhouse"),
    "run": ("run", "chat", "caption", "watch", "serve", "prepare", "plan", "profile", "unpack"),
    "measure": ("audit", "compare", "report", "tune"),
    "check": ("doctor", "selftest", "verify", "clean"),
}
EXIT_INTERRUPTED = 130
_EXIT_ERROR = 2
_LIBRARIES_MIB = 128
_EXIT_UNREAD = 141  # as of programs that SIGPIPE ends


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a problem we can explain (or the error's own), 130 when
    interrupted.
    """
    if arguments is None:
        from lfm_runtime.commands.console import ready_streams

        ready_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {point.name: point for point in entry_points(group=_GROUP)}
    try:
        if not words or words[0] not in commands:
            _say_commands(words, commands)
        if arguments is None:
            _check_room()
        module: ModuleType = importlib.import_module(commands[words[0]].value)
        inner = Parser(prog=f"lfm-edge {words[0]}", formatter_class=Help)
        module.add_arguments(inner)
        return int(module.run(inner.parse_intermixed_args(inner.looked_at(words[1:]))))
    except EdgeError as e:
        return _fail(str(e), e.exit_code)
    except ModuleNotFoundError as e:
        return _fail(_missing(commands[words[0]], e))
    except ImportError as e:
        if is_out_of_memory(e):
            why = " ".join(str(_first_cause(e)).split())[:200]
            return _fail(f"not enough memory to load {e.name or 'a Python package'} ({why}); {more_memory()}")
        return _fail(f"{e.name or 'a Python package'} cannot be loaded ({e}); install lfm-edge again")
    except KeyboardInterrupt as e:  # a terminal has written ^C
        print(f"{chr(10) * sys.stderr.isatty()}lfm-edge: {str(e) or 'interrupted'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader (head, less) went away: nothing to tell it
        sys.stderr.close()
        return _EXIT_UNREAD  # 0 would say that a check went well
    except MemoryError as e:
        return _fail(f"not enough memory ({str(e) or 'none is left'}); {more_memory()}, or use a machine with more")
    except OSError as e:  # a file or disk failed where no better message was made
        if is_out_of_memory(e):
            return _fail(f"not enough memory ({e}); {more_memory()}, or use a machine with more")
        do = "; change its permissions" if isinstance(e, PermissionError) else ""
        do = "; choose a shorter name" if e.errno == errno.ENAMETOOLONG else do
        where = e.filename or ("the output cannot be written" if e.errno == errno.ENOSPC else "input or output")
        return _fail(f"{where}: {e.strerror or e}{do}")


def _check_room() -> None:
    """Whether the libraries of every command have room: numpy's OpenBLAS ends the process itself where it has none.

    Raises:
        OutOfMemoryError: it has less address space than any command was seen to load in.
    """
    try:
        mmap.mmap(-1, _LIBRARIES_MIB << 20).close()
    except OSError as e:
        need = f"they take at least {_LIBRARIES_MIB} MiB of address space"
        raise OutOfMemoryError(f"not enough memory to load numpy and onnxruntime ({need}); {more_memory()}") from e


def _say_commands(words: Sequence[str], commands: Mapping[str, EntryPoint]) -> NoReturn:
    """Help, the version, or what is wrong with the first word; ends the process."""
    parser = Parser(
        prog="lfm-edge",
        description="LFM2-VL on small machines: export, run, measure. Help for a command: lfm-edge COMMAND --help",
        epilog=_by_group(commands),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lfm-edge {__version__}")
    parser.add_argument("command", choices=sorted(commands), metavar="COMMAND", help="one of the commands below")
    first, later = next(iter(words), ""), [word for word in words if word in commands]
    if first.startswith("-") and first not in ("-h", "--help", "--version") and later:
        parser.error(f"{first} stands before the command; options come after it: lfm-edge {later[0]} … {first}")
    parser.parse_args(words[:1] or ["--help"])
    raise AssertionError(words)  # argparse has ended it


def _first_cause(error: BaseException) -> BaseException:
    """Return what an error came from: numpy puts a page of advice around the failed import of its library."""
    return _first_cause(error.__cause__) if error.__cause__ else error


def _by_group(commands: Mapping[str, EntryPoint]) -> str:
    """Every command with what it is for, in groups."""
    known = {name for names in _GROUPS.values() for name in names}
    groups = {**_GROUPS, "others": tuple(sorted(commands.keys() - known))}
    parts = []
    for title, names in groups.items():
        lines = [f"  {name:12}{_what(commands[name])}" for name in names if name in commands]
        parts += [f"{title}:", *lines, ""] if lines else []
    return "\n".join(parts)


def every_command(*, complete: Callable[[argparse.Action], None] = lambda _: None) -> argparse.ArgumentParser:
    """One parser of all commands, for shell completion and the manual page. `complete` is called with each of their
    arguments.
    """
    parser = argparse.ArgumentParser(prog="lfm-edge")
    parser.add_argument("--version", action="version", version=__version__)
    below = parser.add_subparsers(dest="command", metavar="COMMAND")
    for point in sorted(entry_points(group=_GROUP)):
        inner = below.add_parser(point.name, help=_what(point), formatter_class=Help)
        importlib.import_module(point.value).add_arguments(inner)
        for action in inner._actions:  # noqa: SLF001  (argparse has no other way to list them)
            complete(action)
    return parser


def _what(point: EntryPoint) -> str:
    """What a command is for, from the first line of its module, which is not imported for it."""
    try:
        found = importlib.util.find_spec(point.value)
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None:
        return ""
    with open(found.origin, encoding="utf-8") as f:  # noqa: PTH123  (pathlib would be imported for --help)
        return f.readline().strip('"\n').partition("`: ")[2].rstrip(".")


def _fail(message: str, code: int = _EXIT_ERROR) -> int:
    print(f"lfm-edge: {' '.join(message.split())}", file=sys.stderr)
    return code


def _missing(point: EntryPoint, e: ModuleNotFoundError) -> str:
    from lfm_runtime.installation import extra_for, install_advice

    extra = extra_for(str(e.name), point.value.partition(".")[0].removeprefix("lfm_"))
    how = f"install it with: {install_advice(extra)}" if extra else "install lfm-edge again"
    return f"{point.name} needs the Python package {e.name}; {how}"


# ------------------------------------------------------------------------------------------------ shared by commands


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a command that answers: bundle, images, profile, settings, generation."""
    parser.add_argument(
        "bundle", help="folder made by lfm-edge export, a hub repository's ONNX files, or its id: owner/name[@revision]"
    )
    parser.add_argument(
        "images", nargs="*", default=[], metavar="IMAGE", help="image files; the question is about all of them"
    )
    parser.add_argument(
        "--profile", default="", metavar="NAME", help="how to run: a name of lfm-edge profile list, or a .toml file"
    )
    parser.add_argument(
        "--cache",
        metavar="FOLDER",
        help="cache image features and prompt prefixes in FOLDER, for later questions about the same image",
    )
    parser.add_argument("--verify", action="store_true", help="hash every file before loading")
    parser.add_argument(
        "--force", action="store_true", help="run as the profile says even if there is not enough memory"
    )
    add_setting_arguments(parser)
    text = parser.add_argument_group(
        "generation (defaults: the profile's, generation_config.json, else the model card's)"
    )
    text.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    text.add_argument("--min-p", type=float, metavar="P", help="leave out tokens below P times the highest probability")
    text.add_argument("--top-k", type=int, metavar="K", help="choose from the K likeliest tokens")
    text.add_argument(
        "--top-p", type=float, metavar="P", help="choose from the likeliest tokens, up to P of the probability"
    )
    text.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: fewer repetitions")
    text.add_argument("--max-new-tokens", type=int, metavar="N", help="maximum tokens of an answer")
    text.add_argument(
        "--speculate",
        type=int,
        metavar="N",
        help="propose up to N tokens from the prompt and the answer so far, and check them in one step",
    )
    text.add_argument("--seed", type=int, metavar="N", help="seed of the random numbers")
    text.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text; repeatable")
    text.add_argument("--max-megapixels", type=float, metavar="N", help="refuse larger images (default 100)")


def add_output_arguments(parser: argparse.ArgumentParser, each: str = "") -> None:
    """Add --json and --quiet to a command that answers; `each`: what there is one JSON object for."""
    parser.add_argument("--json", action="store_true", help=f"print one JSON object{each} and nothing else")
    parser.add_argument("--quiet", action="store_true", help="no progress and no figures")


def add_force_argument(parser: argparse.ArgumentParser) -> None:
    """Add --force to a command that writes a file."""
    parser.add_argument("--force", action="store_true", help="replace an output that lfm-edge did not write")


def add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting that a profile has; the flag overrides the profile."""
    model = parser.add_argument_group("model (defaults: the profile's)")
    model.add_argument("--variant", choices=tuple(VARIANTS), help="variant of the bundle to run")
    model.add_argument("--threads", type=int, metavar="N", help="threads for each operator")
    model.add_argument(
        "--affinity",
        type=_affinity,
        metavar="CORES",
        help="pin threads to processors: cores, none, or a list such as 0,2",
    )
    model.add_argument(
        "--spinning",
        type=_spinning,
        metavar="US",
        help="how long threads spin before they sleep: on, off, or microseconds",
    )
    model.add_argument(
        "--prefill",
        choices=("none", *VARIANTS),
        metavar="VARIANT",
        help="variant whose decoder does the prefill: int8 is faster there than int4, and needs the memory of a "
        "second decoder",
    )
    model.add_argument(
        "--strict-placement",
        action=argparse.BooleanOptionalAction,
        help="on a GPU: fail if an operator of the decode loop runs on the CPU",
    )
    model.add_argument("--low-memory", action=argparse.BooleanOptionalAction, help="one graph in memory at a time")
    add_image_arguments(parser)


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each image setting."""
    image = parser.add_argument_group("images (defaults: the profile's, else the checkpoint's)")
    image.add_argument(
        "--min-image-tokens", type=int, metavar="N", help="minimum tokens of a whole image; smaller ones are enlarged"
    )
    image.add_argument(
        "--max-image-tokens", type=int, metavar="N", help="maximum tokens of a whole image; larger ones are reduced"
    )
    image.add_argument("--do-image-splitting", action=argparse.BooleanOptionalAction, help="tile large images")
    image.add_argument("--min-tiles", type=int, metavar="N", help="minimum tiles of a large image")
    image.add_argument("--max-tiles", type=int, metavar="N", help="maximum tiles of a large image")
    image.add_argument(
        "--use-thumbnail", action=argparse.BooleanOptionalAction, help="add the whole image to its tiles"
    )


def _affinity(text: str) -> str | tuple[int, ...]:
    try:
        return text if text in ("cores", "none") else tuple(int(part) for part in text.split(","))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r}: write cores, none, or processor numbers: 0,2") from e


def _spinning(text: str) -> bool | int:
    if text in ("on", "off"):
        return text == "on"
    if not (text.isdecimal() and 1 <= int(text) <= 1_000_000):
        raise argparse.ArgumentTypeError(f"{text!r:.40}: write on, off, or microseconds, 1 to 1000000")
    return int(text)


def load_model(
    options: argparse.Namespace, question: str = "", *, special: bool = True, at_once: bool = False
) -> Model:
    """The model of the flags, so that it fits this machine's memory; `at_once`: for this question alone."""
    from lfm_runtime.commands.console import status_line
    from lfm_runtime.images.pixels import MAX_MEGAPIXELS, image_size
    from lfm_runtime.model import Model
    from lfm_runtime.setup.resolve import DoesNotFitError, resolve
    from lfm_runtime.setup.setup import Ask

    check_images(options, more=not question and sys.stdin.isatty())  # a chat, where /image names some
    most = MAX_MEGAPIXELS if options.max_megapixels is None else options.max_megapixels
    sizes = tuple(image_size(image, max_megapixels=most) for image in options.images)
    ask, flags = Ask(sizes, question, special, once=at_once), setting_flags(options)
    bundle = bundle_of(options)
    try:
        setup = resolve(bundle, options.profile, ask, force=options.force, verify=options.verify, **flags)
    except DoesNotFitError as e:
        raise DoesNotFitError(f"{e}; --force tries all the same") from e
    for line in setup.reductions:
        print(f"lfm-edge: {line}", file=sys.stderr)
    say = status_line(quiet=options.quiet or not sys.stderr.isatty())
    say(f"loading {setup.bundle.folder.resolve().name}, {setup.summary}")
    try:
        return Model.of(setup, cache_folder=options.cache, at_once=at_once)
    finally:
        say("")


def bundle_of(options: argparse.Namespace) -> str | Path:
    """The bundle that is named: a path as it is, and the folder of an id of the hub, which is fetched."""
    from lfm_runtime.setup.hub import HubId, bundle_folder
    from lfm_runtime.setup.profile import find_profile

    if HubId.parse(options.bundle) is None:
        return str(options.bundle)
    profile = find_profile(options.profile, **setting_flags(options))
    return bundle_folder(options.bundle, profile, quiet=getattr(options, "quiet", False))


def setting_flags(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given as flags, by name."""
    from lfm_runtime.decode.sampling import Generation
    from lfm_runtime.setup.setup import Flags

    return given_flags(options, (name for name in Flags.__annotations__ if name not in Generation.__annotations__))


def given_flags(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return those of the flags that were given, by name; flags that a command does not have are none."""
    return {name: value for name in names if (value := getattr(options, name, None)) is not None}


def check_images(options: argparse.Namespace, *, more: bool = False) -> None:
    """Image settings need an image that they could apply to; `more`: one may still come. Images that come through pipes
    are read, once.
    """
    from lfm_profiles.schema import IMAGE_SETTINGS

    from lfm_runtime.images.files import is_stream, read_stream

    options.images = [read_stream(image) if is_stream(image) else image for image in options.images]
    given = list(given_flags(options, (*IMAGE_SETTINGS, "max_megapixels")))
    if given and not options.images and not more:
        raise EdgeError(f"--{given[0].replace('_', '-')} has no effect without an image; leave it out or name an image")


def answer_changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return the generation settings and the image limit that were given as flags, by name."""
    from lfm_runtime.decode.sampling import Generation

    given = given_flags(options, (*Generation.__annotations__, "max_megapixels"))
    if options.stop:
        given["stop"] = tuple(options.stop)
    return given


def interrupt_on_termination() -> None:
    """For commands that start processes and keep what they measured: SIGTERM and SIGHUP end them as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and threading.current_thread() is threading.main_thread():
            signal.signal(getattr(signal, name), interrupt)


def progress_of(options: argparse.Namespace) -> Progress | None:
    """What shows the views encoded: on a terminal, where there is more than one."""
    from lfm_runtime.commands.console import status_line

    if options.quiet or not sys.stderr.isatty():
        return None
    say = status_line()

    def show(done: int, total: int) -> None:
        if total > 1:
            say("" if done == total else f"encoding view {done + 1} of {total}")

    return show
