"""A stick for this machine: this Python, this processor, the wheels from the package index."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def stick_once(demo_bundle, tmp_path_factory) -> Path:
    from lfm_package.image import image
    from lfm_package.targets import Platform

    folder = tmp_path_factory.mktemp("usb") / "cam"
    image(demo_bundle, ["fp32"], Platform.of("x86_64", f"3.{sys.version_info.minor}"), folder)
    return folder


@pytest.fixture
def stick(stick_once, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(stick_once, tmp_path / "usb" / "cam"))
