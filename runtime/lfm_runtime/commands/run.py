"""`lfm-edge run`: answer one question about images, then print time and memory."""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lfm_runtime.commands.cli import add_model_arguments, add_output_arguments, answer_changes, load_model, progress_of
from lfm_runtime.commands.console import print_json
from lfm_runtime.errors import SettingError, counted

if TYPE_CHECKING:
    from PIL import Image

    from lfm_runtime.boxes import Box
    from lfm_runtime.model import Model

_SOFTWARE = "lfm-edge run --boxes"
_LARGEST_SCHEMA = 4 << 20
_EXIT_CUT = 3


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
    shape = parser.add_argument_group("what the answer is")
    shape.add_argument("--schema", metavar="FILE", help="a JSON schema that the answer follows (needs the extra json)")
    shape.add_argument(
        "--choices",
        type=parse_choices,
        metavar="A,B",
        help="print how likely each of these answers is, instead of generating one; a JSON list where they have commas",
    )
    shape.add_argument("--boxes", type=Path, metavar="OUT.png", help="draw the boxes of the answer on the image")
    add_output_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Answer one question, print the answer or its JSON report, and return 0."""
    if options.prompt is None:
        return _chat(options)
    if not options.prompt.strip():
        raise SettingError('the question is empty; write one: -p "What is in this image?"')
    _check(options)
    model = load_model(options, f"{options.system} {options.prompt}", special=not options.no_special, at_once=True)
    if options.choices:
        return _choose(options, model)
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
    if not options.json:
        print(flush=True)  # before anything is said of boxes that could not be drawn
    boxes = _draw(options, answer.report.text) if options.boxes else None
    if options.json:
        print_json({**answer.report.as_dict(), **({} if boxes is None else {"boxes": [asdict(box) for box in boxes]})})
    elif not options.quiet:
        name = model.bundle.folder.resolve().name
        print(f"\n{name}, {model.setup.summary}\n{answer.report.table()}", file=sys.stderr)
    if options.schema and answer.report.finish_reason == "length":
        said = f"the answer was cut off after {counted(answer.report.new_tokens, 'token')}, before its JSON was whole"
        print(f"lfm-edge: {said}; allow more with --max-new-tokens", file=sys.stderr)
        return _EXIT_CUT
    return 0


def read_schema(name: str) -> str:
    """The text of a JSON schema's file. Raises SettingError where it cannot be read, is too long, or is not JSON."""
    try:
        with Path(name).open(encoding="utf-8-sig") as file:  # a pipe too; a device would not end
            text = file.read(_LARGEST_SCHEMA + 1)
    except OSError as e:
        raise SettingError(f"{name} cannot be read ({e.strerror}); --schema is a file with a JSON schema") from e
    except UnicodeDecodeError as e:
        raise SettingError(f"{name} is not UTF-8 text; --schema is a file with a JSON schema") from e
    if len(text) > _LARGEST_SCHEMA:
        raise SettingError(f"{name} has more than {_LARGEST_SCHEMA >> 20} MiB; --schema is a file with a JSON schema")
    try:
        json.loads(text)
    except (ValueError, RecursionError) as e:
        raise SettingError(f"{name} is not JSON ({str(e)[:200]}); --schema is a file with a JSON schema") from e
    return text


def parse_choices(text: str) -> list[str]:
    """The answers of --choices. Raises ArgumentTypeError for JSON that is no list of texts."""
    if not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",")]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise argparse.ArgumentTypeError(f'{text!r:.80} is not JSON ({e}); write yes,no or ["a, b", "c"]') from e
    if not all(isinstance(part, str) for part in found):
        raise argparse.ArgumentTypeError(f'{text!r:.80} is no list of texts; write yes,no or ["a, b", "c"]')
    return list(found)


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot be before the model is loaded."""
    from lfm_runtime.answer.choice import check_answers
    from lfm_runtime.formats.files import check_output

    if options.schema:
        options.schema = read_schema(options.schema)
    if options.choices:
        useless = [name for name in answer_changes(options) if name != "max_megapixels"]
        useless += ["boxes"] * bool(options.boxes)
        if useless:
            flag = useless[0].replace("_", "-")
            raise SettingError(f"--{flag} has no effect beside --choices, which generates nothing; leave it out")
        check_answers(options.choices)
    if options.boxes:
        if len(options.images) != 1:
            raise SettingError(f"--boxes draws on one image, and there are {len(options.images)}; name one")
        if options.boxes.suffix.lower() != ".png":
            raise SettingError(f"--boxes {str(options.boxes)!r}: a PNG is written; name it OUT.png")
        check_output(options.boxes, _SOFTWARE, _is_ours, force=None)


def _choose(options: argparse.Namespace, model: Model) -> int:
    chosen = model.choose(
        options.images,
        options.prompt,
        options.choices,
        system=options.system,
        special=not options.no_special,
        **({} if options.max_megapixels is None else {"max_megapixels": options.max_megapixels}),
    )
    if options.json:
        print_json({**chosen.as_dict(), "report": chosen.report.as_dict()})
        return 0
    for score, answer in sorted(zip(chosen.log_likelihoods, chosen.answers, strict=True), reverse=True):
        print(f"{chosen.probabilities[chosen.answers.index(answer)]:8.4f}  {score:9.3f}  {answer}")
    sys.stdout.flush()
    if not options.quiet:
        share = 100 * chosen.share
        said = f"these answers are {share:.{'2g' if share < 10 else '0f'}} % of what the model would say"
        print(f"probability, log-likelihood; {said}\n{chosen.report.table()}", file=sys.stderr)
    return 0


def _draw(options: argparse.Namespace, text: str) -> list[Box]:
    from PIL.PngImagePlugin import PngInfo

    from lfm_runtime.boxes import draw_boxes, parse_boxes
    from lfm_runtime.formats.files import write_whole
    from lfm_runtime.images.pixels import image_size

    image = options.images[0]
    limit = {} if options.max_megapixels is None else {"max_megapixels": options.max_megapixels}
    boxes = parse_boxes(text, [image_size(image, **limit)])
    drawn, note, stream = draw_boxes(image, boxes, **limit), PngInfo(), io.BytesIO()
    note.add_text("Software", _SOFTWARE)
    note.add_text("Comment", _pixels(drawn))
    drawn.save(stream, "png", pnginfo=note)
    write_whole(options.boxes, stream.getvalue())
    if not options.quiet:
        said = (
            f"{len(boxes)} box{'es' * (len(boxes) > 1)} drawn in"
            if boxes
            else "no box in the answer; the image alone is in"
        )
        print(f"lfm-edge: {said} {options.boxes}", file=sys.stderr)
    return boxes


def _is_ours(path: Path) -> bool:
    """Whether it is as we wrote it: an editor that was used on it may have kept its text."""
    from PIL import Image

    with Image.open(path) as image:
        return bool(image.info.get("Software") == _SOFTWARE and image.info.get("Comment") == _pixels(image))


def _pixels(image: Image.Image) -> str:
    import hashlib

    return f"sha256 of {image.mode} {image.width}x{image.height}: {hashlib.sha256(image.tobytes()).hexdigest()}"


def _chat(options: argparse.Namespace) -> int:
    from lfm_runtime.commands import chat

    alone = [name for name in ("no_special", "schema", "choices", "boxes", "json") if getattr(options, name)]
    if alone or not sys.stdin.isatty():
        many = f"--{alone[0].replace('_', '-')} is for one question" if alone else "for many questions: lfm-edge chat"
        raise SettingError(f'the question is missing: -p "What is in this image?"; {many}')
    return chat.run(options)
