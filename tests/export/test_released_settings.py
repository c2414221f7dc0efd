"""preprocessor_config.json of the releases: image settings as the reference's processor reads them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
reference = pytest.importorskip("reference")
pytest.importorskip("onnx_ir")

from changed import edit  # noqa: E402
from lfm_runtime.images.layout import ImageSettings  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SPELLINGS = ROOT / "scripts" / "bench" / "spellings"


def reference_settings(folder: Path) -> ImageSettings:
    """Return the settings that transformers' own processor reads from a folder."""
    found = reference.image_processor_class().from_pretrained(folder)
    return ImageSettings(
        found.min_image_tokens,
        found.max_image_tokens,
        bool(found.do_image_splitting),
        found.min_tiles,
        found.max_tiles,
        bool(found.use_thumbnail),
        found.tile_size,
        found.downsample_factor,
        found.encoder_patch_size,
        found.max_pixels_tolerance,
        int(found.resample),
        tuple(found.image_mean),
        tuple(found.image_std),
    )


def real_folders() -> dict[str, dict[str, Path]]:
    """Name → files of a release, fine-tune or conversion: ours in the same form, and the real ones where
    LFM_EDGE_REAL_FILES names them.
    """
    found = {name: {file.name: file for file in (SPELLINGS / name).iterdir()} for name in ("lfm2.5", "3b")}
    if real := os.environ.get("LFM_EDGE_REAL_FILES"):
        spellings = Path(real) / "spellings"
        found["real lfm2.5"] = {file.name: file for file in (Path(real) / "lfm25-vl-450m").iterdir()}
        found["real mlx3b"] = {"preprocessor_config.json": spellings / "preprocessor_mlx3b.json"}
        found["real tiny"] = {"preprocessor_config.json": spellings / "preprocessor_tiny.json"}
        found["real websight"] = {"processor_config.json": spellings / "processor_websight.json"}
        found["real devkit"] = {
            "processor_config.json": spellings / "processor_devkit.json",
            "preprocessor_config.json": spellings / "preprocessor_mlx3b.json",
        }
    return found


@pytest.mark.transformers5
@pytest.mark.parametrize("name", real_folders())
def test_image_settings_as_the_reference_processor_reads_them(name, tmp_path) -> None:
    for file, source in real_folders()[name].items():
        shutil.copyfile(source, tmp_path / file)
    if not reference.TRANSFORMERS_5 and not (tmp_path / "preprocessor_config.json").exists():
        pytest.skip("transformers 4.57 does not read what is inside processor_config.json")
    assert ImageSettings.from_folder(tmp_path) == reference_settings(tmp_path)


RELEASES_2025 = {
    "450M": (
        {"max_pixels_tolerance": 2.0, "use_thumbnail": False},
        {"max_pixels_tolerance": 2.0, "use_thumbnail": False},
    ),
    "1.6B": ({"max_pixels_tolerance": 1.5, "use_thumbnail": True}, {"max_pixels_tolerance": 1.5}),
}


@pytest.mark.transformers5
@pytest.mark.parametrize("size", RELEASES_2025)
def test_image_settings_of_the_2025_releases(size, tmp_path) -> None:
    """Their own code read them at the top of processor_config.json; transformers' processor, which does not, cuts them
    otherwise.
    """
    said, wanted = RELEASES_2025[size]
    for file in ("preprocessor_config.json", "processor_config.json"):
        shutil.copyfile(SPELLINGS / "2025" / file, tmp_path / file)
    for key, value in said.items():
        edit(tmp_path, "processor_config.json", key, to=value)
    assert ImageSettings.from_folder(tmp_path) == ImageSettings(**wanted)
