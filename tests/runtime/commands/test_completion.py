"""The completion script in a real bash, and the help that a terminal shows."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from lfm_runtime.commands.cli import main

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


def test_help_is_in_groups(capsys) -> None:
    """Every command once, those that a device needs apart from those of a PC."""
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert said.index("make, on a PC:") < said.index("  export") < said.index("\nrun:") < said.index("\nmeasure:")
    assert "others:\n  completion" in said
