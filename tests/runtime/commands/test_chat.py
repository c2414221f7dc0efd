"""`lfm-edge chat`: at a pseudo-terminal, driven by pexpect, and in a pipe."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from lfm_runtime.commands.cli import main
from lfm_runtime.commands.parser import Parser

pexpect = pytest.importorskip("pexpect")
fdpexpect = pytest.importorskip("pexpect.fdpexpect")

pytestmark = [pytest.mark.process, pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal of POSIX")]
WAIT_S = 120  # for a machine that is busy; nothing is asserted of it
UP, DOWN, CTRL_C, CTRL_D, TAB = "\x1b[A", "\x1b[B", "\x03", "\x04", "\t"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "200"}
ENDLESS = ("--temperature", "100", "--min-p", "0", "--seed", "1", "--max-new-tokens", "100000")
"""Random tokens, of a bundle whose end is never drawn: 4,000 tokens, more text than a pseudo-terminal holds unread."""


_IN_A_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
for name in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # a run in the background ignores them, and so would we
    signal.signal(name, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Makes standard input the controlling terminal, then becomes the program. pexpect's own way forks, which crashes in a
process where torch and OpenVINO have threads.
"""


class Terminal:
    """A chat at a pseudo-terminal."""

    def __init__(self, *words: object, command: str = "chat") -> None:
        arguments = ["-m", "lfm_runtime", command, *map(str, words), "--threads", "1"]
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _IN_A_TERMINAL, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        os.close(theirs)
        self.child = fdpexpect.fdspawn(ours, encoding="utf-8", timeout=WAIT_S)
        self.sees("ends the chat")
        self.prompt()

    def sees(self, text: str) -> str:
        """Wait for a text; return what came before it."""
        if self.child.expect_exact([text, pexpect.EOF]):
            raise AssertionError(f"ended: {self.process.wait()}: {self.child.before}")
        return self.child.before

    def prompt(self) -> str:
        return self.sees("> ")

    def types(self, text: str) -> None:
        self.child.send(text)

    def asks(self, question: str) -> str:
        """Return what is shown until the next prompt."""
        self.types(question + "\r")
        return self.prompt()

    def ends(self) -> int:
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.process.wait()


_A_SHELL = (
    _IN_A_TERMINAL[: _IN_A_TERMINAL.index("os.execv")]
    + """
os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
"""
)


@pytest.fixture
def image() -> Path:
    return Path(__file__).resolve().parents[3] / "demo" / "eval" / "images" / "0000.png"


def test_a_conversation(demo_bundle, image) -> None:
    """Figures of the second question show that the first was remembered; an empty line is no question."""
    terminal = Terminal(demo_bundle, image)
    first = terminal.asks("What is in this image?")
    assert "generated, first token after" in first
    assert terminal.asks("").strip() == ""
    second = terminal.asks("How many shapes?")
    assert int(second.split("[")[-1].split()[0]) < int(first.split("[")[-1].split()[0])
    terminal.types(CTRL_D)
    assert terminal.ends() == 0


def test_lines_are_edited_and_remembered(demo_bundle) -> None:
    """An arrow is not a question; the line before comes back, and can be changed."""
    terminal = Terminal(demo_bundle)
    terminal.asks("How many red shapes?")
    terminal.types(UP + "\x7f" * 7 + "stars?\r")
    shown = terminal.prompt()
    assert "stars?" in shown
    assert "[A" not in shown
    terminal.types("/Exit\r")
    assert terminal.ends() == 0


