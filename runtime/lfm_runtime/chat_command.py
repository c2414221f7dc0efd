"""`lfm-edge chat`: several turns about the same images in the terminal. Images are encoded once."""

from __future__ import annotations

import argparse
import sys

from lfm_runtime.cli import add_model_arguments, answer_changes, image_changes, show_progress
from lfm_runtime.errors import PromptError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description = "Talk about images: one question a line; an empty line or Ctrl-D ends."
    add_model_arguments(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")


def run(options: argparse.Namespace) -> int:
    """Talk until the input ends."""
    from lfm_runtime.model import Model
    from lfm_runtime.prompt import Message

    model = Model.load(
        options.bundle, variant=options.variant, threads=options.threads, verify=options.verify, **image_changes(options)
    )
    changes = answer_changes(options)
    limit = {"max_megapixels": changes["max_megapixels"]} if "max_megapixels" in changes else {}
    planned = [model.open(image, **limit) for image in options.images]
    features = model.encode(planned, progress=show_progress)
    messages = [Message("system", options.system)] if options.system else []
    images_to_place = len(planned)
    while question := _ask():
        turn = Message("user", question, images_to_place)
        try:
            answer = model.converse([*messages, turn], [p.image for p in planned], features=features, **changes)
            for piece in answer:
                print(piece, end="", flush=True)
        except PromptError as e:  # a question that does not fit must not end the conversation
            print(f"lfm-edge: {e}", file=sys.stderr)
            continue
        report = answer.report
        print(f"\n  [{report.new_tokens} tokens, first after {report.timing_ms['ttft'] or 0:.0f} ms]", file=sys.stderr)
        messages += [turn, Message("assistant", report.text)]
        images_to_place = 0
    return 0


def _ask() -> str:
    """The next line; the prompt sign only for a person."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()
