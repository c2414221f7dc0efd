"""Profiles arrive: session options, threads, tiles and tokens, generation, as every shipped profile and flags say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime as ort
import pytest
from lfm_profiles import default_threads, physical_cores, read
from lfm_profiles.files import names
from lfm_runtime import Model, SettingError
from lfm_runtime.commands.cli import main
from lfm_runtime.engine.execution import Execution
from lfm_runtime.formats.manifest import Manifest, hashed
from lfm_runtime.images.layout import lay_out
from lfm_runtime.setup.profile import detected, find_profile
from lfm_runtime.setup.resolve import resolve
from PIL import Image

CUDA = [name for name in names() if "CUDAExecutionProvider" in read(name).providers]
QUESTION = "What is in this image?"


@pytest.fixture
def sessions(monkeypatch) -> list[dict]:
    """A list that gets the options of every session that is created."""
    created: list[dict] = []
    real = ort.InferenceSession

    def spy(path, options, providers, enable_fallback):
        def entry(key):
            try:
                return options.get_session_config_entry(f"session.intra_op{key}")
            except RuntimeError:  # nobody set it
                return None

        created.append(
            {
                "graph": Path(path).name,
                "threads": options.intra_op_num_threads,
                "arena": options.enable_cpu_mem_arena,
                "providers": providers,
                "spinning": entry(".allow_spinning"),
                "spin_us": entry(".spin_duration_us"),
                "affinity": entry("_thread_affinities"),
            }
        )
        return real(path, options, providers=providers, enable_fallback=enable_fallback)

    monkeypatch.setattr("lfm_runtime.engine.loader.ort.InferenceSession", spy)
    return created


@pytest.mark.parametrize(
    ("features", "wanted"),
    [
        (("avx2", "x86_64"), "1"),
        (("AMD64", "avx2"), "1"),
        (("x86_64", ""), "1"),
        (("avx2", "avx512_vnni", "x86_64"), None),
        (("avx2", "avx_vnni", "x86_64"), None),
        (("aarch64", "asimd"), None),
    ],
)
def test_exact_int8_products_only_where_they_would_overflow(monkeypatch, features, wanted) -> None:
    """Exact products are not requested elsewhere, where they would be slower."""

    monkeypatch.setattr("lfm_profiles.cpu.cpu_features", lambda: features)
    try:
        found = Execution(1).options().get_session_config_entry("session.x64quantprecision")
    except RuntimeError:  # nobody set it
        found = None
    assert found == wanted


def test_one_graph_at_a_time_without_an_arena(demo_bundle, photo) -> None:
    """low_memory gives the arena's memory back after prompts, and there may be none."""
    words = {"variant": "fp32", "threads": 1, "low_memory": True}
    said = [
        Model.load(demo_bundle, profile="generic", arena=arena, **words).answer([photo], QUESTION, temperature=0).text()
        for arena in (True, False)
    ]
    assert said[0] == said[1] != ""


@pytest.mark.parametrize("name", [name for name in names() if name not in CUDA])
def test_each_shipped_profile_is_honoured(name, demo_bundle, photo, sessions) -> None:
    """Models are loaded with force: tests keep more memory than a small board has."""
    profile = find_profile(name)
    model = Model.load(demo_bundle, profile=name, force=True)
    answer = model.answer([Image.open(photo).resize((900, 600))], QUESTION, temperature=0)
    answer.text()
    assert model.setup.profile.name == name
    assert len(sessions) == 3
    assert (
        sessions[0]["graph"].startswith("vision_encoder") or not profile.low_memory
    )  # one graph at a time, the encoder first
    for session in sessions:
        assert session["threads"] == (
            1 if session["graph"].startswith("embed") else profile.threads or default_threads()
        )
        assert session["arena"] is profile.arena
        assert [name for name, _ in session["providers"]] == list(profile.providers)
        assert (session["spinning"], session["affinity"]) == (None, None)  # no shipped profile changes them
    base = model.bundle.images
    assert model.setup.images.max_image_tokens == min(
        profile.max_image_tokens or base.max_image_tokens, base.max_image_tokens
    )
    assert model.setup.images.do_image_splitting == (profile.do_image_splitting is not False)
    plan = lay_out(900, 600, model.setup.images)
    assert answer.report.tiles == len(plan.views)
    assert answer.report.image_tokens == sum(view.tokens for view in plan.views)
    assert answer.report.tiles == 1 or model.setup.images.do_image_splitting
    assert answer.report.tiles <= model.setup.images.max_tiles + 1
    assert model.setup.generation.max_new_tokens == min(
        profile.max_new_tokens or 512, model.bundle.generation.max_new_tokens
    )
    assert answer.report.new_tokens <= model.setup.generation.max_new_tokens
    assert model.setup.context_length == min(profile.context or 1 << 30, model.bundle.context_length)


