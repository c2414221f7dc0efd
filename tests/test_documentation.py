"""Every command and every Python block of README, the folders' READMEs and docs, as somebody would run it who has the
files that the texts name. What needs a network, a board, a GPU or hours is listed with the reason, and still parsed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from lfm_runtime.commands.cli import main
from lfm_runtime.commands.parser import Parser

pytestmark = [pytest.mark.process, pytest.mark.newest_python]
ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*/README.md"))]
BOARD = ("jetson.md", "raspberry-pi.md")
SHORTER = {"audit": ["--new-tokens", "2", "--force"], "tune": ["--minutes", "0.02", "--force"], "report": ["--force"]}
"""Added, so that a test does not take minutes, and may run the same line again."""
CODES = {"audit": {0, 3}, "compare": {0, 1, 3}, "doctor": {0, 1}, "selftest": {0, 3}}
NOT_RUN = (
    (r"lfm-edge (make|stick|wheelhouse)", "fetches wheels; tests/package"),
    (r"lfm-edge export .*--portable|--static", "minutes; tests/export/test_portable.py, test_static.py"),
    (r"lfm-edge .*/tmp/", "a 450M; docs/performance.md says how long"),
    (r"lfm-edge --version", "not a command"),
    (r"lfm-edge serve", "does not end; tests/serve, and the Python block of docs/serve.md"),
    (r"lfm-edge caption .*--watch", "does not end; tests/serve/test_captions.py"),
    (r"lfm-edge .*--scheduler", "needs a cluster; tests/fleet"),
    (r"lfm-edge watch .*(rtsp://|exec:)", "needs a camera; tests/serve/test_watch.py"),
    (r"lfm-edge completion .*>", "writes into a shell; tests/runtime/commands/test_completion.py"),
    (r"lfm-edge quantize bundle --variant fp16 --calibration", "for a GPU; tests/quantize/test_gpu_variants.py"),
)
NAMES = {
    "BUNDLE": "bundle",
    "CHECKPOINT": "checkpoint",
    "IMAGE…": "photo.jpg",
    "STATIC": "static",
    "QUESTION": "What?",
    "LORA_DIR": "lora",
    "LiquidAI/LFM2-VL-450M": "checkpoint",  # tests/export/test_hub.py
    "N": "2",
}


def commands(page: Path) -> Iterator[str]:
    """The `lfm-edge …` lines of a page's indented blocks, without prompt and comment; two of one line apart."""
    for line in page.read_text().splitlines():
        found = re.match(r"    (?:\$ )?((?:\S*bin/)?lfm-edge .*)", line)
        if found and not re.match(r"\S*lfm-edge {2}", found[1]):
            words = re.split(r"\s+#\s", found[1])[0]
            for command in re.split(r"\s*(?:&&|;)\s+", words):
                yield re.sub(r"^\S*bin/lfm-edge", "lfm-edge", command.strip())


def with_names(command: str) -> str:
    for name, here in NAMES.items():
        command = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", here, command)
    return command.replace("current/bundle", "bundle")


ALL = [(page, command) for page in PAGES for command in commands(page)]


def test_there_are_commands() -> None:
    assert len(ALL) > 60
    assert {page.name for page, _ in ALL} >= {"README.md", "quickstart.md", "raspberry-pi.md", "jetson.md", "gpu.md"}


@pytest.mark.parametrize(("page", "command"), ALL, ids=lambda value: value if isinstance(value, str) else value.name)
def test_it_parses(page, command) -> None:
    """Flags in brackets as well; of alternatives the first."""
    command = command.partition(" > ")[0]
    full = re.sub(r"\[([^\]|]*?)(\|[^\]]*)?\]", r"\1", with_names(command)).replace("…", "")
    name, *words = shlex.split(full)[1:]
    points = {point.name: point for point in entry_points(group="lfm_edge.commands")}
    if name.startswith("-"):
        return
    parser = Parser(prog=name)
    importlib.import_module(points[name].value).add_arguments(parser)
    if "|" not in words:  # "profile list | show"
        parser.parse_intermixed_args(parser.looked_at(words))


