"""`lfm-edge run`: answer one question about images, then print time and memory."""

from __future__ import annotations

import argparse
import sys

from lfm_runtime.commands.cli import add_model_arguments, add_output_arguments, answer_changes, load_model, progress_of
from lfm_runtime.commands.console import print_json
from lfm_runtime.errors import SettingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = "Answer a question about images, or one without images. On a terminal, without -p: chat."
    add_model_arguments(parser)
    parser.add_argument("-p", "--prompt", metavar="QUESTION", help="the question")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--no-special",
        action="store_true",
        help="treat special tokens in QUESTION and TEXT as plain text (for untrusted input)",
    )
    add_output_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Answer one question, print the answer or its JSON report, and return 0."""
    if options.prompt is None:
        return _chat(options)
    if not options.prompt.strip():
        raise SettingError('the question is empty; write one: -p "What is in this image?"')
    model = load_model(options, f"{options.system} {options.prompt}", special=not options.no_special)
    answer = model.answer(
        options.images,
        options.prompt,
        system=options.system,
        special=not options.no_special,
        progress=progress_of(options),
        **answer_changes(options),
    )
    for piece in answer:
        if not options.json:
            print(piece, end="", flush=True)
    if options.json:
        print_json(answer.report.as_dict())
    else:
        print()
        sys.stdout.flush()
        if not options.quiet:
            name = model.bundle.folder.resolve().name
            print(f"\n{name}, {model.setup.summary}\n{answer.report.table()}", file=sys.stderr)
    return 0


def _chat(options: argparse.Namespace) -> int:
    from lfm_runtime.commands import chat

    if options.no_special or options.json or not sys.stdin.isatty():
        raise SettingError('the question is missing: -p "What is in this image?"; for many questions: lfm-edge chat')
    return chat.run(options)