@pytest.mark.parametrize("name", CUDA)
def test_profile_for_hardware_that_is_not_there(name, demo_bundle, capsys) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has it")
    assert main(["run", str(demo_bundle), "-p", "x", "--profile", name]) == 2
    assert (
        f"profile {name} needs a GPU: there is no NVIDIA GPU with a driver; choose another profile"
        in capsys.readouterr().err
    )


EVERYTHING = """
variant = ["int4", "fp32"]
prefill = "int8"
threads = 1
spinning = {spinning}
arena = false
prepared = false
context = 300
min_image_tokens = 16
max_image_tokens = 32
do_image_splitting = true
max_tiles = 2
use_thumbnail = false
max_new_tokens = 3
speculate = 2
"""


@pytest.mark.parametrize(("spinning", "allowed", "us"), [("false", "0", None), ("200", "1", "200")])
def test_a_profile_of_ones_own(spinning, allowed, us, demo_bundle, photo, sessions, tmp_path) -> None:
    if us and [int(n) for n in ort.__version__.split(".")[:2]] < [1, 26]:
        pytest.skip("this onnxruntime cannot limit spinning")
    (tmp_path / "mine.toml").write_text(EVERYTHING.format(spinning=spinning))
    model = Model.load(demo_bundle, profile=tmp_path / "mine.toml")
    answer = model.answer([Image.open(photo).resize((900, 600))], QUESTION, temperature=0)
    answer.text()
    assert (model.setup.variant, model.sessions.prefill_path) == ("fp32", None)  # wishes the bundle cannot meet
    assert [(s["threads"], s["arena"]) for s in sessions if not s["graph"].startswith("embed")] == [(1, False)] * 2
    assert {(s["spinning"], s["spin_us"]) for s in sessions if not s["graph"].startswith("embed")} == {(allowed, us)}
    assert answer.report.tiles == 2
    assert answer.report.image_tokens <= 2 * 64  # a tile has its own size
    assert answer.report.new_tokens <= 3
    assert (model.setup.generation.speculate, model.setup.context_length) == (2, 300)
    small = model.answer([Image.new("RGB", (40, 40))], QUESTION)
    assert small.report.tiles == 1
    assert 16 <= small.report.image_tokens <= 32
    with pytest.raises(SettingError, match="prefill"):
        Model.load(demo_bundle, profile=tmp_path / "mine.toml", low_memory=True, prefill="int8")


def test_flags_environment_and_file_in_order(demo_bundle, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "file.toml").write_text("threads = 3\nmax_new_tokens = 2\n")
    (tmp_path / "environment.toml").write_text("threads = 2\n")
    monkeypatch.setenv("LFM_EDGE_PROFILE", str(tmp_path / "environment.toml"))
    assert find_profile().threads == 2
    assert find_profile(tmp_path / "file.toml").threads == 3
    assert find_profile(tmp_path / "file.toml", threads=1).threads == 1
    assert find_profile("auto").threads is None
    assert main(["run", str(demo_bundle), "-p", "x", "--json", "--profile", str(tmp_path / "file.toml")]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] <= 2
    monkeypatch.setenv("LFM_EDGE_PROFILE", "nonsense")
    assert main(["run", str(demo_bundle), "-p", "x"]) == 2
    assert "LFM_EDGE_PROFILE: there is no profile 'nonsense'; shipped: auto" in capsys.readouterr().err


def test_a_profile_never_asks_for_more_than_the_checkpoint(bundle_copy, photo) -> None:
    """A fine-tune that turned splitting off, or was trained on small views, stays as it is; a flag holds."""
    path = bundle_copy / "preprocessor_config.json"
    raw = json.loads(path.read_text())
    raw.update(do_image_splitting=False, max_image_tokens=20, min_image_tokens=10)
    path.write_text(json.dumps(raw))
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    del manifest["files"]["preprocessor_config.json"]
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    found = Model.load(bundle_copy, profile="quality", threads=1).setup.images
    assert (found.do_image_splitting, found.max_image_tokens, found.min_image_tokens) == (False, 20, 10)
    asked = Model.load(
        bundle_copy, profile="quality", threads=1, do_image_splitting=True, max_image_tokens=64
    ).setup.images
    assert (asked.do_image_splitting, asked.max_image_tokens) == (True, 64)
    small = Model.load(bundle_copy, profile="pi4", threads=1, force=True, max_image_tokens=5).setup.images
    assert (small.max_image_tokens, small.min_image_tokens) == (5, 5)


