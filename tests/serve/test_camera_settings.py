"""What the options of watch mean: durations, ends, regions, what counts as changed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lfm_runtime.errors import ImageError, SettingError
from lfm_serve.cameras.scene import patch_means, share_changed, small
from lfm_serve.cameras.settings import Roi, Until, seconds
from PIL import Image

BLANK = Image.new("RGB", (64, 48))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("2", 2), ("2s", 2), ("500ms", 0.5), ("10m", 600), ("1.5h", 5400), ("2 min", 120), ("1d", 86400)],
)
def test_durations(text, wanted) -> None:
    assert seconds(text, "--every") == pytest.approx(wanted)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 week", "nan", "inf", "1e3", "2s3", "99999999d"])
def test_no_durations(text) -> None:
    with pytest.raises(SettingError, match=r"--every .* no duration"):
        seconds(text, "--every")


def test_ends() -> None:
    assert Until.parse(["10m"]).left() == pytest.approx(600, abs=5)
    assert not Until.parse(["10m"]).over()
    assert Until.parse(["0s"]).over()
    assert 0 < Until.parse(["00:00"]).left() <= 24 * 3600 + 3600  # summer time
    assert not Until().over()
    assert Until().left() is None
    until = Until.parse(["answer: yes"])
    assert [until.said(text) for text in ("Yes.", "yes", "Oh YES, it is", "eyes", "yesterday", "no", "")] == [
        *[True] * 3,
        *[False] * 4,
    ]
    assert not Until().said("")
    both = Until.parse(["answer:yes", "30m", "answer:no entry", "10m"])
    assert both.left() == pytest.approx(600, abs=5)
    assert [both.said(text) for text in ("yes", "No entry.", "no")] == [True, True, False]
    for text in ("soon", "25:00", "answer:", ""):
        with pytest.raises(SettingError, match="--until"):
            Until.parse([text])


@settings(max_examples=100)
@given(st.integers(0, 63), st.integers(0, 47), st.integers(1, 64), st.integers(2, 48), st.booleans())
def test_regions(x, y, width, height, shares) -> None:
    """Those of Pillow's crop; none reaches beyond the picture."""
    array = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
    text = f"{x},{y},{width},{height}"
    if shares:
        text = f"{x / 64:.6f},{y / 48:.6f},{width / 64:.6f},{height / 48:.6f}"
    if x + width > 64 or y + height > 48:
        with pytest.raises(SettingError, match="--roi"):
            Roi.parse(text).of(Image.fromarray(array), first=True)
        return
    found = Roi.parse(text).of(Image.fromarray(array), first=True)
    assert np.array_equal(np.asarray(found), array[y : y + height, x : x + width])


@pytest.mark.parametrize(
    "text", ["", "1,2,3", "a,b,c,d", "0,0,0,5", "-1,0,5,5", "0.5,0.5,2.0,1.0", "nan,0,1,1", "1e999,.0,1,1", "0,0,1,1"]
)
def test_no_regions(text) -> None:
    with pytest.raises(SettingError, match="--roi"):
        Roi.parse(text)


def test_a_region_outside() -> None:
    """Of the first picture it is the user's mistake; of a later one the camera's size has changed."""
    roi = Roi.parse("64,0,10,10")
    with pytest.raises(SettingError, match="64,0,10,10 is not inside of the picture of 64×48"):
        roi.of(BLANK, first=True)
    with pytest.raises(ImageError, match="not inside"):
        roi.of(BLANK, first=False)


@settings(max_examples=50)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 1000))
def test_means_of_patches(height, width, seed) -> None:
    """Against each patch's own mean; what is left at the edges belongs to the last patches."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    tops, lefts = (list(range(0, max(side - 15, 1), 16)) for side in (height, width))
    bottoms, rights = [*tops[1:], height], [*lefts[1:], width]
    wanted = [
        [pixels[a:b, c:d].reshape(-1, 3).mean(axis=0) for c, d in zip(lefts, rights, strict=True)]
        for a, b in zip(tops, bottoms, strict=True)
    ]
    np.testing.assert_allclose(patch_means(pixels), wanted)


def test_the_share_that_has_changed() -> None:
    one = Image.new("RGB", (640, 360), (10, 100, 200))
    other = one.copy()
    other.paste((10, 160, 200), (0, 0, 320, 90))  # an eighth, in one colour
    assert share_changed(small(one), small(one)) == 0
    assert share_changed(small(one), small(other)) == pytest.approx(1 / 8, abs=0.01)
    noise = np.random.default_rng(0).normal(0, 4, (360, 640, 3))
    noisy = Image.fromarray(np.clip(np.asarray(one) + noise, 0, 255).astype(np.uint8))
    assert share_changed(small(one), small(noisy)) == 0
    assert share_changed(small(Image.new("RGB", (9, 5))), small(Image.new("RGB", (9, 5), "white"))) == 1
