"""What messages tell people to type works whatever their paths are."""

from __future__ import annotations

import ast
import re
import shlex

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


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_message_puts_a_path_into_a_command_as_it_is(path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            quoted = [_is_quoted(v) for v in node.values]
            parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
            text = "".join("word" if q else part for q, part in zip(quoted, parts, strict=True))
            found = _TYPED.search(text)
            assert not found or any(name in found[0] for name in _NAMES), f"line {node.lineno}: {found[0]!r}"


def _is_quoted(value: ast.expr) -> bool:
    """Whether a shell reads it as it was meant."""
    call = value.value if isinstance(value, ast.FormattedValue) else None
    name = getattr(call, "func", None)
    return getattr(name, "attr", getattr(name, "id", "")) in ("quote", "join", "command", "word")


def test_a_folder_with_a_space(demo_bundle, tmp_path) -> None:
    named = tmp_path / "my bundle"
    named.symlink_to(demo_bundle)
    with pytest.raises(BundleError) as e:
        resolve(named, variant="int4-kv8")
    typed = str(e.value).partition("make it: ")[2]
    assert shlex.split(typed) == ["lfm-edge", "quantize", str(named), "--variant", "int4-kv8"]
