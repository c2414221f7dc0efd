"""A frame costs what has changed; answers, and the decoder's state, are those of computing everything anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lfm_runtime import Model
from lfm_runtime.errors import PromptError, SettingError
from lfm_runtime.setup.setup import Ask
from lfm_serve.asking import Asking
from lfm_serve.cameras.scene import KEPT, Scene
from PIL import Image

EVAL = Path(__file__).resolve().parents[2] / "demo" / "eval"
CHOICES = Asking("What is in this image?", choices=("red cross", "green circle"))
SHORT = {"temperature": 0.0, "max_new_tokens": 6}
QUESTIONS = [
    Asking("What is in this image?", generation=SHORT),
    Asking("How many shapes?", "Be short.", generation=SHORT),
    Asking("", generation=SHORT),
]


@pytest.fixture(scope="module")
def models(demo_bundle) -> tuple[Model, Model]:
    """One that keeps views, and one that keeps nothing."""
    kept = Model.load(demo_bundle, threads=1, cache_mib=8)
    return kept, Model.load(demo_bundle, threads=1)


def tiled(colours: list[int]) -> Image.Image:
    """768×512: six tiles of 256 and a thumbnail. Each tile has a square of its own colour."""
    image = Image.new("RGB", (768, 512), (40, 40, 40))
    for n, colour in enumerate(colours):
        left, top = 256 * (n % 3) + 64, 256 * (n // 3) + 64
        image.paste((colour, 255 - colour, (7 * colour) % 256), (left, top, left + 128, top + 128))
    return image


def state(scene: Scene) -> dict[str, np.ndarray]:
    return dict(scene._context.snapshot().values)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    frames=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 3), st.sampled_from([*QUESTIONS, CHOICES])), min_size=2, max_size=6
    )
)
def test_texts_are_those_computed_anew(models, frames) -> None:
    """Whatever changes from frame to frame: the same text, and the same keys and values, bit for bit."""
    scene, colours = Scene(models[0]), [10, 60, 110, 160, 210, 250]
    for tile, colour, asking in frames:
        colours[tile] = 20 * colour
        picture = tiled(colours)
        found, fresh = scene.ask(scene.see(picture), asking), Scene(models[1])
        wanted = fresh.ask(fresh.see(picture), asking)
        assert asking.outcome(found)["text"] == asking.outcome(wanted)["text"]
        if asking is CHOICES:
            assert found.probabilities == wanted.probabilities
        assert {name: array.tobytes() for name, array in state(scene).items()} == {
            name: array.tobytes() for name, array in state(fresh).items()
        }


def test_a_frame_costs_what_has_changed(models) -> None:
    """Tile by tile: it and the thumbnail are encoded, and the prompt is read from the end of the step before it on. A
    step has as many tiles as fit 320 tokens: four of these, which have 64.
    """
    scene, colours = Scene(models[0]), [15, 65, 115, 165, 215, 245]
    first = scene.ask(scene.see(tiled(colours)), QUESTIONS[0])
    assert (first.tiles, first.encoded_tiles, first.cached_tokens) == (7, 7, 0)
    known = []
    for tile in range(6):
        colours[tile] += 3
        report = scene.ask(scene.see(tiled(colours)), QUESTIONS[0])
        assert report.encoded_tiles == 2
        known.append(report.cached_tokens)
    assert known[:4] == [0] * 4
    assert known[4] == known[5] > 4 * 64
    again = scene.ask(scene.see(tiled(colours)), Asking("How many shapes?", generation=SHORT))
    assert again.encoded_tiles == 0
    assert again.cached_tokens > again.image_tokens
    other = scene.ask(scene.see(tiled(colours).resize((640, 512))), QUESTIONS[0])
    assert other.encoded_tiles == other.tiles


def test_the_cache_holds_two_pictures_and_no_more(demo_bundle) -> None:
    """Also those views that the decoder has read long ago, and no copies of its keys and values."""
    model = Model.load(demo_bundle, threads=1, cache_mib=8)
    scene, colours = Scene(model), [10, 60, 110, 160, 210, 250]
    scene.ask(scene.see(tiled(colours)), QUESTIONS[0])
    model.cache._max_bytes = 2 * model.cache.nbytes
    for n in range(12):
        colours[5] = 21 * n + 1  # no other tile has this colour
        assert scene.ask(scene.see(tiled(colours)), QUESTIONS[0]).encoded_tiles == 2
    colours[0] = 99
    assert scene.ask(scene.see(tiled(colours)), QUESTIONS[0]).encoded_tiles == 2
    assert model.cache.nbytes <= model.cache._max_bytes
    assert not model.cache._lengths
    views = model.setup.images.max_tiles + 1
    setup = replace(model.setup, ask=Ask((), pictures=KEPT))
    assert setup.pictures_mib << 20 >= 2 * views * 64 * model.bundle.facts.hidden * 4


def test_tolerance_takes_noise_for_nothing(models) -> None:
    """What is within it is the picture before, to the bit; what is not is seen. Small steps do not add up."""
    quiet = np.asarray(tiled([10, 60, 110, 160, 210, 250]), np.int16)
    random = np.random.default_rng(0)

    def noisy(base: np.ndarray) -> Image.Image:
        return Image.fromarray(np.clip(base + random.normal(0, 2, base.shape).round(), 0, 255).astype(np.uint8))

    scene = Scene(models[0], tolerance=2)
    before = scene.ask(scene.see(noisy(quiet)), QUESTIONS[0])
    for _ in range(3):
        report = scene.ask(scene.see(noisy(quiet)), QUESTIONS[0])
        assert (report.encoded_tiles, report.text) == (0, before.text)
    moved = quiet.copy()
    moved[300:340, 300:340] += 60  # in the fifth tile
    report = scene.ask(scene.see(noisy(moved)), QUESTIONS[0])
    assert report.encoded_tiles == 2
    encoded = 0
    for step in range(1, 8):  # it becomes light, by 1 of 255 a frame
        encoded += scene.ask(
            scene.see(Image.fromarray((moved + step).clip(0, 255).astype(np.uint8))), QUESTIONS[0]
        ).encoded_tiles
    assert 14 <= encoded <= 21
    exact = Scene(models[0])
    exact.ask(exact.see(noisy(quiet)), QUESTIONS[0])
    assert exact.ask(exact.see(noisy(quiet)), QUESTIONS[0]).encoded_tiles == 7


def test_choices_without_a_cache(models) -> None:
    """The context is kept though features are not: answers are about this picture, and what is known is not read again."""
    scene = Scene(models[1])
    for colours in ([10, 60, 110, 160, 210, 250], [200, 60, 110, 160, 210, 250], [200, 60, 110, 160, 210, 250]):
        found = scene.ask(scene.see(tiled(colours)), CHOICES)
        fresh = Scene(models[1])
        assert found.probabilities == fresh.ask(fresh.see(tiled(colours)), CHOICES).probabilities
    assert found.report.cached_tokens >= found.report.image_tokens


@pytest.mark.parametrize("tolerance", [-1, 300, float("nan"), None, "x"])
def test_impossible_tolerances(models, tolerance) -> None:
    with pytest.raises(SettingError, match=r"tolerance .* is impossible; allowed: 0 to 255"):
        Scene(models[0], tolerance=tolerance)


def test_errors_leave_the_scene_usable(models) -> None:
    scene = Scene(models[0])
    picture = scene.see(tiled([10, 60, 110, 160, 210, 250]))
    with pytest.raises(PromptError):
        scene.ask(picture, Asking("x " * 40_000, generation=SHORT))
    fresh = Scene(models[1])
    assert scene.ask(picture, QUESTIONS[0]).text == fresh.ask(picture, QUESTIONS[0]).text


def test_answers_of_the_evaluation_set(models) -> None:
    """One scene through all of its pictures says what single answers say."""
    lines = [json.loads(line) for line in (EVAL / "eval.jsonl").read_text().splitlines()[:60]]
    scene = Scene(models[0])
    for line in lines:
        picture, asking = EVAL / line["image"], Asking(line["question"], generation=SHORT)
        wanted = models[1].answer(picture, line["question"], **SHORT).text()
        assert scene.ask(scene.see(picture), asking).text == wanted