def test_what_is_said_about_threads(demo_bundle, capsys, caplog) -> None:
    assert main(["run", str(demo_bundle), "-p", "x", "--threads", "64", "--max-new-tokens", "1"]) == 0
    assert "64 threads on" in caplog.text
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for words, says in [
        (["--threads", "0"], "threads 0 is impossible; allowed: 1 to 1024"),
        (["--affinity", "4000"], "affinity: this process may not use processor 4000; it may use"),
        (["--threads", "3", "--affinity", ",".join(map(str, usable[:1]))], "affinity has 1 processor for 3 threads"),
    ]:
        assert main(["run", str(demo_bundle), "-p", "x", *words]) == 2
        assert says in capsys.readouterr().err
    for wrong in ("0", "-1", "true", "1000001"):  # in the flag's own words, not a profile's
        with pytest.raises(SystemExit, match="2"):
            main(["run", str(demo_bundle), "-p", "x", f"--spinning={wrong}"])
        assert f"'{wrong}': write on, off, or microseconds, 1 to 1000000" in capsys.readouterr().err


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(physical_cores()) < 2, reason="needs two cores and Linux"
)
def test_threads_stay_on_their_processors(demo_bundle) -> None:
    """Asked of the system for every thread: one on each processor, the calling one on the first."""
    code = """if True:
        import os, sys
        from pathlib import Path
        from lfm_profiles import physical_cores
        from lfm_runtime import Model
        first, second = physical_cores()[:2]
        model = Model.load(sys.argv[1], threads=2, affinity=(second, first))
        before, meanwhile = os.sched_getaffinity(0), []
        inner = model._tokens
        def watched(*arguments):
            for token in inner(*arguments):
                meanwhile.append(os.sched_getaffinity(0))
                yield token
        model._tokens = watched
        for _ in model.answer([], "What?", max_new_tokens=2, ignore_eos=True):
            assert os.sched_getaffinity(0) == before, "between two pieces the thread is the caller's"
        assert meanwhile == [{second}] * 2, meanwhile
        assert os.sched_getaffinity(0) == before
        pinned = [os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()]
        assert {first} in pinned, pinned
    """
    subprocess.run(
        [sys.executable, "-c", code, str(demo_bundle)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_not_allowed_to_choose_processors(demo_bundle, monkeypatch, caplog) -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("Linux only")

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("lfm_runtime.engine.execution.os.sched_setaffinity", refuse)
    assert Model.load(demo_bundle, threads=1, affinity="cores").answer([], "x", max_new_tokens=1).text() is not None
    assert "Operation not permitted" in caplog.text


def test_show_tells_what_a_packed_bundle_would_run_with(bundle_copy, capsys, monkeypatch) -> None:
    """As `run` does: its own profile, unless a variable names another."""
    monkeypatch.delenv("LFM_EDGE_PROFILE", raising=False)
    (bundle_copy / "profile.toml").write_text('extends = "pi5"\nname = "mine"\n')
    manifest = Manifest.of(bundle_copy)
    manifest.with_files(hashed(bundle_copy, ["profile.toml"])).write(bundle_copy)
    for words, shown in (([], "mine"), (["pi4"], "pi4")):
        assert main(["profile", "show", *words, "--bundle", str(bundle_copy), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["name"] == shown
        setup = resolve(bundle_copy, *words, force=True)  # however much the tests before have taken
        assert setup.profile.name == shown


def test_show_tells_where_values_come_from(demo_bundle, capsys) -> None:
    assert main(["profile", "show", "pi4-1gb", "--bundle", str(demo_bundle), "--threads", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["threads"] == {"value": 3, "from": "flag"}
    assert found["settings"]["low_memory"] == {"value": True, "from": "pi4-1gb"}
    assert found["settings"]["do_image_splitting"] == {"value": False, "from": "pi4"}
    assert found["settings"]["min_tiles"] == {"value": 2, "from": "checkpoint"}
    assert found["settings"]["variant"]["from"] == "generic"
    assert found["settings"]["arena"]["from"] == "default"
    assert found["settings"]["max_new_tokens"] == {"value": 64, "from": "checkpoint"}
    assert found["settings"]["temperature"] == {"value": 0.0, "from": "checkpoint"}
    assert found["settings"]["top_p"] == {"value": 1.0, "from": "default"}
    assert found["budget"] == {"peak_rss_mib": 700}
    assert main(["profile", "show", "pi4", "--bundle", str(demo_bundle), "--json"]) == 0
    limited = json.loads(capsys.readouterr().out)["settings"]["max_image_tokens"]
    assert limited == {"value": 64, "from": "checkpoint (pi4: 128)"}, "the profile asks for less, never for more"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["list", "pi4"], "NAME has no effect on profile list"),
        (["detect", "--threads", "2"], "a setting has no effect on profile detect"),
        (["validate"], "validate needs a file"),
        (["show", "pi4", "pi5"], "show takes one profile"),
        (["validate", str(Path(__file__).parent)], "setup is a folder; name a profile, or its .toml file"),
        (
            ["show", "pi4", "--max-tiles", "2"],
            "max_tiles has no effect while do_image_splitting is off (by the profile pi4)",
        ),
    ],
)
def test_profile_commands_that_cannot_be_are_refused(words, says, capsys) -> None:
    assert main(["profile", *words]) == 2
    assert says in capsys.readouterr().err


def test_without_any_name_the_machine_decides(monkeypatch) -> None:
    monkeypatch.delenv("LFM_EDGE_PROFILE")
    assert find_profile() == detected().profile
