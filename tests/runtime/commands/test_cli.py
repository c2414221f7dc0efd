"""The command line itself: help, words that are wrong, files that are no bundle."""

from __future__ import annotations

import pytest
from lfm_runtime.commands.cli import main


def test_help_says_what_each_command_does(capsys) -> None:
    from importlib.metadata import entry_points

    from lfm_runtime import __version__

    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for point in entry_points(group="lfm_edge.commands"):
        line = next(line for line in said.splitlines() if line.startswith(f"  {point.name} "))
        assert len(line.split()) > 4, line
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"lfm-edge {__version__}\n"


def test_misspelt_options(capsys) -> None:
    """The error is one line, with the option that was meant."""
    with pytest.raises(SystemExit) as e:
        main(["run", "bundle", "-p", "hi", "--max-imge-tokens", "64"])
    assert e.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("did you mean --max-image-tokens? for help: lfm-edge run --help")


@pytest.mark.parametrize(
    ("name", "said"),
    [("cam.tar", "unpack it first: lfm-edge unpack"), ("photo.png", "is a file; give the bundle folder first")],
)
def test_files_that_are_no_bundle(tmp_path, capsys, name, said) -> None:
    (tmp_path / name).touch()
    assert main(["run", str(tmp_path / name), "-p", "?"]) == 2
    assert said in capsys.readouterr().err
