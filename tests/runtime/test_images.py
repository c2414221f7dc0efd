"""Images against the reference processor and Pillow: plans, tokens, pixels, modes, orientation, damage."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lfm_runtime.errors import ImageError, SettingError
from lfm_runtime.images.layout import ImageSettings, lay_out
from lfm_runtime.images.pixels import cut_views, image_size, open_image, patchify
from lfm_runtime.text.spec import ImageTokens
from PIL import Image, ImageOps

pytestmark = pytest.mark.transformers5

NAMED_SIZES = [
    (1024, 977),
    (3000, 600),
    (600, 3000),
    (6000, 700),
    (256, 384),
    (1000, 3000),
    (512, 512),
    (724, 724),
    (725, 724),
    (736, 720),
    (720, 736),
    (1, 1),
    (2, 3),
    (16, 16),
    (31, 33),
    (256, 256),
    (255, 257),
    (1, 900),
    (900, 1),
    (40, 3000),
    (3000, 40),
    (4000, 3000),
    (3000, 4000),
    (2048, 256),
    (640, 480),
    (1920, 1080),
    (1080, 1920),
    (512, 1024),
    (1024, 512),
    (528, 992),
    (1536, 1536),
]


def sizes() -> list[tuple[int, int]]:
    rng = random.Random(0)
    near = [(round(524288 / h) + d, h) for h in range(400, 1400, 40) for d in (-17, -1, 0, 16)]  # the tiling threshold
    return [
        *NAMED_SIZES,
        *near,
        *((rng.randint(1, 1500), rng.randint(1, 1500)) for _ in range(130)),
        *((rng.randint(1, 40), rng.randint(300, 2500)) for _ in range(25)),
        *((rng.randint(300, 2500), rng.randint(1, 40)) for _ in range(25)),
    ]


def reference_outputs(image: Image.Image, **changes):
    reference = pytest.importorskip("reference")
    processor = reference_outputs.cache.setdefault("p", None) or reference.image_processor_class()(
        return_row_col_info=True
    )
    reference_outputs.cache["p"] = processor
    return processor(
        [[image]], return_tensors="pt", input_data_format=None if min(image.size) > 4 else "channels_first", **changes
    )


reference_outputs.cache = {}


def compare(image: Image.Image, **changes) -> None:
    wanted = reference_outputs(image, **changes)
    chosen = ImageSettings(**changes)
    plan = lay_out(*image.size, chosen)
    assert [[v.rows, v.columns] for v in plan.views] == np.asarray(wanted["spatial_shapes"]).tolist()
    assert (plan.rows, plan.columns) == (int(np.ravel(wanted["image_rows"])[0]), int(np.ravel(wanted["image_cols"])[0]))
    views = list(cut_views(image, plan, chosen))
    assert len(views) == len(plan.views)
    differences = [
        np.abs(np.asarray(wanted["pixel_values"][i])[: len(view)] - view).ravel() * 127.5
        for i, view in enumerate(views)
    ]
    together = np.concatenate(differences)
    assert together.max() <= 2.001, f"{image.size}: {together.max()}"
    assert together.mean() <= 0.1, f"{image.size}: {together.mean()}"


@pytest.mark.transformers5_alone
@pytest.mark.parametrize("part", range(4))
def test_pixels_like_the_reference(photo, part) -> None:
    """More than 300 sizes of a real photo: the same tiles and tokens, pixels within 2/255, 0.1/255 on average."""
    source = Image.open(photo).convert("RGB")
    chosen = sizes()
    assert len(chosen) >= 300
    for size in chosen[part::4]:
        compare(source.resize(size, Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    "changes",
    [
        {"resample": 3},
        {"use_thumbnail": False},
        {"do_image_splitting": False},
        {"max_image_tokens": 64, "min_image_tokens": 16},
        {"max_tiles": 4},
        {"min_tiles": 3, "max_tiles": 6},
        {"max_pixels_tolerance": 1.5},
        {"tile_size": 256, "max_image_tokens": 64},
        {"min_tiles": 1, "max_tiles": 1},
        {"min_tiles": 1},
    ],
    ids=str,
)
def test_settings_like_the_reference(photo, changes) -> None:
    source = Image.open(photo).convert("RGB")
    for size in [(1024, 977), (256, 384), (1000, 3000), (90, 700), (1500, 400)]:
        compare(source.resize(size), **changes)


def test_the_text_like_the_reference() -> None:
    """Expanded placeholders for every shape of plan, against the reference processor's own method."""
    reference = pytest.importorskip("reference")
    from transformers.models.lfm2_vl import Lfm2VlProcessor

    if reference.TRANSFORMERS_5:
        pytest.skip("transformers 5 has no such method; the greedy texts of tests/export compare whole prompts there")
    processor = Lfm2VlProcessor.__new__(Lfm2VlProcessor)
    processor.image_processor = reference.image_processor_class()()
    processor.image_token, processor.image_start_token, processor.image_end_token = (
        "<image>",
        "<|image_start|>",
        "<|image_end|>",
    )
    processor.image_thumbnail_token = "<|img_thumbnail|>"
    for width, height in sizes():
        plan = lay_out(width, height, ImageSettings())
        wanted = processor.expand_text_with_placeholders(
            ["a<image>b"],
            [[None]],
            image_rows=[plan.rows],
            image_cols=[plan.columns],
            image_sizes=[[plan.whole_size[1], plan.whole_size[0]]],
            use_image_special_tokens=True,
        )
        assert "a" + ImageTokens().expand(plan) + "b" == wanted[0]