def test_ctrl_c_stops_the_answer_and_not_the_chat(bundle_copy, image) -> None:
    """While it streams, after a second image too; twice in a row ends the chat."""
    (bundle_copy / "manifest.json").unlink()
    file = bundle_copy / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 6}))
    terminal = Terminal(bundle_copy, image, *ENDLESS)
    terminal.types("What is in this image?\r")
    terminal.sees("image?\r\n")
    terminal.child.expect(r"[^\r\n]{40}")  # it streams
    terminal.types(CTRL_C)
    assert "generated" not in terminal.sees("[stopped; ")
    terminal.prompt()
    assert "added" in terminal.asks(f"/image {image}")
    terminal.types("How many shapes?\r")
    terminal.sees("shapes?\r\n")
    terminal.child.expect(r"[^\r\n]{40}")
    terminal.types(CTRL_C)
    assert "generated" not in terminal.sees("[stopped; ")
    terminal.prompt()
    terminal.types(CTRL_C)  # nothing was typed since: the second in a row
    assert terminal.ends() == 130


def test_the_first_ctrl_c_of_a_chat_asks(demo_bundle) -> None:
    terminal = Terminal(demo_bundle)
    terminal.types(CTRL_C)
    terminal.sees("[Ctrl-C again or Ctrl-D ends the chat]")
    terminal.prompt()
    terminal.types(CTRL_C)
    assert terminal.ends() == 130


