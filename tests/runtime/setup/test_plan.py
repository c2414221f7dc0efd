"""What is foreseen against what is measured; stepping down in order; refusing with the numbers; the same from Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lfm_profiles import Device, detect, read, with_flags
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import SettingError
from lfm_runtime.setup import costs
from lfm_runtime.setup import memory as planning
from lfm_runtime.setup.forecast import Forecast, Memory
from lfm_runtime.setup.machine import this_machine
from lfm_runtime.setup.memory import Shapes, forecast
from lfm_runtime.setup.resolve import DoesNotFitError, resolve
from lfm_runtime.setup.setup import Ask, Setup, settle

ROOT = Path(__file__).resolve().parents[3]
QUESTION = "What is in this image?"
LARGE = (1400, 1000)
START = Memory(40.0, 27.0)  # a process with the libraries loaded


@pytest.fixture
def bundle(demo_bundle) -> Bundle:
    return Bundle.open(demo_bundle)


@pytest.fixture
def as_450m(bundle, monkeypatch) -> Bundle:
    """The demo bundle with the weights and shapes of a 450M, in fp32, int8 and int4."""
    graphs = {stem: bundle.variants["fp32"][stem] for stem in bundle.variants["fp32"]}
    sizes = {
        "fp32": (367, 256, 1352),
        "int8": (94, 64, 343),
        "int4": (94, 33, 177),
    }  # MiB: encoder, table, decoder with the table
    weights, variants = {}, {}
    for variant, numbers in sizes.items():
        suffix = {"fp32": "", "int8": "_int8", "int4": "_q4"}[variant]
        files = {
            stem: path if not suffix else path.with_name(f"{path.stem}{suffix}.onnx") for stem, path in graphs.items()
        }
        variants[variant] = {stem: ExistingPath(path) for stem, path in files.items()}
        weights |= {
            files[stem]: n << 20
            for stem, n in zip(("vision_encoder", "embed_tokens", "decoder_model_merged"), numbers, strict=True)
        }
    monkeypatch.setattr(Shapes, "of", staticmethod(lambda _: Shapes(1024, 4608, 768, 65536, 24576, 8 << 20)))
    monkeypatch.setattr(planning, "weights_of", lambda _, path: weights[Path(path)])
    monkeypatch.setattr(planning, "weights_on_disk", lambda _, paths: sum(weights[Path(path)] for path in paths))
    monkeypatch.setattr(planning, "adds_int8_in_16_bits", lambda: False)
    return replace(bundle, variants=variants)


class ExistingPath(type(Path())):
    """A file that is not there and is not asked to be."""

    def exists(self, **_) -> bool:
        return True


@pytest.fixture(autouse=True)
def start(monkeypatch) -> None:
    """Make this process seem to have only the libraries loaded."""
    monkeypatch.setattr(Memory, "of_this_process", staticmethod(lambda: START))


def foreseen(bundle: Bundle, sizes, profile) -> Forecast:
    return forecast(settle(bundle, profile, Ask(tuple(sizes), QUESTION)), START)


def fit(bundle: Bundle, sizes, profile, board: Device, *, force: bool = False) -> Setup:
    return resolve(bundle, profile, Ask(tuple(sizes), QUESTION), device=board, force=force)


def device(free: int, total: int | None = None) -> Device:
    return Device("Linux", "aarch64", 64, 4096, ram_total_mib=total or 2 * free, ram_available_mib=free)


def test_views_and_tokens_are_those_of_the_run(bundle, demo_model, photo) -> None:
    plan = foreseen(bundle, [(600, 400)], read("generic"))
    answer = demo_model.answer([photo], QUESTION, max_new_tokens=1)
    answer.text()
    report = answer.report
    assert (plan.views, plan.image_tokens, plan.prompt_tokens) == (
        report.tiles,
        report.image_tokens,
        report.prompt_tokens,
    )
    assert plan.new_tokens == demo_model.setup.generation.max_new_tokens
    assert (
        foreseen(bundle, [(600, 400)], with_flags(read("generic"), {"context": 470})).new_tokens
        == 470 - report.prompt_tokens
    )


@pytest.mark.skipif(sys.platform != "linux", reason="mapped memory is told on Linux alone")
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("size", [None, LARGE])
def test_memory_is_foreseen(demo_bundle, tmp_path, size, low) -> None:
    """Two fresh processes: one plans, one runs. Most of a demo model's memory is libraries', of which each version has
    its own pages, so the range is wider than at full size, where scripts/bench/check_plan.py holds predictions to 0.95
    to 1.10.
    """
    from PIL import Image

    images = []
    if size:
        Image.effect_noise(size, 50).convert("RGB").save(tmp_path / "image.png")
        images = [str(tmp_path / "image.png")]
    words = [*(["--low-memory"] if low else []), "--threads", "1"]

    def run(*command: str) -> dict:
        code = "import sys; from lfm_runtime.commands.cli import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code, *command],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        return json.loads(done.stdout)

    plan = run("plan", str(demo_bundle), *images, "-p", QUESTION, "--json", *words)
    report = run("run", str(demo_bundle), *images, "-p", QUESTION, "--json", "--temperature", "0", *words)
    assert plan["prompt_tokens"] == report["prompt_tokens"]
    assert 0.85 <= plan["memory_mib"]["peak"] / report["memory_mib"]["peak"] <= 1.20


def test_orders_of_magnitude_of_a_450m(as_450m) -> None:
    """By hand: an unprepared int4 450M with one view is its packed weights, 46 vectors a token, 17 a patch, and the
    libraries.
    """
    profile = with_flags(
        read("generic"), {"variant": ("int4",), "prepared": False, "do_image_splitting": False, "max_image_tokens": 64}
    )
    plan = foreseen(as_450m, [(256, 256)], profile)
    (view,) = plan.images[0].views
    work = 4 * (17 * 768 * view.rows * view.columns + 46 * 1024 * plan.prompt_tokens) / 2**20
    weights = 94 * 1.04 + 177 * 1.24
    assert plan.memory.peak == pytest.approx(START.peak + weights + work, abs=45)
    assert plan.disk_mib == 94 + 33 + 177
    low = foreseen(as_450m, [(256, 256)], with_flags(profile, {"low_memory": True}))
    assert plan.memory.peak - low.memory.peak == pytest.approx(94 * 1.04, abs=40)


def smallest_free(bundle, profile, sizes) -> int:
    return int(foreseen(bundle, sizes, profile).memory.peak - START.peak) + 5


def test_steps_come_in_order_and_only_where_needed(as_450m) -> None:
    profile = with_flags(read("generic"), {"prefill": "int8"})
    wide = replace(profile, origin={**profile.origin, "prefill": "somebody"})  # a profile's wish, not the user's
    assert fit(as_450m, [LARGE], wide, device(8000)).steps == ()
    found = [fit(as_450m, [LARGE], wide, device(free)) for free in range(900, 260, -20)]
    order = ["no int8 decoder", "at most 4 tiles", "no tiles", "at most 64 tokens", "one graph", "int4 instead"]
    for fitted in found:
        ranks = [next(i for i, start in enumerate(order) if words.startswith(start)) for words in fitted.steps]
        assert ranks == sorted(set(ranks))
        assert fitted.forecast.memory.peak - START.peak <= fitted.free_mib + 2
    assert {fitted.steps[:1] for fitted in found} >= {("no int8 decoder for prefill",)}
    assert any(fitted.profile.low_memory for fitted in found)
    last = found[-1]
    assert last.profile.low_memory
    assert last.prefill is None
    # The user's own settings stay, and what is left open gives way.
    mine = with_flags(read("generic"), {"max_image_tokens": 32, "variant": ("int8",)})
    kept = fit(as_450m, [LARGE], mine, device(smallest_free(as_450m, with_flags(mine, {"low_memory": True}), [LARGE])))
    assert kept.variant == "int8"
    assert kept.profile.max_image_tokens == 32


def test_a_smaller_variant_is_the_last_step(as_450m) -> None:
    profile = replace(read("quality"), variant=("fp32",))
    fitted = fit(as_450m, [], profile, device(400, 8000))
    assert fitted.variant == "int4"
    assert fitted.steps[-1] == "int4 instead of fp32"


@pytest.mark.parametrize(
    ("tree", "fits"), [("pi-zero2w", False), ("pi3b", True), ("pi4-1gb", True), ("pi4-8gb", True), ("pi5-2gb", True)]
)
def test_what_a_450m_comes_to_on_boards(as_450m, tree, fits, tmp_path) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "profiles"))
    from lfm_profiles import choose
    from trees import DEVICES, write

    board = detect(write(tmp_path, DEVICES[tree][0]), system="Linux", machine="aarch64")
    profile = choose(board).profile
    if not fits:
        with pytest.raises(
            DoesNotFitError,
            match=r"needs at least \d+ MiB .* may use 416 MiB .* budget of profile pi-zero2w is 320 MiB",
        ):
            fit(as_450m, [LARGE], profile, board)
        assert fit(as_450m, [LARGE], profile, board, force=True).steps == ()
        return
    setup = fit(as_450m, [LARGE], profile, board)
    assert setup.variant == "int4"
    assert setup.forecast.views == 1
    assert setup.forecast.memory.peak <= profile.budget.peak_rss_mib


def on(monkeypatch, board: Device) -> None:
    """Make this machine seem to be `board`."""
    here = replace(this_machine(), device=board)
    monkeypatch.setattr("lfm_runtime.setup.resolve.this_machine", lambda: here)
    monkeypatch.setattr("lfm_runtime.setup.resolve.now", lambda found: found)


def test_run_refuses_or_is_forced(demo_bundle, photo, capsys, monkeypatch) -> None:
    on(monkeypatch, device(10, 60))
    words = ["run", str(demo_bundle), str(photo), "-p", QUESTION, "--max-new-tokens", "1"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "needs at least" in err
    assert "; --force tries all the same" in err
    assert err.count("\n") == 1
    assert main([*words, "--force"]) == 0
    assert main(["plan", str(demo_bundle), str(photo)]) == 2


def test_run_says_what_it_gave_up(demo_bundle, photo, capsys, monkeypatch) -> None:
    low = with_flags(read("generic"), {"low_memory": True})
    need = foreseen(Bundle.open(demo_bundle), [(600, 400)], low).memory.peak - START.peak
    on(monkeypatch, device(int(need) + 1, 100_000))
    assert main(["run", str(demo_bundle), str(photo), "-p", QUESTION, "--max-new-tokens", "1"]) == 0
    assert re.search(r"reduced to fit the memory \(\d+ MiB are free\): no tiles", capsys.readouterr().err)


def test_what_asked_for_the_steps_is_named(demo_bundle, photo, capsys, monkeypatch, tmp_path) -> None:
    """A profile's budget is not told as free memory, by run and plan and to programs; the tightest is."""
    low = with_flags(read("generic"), {"low_memory": True})
    need = foreseen(Bundle.open(demo_bundle), [(600, 400)], low).memory.peak
    (tmp_path / "small.toml").write_text(f'extends = "generic"\n[budget]\npeak_rss_mib = {int(need) + 1}\n')
    words = [str(demo_bundle), str(photo), "-p", QUESTION, "--profile", str(tmp_path / "small.toml")]
    allowed = f"profile small allows {int(need) + 1} MiB (peak_rss_mib)"
    on(monkeypatch, device(90_000, 100_000))
    assert main(["run", *words, "--max-new-tokens", "1"]) == 0
    assert f"reduced to fit the memory ({allowed}): no tiles" in capsys.readouterr().err
    assert main(["plan", *words]) == 0
    assert f"to fit     no tiles: {allowed}" in capsys.readouterr().out
    assert main(["plan", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bound"] == allowed
    on(monkeypatch, device(int(need - START.peak) + 20, int(need) + 20))
    assert resolve(demo_bundle, str(tmp_path / "small.toml"), Ask(((1200, 800),))).remedy == "take another profile"


def test_plan_for_people(demo_bundle, photo, capsys) -> None:
    assert main(["plan", str(demo_bundle), str(photo), "-p", QUESTION, "--profile", "balanced"]) == 0
    out = capsys.readouterr().out
    assert "balanced: fp32" in out
    assert "2 × 2 tiles and a thumbnail" in out or "tiles" in out
    assert "MiB at the peak" in out
    assert "MiB are free" in out


def test_a_plan_of_nothing_is_refused(demo_bundle, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan"])
    assert stop.value.code == 2
    assert "bundle" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["plan", str(demo_bundle), str(tmp_path / "none.jpg")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_hub_folder_is_foreseen_too(demo_bundle, demo_model, tmp_path) -> None:
    """Without a manifest, from config.json and the graphs: as with one."""
    folder = Path(shutil.copytree(demo_bundle, tmp_path / "hub"))
    (folder / "manifest.json").unlink()
    ours, theirs = (foreseen(Bundle.open(f), [(600, 400)], read("generic")) for f in (demo_bundle, folder))
    assert theirs.memory.peak == pytest.approx(ours.memory.peak, abs=2)
    (folder / "config.json").write_text('{"text_config": {}}')
    assert foreseen(Bundle.open(folder), [(600, 400)], read("generic")) is None


CHILD = """
import resource, sys
limit = int(sys.argv[1]) << 20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from lfm_runtime import EdgeError, Model
from lfm_runtime.images.pixels import image_size
from lfm_runtime.setup.setup import Ask
if sys.argv[2] == "python":
    try:
        model = Model.load(sys.argv[3], ask=Ask((image_size(sys.argv[4]),), sys.argv[5]), threads=1)
    except EdgeError as e:
        print(e); sys.exit(2)
    model.answer([sys.argv[4]], sys.argv[5], max_new_tokens=1).text()
else:
    from lfm_runtime.commands.cli import main
    sys.exit(main(["run", sys.argv[3], sys.argv[4], "-p", sys.argv[5], "--max-new-tokens", "1", "--threads", "1"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
@pytest.mark.parametrize("spare", [-30, 10, 400])
def test_python_does_what_run_does_under_a_memory_limit(demo_bundle, photo, spare) -> None:
    """One steps down, or refuses with the numbers, exactly as the other. The limit: what a process has mapped before
    it loads a model, and so much more than the smallest setup takes.
    """
    code = "from lfm_runtime.model import Model; import psutil; print(psutil.Process().memory_info().vms >> 20)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    mapped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    low = with_flags(
        read("generic"), {"low_memory": True, "max_image_tokens": 64, "do_image_splitting": False, "threads": 1}
    )
    need = foreseen(Bundle.open(demo_bundle), [(600, 400)], low).address_mib
    limit = int(mapped.stdout) + int(need) + spare

    def said(how: str) -> tuple[int, list[str]]:
        words = [sys.executable, "-c", CHILD, str(limit), how, str(demo_bundle), str(photo), QUESTION]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        flag = "; --force tries all the same"  # which Python has as well, by another name
        lines = [
            line
            for line in (done.stdout + done.stderr).splitlines()
            if "reduced to fit the memory" in line or "of address space" in line
        ]
        return done.returncode, [
            re.sub(r"\d+", "N", line.removeprefix("lfm-edge: ").removesuffix(flag)) for line in lines
        ]

    command, python = said("run"), said("python")
    assert command == python
    assert (command[0] == 2) == (spare < 0)
    assert bool(command[1]) == (spare < 400)


@pytest.mark.skipif(sys.platform != "linux", reason="a folder that even root cannot write")
def test_times_are_not_kept_where_nothing_may_be_written(demo_bundle, monkeypatch) -> None:
    """An audit by another user than who installed: it ends well, and plans go on without its times."""
    monkeypatch.setattr(costs, "folder_of", lambda folder: Path("/proc/self"))
    costs.keep_costs(Bundle.open(demo_bundle), {"key": costs.Costs((), (), (), (), 1.0, 1.0, valid=True)})
    assert not Path("/proc/self/measured.json").exists()


def test_times_that_were_edited_are_unknown(bundle, tmp_path, monkeypatch) -> None:
    """They would be told as measured."""
    monkeypatch.setattr(costs, "folder_of", lambda _: tmp_path)
    key = costs.cost_key("fp32", None, 1, costs.fingerprint(bundle, "fp32"), low_memory=False)
    known = costs.Costs(((1, 0.5),), ((4, 1.0),), ((4, 2.0),), ((9, 3.0),), 1.5, 0.0, valid=True)
    costs.keep_costs(bundle, {key: known})
    assert costs.find_costs(bundle, "fp32", None, 1, low_memory=False) == known
    whole = (tmp_path / "measured.json").read_text()
    for edited in (whole.replace("1.5", "-5"), whole.replace("1.5", "1e308"), whole[:-9], whole.replace("valid", "x")):
        (tmp_path / "measured.json").write_text(edited)
        assert costs.find_costs(bundle, "fp32", None, 1, low_memory=False) is None
    costs.keep_costs(bundle, {key: known})
    assert costs.find_costs(bundle, "fp32", None, 1, low_memory=False) == known, "the next audit writes it anew"


def test_weights_that_two_graphs_share_are_on_disk_once(demo_bundle) -> None:
    """The decoder's head is the embeddings' table, in one file."""
    bundle = Bundle.open(demo_bundle)
    files = {demo_bundle / name for path in bundle.graphs("fp32")[1].values() for name in data_of(path)}
    found = resolve(demo_bundle, read("generic"), variant="fp32").forecast
    assert found.disk_mib == pytest.approx(sum(path.stat().st_size for path in files) / 2**20)


def data_of(graph: Path) -> set[str]:
    onnx = pytest.importorskip("onnx")
    tensors = onnx.load(str(graph), load_external_data=False).graph.initializer
    return {f"onnx/{e.value}" for t in tensors for e in t.external_data if e.key == "location"}


@pytest.mark.parametrize(
    "wrong", [{"images": ((0, 960),)}, {"images": ((-5, 960),)}, {"kv_tokens": -1}, {"cache_mib": -1}]
)
def test_nobody_asks_so(wrong) -> None:
    with pytest.raises(SettingError, match=r"impossible|allowed are 0 and above"):
        Ask(**{"images": ((512, 512),), **wrong})