def test_known_figures() -> None:
    """256×384 is 96 tokens; 1000×3000 is 1,011 with its thumbnail; nothing exceeds 2,816."""
    assert lay_out(256, 384, ImageSettings()).tokens == 96
    assert lay_out(1000, 3000, ImageSettings()).tokens == 1011
    assert (
        max(lay_out(w, h, ImageSettings()).tokens for w, h in itertools.product((100, 700, 1500, 4000), repeat=2))
        <= 2816
    )


@settings(max_examples=300)
@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    fewest=st.integers(1, 128),
    more=st.integers(0, 256),
    tiles=st.integers(1, 12),
    splitting=st.booleans(),
    thumbnail=st.booleans(),
)
def test_plan_properties(width, height, fewest, more, tiles, splitting, thumbnail) -> None:
    chosen = ImageSettings(
        min_image_tokens=fewest,
        max_image_tokens=fewest + more,
        min_tiles=1,
        max_tiles=tiles,
        do_image_splitting=splitting,
        use_thumbnail=thumbnail,
    )
    plan = lay_out(width, height, chosen)
    assert plan.tokens == sum(v.tokens for v in plan.views) >= 1
    assert all(v.rows % 2 == v.columns % 2 == 0 and v.tokens == v.rows * v.columns // 4 for v in plan.views)
    assert plan.rows * plan.columns <= tiles
    assert plan.whole_size[0] % 32 == plan.whole_size[1] % 32 == 0
    assert (plan.thumbnail is not None) == (plan.tiled and thumbnail)
    if not splitting:
        assert len(plan.views) == 1


def test_patchify_by_hand() -> None:
    pixels = np.arange(32 * 48 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 48, 3)
    patches = patchify(pixels, ImageSettings())
    assert patches.shape == (6, 768)
    # patch 4 is row 1, column 1; its element (row 2, column 3, channel 1)
    assert patches[4, (2 * 16 + 3) * 3 + 1] == pytest.approx(pixels[18, 19, 1] / 127.5 - 1, abs=1e-6)


# ------------------------------------------------------------------------------------------------------- opening


def save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(photo, orientation) -> None:
    source = Image.open(photo).convert("RGB").resize((96, 64))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(source, "PNG", exif=exif)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    wanted = source.transpose(undo[orientation]) if orientation > 1 else source
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(wanted))