def run_short(words: list[str]) -> int:
    """The exit code of a command made shorter; an audit gets more time where a busy machine needs it."""
    words = [*words, *SHORTER.get(words[0], [])]
    if words[0] == "plan":  # what this process holds by now counts, and a board's budget is small
        done = subprocess.run(
            [sys.executable, "-m", "lfm_runtime", *words], capture_output=True, text=True, check=False
        )
        print(done.stderr, file=sys.stderr)
        return done.returncode
    if words[0] != "audit":
        return main(words)
    codes = (main([*words, "--budget", budget]) for budget in ("4s", "15s", "60s", "10m"))
    return next((code for code in codes if code != 2), 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory, demo_bundle) -> Path:
    """A folder with all that the texts name."""
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(demo_bundle, folder / "bundle")
    for variant in ("int4", "int8"):
        assert main(["quantize", str(folder / "bundle"), "--variant", variant, "--quiet"]) == 0
    for name in ("scripts", "device_tests", "docs", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "demo").mkdir()
    for path in (ROOT / "demo").iterdir():
        if path.name not in ("bundle", "bundle.prepared", "calibration"):
            (folder / "demo" / path.name).symlink_to(path)
    (folder / "demo" / "calibration" / "images").mkdir(parents=True)  # of 130, twelve
    for path in sorted((ROOT / "demo" / "calibration" / "images").iterdir())[:12]:
        (folder / "demo" / "calibration" / "images" / path.name).symlink_to(path)
    (folder / "demo" / "bundle").symlink_to(folder / "bundle")
    (folder / "checkpoint").symlink_to(ROOT / "demo" / "checkpoint")
    for name in ("photos", "other-photos"):
        (folder / name).mkdir()
        for n in range(3):
            shutil.copy(ROOT / "demo" / "eval" / "images" / f"{n:04d}.png", folder / name)
    shutil.copy(ROOT / "demo" / "photos" / "coffee.jpg", folder / "photo.jpg")
    audit = str(folder / "audit.json")
    assert run_short(["audit", str(folder / "bundle"), "--variants", "fp32", "-o", audit]) in (0, 3)
    for name in ("last-week", "before", "after", "pi4", "pi5"):
        shutil.copy(audit, folder / f"{name}.json")
    words = [str(folder / "bundle"), str(folder / "photo.jpg"), "-o", str(folder / "tuned.toml")]
    assert run_short(["tune", *words]) == 0
    (folder / "fields.yaml").write_text("shape: the shape\ncolour: its colour\n")
    (folder / "my-board.toml").write_text('extends = "generic"\nthreads = 1\n')
    assert main(["pack", str(folder / "bundle"), "--variant", "int4", "-o", str(folder / "cam.tar")]) == 0
    return folder


_DONE: set[tuple[str, ...]] = set()
RUN = [(page, command) for page, command in ALL if not any(re.search(what, command) for what, _ in NOT_RUN)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_it_runs(page, place, monkeypatch, capsys) -> None:
    """From top to bottom, as it stands, without what is in brackets."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: PTH123, SIM115
    for of, command in RUN:
        if of != page or "|" in command:
            continue
        words = shlex.split(
            re.sub(r"\[[^\]]*\]", "", with_names(command)).replace("…", "What is it?" if '"…"' in command else "")
        )[1:]
        if words[0] == "tune":  # of the bundle as it was before the page's own quantize
            output = words[words.index("-o") + 1] if "-o" in words else "tuned.toml"
            (place / output).with_suffix(".json").unlink(missing_ok=True)
        if words[0] == "quantize" and "--calibration" in words:  # another page made it with other photos
            words.append("--force")
        words = [os.path.expanduser(word) for word in words]  # noqa: PTH111
        if words[:2] == ["report", "tuned.json"] and not Path("tuned.json").exists():
            Path("my-board.json").rename("tuned.json")
        if tuple(words) in _DONE:  # another page has the same line
            continue
        _DONE.add(tuple(words))
        code = run_short(words)
        said = capsys.readouterr().err
        allowed = {0, 3} if "--fields" in words else CODES.get(words[0], {0})  # the demo's JSON may not end
        assert code in allowed, f"{command}: {code}: {said[-500:]}"


BLOCKS = [
    pytest.param(page, block, id=f"{page.relative_to(ROOT)}-{n}")
    for page in PAGES
    for n, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_python_blocks_run(page, block, place) -> None:
    """Blocks of one page go on from each other: `model` of an earlier one is there."""
    before = "from lfm_runtime import Chat, Model, Message, Conversation\n"
    if not re.search(r"^model = ", block, re.MULTILINE):
        before += "model = Model.load('bundle', threads=1)\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(place)}
    with served(place, environment) if SERVER in block else nullcontext(SERVER) as server:
        code = before + block.replace("/var/cache", str(place)).replace(SERVER, server)
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SERVER = "http://pi.local:8080"


@contextmanager
def served(place: Path, environment: dict[str, str]) -> Iterator[str]:
    """A server of the bundle; its address."""
    pytest.importorskip("openai")
    words = [sys.executable, "-m", "lfm_runtime", "serve", "bundle", "--port", "0", "--threads", "1"]
    process = subprocess.Popen(words, cwd=place, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        said = next(line for line in process.stderr if "serving at" in line)
        yield said.split("serving at ")[1].strip().removesuffix("/v1")
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_device_tests_run(place) -> None:
    line = next(
        line for line in (ROOT / "device_tests" / "README.md").read_text().splitlines() if "pytest device_tests" in line
    )
    words = shlex.split(re.split(r"\s+#\s", line.strip())[0].split("&&")[-1].replace("BUNDLE", "bundle"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *words[1:], "-p", "no:cacheprovider"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-800:]
    assert json.loads((place / "audit.json").read_text())["tool"]["name"] == "lfm-edge audit"
