"""`lfm-edge chat`: chat about images; each question prefills only its own tokens."""

from __future__ import annotations

import argparse
import sys

from lfm_runtime.commands.cli import add_model_arguments, answer_changes, load_model, show_progress
from lfm_runtime.errors import PromptError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = "Chat about images: one question per line; an empty line or Ctrl-D ends the chat."
    add_model_arguments(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")


def run(options: argparse.Namespace) -> int:
    """Answer questions until the input ends; return 0 on a terminal, else the last question's exit code."""
    from lfm_runtime.conversation import Chat

    model = load_model(options)
    changes = answer_changes(options)
    chat = Chat(model, system=options.system)
    limit = {"max_megapixels": changes.pop("max_megapixels")} if "max_megapixels" in changes else {}
    images = [model.open(image, **limit) for image in options.images]
    code = 0
    while question := _ask():
        try:
            answer = chat.ask(question, images, progress=show_progress, **changes)
            for piece in answer:
                print(piece, end="", flush=True)
        except PromptError as e:  # a question that does not fit must not end the conversation
            print(f"lfm-edge: {e}", file=sys.stderr)
            code = e.exit_code
            continue
        code = 0
        report = answer.report
        new = report.prompt_tokens - report.cached_tokens
        print(
            f"\n  [{new} prompt tokens, {report.new_tokens} generated, "
            f"first token after {report.timing_ms['ttft'] or 0:.0f} ms]",
            file=sys.stderr,
        )
        images = []
    return 0 if sys.stdin.isatty() else code  # a script is told of its last question


def _ask() -> str:
    """Return the next line of input; show a prompt sign only on a terminal."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()
