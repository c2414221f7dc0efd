"""Loading: graphs side by side, for one answer while it is made, and without packing what is used once."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
from lfm_runtime import BundleError, ImageError, Model
from lfm_runtime.commands.cli import main
from lfm_runtime.decode.decoder import Decoder
from lfm_runtime.engine.loader import Loader
from lfm_runtime.formats.contract import DECODER
from lfm_runtime.setup.resolve import resolve
from lfm_runtime.setup.setup import Ask

from tests.cache import cached_bundle

PICTURE = Path(__file__).resolve().parents[3] / "demo" / "eval" / "images" / "0000.png"
QUESTION = "What is in this image?"
ONCE = Ask(((256, 256),), QUESTION, once=True)


@pytest.fixture(scope="module")
def two_decoders(demo_bundle, tmp_path_factory) -> Path:
    """The demo bundle with int8 and int4."""
    pytest.importorskip("onnx")
    from lfm_quantize.quantize import quantize
    from lfm_quantize.settings import Settings

    def make(folder: Path) -> None:
        shutil.copytree(demo_bundle, folder)
        for variant in ("int8", "int4"):
            quantize(folder, Settings(variant), warn=lambda _: None)

    return cached_bundle("two-decoders", make, tmp_path_factory.mktemp("two") / "bundle")


def unpacked(bundle: Path, ask: Ask, **flags) -> set[str]:
    return {path.name for path in resolve(bundle, ask=ask, **flags).unpacked}


def test_what_is_used_once_is_not_packed(two_decoders) -> None:
    both = {"variant": "int4", "prefill": "int8"}
    images = resolve(two_decoders, **both).paths["vision_encoder"].name
    few = {images, "decoder_model_merged_int8.onnx"}
    assert unpacked(two_decoders, ONCE, **both) == few
    assert unpacked(two_decoders, Ask((), "Hello", once=True), **both) == few
    assert unpacked(two_decoders, Ask(ONCE.images), **both) == set()
    assert unpacked(two_decoders, Ask(((2048, 1024),), once=True), **both) == set(), "eight views are many uses"
    assert unpacked(two_decoders, ONCE, variant="int8") == {"vision_encoder_int8.onnx"}, "a decoder's are used again"
    assert unpacked(two_decoders, ONCE, variant="fp32", prefill="none") == set()


def test_float_weights_read_their_own_prompts(two_decoders) -> None:
    """A profile's prefill decoder is dropped where the user names a variant of float weights; the user's own stays."""
    name = "x86-avx512-vnni"
    assert resolve(two_decoders, name).prefill == "int8"
    assert resolve(two_decoders, name, variant="int4").prefill == "int8"
    assert resolve(two_decoders, name, variant="fp32").prefill is None
    assert resolve(two_decoders, name, variant="fp32", prefill="int8").prefill == "int8"


def test_one_answer_while_graphs_load_is_the_same(two_decoders, monkeypatch) -> None:
    """Each graph of the variant is loaded once, by threads that are no answer's; the text is that of a loaded model."""
    flags = {"variant": "int4", "prefill": "int8", "threads": 2}
    wanted = Model.load(two_decoders, **flags).answer(PICTURE, QUESTION).text()
    loaded, load = [], Loader.load

    def seen(self, graph, path):
        loaded.append((path.name, threading.current_thread() is threading.main_thread()))
        return load(self, graph, path)

    monkeypatch.setattr(Loader, "load", seen)
    setup = resolve(two_decoders, ask=ONCE, **flags)
    answer = Model.of(setup, at_once=True).answer(PICTURE, QUESTION)
    assert answer.text() == wanted
    names = {path.name for path in setup.paths.values()} | {"decoder_model_merged_int8.onnx"}
    assert {name for name, _ in loaded} == names
    assert len(loaded) == len(names)
    assert [name for name, by_main in loaded if by_main] == [setup.paths["embed_tokens"].name]


def test_waiting_for_graphs_is_loading_and_no_part_of_the_answer(demo_bundle, monkeypatch) -> None:
    waits, load, loaded = threading.Event(), Loader.load, Decoder.load

    def held(self, graph, path):
        assert graph is not DECODER or waits.wait(60)
        return load(self, graph, path)

    def needed(self):
        threading.Timer(0.25, waits.set).start()
        return loaded(self)

    monkeypatch.setattr(Loader, "load", held)
    monkeypatch.setattr(Decoder, "load", needed)
    model = Model.of(resolve(demo_bundle, ask=ONCE, variant="fp32", threads=1), at_once=True)
    started = time.perf_counter()
    answer = model.answer(PICTURE, QUESTION)
    answer.text()
    ms, wall = answer.report.timing_ms, (time.perf_counter() - started) * 1e3
    assert ms["load"] >= 250
    assert ms["total"] <= wall - 250
    assert 0 < ms["ttft"] <= ms["total"]


@pytest.fixture
def broken(demo_bundle, tmp_path, monkeypatch):
    """A function: a bundle whose graph `stem` is no graph, which its hash would tell if it were read."""
    monkeypatch.setattr("lfm_runtime.bundle.HASHED_AT_LOAD", 0)

    def make(stem: str) -> Path:
        bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
        graph = bundle / "onnx" / f"{stem}.onnx"
        graph.write_bytes(b"\x0a" * graph.stat().st_size)
        return bundle

    return make


@pytest.mark.parametrize("stem", ["vision_encoder", "decoder_model_merged"])
def test_errors_of_loading_come_with_the_answer(broken, stem, capsys) -> None:
    bundle = broken(stem)
    with pytest.raises(BundleError, match=stem) as loading:
        Model.load(bundle, threads=1)
    model = Model.of(resolve(bundle, ask=ONCE, threads=1), at_once=True)
    with pytest.raises(BundleError, match=stem) as answering:
        model.answer(PICTURE, QUESTION).text()
    assert str(answering.value) == str(loading.value)
    assert main(["run", str(bundle), str(PICTURE), "-p", QUESTION]) == 2
    said = capsys.readouterr()
    assert stem in said.err
    assert said.out == ""


def test_an_image_that_cannot_be_read_is_said_first(broken, tmp_path) -> None:
    model = Model.of(resolve(broken("vision_encoder"), ask=ONCE, threads=1), at_once=True)
    (tmp_path / "cut.png").write_bytes(PICTURE.read_bytes()[:100])
    with pytest.raises(ImageError):
        model.answer(tmp_path / "cut.png", QUESTION)


def test_a_graph_that_fails_leaves_nothing_of_the_others(broken) -> None:
    model = Model(resolve(broken("vision_encoder"), ask=ONCE, threads=1))
    with pytest.raises(BundleError):
        model.sessions.load()
    assert not model.sessions._begun
    assert not model.decoder.is_loaded
