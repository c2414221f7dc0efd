"""A server of the demo bundle for all tests of a process."""

from __future__ import annotations

import pytest
from servers import Server


@pytest.fixture(scope="session")
def server(demo_bundle):
    pytest.importorskip("starlette")
    found = Server(demo_bundle, "--max-body-mib", "8")
    yield found
    assert found.stop() == 0
