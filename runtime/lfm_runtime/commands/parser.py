"""How the command line is read: errors in one line, with what was meant; defaults in the help."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any, NoReturn

_EXIT_ERROR = 2
_MAY_BE_EMPTY = ("-p", "--prompt", "--system")
"""Options whose values are texts for the model; of others an empty value is a variable of the shell that is not set."""


class Help(argparse.HelpFormatter):
    """Help that ends with the default where there is one and the text does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, "", False, argparse.SUPPRESS) and action.default != []
        if not action.help or not action.option_strings or not shown or "default" in action.help:
            return action.help
        return f"{action.help} (default %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the option that was meant."""

    _words: Sequence[str] = ()

    def _print_message(self, message: str, file: Any = None) -> None:
        """As argparse does, but that a full disk or a reader that went away is an error."""
        file = file or sys.stderr
        # What is wrong with the words is told by the exit code as well.
        with suppress(OSError) if file is sys.stderr else nullcontext():
            file.write(message or "")
            file.flush()

    def looked_at(self, words: list[str]) -> list[str]:
        """The words as argparse is to read them: `-- -x.jpg` names a file, and argparse, which lets options stand
        between positional words, would forget the dashes. An empty value is an error.
        """
        self._words = words
        self._refuse_empty(words)
        if "--" not in words:
            return words
        at = words.index("--")
        option = self._option_string_actions.get(words[at - 1]) if at else None
        if option is not None and option.nargs != 0:
            self.error(f"argument {words[at - 1]}: expected one argument")
        return words[:at] + [f"./{word}" if word.startswith("-") else word for word in words[at + 1 :]]

    def _refuse_empty(self, words: list[str]) -> None:
        """An option's empty value would be taken for none by one command, and for a folder by another."""
        for at, word in enumerate(words):
            if word == "--":
                return
            name, has_value, value = word.partition("=")
            option = self._option_string_actions.get(name)
            if option is None or option.nargs == 0 or name in _MAY_BE_EMPTY:
                continue
            if (has_value and not value) or (not has_value and words[at + 1 : at + 2] == [""]):
                self.error(f"argument {name}: its value is empty; give one, or leave the option out")

    def _of_a_negative(self, message: str) -> str:
        """How a value is given that looks like an option; "" where none was."""
        found = re.fullmatch(r"argument (?:-\w/)?(--[\w-]+): expected one argument", message)
        words = self._words
        at = words.index(found[1]) + 1 if found and found[1] in words else len(words)
        if found and at < len(words) and re.match(r"-[\d.]", words[at]):
            return f"a value that begins with a dash is written {found[1]}={words[at]}; "
        return ""

    def _unknown_option(self) -> str:
        """The first word that begins as an option does and is none, nor the beginning of one; "" without such."""
        options = self._words[: self._words.index("--")] if "--" in self._words else self._words
        names = [word.partition("=")[0] for word in options if re.match(r"--[\w-]+(=|$)", word)]
        known = list(self._option_string_actions)
        return next((name for name in names if not any(option.startswith(name) for option in known)), "")

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with code 2."""
        if message.startswith("the following arguments are required") and (odd := self._unknown_option()):
            message = f"unrecognized arguments: {odd}"  # which may be the one that is missing
        unknown = message.partition("unrecognized arguments: ")[2].partition(" ")[0].partition("=")[0]
        known = list(self._option_string_actions)
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            unknown, known = choice[1], re.findall(r"[^', ]+", choice[2])
        meant = difflib.get_close_matches(unknown, known, 1) if unknown else []
        hint = f"did you mean {meant[0]}? " if meant else self._of_a_negative(message)
        self.exit(_EXIT_ERROR, f"{self.prog}: {message}; {hint}for help: {self.prog} --help\n")