def test_modes(photo) -> None:
    source = Image.open(photo).convert("RGB").resize((60, 40))
    rgb = np.asarray(source)
    grey = source.convert("L")
    assert np.array_equal(np.asarray(open_image(save(grey, "PNG"))), np.stack([np.asarray(grey)] * 3, -1))
    palette = source.quantize(64)
    assert np.array_equal(np.asarray(open_image(save(palette, "PNG"))), np.asarray(palette.convert("RGB")))
    cmyk = source.convert("CMYK")
    assert np.array_equal(np.asarray(open_image(save(cmyk, "TIFF"))), np.asarray(cmyk.convert("RGB")))
    one_bit = grey.convert("1")
    assert set(np.unique(np.asarray(open_image(save(one_bit, "PNG"))))) <= {0, 255}

    alpha = np.linspace(0, 255, 60, dtype=np.uint8)[None].repeat(40, 0)
    rgba = Image.fromarray(np.dstack([rgb, alpha]))
    wanted = rgb * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    assert np.abs(np.asarray(open_image(save(rgba, "PNG"))) - wanted).max() <= 1
    assert np.abs(np.asarray(open_image(np.asarray(rgba))) - wanted).max() <= 1

    keyed = save(palette, "PNG", transparency=0)
    clear = np.asarray(palette) == 0
    assert (np.asarray(open_image(keyed))[clear] == 255).all()

    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(open_image(save(deep, "PNG")))[..., 0], np.asarray(grey))
    assert np.array_equal(np.asarray(open_image(save(deep, "TIFF")))[..., 1], np.asarray(grey))
    assert np.array_equal(np.asarray(open_image(np.asarray(grey)))[..., 2], np.asarray(grey))
    for wide in (1, 257):  # 32 bits a pixel: of 8, or of 16
        image = Image.fromarray(np.asarray(grey).astype(np.int32) * wide)
        assert np.array_equal(np.asarray(open_image(image))[..., 0], np.asarray(grey))
        assert np.array_equal(np.asarray(open_image(save(image, "TIFF")))[..., 0], np.asarray(grey))


