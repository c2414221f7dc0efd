"""What messages tell people to type works whatever their paths are."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lfm_runtime.errors import BundleError, command
from lfm_runtime.setup.resolve import resolve
from test_sizes import CODE, ROOT

_TYPED = re.compile(
    r"(?:lfm-edge (?!reads|exports|runs)[a-z]+(?: [^ ;,\n]+)*|python3? -m [^;,\n]*|\bsh|ssh-keygen [^;,\n]*) \0"
)
"""A command with a path that was put into it as it is."""
_NAMES = "profile show", "quantize BUNDLE"  # what follows is no path of the user's


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), max_size=4))
def test_a_shell_reads_the_words_of_a_command(words) -> None:
    assert shlex.split(command("quantize", *words)) == ["lfm-edge", "quantize", *words]


def test_no_message_puts_a_path_into_a_command_as_it_is() -> None:
    found = [f"{path.relative_to(ROOT)}, line {line}: {typed!r}" for path in CODE for line, typed in _as_it_is(path)]
    assert CODE and not found


def _as_it_is(path: Path) -> Iterator[tuple[int, str]]:
    """(line, command) of every message of a file that does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "word" if _is_quoted(v) else "\0" for v in node.values]
            typed = _TYPED.search("".join(parts))
            if typed and not any(name in typed[0] for name in _NAMES):
                yield node.lineno, typed[0]


def _is_quoted(value: ast.expr) -> bool:
    """Whether a shell reads it as it was meant."""
    call = value.value if isinstance(value, ast.FormattedValue) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func) in ("shlex.quote", "shlex.join", "command")


def test_a_folder_with_a_space(demo_bundle, tmp_path) -> None:
    named = tmp_path / "my bundle"
    named.symlink_to(demo_bundle)
    with pytest.raises(BundleError) as e:
        resolve(named, variant="int4-kv8")
    typed = str(e.value).partition("make it: ")[2]
    assert shlex.split(typed) == ["lfm-edge", "quantize", str(named), "--variant", "int4-kv8"]
