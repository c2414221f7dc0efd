"""What can go wrong, said so that the person at the keyboard can act on it. Commands print these in one line."""

from __future__ import annotations


class EdgeError(Exception):
    """A problem we can explain: what, where, and what to do next. No traceback."""

    exit_code = 2


class BundleError(EdgeError, ValueError):
    """The bundle folder is incomplete, damaged, or made for another version."""


class GraphContractError(EdgeError, ValueError):
    """A graph lacks an input or output the runtime binds, or has one it does not know."""


class ImageError(EdgeError, ValueError):
    """The image cannot be opened, is empty, or is larger than the limit."""


class PromptError(EdgeError, ValueError):
    """The tokenizer, the chat template or the conversation cannot be expressed, or does not fit the context."""


class SettingError(EdgeError, ValueError):
    """A setting has an impossible value, or could have no effect."""
