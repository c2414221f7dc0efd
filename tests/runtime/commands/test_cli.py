"""The command line itself: help, words that are wrong, files that are no bundle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

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


def test_options_before_the_command(capsys) -> None:
    with pytest.raises(SystemExit) as e:
        main(["--variant", "int4", "run", "bundle", "-p", "hi"])
    assert e.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--variant stands before the command; options come after it: lfm-edge run … --variant" in line
    with pytest.raises(SystemExit) as e:
        main(["--help", "run"])
    assert e.value.code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["run", "bundle", "--max-imge-tokens", "64"],
            "; did you mean --max-image-tokens? for help: lfm-edge run --help",
        ),
        (["quantise", "bundle"], "; did you mean quantize? for help: lfm-edge --help"),
        (["run", "bundle", "--variant", "int44"], "; did you mean int4? for help: lfm-edge run --help"),
        (["llama", "bundle"], "); for help: lfm-edge --help"),
    ],
)
def test_misspelt_words(words, says, capsys) -> None:
    """The error is one line, with the command, option or value that was meant."""
    with pytest.raises(SystemExit) as e:
        main(words)
    assert e.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(says)


@pytest.mark.parametrize(
    ("name", "said"),
    [("cam.tar", "unpack it first: lfm-edge unpack"), ("photo.png", "is a file; give the bundle folder first")],
)
def test_files_that_are_no_bundle(tmp_path, capsys, name, said) -> None:
    (tmp_path / name).touch()
    assert main(["run", str(tmp_path / name), "-p", "?"]) == 2
    assert said in capsys.readouterr().err


def test_every_profile_that_is_named_is_validated(tmp_path, capsys) -> None:
    """A first one that is wrong does not hide the others."""
    for name, text in (("a", "treads = 2\n"), ("b", "threads = 2\n"), ("c", 'threads = "x"\n')):
        (tmp_path / f"{name}.toml").write_text(text)
    assert main(["profile", "validate", *(str(tmp_path / f"{name}.toml") for name in "abc")]) == 2
    out, err = capsys.readouterr()
    assert "did you mean threads?" in out
    assert "b.toml: sets threads" in out
    assert "c.toml, line 1: threads = 'x' is impossible" in out
    assert "2 of 3 files cannot be used" in err
    assert main(["profile"]) == 2
    assert "say what to show: lfm-edge profile list, show" in capsys.readouterr().err


def test_what_names_no_bundle(tmp_path, monkeypatch, capsys, demo_bundle, photo) -> None:
    """A hub id, a stick, a bundle whose names a FAT mount shows in capitals, an empty question."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stick").mkdir()
    (tmp_path / "stick" / "stick.conf").write_text("name=cam\n")
    (tmp_path / "caps").mkdir()
    (tmp_path / "caps" / "MANIFEST.JSON").write_text("{}")
    for words, said in (
        (["run", "LiquidAI/LFM2-VL-450M", "-p", "x"], "LiquidAI/LFM2-VL-450M is "),
        (["verify", "stick"], "is a stick, not a bundle; its install.sh checks it"),
        (["run", "caps", "-p", "x"], "has names in capitals"),
        (["verify", "caps"], "has names in capitals"),
        (["run", str(demo_bundle), "-p", " "], "the question is empty"),
        (
            ["run", str(demo_bundle), "-p", "x", "--max-new-tokens", "100000000"],
            "max_new_tokens 100000000 is impossible",
        ),
        *(
            (
                ["run", str(demo_bundle), str(photo), "-p", "x", f"--max-megapixels={n}"],
                f"max_megapixels {n} is impossible",
            )
            for n in ("nan", "-1", "0")
        ),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["watch", "b", "s", "--every", "-2s"],
            "expected one argument; a value that begins with a dash is written --every=-2s",
        ),
        (["watch", "b", "s", "--every"], "expected one argument; for help"),
        (["watch", "b", "s", "--every", "--quiet"], "expected one argument; for help"),
        (["watch", "b", "s", "--every", ""], "argument --every: its value is empty; give one, or leave the option out"),
        (["run", "b", "--profile=", "-p", "x"], "argument --profile: its value is empty"),
        (["quantize", "b", "--variant", "int4", "--scheduler", ""], "argument --scheduler: its value is empty"),
        (["export", "c", "-o", ""], "argument -o: its value is empty"),
    ],
)
def test_values_that_look_like_none(words, said, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_permissions_that_lack_where_no_reader_says_so(monkeypatch, capsys) -> None:
    from lfm_runtime.commands import profile

    def fails(_: object) -> int:
        raise PermissionError(13, "Permission denied", "place")

    monkeypatch.setattr(profile, "run", fails)
    assert main(["profile", "list"]) == 2
    assert capsys.readouterr().err == "lfm-edge: place: Permission denied; change its permissions\n"


@pytest.mark.process
def test_ctrl_c_waits_for_a_module_that_loads(tmp_path) -> None:
    """Libraries make errors of their own of it: numpy "import numpy failed", onnxruntime "initialization failed"."""
    (tmp_path / "library.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    loaded = True\n"
        "except KeyboardInterrupt:\n    raise ImportError('initialization failed') from None\n"
    )
    program = (
        "import signal, time\nfrom lfm_runtime.commands import _interrupt\nsignal.signal(signal.SIGINT, _interrupt)\n"
        "import library\nprint('loaded', flush=True)\ntime.sleep(100)\n"
    )
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.stderr.rstrip().endswith("KeyboardInterrupt") and "ImportError" not in done.stderr
    assert done.returncode == -signal.SIGINT
