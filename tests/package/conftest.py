"""What several tests of packing share."""

from pathlib import Path

import pytest
from lfm_profiles import read


@pytest.fixture
def packed(demo_bundle, tmp_path) -> Path:
    from lfm_package.pack import Extras, pack  # not where verify alone is tested, without the extra

    pack(demo_bundle, ["fp32"], tmp_path / "cam.tar", Extras(profile=read("pi5")))
    return tmp_path / "cam.tar"
