"""Keys and values in 8 bits: against the same variant with 32, and in everything that carries state."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from bundles import read_manifest
from lfm_quantize.graph import QuantizeError, constant, open_graph
from lfm_quantize.judge.measure import measure
from lfm_quantize.quantize import quantize
from lfm_quantize.settings import Settings
from lfm_runtime import Chat, Model
from lfm_runtime.batch import answer_all
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.decode.states import SharedState
from lfm_runtime.engine.prepared import folder_of
from lfm_runtime.setup.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]
PICTURES = sorted((ROOT / "demo" / "eval" / "images").iterdir())[:3]
QUESTION = "What is in this image?"


@pytest.fixture(scope="module")
def bundle(quantized, few, tmp_path_factory) -> Path:
    """With int4-kv8 and int8-kv8, calibrated on the same pictures."""
    folder = Path(shutil.copytree(quantized, tmp_path_factory.mktemp("kv") / "bundle"))
    for variant in ("int4-kv8", "int8-kv8"):
        quantize(folder, Settings(variant, (few / "images",), few / "calibration.jsonl"))
    return folder


def test_quality_and_size(bundle, questions) -> None:
    """Nearer to fp32 than 4-bit weights are, and no second copy of them."""
    chosen = questions[1][::8]
    plain, small = (measure(bundle, v, "fp32", chosen, 2) for v in ("int4", "int4-kv8"))
    assert small.kl < plain.kl + 1e-4
    assert small.accuracy_lost() <= plain.accuracy_lost() + 1
    manifest = read_manifest(bundle)
    files = manifest["graphs"]["onnx/decoder_model_merged_q4_kv8.onnx"]
    assert files["data"] == manifest["graphs"]["onnx/decoder_model_merged_q4.onnx"]["data"]
    assert files["min_onnxruntime"] == "1.27.0"
    assert manifest["quantization"]["int4-kv8"]["base"] == "int4"
    assert not list(bundle.glob("onnx/*kv8*_data"))


def test_state_is_a_quarter_and_near(bundle) -> None:
    """Each key and value against the one in 32 bits: half a step of its channel's scale, and what earlier layers'
    rounding adds.
    """
    models = [Model.load(bundle, variant=v, threads=2) for v in ("int8", "int8-kv8")]
    ids = [int(i) for i in np.random.default_rng(0).integers(120, 400, 60)]
    snapshots = []
    for model in models:
        state = model.decoder.start(64)
        state.step(model.decoder.embed(ids))
        snapshots.append(state.snapshot())
    graph = open_graph(bundle / "onnx" / "decoder_model_merged_int8_kv8.onnx")
    names = [n for n in snapshots[0].values if n.startswith("past_key_values.")]
    assert names
    for i, name in enumerate(names):
        plain, small = (s.values[name] for s in snapshots)
        assert small.dtype == np.int8
        assert small.nbytes * 4 == plain.nbytes
        scale = constant(graph.graph.initializers[f"{name}.scale"])
        assert scale.shape == (1, plain.shape[1], 1, plain.shape[3])
        inside = np.abs(plain) < 126 * scale
        assert inside.mean() > 0.95  # random tokens, not those it was calibrated with
        if i < 2:  # nothing was rounded before the first attention layer
            assert (np.abs(small * scale - plain) <= 0.51 * scale)[inside].all()


def test_everything_that_carries_state(bundle) -> None:
    """Turns, forks, batches, guesses and disk caches say what one whole computation says."""
    model = Model.load(bundle, variant="int4-kv8", threads=2)
    assert isinstance(model.decoder.start(8), SharedState)
    chat = Chat(model)
    chat.ask(QUESTION, PICTURES[:1], temperature=0).text()
    fork = chat.fork()
    second = chat.ask("How many shapes are there?", temperature=0, speculate=4).text()
    assert second == fork.ask("How many shapes are there?", temperature=0).text()
    assert second == model.converse(chat.messages[:3], PICTURES[:1], temperature=0).text()
    singles = [model.answer([p], QUESTION, temperature=0).text() for p in PICTURES]
    together = dict(answer_all(model, [([p], QUESTION) for p in PICTURES], rows=2, temperature=0))
    assert [together[i].text for i in range(3)] == singles


def test_cache_on_disk(bundle, tmp_path) -> None:
    texts = []
    for _ in range(2):
        model = Model.load(bundle, variant="int4-kv8", threads=2, cache_folder=tmp_path)
        answer = model.answer(PICTURES[:1], QUESTION, temperature=0)
        texts.append(answer.text())
    assert texts[0] == texts[1]
    assert answer.report.cached_tokens > 0


def test_prefill_shares_the_past(bundle, few, tmp_path, capsys) -> None:
    """Only with the same scales: another variant's float past, or one calibrated otherwise, is refused."""
    for prefill in ("int8", "int8-kv8"):
        model = Model.load(bundle, variant="int4-kv8", prefill=prefill, threads=2)
        assert model.sessions.prefill_path == bundle / "onnx" / "decoder_model_merged_int8_kv8.onnx"
        assert model.answer(PICTURES[:1], QUESTION, temperature=0).text()
    other = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    words = ["run", str(other), "-p", "x", "--variant", "int4-kv8", "--prefill", "int8"]
    quantize(other, Settings("int8-kv8", (few / "images",)))  # other questions, other ranges
    assert main(words) == 2
    assert "same images" in capsys.readouterr().err
    quantize(other, Settings("int8", method="rtn", force=True))  # takes int8-kv8 away
    assert main(words) == 2
    assert "two that are neither" in capsys.readouterr().err


