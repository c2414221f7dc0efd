"""The completion script in a real bash, and the help that a terminal shows."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from lfm_runtime.commands.cli import every_command, main
from lfm_runtime.commands.completion import EXIT_CODES

pytest.importorskip("shtab")


@pytest.mark.process
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["lfm-edge", "qua"], ["quantize", "quality"]),
        (["lfm-edge", "run", "--max-im"], ["--max-image-tokens"]),
        (["lfm-edge", "quantize", "here", "--meth"], ["--method"]),
        (["lfm-edge", "run", "here", "--variant", "int4-"], ["int4-kv8", "int4-fp16"]),
        (["lfm-edge", "verify", "some"], ["somewhere"]),
    ],
)
def test_bash_completes(words, wanted, tmp_path, capsys) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    (tmp_path / "somewhere").mkdir()
    typed = " ".join(f"'{word}'" for word in words)
    script = f"""source ./completion
COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; cur='{words[-1]}'
function=$(complete -p lfm-edge | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function lfm-edge '{words[-1]}' '{words[-2]}'; printf '%s\\n' "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert sorted(done.stdout.split()) == sorted(wanted), done.stderr


def test_the_manual_page_names_every_command_flag_and_exit_code(capsys) -> None:
    """As groff sets it; the exit codes are those of the table for people."""
    pytest.importorskip("argparse_manpage")
    assert main(["completion", "man"]) == 0
    page = capsys.readouterr().out
    if shutil.which("groff"):
        done = subprocess.run(
            ["groff", "-man", "-Tascii", "-P-cbou"], input=page, capture_output=True, text=True, check=True
        )
        assert "EXIT STATUS" in done.stdout
        assert "--max-size MB" in done.stdout
    said = page.replace("\\-", "-")
    parser = every_command()
    for name, inner in parser._subparsers._group_actions[0].choices.items():
        assert f"lfm-edge {name}" in said
        for action in inner._actions:
            missing = [f for f in action.option_strings if f.startswith("--") and f != "--help" and f not in said]
            assert not missing, name
    table = (Path(__file__).parents[3] / "docs" / "troubleshooting.md").read_text()
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in table.replace("`", "")


def test_help_shows_defaults_once(capsys) -> None:
    """Of flags that have one; a text that names it already is left alone."""
    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "tokens of every answer (default 32)" in said
    assert "(default: three generated images) --" in said
    assert "(default None)" not in said
    assert "(default False)" not in said


def test_help_is_in_groups(capsys) -> None:
    """Every command once, those that a device needs apart from those of a PC."""
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert said.index("make, on a PC:") < said.index("  export") < said.index("\nrun:") < said.index("\nmeasure:")
    assert "others:\n  completion" in said