def test_kinds_of_source(photo, tmp_path) -> None:
    """Path, string, bytes, PIL and numpy give the same pixels."""
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(photo)).convert("RGB"))
    opened = photo.open("rb")
    opened.read(10)  # whoever looked at its header
    for source in (photo, str(photo), photo.read_bytes(), Image.open(photo), wanted, io.BytesIO(photo.read_bytes()), opened):  # fmt: skip
        assert np.array_equal(np.asarray(open_image(source)), wanted)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no/such/file.png", "does not exist"),
        (".", "is a folder"),
        (b"", "not a readable image"),
        (b"GIF89a", "not a readable image"),
        (b"hello world" * 100, "not a readable image"),
        (np.zeros((4, 4), np.float32), "uint8"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((2, 2, 2, 3), np.uint8), "uint8"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (Image.new("F", (4, 4), 0.5), "convert it"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_sources(source, says) -> None:
    with pytest.raises(ImageError, match=says):
        open_image(source)


def test_truncated(photo) -> None:
    data = photo.read_bytes()
    for fraction in (0.1, 0.5, 0.98):
        with pytest.raises(ImageError, match="cut off"):
            open_image(data[: int(len(data) * fraction)])


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_bytes_never_escape(photo, data) -> None:
    """Flipped bytes give an image or an ImageError, nothing else."""
    small = save(
        Image.open(photo).resize((40, 30)), data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
    )
    damaged = bytearray(small)
    for at in data.draw(st.lists(st.integers(0, len(small) - 1), min_size=1, max_size=8)):
        damaged[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ImageError):
        assert open_image(bytes(damaged)).mode == "RGB"


def test_decompression_bomb() -> None:
    bomb = save(Image.new("1", (20000, 10000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(ImageError, match=r"^the image has 200 megapixels, the limit is 100"):
        open_image(bomb)
    assert Image.MAX_IMAGE_PIXELS is not None  # Pillow's own setting is as before
    assert open_image(save(Image.new("1", (200, 100)), "PNG"), max_megapixels=0.02).size == (200, 100)
    with pytest.raises(ImageError, match=r"limit is 0\.01"):
        open_image(save(Image.new("1", (200, 100)), "PNG"), max_megapixels=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"min_image_tokens": 0},
        {"min_image_tokens": 65, "max_image_tokens": 64},
        {"max_tiles": 0},
        {"tile_size": 100},
        {"resample": 9},
    ],
    ids=str,
)
def test_impossible_settings(changes) -> None:
    with pytest.raises(SettingError):
        ImageSettings(**changes)


def test_settings_from_files(tmp_path) -> None:
    """Settings come from four places, in transformers' order; unknown keys are ignored."""
    assert ImageSettings.from_folder(tmp_path) == ImageSettings()
    (tmp_path / "config.json").write_text('{"max_image_tokens": 128, "use_thumbnail": false, "model_type": "lfm2-vl"}')
    assert ImageSettings.from_folder(tmp_path) == ImageSettings(max_image_tokens=128, use_thumbnail=False)
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"max_image_tokens": 200, "resample": 3}}')
    assert ImageSettings.from_folder(tmp_path).max_image_tokens == 200
    (tmp_path / "preprocessor_config.json").write_text(
        '{"max_image_tokens": 256, "do_image_splitting": false, "junk": 1}'
    )
    assert (
        ImageSettings.from_folder(tmp_path).max_image_tokens == 200
    )  # what is inside processor_config.json stands for the whole file
    (tmp_path / "processor_config.json").write_text('{"max_image_tokens": 200, "resample": 3, "use_thumbnail": null}')
    found = ImageSettings.from_folder(tmp_path)
    assert (found.max_image_tokens, found.resample, found.do_image_splitting, found.use_thumbnail) == (
        256,
        3,
        False,
        False,
    )
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(SettingError, match="not valid JSON"):
        ImageSettings.from_folder(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_from_the_header(orientation, tmp_path) -> None:
    """image_size gives what open_image does for every EXIF orientation, without decoding."""
    from lfm_runtime.images.pixels import image_size

    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(tmp_path / "image.jpg", exif=exif)
    assert image_size(tmp_path / "image.jpg") == open_image(tmp_path / "image.jpg").size


def test_files_are_closed_and_further_pages_told_of(tmp_path, caplog) -> None:
    """Of an animation or a scan of several pages the model sees the first, and the user is told; of a photo nothing."""
    pages = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "b.tif", "c.png", "d.webp"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a file left open is a ResourceWarning
            assert image_size(tmp_path / name) == (40, 30)
            first = open_image(tmp_path / name)
            open_image(tmp_path / name)
        assert first.getpixel((3, 3))[0] > 200
        assert caplog.text.count(f"{name} has several pages or frames; the first one is used") == 1
    caplog.clear()
    pages[0].save(tmp_path / "one.gif")
    pages[0].save(tmp_path / "two.mpo", save_all=True, append_images=pages[1:])
    open_image(tmp_path / "one.gif")
    open_image(tmp_path / "two.mpo")
    open_image((tmp_path / "one.gif").read_bytes())
    assert not caplog.text


def test_the_views_of_the_reference_processor() -> None:
    """Rows and columns of patches for 209 sizes on half cells, where rounding decides: a table that transformers made
    with its default settings, LFM2.5-VL's.
    """
    table = json.loads((Path(__file__).parent / "views.json").read_text())["views"]
    assert len(table) == 209
    for width, height, views in table:
        found = [[view.rows, view.columns] for view in lay_out(width, height, ImageSettings()).views]
        assert found == views, (width, height)
