"""Options and the one fixture: the bundle as it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("device")
    group.addoption("--bundle", type=Path, help="the installed bundle")
    group.addoption("--profile", default="", help="how to run: a name of lfm-edge profile list, or a .toml file")
    group.addoption("--variant", help="variant to test (default: the profile's)")


def pytest_configure(config: pytest.Config) -> None:
    for need in ("cpu", "arm", "cuda", "sensor"):
        config.addinivalue_line("markers", f"{need}: needs it, and is skipped with the reason where there is none")


@pytest.fixture(scope="session")
def installed(request: pytest.FixtureRequest):
    from lfm_audit.selftest import Installed

    bundle = request.config.getoption("--bundle")
    if bundle is None:
        pytest.fail("name the bundle: pytest device_tests --bundle PATH", pytrace=False)
    return Installed(bundle, request.config.getoption("--profile"), request.config.getoption("--variant"))
