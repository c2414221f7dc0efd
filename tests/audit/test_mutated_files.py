"""Every JSON and TOML that we read, with one value dropped or exchanged: an answer or one line, never a traceback, and
no exit code that means something else. LONG=1: many more.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edits import sealed
from lfm_audit.report.source import read_tuning
from lfm_audit.tune.result import Key, PointResult, TuningResult
from lfm_profiles import ProfileError, read
from lfm_runtime import EdgeError, Model
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.formats.manifest import Manifest, file_hash
from lfm_runtime.formats.typed import as_json

pytestmark = [pytest.mark.process, pytest.mark.newest_python]
ROOT = Path(__file__).resolve().parents[2]
EXCHANGED = (None, True, 0, -1, 10**9, 1.5, "", "x", [], {}, [None], {"x": 1})
GONE = object()
SAMPLE = 2000 if os.environ.get("LONG") else 16
DEEP = 4
"""Of values in a list, so many are tried: the others are as these."""


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The paths to all values in JSON, the whole included."""
    if at:
        yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*at, key))
    elif isinstance(value, list):
        for n, inner in enumerate(value[:DEEP]):
            yield from places(inner, (*at, n))


def mutations(value: Any, seed: str) -> Iterator[tuple[tuple, Any, Any]]:
    """(path, what it became, the whole) with one value dropped or exchanged."""
    cases = [(at, new) for at in places(value) for new in (GONE, *EXCHANGED)]
    if len(cases) > SAMPLE:
        cases = random.Random(seed).sample(cases, SAMPLE)
    for at, new in cases:
        whole = copy.deepcopy(value)
        place = whole
        for key in at[:-1]:
            place = place[key]
        if new is GONE:
            del place[at[-1]]
        else:
            place[at[-1]] = new
        yield at, "gone" if new is GONE else new, whole


