"""`lfm-edge run`: answer one question about images, then print time and memory."""

from __future__ import annotations

import argparse
import sys

from lfm_runtime.commands.cli import add_model_arguments, answer_changes, load_model, show_progress
from lfm_runtime.commands.console import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = "Answer a question about images, or a question without images."
    add_model_arguments(parser)
    parser.add_argument("-p", "--prompt", required=True, metavar="QUESTION")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--no-special",
        action="store_true",
        help="treat special tokens in QUESTION and TEXT as plain text (for untrusted input)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(options: argparse.Namespace) -> int:
    """Answer one question, print the answer or its JSON report, and return 0."""
    model = load_model(options, f"{options.system} {options.prompt}", special=not options.no_special)
    answer = model.answer(
        options.images,
        options.prompt,
        system=options.system,
        special=not options.no_special,
        progress=show_progress,
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
        print(f"\n{model.bundle.folder.name}, {model.setup.summary}\n{answer.report.table()}", file=sys.stderr)
    return 0