def test_profile_takes_it_where_it_is(bundle, demo_bundle) -> None:
    chosen = Model.load(bundle, profile="small", threads=1)
    assert (chosen.setup.variant, chosen.sessions.prefill_path, chosen.setup.execution.low_memory) == (
        "int4-kv8",
        None,
        True,
    )
    split = Model.load(bundle, profile="fast", threads=1, kv="int8")
    assert split.setup.variant == "int4-kv8"
    assert split.sessions.prefill_path == bundle / "onnx" / "decoder_model_merged_int8_kv8.onnx"
    assert resolve(demo_bundle, "small", force=True).variant == "fp32"


def test_prepared(bundle, tmp_path, capsys) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    wanted = Model.load(copy, variant="int4-kv8", threads=1).answer([], QUESTION, temperature=0).text()
    assert main(["prepare", str(copy), "--variant", "int4-kv8"]) == 0
    assert (folder_of(copy) / "decoder_model_merged_q4_kv8").is_dir()
    model = Model.load(
        copy, variant="int4-kv8", prefill="int8-kv8", threads=1
    )  # one decoder prepared, one not: scales still known
    assert Model.load(copy, variant="int4-kv8", threads=1).answer([], QUESTION, temperature=0).text() == wanted
    assert model.answer([], QUESTION, temperature=0).text()


def test_a_new_base_takes_it_away(bundle, few, tmp_path) -> None:
    """Its offsets would point into files written anew."""
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    said: list[str] = []
    with pytest.raises(QuantizeError, match="int4-kv8 is there, calibrated, and uses int4's weights"):
        quantize(copy, Settings("int4", (few / "images",)))
    quantize(copy, Settings("int4", method="rtn", force=True), warn=said.append)
    assert any("int4-kv8" in line and "again" in line for line in said)
    found = Bundle.open(copy)
    assert set(found.variants) == {"fp32", "fp16", "int8", "int4", "int8-kv8"}
    assert not list(copy.glob("onnx/*q4_kv8*"))
    assert (
        Model.load(copy, variant="int8-kv8", threads=1, verify=True)
        .answer([], "x", temperature=0, max_new_tokens=2)
        .text()
        is not None
    )


def test_int8_keys_without_base_or_images_are_refused(demo_bundle, bundle, few, capsys, monkeypatch) -> None:
    for words, said in [
        (["--variant", "int4-kv8"], "needs --calibration"),
        (["--variant", "int4-kv8", "--calibration", str(few / "images")], "no variant 'int4'"),
        (["--variant", "int4-kv8", "--calibration", str(few / "images"), "--method", "rtn"], "no effect"),
        (["--variant", "int4-kv8", "--calibration", str(few / "images"), "--keep", "head"], "no effect"),
    ]:
        assert main(["quantize", str(demo_bundle), "--quiet", *words]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr("lfm_runtime.engine.loader.ort.__version__", "1.26.0")
    assert main(["run", str(bundle), "-p", "x", "--variant", "int4-kv8"]) == 2
    assert "needs onnxruntime 1.27.0, this is 1.26.0" in capsys.readouterr().err
    words = ["--variant", "int4-kv8", "--calibration", str(few / "images"), "--force", "--quiet"]
    assert main(["quantize", str(bundle), *words]) == 2
    assert "int4-kv8 needs onnxruntime 1.27.0, this is 1.26.0" in capsys.readouterr().err


def test_doctor_says_which_decoder_is_not_prepared(quantized, tmp_path, capsys) -> None:
    """The one that reads prompts, where the variant is prepared without it."""
    bundle = Path(shutil.copytree(quantized, tmp_path / "bundle"))
    (tmp_path / "mine.toml").write_text('variant = ["int4"]\nprefill = "int8"\n')
    words = ["doctor", str(bundle), "--profile", str(tmp_path / "mine.toml")]
    for prepared, says in (
        (None, "int4 is not prepared: it starts"),
        ([], "the decoder of int8 that reads prompts is not prepared: it starts"),
        (["--prefill", "int8"], "int4 and the decoder of int8, for this processor and onnxruntime"),
    ):
        if prepared is not None:
            assert main(["prepare", str(bundle), "--variant", "int4", *prepared]) == 0
        main(words)
        assert says in capsys.readouterr().out
