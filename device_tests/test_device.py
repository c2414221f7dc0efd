"""The checks of `lfm-edge selftest`, one test each; what a failure says is what to do."""

from __future__ import annotations

import pytest
from lfm_audit.selftest import CHECKS, CheckError, Installed, Skipped

CASES = [
    pytest.param(check, id=check.name.replace(" ", "-"), marks=getattr(pytest.mark, check.needs)) for check in CHECKS
]


@pytest.mark.parametrize("check", CASES)
def test_device(installed: Installed, check) -> None:
    try:
        print(check.run(installed))
    except Skipped as e:
        pytest.skip(str(e))
    except CheckError as e:
        pytest.fail(str(e), pytrace=False)
