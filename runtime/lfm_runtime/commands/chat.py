"""`lfm-edge chat`: chat about images; each question prefills only its own tokens."""

from __future__ import annotations

import argparse
import difflib
import glob
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lfm_runtime.commands.cli import add_model_arguments, add_output_arguments, answer_changes, load_model, progress_of
from lfm_runtime.commands.console import print_json
from lfm_runtime.errors import ContextFullError, EdgeError, SettingError

if TYPE_CHECKING:
    from lfm_runtime.images.opened import OpenedImage
    from lfm_runtime.model import Model

HELP = """\
/image FILE   add an image to the next question
/clear        forget the conversation and its images
/save FILE    write the conversation to a new JSON file
/help         show this list
/exit         end the chat; so does Ctrl-D
Ctrl-C stops an answer. A line that ends in \\ goes on in the next line."""
_COMMANDS = ("/image", "/clear", "/save", "/help", "/exit")
_WITH_FILE = ("/image", "/save")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Chat about images. On a terminal, /help lists the commands of the chat. From a pipe, each line is a question, "
        "and each answer is one line; line breaks in it become spaces."
    )
    add_model_arguments(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    add_output_arguments(parser, " for each question")


def run(options: argparse.Namespace) -> int:
    """Answer questions until the input ends; return 0 on a terminal, else the first failed question's exit code."""
    model = load_model(options)
    talk = Talk(model, options)
    if sys.stdin.isatty():
        _on_terminal(talk)
        return 0
    failed = 0
    for line in sys.stdin:
        code = talk.ask(line.strip()) if line.strip() else talk.say_nothing()
        failed = failed or code
    return failed


class Talk:
    """A conversation and what the command line says of it: images for the next question, settings, output."""

    def __init__(self, model: Model, options: argparse.Namespace) -> None:
        self._model = model
        self._system, self._json, self._quiet = options.system, options.json, options.quiet
        self._progress = progress_of(options)
        self._generation = answer_changes(options)
        most = self._generation.pop("max_megapixels", None)
        self._limit = {} if most is None else {"max_megapixels": most}
        self.clear()
        for image in options.images:
            self.add_image(image)

    def clear(self) -> None:
        """Forget the conversation and its images."""
        from lfm_runtime.conversation import Chat

        self._chat = Chat(self._model, system=self._system)
        self._waiting: list[tuple[str, OpenedImage]] = []  # for the next question
        self._asked: list[str] = []  # images of the questions before

    def add_image(self, path: str) -> None:
        """Open an image for the next question."""
        self._waiting.append((path if isinstance(path, str) else "-", self._model.open(path, **self._limit)))

    def _what_is_full(self, error: ContextFullError) -> str:
        """What takes most of a full context, unless it is the question, and how to be rid of it."""
        images = sum(image.layout.tokens for _, image in self._waiting)
        if 2 * max(self._chat.tokens, images) < error.tokens:
            return ""
        taken, them = (
            ("the conversation so far takes", "it") if self._chat.tokens > images else ("its images take", "them")
        )
        return f"; {taken} most of them: " + (f"/clear forgets {them}" if sys.stdin.isatty() else "start another chat")

    def ask(self, question: str) -> int:
        """Print the answer to a question; return the exit code. A question that fails, or is interrupted before its
        answer begins, is not part of the conversation.
        """
        said = len(self._chat.messages)
        pieces: Iterator[str] = iter(())
        try:
            answer = self._chat.ask(
                question, [image for _, image in self._waiting], progress=self._progress, **self._generation
            )
            pieces = iter(answer)
            self._show(pieces)
        except EdgeError as e:
            full = self._what_is_full(e) if isinstance(e, ContextFullError) else ""
            print_json({"question": question, "error": f"{e}{full}"}) if self._json else self.say_nothing()
            print(f"lfm-edge: {e}{full}", file=sys.stderr)
            return e.exit_code
        except KeyboardInterrupt:
            getattr(pieces, "close", lambda: None)()  # what was said so far is kept now, before it is looked at
            if len(self._chat.messages) == said:
                kept = "; its image waits for the next question" if self._waiting else ""
                print(f"\n[not answered, and not part of the chat{kept}]", end="", file=sys.stderr)
            raise
        finally:
            if len(self._chat.messages) > said:
                self._asked += [path for path, _ in self._waiting]
                self._waiting = []
        report = answer.report
        cut = " (length)" if report.finish_reason == "length" else ""
        if self._json:
            print_json({"question": question, **report.as_dict()})
            sys.stdout.flush()
            return 0
        print(flush=True)
        if not self._quiet:
            new = report.prompt_tokens - report.cached_tokens
            print(
                f"  [{new} new prompt tokens, {report.new_tokens} generated{cut}, "
                f"first token after {report.timing_ms['ttft'] or 0:.0f} ms]",
                file=sys.stderr,
            )
        return 0

    def _show(self, pieces: Iterator[str]) -> None:
        """Print an answer as it is made. A Ctrl-C while it streams takes hold between two pieces.

        A step that is cut off would cost the whole conversation's prefill again.
        """
        with _kept_for_later() as interrupted:
            for piece in pieces:
                if not self._json:
                    print(piece if sys.stdin.isatty() else _on_one_line(piece), end="", flush=True)
                if interrupted.is_set():
                    raise KeyboardInterrupt
                interrupted.hold()

    def say_nothing(self) -> int:
        """In a pipe, an empty line for a line without an answer: line N answers line N."""
        if not self._json and not sys.stdin.isatty():
            print(flush=True)
        return 0

    def save(self, path: Path) -> None:
        """Write the conversation as transformers' chat templates take it, with the images' paths.

        Raises:
            SettingError: the file exists, or nothing was said yet.
            EdgeError: it cannot be written.
        """
        from lfm_runtime.formats.files import check_outside_bundles, to_json, write_whole

        if not self._chat.messages:
            raise SettingError("there is no conversation yet; ask something first")
        check_outside_bundles(path)
        if path.exists():
            raise SettingError(f"{path} exists; choose a new name")
        paths: Iterator[str] = iter(self._asked)
        turns = [message.as_dict() for message in self._chat.messages]
        for turn in turns:
            for part in turn["content"] if isinstance(turn["content"], list) else ():
                if part["type"] == "image":
                    part["path"] = next(paths)
        write_whole(path, to_json(turns, indent=1) + "\n")


class _Interrupted:
    """Whether Ctrl-C was pressed; from `hold` on it is noted instead of raised."""

    def __init__(self) -> None:
        self._pressed = self._held = False

    def is_set(self) -> bool:
        """Whether it was."""
        return self._pressed

    def hold(self) -> None:
        """Note it from now on."""
        self._held = True

    def note(self, *_: object) -> None:
        """Handle the signal."""
        if not self._held:
            raise KeyboardInterrupt
        self._pressed = True


@contextmanager
def _kept_for_later() -> Iterator[_Interrupted]:
    """Ctrl-C in this block, as `_Interrupted` says. Only the main thread may do so; elsewhere nothing changes."""
    found = _Interrupted()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = signal.signal(signal.SIGINT, found.note)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


def _on_one_line(piece: str) -> str:
    return re.sub(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", " ", piece)


# ---------------------------------------------------------------------------------------------------- on a terminal


def _on_terminal(talk: Talk) -> None:
    """Read lines with history and editing until Ctrl-D, /exit, or Ctrl-C twice at the prompt."""
    _edit_lines()
    print("/help lists commands; Ctrl-C stops an answer; Ctrl-D ends the chat", file=sys.stderr)
    first = True
    while _turns(talk, first=first):
        first = False


def _turns(talk: Talk, *, first: bool) -> bool:
    """Questions and commands to the end of the chat (False) or to a Ctrl-C (True). A Ctrl-C before anything is typed
    is raised where it is not the first: it is the second in a row.
    """
    lines, answering = 0, False
    try:
        while (line := _read_question()) is not None and line.lower() != "/exit":
            lines, answering = lines + 1, True
            if line:
                _do(talk, line)
            answering = False
    except KeyboardInterrupt:
        if not (first or lines or _typed()):
            raise
        what = "stopped; " if answering else ""
        print(f"\n[{what}Ctrl-C again or Ctrl-D ends the chat]", file=sys.stderr)
        return True
    return False


def _typed() -> str:
    """What stands on the line that a Ctrl-C dropped."""
    readline = sys.modules.get("readline")
    return str(readline.get_line_buffer()) if readline else ""


def _do(talk: Talk, line: str) -> None:
    """Carry out a command, or ask a question. `/home/me/photo.jpg …` is a question: a command is one word."""
    word, _, rest = line.partition(" ")
    word = word.lower() if word.lower() in _COMMANDS else word
    if not re.fullmatch(r"/[a-z?]*", word):
        talk.ask(line)
        return
    try:
        rest = _as_pasted(rest.strip()) if word in _WITH_FILE else rest.strip()
        if word == "/image" and rest:
            talk.add_image(str(Path(rest).expanduser()))
            print("[added to the next question]", file=sys.stderr)
        elif word == "/save" and rest:
            talk.save(Path(rest).expanduser())
            print(f"[written: {rest}]", file=sys.stderr)
        elif rest and word in _COMMANDS and word not in _WITH_FILE:
            raise SettingError(f"{word} stands alone; leave the rest out")
        elif word == "/clear":
            talk.clear()
            print("[forgotten]", file=sys.stderr)
        elif word == "/help":
            print(HELP, file=sys.stderr)
        else:
            wanted = word in _WITH_FILE
            meant = difflib.get_close_matches(word, _COMMANDS, 1)
            hint = f"did you mean {meant[0]}?" if meant else "see /help"
            if wanted:
                raise SettingError(f"{word} needs a file")
            raise SettingError(f"{word} is not a command; {hint}")
    except EdgeError as e:
        print(f"lfm-edge: {e}", file=sys.stderr)
    except (OSError, RuntimeError) as e:  # a name that is too long, or of a user who is not there
        print(f"lfm-edge: {word}: {getattr(e, 'strerror', '') or e}; name another file", file=sys.stderr)


def _as_pasted(text: str) -> str:
    """A file's name without the quotes or backslashes that terminals and shells put around blanks."""
    if Path(text).expanduser().exists():
        return text
    try:
        return " ".join(shlex.split(text)) if "\\" in text or text[:1] in "\"'" else text
    except ValueError:
        return text.strip("\"'")


def _read_question() -> str | None:
    r"""A line, with those that follow while it ends in \; None at the end of the input."""
    lines: list[str] = []
    while True:
        try:
            lines.append(_read_line("… " if lines else "> "))
        except EOFError:
            print(file=sys.stderr)
            return None
        if not lines[-1].endswith("\\"):
            return "\n".join(lines).strip()
        lines[-1] = lines[-1][:-1]


def _read_line(prompt: str) -> str:
    """A line of the terminal. readline writes its prompt to standard output, so only where that is the terminal."""
    if sys.stdout.isatty():
        with _coming_back(prompt):
            return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


@contextmanager
def _coming_back(prompt: str) -> Iterator[None]:
    """After Ctrl-Z and `fg`, the terminal as readline had it, which the shell has changed since, and the line again."""
    if not hasattr(signal, "SIGTSTP"):
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)

    def stop(*_: object) -> None:
        during = termios.tcgetattr(sys.stdin)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # until it is continued
        signal.signal(signal.SIGTSTP, stop)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, during)
        print(f"\r{prompt}{_typed()}", end="", flush=True)

    known = signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, known)


def _edit_lines() -> None:
    """Let `input` edit lines, remember them, and complete commands and file names with Tab."""
    try:
        import readline  # not there on every Python
    except ImportError:
        return

    def complete(text: str, state: int) -> str | None:
        line = readline.get_line_buffer()
        if line.startswith(("/image ", "/save ")):
            found = sorted(glob.glob(glob.escape(str(Path(text).expanduser()) if text else "") + "*"))  # noqa: PTH207
            found = [f"{name}/" if Path(name).is_dir() else name for name in found]
        else:
            found = [command for command in _COMMANDS if command.startswith(line)] if line.startswith("/") else []
            found = [f"{command} " if command in _WITH_FILE else command for command in found]
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