def test_a_full_conversation_says_what_helps(demo_bundle, image, tmp_path) -> None:
    """The question alone is told its own length; a conversation, how it begins anew."""
    words = [sys.executable, "-m", "lfm_runtime", "chat", str(demo_bundle), "--quiet", "--max-new-tokens", "2"]
    asked = f"{'word ' * 300}\n" * 5
    done = subprocess.run(words, input=asked, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert "the conversation so far takes most of them: start another chat" in done.stderr
    first = subprocess.run(words, input="word " * 9000, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert "may have at most" in first.stderr
    assert "the conversation so far" not in first.stderr
    (tmp_path / "short.toml").write_text('extends = "auto"\ncontext = 100\n')
    short = [*words, "--profile", str(tmp_path / "short.toml")]
    second = subprocess.run(
        short, input=f"Hi.\n{'word ' * 400}\n", capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert "may have at most 100; shorten the text\n" in second.stderr, "it is the question that takes them"
    words += [str(image)] * 400
    many = subprocess.run(words, input="What?", capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert "its images take most of them: start another chat" in many.stderr


def test_names_as_terminals_paste_them(tmp_path) -> None:
    from lfm_runtime.commands.chat import _as_pasted

    (tmp_path / "a b.png").write_bytes(b"")
    for text in (f"{tmp_path}/a b.png", f"{tmp_path}/a\\ b.png", f"'{tmp_path}/a b.png'", f'"{tmp_path}/a b.png"'):
        assert _as_pasted(text) == f"{tmp_path}/a b.png"


def test_ctrl_c_before_the_answer_is_told(demo_bundle, image, monkeypatch, capsys) -> None:
    """The question is not part of the chat, and the image is not lost."""
    from lfm_runtime.commands import chat
    from lfm_runtime.conversation import Chat
    from lfm_runtime.model import Model

    parser = Parser(prog="lfm-edge chat")
    chat.add_arguments(parser)
    talk = chat.Talk(Model.load(demo_bundle, threads=1), parser.parse_intermixed_args([str(demo_bundle), str(image)]))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Chat, "ask", interrupted)
        talk.ask("What is in this image?")
    assert "[not answered, and not part of the chat; its image waits for the next question]" in capsys.readouterr().err
    assert talk.ask("What is in this image?") == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Chat, "ask", interrupted)
        talk.ask("And now?")
    assert "[not answered, and not part of the chat]" in capsys.readouterr().err


def test_ctrl_c_while_it_streams_keeps_what_was_said(demo_bundle, image, monkeypatch, tmp_path, capsys) -> None:
    """The part that was shown is part of the chat, its image is in what is saved, and nothing of it is computed again."""
    from lfm_runtime.commands import chat
    from lfm_runtime.model import Model

    parser = Parser(prog="lfm-edge chat")
    chat.add_arguments(parser)
    words = [str(demo_bundle), str(image), "--max-new-tokens", "100", "--temperature", "100", "--min-p", "0"]
    talk = chat.Talk(Model.load(demo_bundle, threads=1), parser.parse_intermixed_args([*words, "--seed", "1"]))
    before, shown = signal.getsignal(signal.SIGINT), []

    def piece_shown(piece: str) -> str:
        shown.append(piece)
        if len(shown) == 2:
            signal.getsignal(signal.SIGINT)(signal.SIGINT, None)  # not raised: that would be the whole process's
        return piece

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chat, "_on_one_line", piece_shown)
        talk.ask("What is in this image?")
    assert len(shown) == 2
    assert signal.getsignal(signal.SIGINT) is before
    assert "not part of the chat" not in capsys.readouterr().err
    talk.save(tmp_path / "talk.json")
    question, answer = json.loads((tmp_path / "talk.json").read_text())
    assert question["content"][0] == {"type": "image", "path": str(image)}
    assert answer["content"] == "".join(shown).strip()
    assert talk.ask("And now?") == 0
    new = int(re.search(r"\[(\d+) new prompt tokens", capsys.readouterr().err)[1])
    assert new < 30, "the image alone has more"


def test_commands(demo_bundle, image, tmp_path) -> None:
    terminal = Terminal(demo_bundle, "--max-image-tokens", "32")  # for images that are named later
    assert "/save FILE" in terminal.asks("/help")
    assert "/save FILE" in terminal.asks("/HELP")
    assert "did you mean /clear?" in terminal.asks("/cler")
    assert "/image needs a file" in terminal.asks("/image")
    assert "/clear stands alone" in terminal.asks("/clear all")
    assert "does not exist" in terminal.asks("/image nowhere.png")
    assert "added" in terminal.asks(f"/image '{image}'")
    assert "there is no conversation yet" in terminal.asks(f"/save {tmp_path / 'nothing.json'}")
    terminal.asks("What is in this image?")
    terminal.asks("How many\\\rshapes?")
    file = tmp_path / "my talk.json"
    assert "written" in terminal.asks(f"/save {file}")
    turns = json.loads(file.read_text())
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert turns[0]["content"] == [
        {"type": "image", "path": str(image)},
        {"type": "text", "text": "What is in this image?"},
    ]
    assert turns[2]["content"] == "How many\nshapes?"
    assert "exists; choose a new name" in terminal.asks(f"/save {file}")
    for word in ("/save", "/image"):
        for name in ("~nobody99/x", "x" * 300):
            assert f"lfm-edge: {word}" in terminal.asks(f"{word} {name}") or word == "/image"
    assert "lies inside the bundle" in terminal.asks(f"/save {demo_bundle}/x.txt")
    assert "forgotten" in terminal.asks("/clear")
    terminal.asks("/var/log is a folder")  # a path is no command
    for question in ("Please " + "describe it " * 30, "Compare ~nobody99 and the others", "Say 'it"):
        said = terminal.asks(question)
        assert "generated" in said and "lfm-edge:" not in said  # no file is looked for
    terminal.types("/exit\r")
    assert terminal.ends() == 0


def test_ctrl_z_and_back(demo_bundle) -> None:
    """In a shell with jobs: the line stands there again, is edited on, and is shown once."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "lfm_runtime", "chat", str(demo_bundle), "--threads", "1"]
    shell = subprocess.Popen(
        [sys.executable, "-c", _A_SHELL],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**ENVIRONMENT, "PS1": "ready: "},
        start_new_session=True,
    )
    os.close(theirs)
    child = fdpexpect.fdspawn(ours, encoding="utf-8", timeout=WAIT_S)
    child.send(shlex.join(words) + "\r")
    child.expect_exact("ends the chat")
    child.expect_exact("> ")
    child.send("How many")
    child.expect_exact("How many")
    child.send("\x1a")
    child.expect_exact("Stopped")
    child.send("fg\r")
    child.expect_exact("> How many")
    child.send(" shapes\x7f\x7f?\r")
    child.expect_exact("generated")
    assert child.before.count("shap") == 1, child.before  # the terminal itself shows nothing: readline does
    child.send(CTRL_D)
    child.expect_exact("ready: ")
    child.send("exit\r")
    child.expect(pexpect.EOF)
    shell.wait()


def test_tab_completes_file_names(demo_bundle, tmp_path) -> None:
    (tmp_path / "kitchen.png").write_bytes(b"no image")
    terminal = Terminal(demo_bundle)
    terminal.types(f"/image {tmp_path}/kit{TAB}")
    terminal.sees("kitchen.png")
    assert "not a readable image" in terminal.asks("")
    terminal.types(CTRL_D)
    assert terminal.ends() == 0


def test_a_pasted_text_is_one_question(demo_bundle, tmp_path) -> None:
    """Terminals bracket what is pasted; readline keeps its line breaks."""
    terminal = Terminal(demo_bundle)
    terminal.types("\x1b[200~How many\nshapes?\x1b[201~\r")
    terminal.sees("generated")
    terminal.prompt()
    terminal.asks(f"/save {tmp_path}/talk.json")
    assert json.loads((tmp_path / "talk.json").read_text())[0]["content"].split() == ["How", "many", "shapes?"]
    terminal.types(CTRL_D)
    assert terminal.ends() == 0


def test_run_without_a_question_is_a_chat(demo_bundle, image) -> None:
    terminal = Terminal(demo_bundle, image, command="run")
    assert "generated" in terminal.asks("How many shapes?")
    terminal.types(CTRL_D)
    assert terminal.ends() == 0


@pytest.mark.parametrize(
    ("flag", "value"), [("--schema", "nowhere.json"), ("--choices", "a,b"), ("--boxes", "b.png"), ("--no-special", "")]
)
def test_what_is_for_one_question_does_not_become_a_chat(flag, value, tmp_path, monkeypatch, capsys) -> None:
    """A chat has none of these flags: they would have no effect, or another one."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(["run", str(tmp_path), flag, *([value] if value else [])]) == 2
    assert (
        f'the question is missing: -p "What is in this image?"; {flag} is for one question' in capsys.readouterr().err
    )


def piped(text: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lfm_runtime", "chat", *map(str, words), "--threads", "1"]
    return subprocess.run(command, input=text, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def test_in_a_pipe_each_answer_is_a_line(demo_bundle, image) -> None:
    """Line N answers line N, also where there is no answer; a command of the terminal is a question there."""
    found = piped(
        "What is in this image?\n\nHow many shapes?\n" + "word " * 9000 + "\n/exit\nHow many?", demo_bundle, image
    )
    lines = found.stdout.split("\n")
    assert len(lines) == 7, found.stdout
    assert [bool(line) for line in lines[:4]] == [True, False, True, False]
    assert found.returncode == 2
    assert "may have at most" in found.stderr


def test_in_a_pipe_line_breaks_are_spaces(demo_bundle) -> None:
    found = piped("What?\nWhich?\n", demo_bundle, *ENDLESS[:-1], "300")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("\n") == 2
    assert len(found.stdout.splitlines()) == 2


def test_json_of_each_answer(demo_bundle, image) -> None:
    found = piped("How many shapes?\n" + "word " * 9000 + "\n", demo_bundle, image, "--json", "--quiet")
    good, bad = map(json.loads, found.stdout.splitlines())
    assert good["question"] == "How many shapes?"
    assert good["text"]
    assert good["new_tokens"] >= 1
    assert "may have at most" in bad["error"]
    assert len(found.stderr.splitlines()) == 1


def test_run_without_a_question_in_a_pipe(demo_bundle) -> None:
    command = [sys.executable, "-m", "lfm_runtime", "run", str(demo_bundle)]
    found = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert found.returncode == 2
    assert "the question is missing" in found.stderr