def survives(case: object, codes: set[int], *words: object) -> int:
    """Run a command in this process: only these exit codes, no exception, no warning of Python's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            code = main(list(map(str, words)))
        except Exception as e:
            raise AssertionError(f"{case}: {type(e).__name__}: {e}") from e
    assert code in codes, (case, code)
    return code


@pytest.fixture
def audit(made) -> Any:
    return {key: value for key, value in json.loads(made.read_text()).items() if key != "sha256"}


def test_audits(made, audit, tmp_path, capsys) -> None:
    path = tmp_path / "a.json"
    capsys.readouterr()
    assert main(["compare", str(made), str(made)]) == 0
    for at, new, whole in mutations(audit, "audit"):
        path.write_text(sealed(whole))
        survives((at, new), {0, 2, 3}, "compare", path, made)
        survives((at, new), {0, 2}, "report", path, "-o", tmp_path / "a.md")


def test_pages_of_audits(made, audit, tmp_path) -> None:
    """The page draws, which takes a second: only of mutations that are read, and fewer."""
    pytest.importorskip("matplotlib")
    path, drawn = tmp_path / "a.json", 0
    for at, new, whole in mutations(audit, "page"):
        path.write_text(sealed(whole))
        if survives((at, new), {0, 2}, "report", path, "-o", tmp_path / "a.md") == 0:
            survives((at, new), {0, 2}, "report", path, "-o", tmp_path / "a.html")
            drawn += 1
            if drawn == max(4, SAMPLE // 20):
                break
    assert drawn


def tuning() -> TuningResult:
    settings = [
        {"variant": variant, "prefill": "none", "threads": 2, "low_memory": False, "arena": True, "tiles": 1}
        for variant in ("int4", "fp32")
    ]
    points = [
        PointResult(s, {"0": 9.0 + n, "1": 9.5}, {"0": 5.0, "1": 5.0}, 100.0 + n, 50.0, {"0": 1.0}, 0.01, None)
        for n, s in enumerate(settings)
    ]
    found = TuningResult(
        "lfm-edge tune",
        "1",
        Key(("x",), "1.24.0", "aarch64", ("asimddp",), ("/x.png",), "?"),
        "latency",
        0.1,
        2,
        "fp32",
        "generic",
        tuple(settings),
        settings[0],
        tuple(points),
    )
    return replace(found, bundle="b", machine="m", created_unix_s=1.7e9, why="best")


def test_tunings(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    path, drawn = tmp_path / "t.json", 0
    for at, new, whole in mutations(as_json(tuning()), "tuning"):
        path.write_text(sealed(whole))
        code = survives((at, new), {0, 2}, "report", path, "-o", tmp_path / "t.md")
        if code == 0 and drawn < max(4, SAMPLE // 20):
            survives((at, new), {0}, "report", path, "-o", tmp_path / "t.html")
            drawn += 1
        assert (
            (read_tuning(path) is not None) == (code == 0) or whole.get("tool") != "lfm-edge tune"
            if code == 0
            else True
        )


def asked(bundle: Path) -> tuple[object, ...]:
    return ("run", bundle, "-p", "What?", "--max-new-tokens", 1, "--threads", 1, "--quiet", "--json")


def each(path: Path, seed: str, kept: Callable[[], None] = lambda: None) -> Iterator[tuple[object, Any]]:
    """Write every mutation of a file; `kept` is called after each."""
    text = path.read_text()
    try:
        for at, new, whole in mutations(json.loads(text), seed):
            path.write_text(json.dumps(whole))
            kept()
            yield (path.name, at, new), whole
    finally:
        path.write_text(text)


def test_manifests(bundle_copy, photo) -> None:
    for case, _ in each(bundle_copy / "manifest.json", "manifest"):
        survives(case, {0, 2}, *asked(bundle_copy))
        survives(case, {0, 1, 2}, "verify", bundle_copy)
        survives(case, {0, 2}, "plan", bundle_copy, photo, "--json")
        survives(case, {0, 1, 2}, "doctor", bundle_copy, "--json")


def test_golden_values(bundle_copy) -> None:
    """What selftest compares with."""
    from lfm_runtime.golden import compare, golden_of

    path = bundle_copy / "manifest.json"
    raw = json.loads(path.read_text())
    model = Model.load(bundle_copy, threads=1)
    for at, new, whole in mutations(raw["golden"], "golden"):
        path.write_text(json.dumps({**raw, "golden": whole}))
        try:
            if (golden := golden_of(Bundle.open(bundle_copy), "fp32")) is not None:
                compare(model, golden)
        except EdgeError as e:
            assert len(str(e).splitlines()) == 1, (at, new)
        except Exception as e:
            raise AssertionError(f"{at} {new}: {type(e).__name__}: {e}") from e


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "generation_config.json"])
def test_files_of_a_hub_folder(bundle_copy, photo, name) -> None:
    """Without a manifest nothing has a hash: every value arrives."""
    (bundle_copy / "manifest.json").unlink()
    (bundle_copy / "prompt.json").unlink(missing_ok=True)
    question = asked(bundle_copy)
    assert main([*map(str, question), str(photo)]) == 0
    for case, _ in each(bundle_copy / name, name):
        survives(case, {0, 2}, *question, photo)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers_of_a_hub_folder(bundle_copy, name) -> None:
    (bundle_copy / "manifest.json").unlink()
    (bundle_copy / "prompt.json").unlink(missing_ok=True)
    for case, _ in each(bundle_copy / name, name):
        survives(case, {0, 2}, *asked(bundle_copy))


@pytest.mark.parametrize("name", ["prompt.json", "config.json", "preprocessor_config.json", "generation_config.json"])
def test_files_that_the_manifest_vouches_for(bundle_copy, photo, name) -> None:
    """Whoever writes a file can write its hash as well."""

    def signed() -> None:
        manifest = Manifest.of(bundle_copy)
        size, digest = (bundle_copy / name).stat().st_size, file_hash(bundle_copy / name)
        files = {**manifest.files, name: replace(manifest.files[name], bytes=size, sha256=digest)}
        replace(manifest, files=files).write(bundle_copy)

    for case, _ in each(bundle_copy / name, f"signed {name}", signed):
        survives(case, {0, 2}, *asked(bundle_copy), photo)


def test_profiles(tmp_path) -> None:
    profile = {
        "description": "x",
        "extends": "pi5",
        "threads": 2,
        "affinity": [0, 1],
        "variant": ["int4", "int8"],
        "max_image_tokens": 128,
        "low_memory": True,
        "budget": {"ttft_ms": 2000, "peak_rss_mib": 900},
        "match": {"board": ["raspberrypi,5"], "max_ram_mib": 9000},
    }
    path = tmp_path / "mine.toml"
    assert read(str(write_toml(path, profile))).threads == 2
    for at, new, whole in mutations(profile, "profile"):
        if new is None or (isinstance(new, list) and None in new):
            continue  # TOML has no null
        survives((at, new), {0, 2}, "profile", "validate", write_toml(path, whole))
        try:
            read(str(path))
        except ProfileError as e:
            assert str(path) in str(e), (at, new, e)
            assert "\n" not in str(e)


def write_toml(path: Path, values: dict[str, Any]) -> Path:
    """Inner tables in braces: every JSON value but null is TOML after that."""

    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {shown(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(shown, value)) + "]"
        return json.dumps(value)

    path.write_text("".join(f"{key} = {shown(value)}\n" for key, value in values.items() if value is not None))
    return path


def test_what_prepare_and_audit_keep(bundle_copy, made) -> None:
    """The record beside prepared graphs, and the figures kept for plans."""
    assert main(["prepare", str(bundle_copy), "--variant", "fp32"]) == 0
    kept = bundle_copy.with_name(f"{bundle_copy.name}.prepared")
    files = sorted(kept.rglob("*.json"))
    assert files
    for path in files:
        for case, _ in each(path, path.name):
            survives(case, {0, 2}, *asked(bundle_copy))
            survives(case, {0, 2}, "plan", bundle_copy, "--json")
    shutil.rmtree(kept)
