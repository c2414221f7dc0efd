"""The options about what is asked, which `caption` and `watch` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm_runtime.commands.run import parse_choices, read_schema
from lfm_runtime.errors import SettingError

if TYPE_CHECKING:
    from lfm_runtime.bundle import Bundle

    from lfm_serve.asking import Asking

_GENERATION = ("temperature", "max_new_tokens", "repetition_penalty", "seed")


def add_asking_arguments(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """Add what is asked; `several`: more than one question may be given."""
    what = parser.add_argument_group("what is asked")
    again = "; repeatable: each is asked about every picture" if several else ""
    action = "append" if several else "store"
    what.add_argument("-p", "--prompt", action=action, metavar="QUESTION", help=f"the question{again}")
    what.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    what.add_argument("--schema", metavar="FILE", help="a JSON schema that answers follow (needs the extra json)")
    what.add_argument("--choices", type=parse_choices, metavar="A,B", help="the likeliest of these answers")
    what.add_argument(
        "--fields", type=Path, metavar="FILE.yaml", help="fields to be read from images, name: description a line"
    )


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how answers are generated, and how the model runs."""
    parser.add_argument(
        "--profile", default="", metavar="NAME", help="how to run: a name of lfm-edge profile list, or a .toml file"
    )
    parser.add_argument("--quiet", action="store_true", help="only errors")
    text = parser.add_argument_group("generation (defaults: greedy; else as lfm-edge run)")
    text.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    text.add_argument("--max-new-tokens", type=int, metavar="N", help="maximum tokens of an answer")
    text.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: fewer repetitions")
    text.add_argument("--seed", type=int, metavar="N", help="seed of the random numbers")


def check_asking(options: argparse.Namespace, questions: Sequence[str | None], example: str) -> None:
    """Raise SettingError for what cannot be asked."""
    shapes = [name for name in ("schema", "choices", "fields") if getattr(options, name)]
    if len(shapes) > 1:
        raise SettingError(f"--{shapes[0]} and --{shapes[1]} exclude each other; give one")
    if options.fields and any(question is not None for question in questions):
        raise SettingError("-p has no effect beside --fields, which asks for the fields; leave it out")
    if options.fields and options.system:
        raise SettingError("--system has no effect beside --fields, which has its own; leave it out")
    if not options.fields and not all((question or "").strip() for question in questions):
        what = "missing" if all(question is None for question in questions) else "empty"
        raise SettingError(f'the question is {what}: -p "{example}"; or --fields FILE.yaml')
    if options.choices and any(getattr(options, name) for name in _GENERATION):
        raise SettingError("generation settings have no effect beside --choices, which generates nothing")


def asking_of(options: argparse.Namespace, question: str, bundle: Bundle) -> Asking:
    """What is asked, judged before the model is loaded.

    Raises:
        SettingError: fields, choices or a schema that are none.
    """
    from lfm_serve.asking import Asking, with_fields

    if options.fields:
        return replace(with_fields(bundle, options.fields), generation=_generation(options))
    schema = read_schema(options.schema) if options.schema else None
    if schema is not None:
        from lfm_runtime.decode.guide import Grammars

        try:
            Grammars(bundle.prompts.tokenizer, bundle.eos).of_schema(schema)
        except SettingError as e:
            raise SettingError(f"--schema {options.schema}: {e}") from e
    return Asking(question, options.system, schema, tuple(options.choices or ()), generation=_generation(options))


def _generation(options: argparse.Namespace) -> dict[str, Any]:
    """The generation settings that were given."""
    given = {name: getattr(options, name) for name in _GENERATION if getattr(options, name) is not None}
    return {} if options.choices else given
