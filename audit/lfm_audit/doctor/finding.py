"""What a check says, and the machine that it looks at.

Facts come from `lfm_profiles.detect` and `Sensors`, so recorded trees of other machines can be examined as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lfm_profiles import Device, this_device
from lfm_profiles.sensors import Sensors


@dataclass(frozen=True)
class Finding:
    """`state`: ok, warning or problem; `fix` is what to do, where it is not ok."""

    name: str
    state: str
    said: str
    fix: str = ""


def judged(name: str, state: str | bool, said: str, fix: str) -> Finding:
    """Return a finding of this state; where `state` is False it is "ok", without the fix."""
    return Finding(name, str(state), said, fix) if state else Finding(name, "ok", said)


@dataclass(frozen=True)
class Machine:
    """The machine that is examined, and the bundle and profile to be run on it."""

    device: Device
    sensors: Sensors
    root: Path = Path("/")
    bundle: Path | None = None
    profile: str = ""

    @staticmethod
    def here(bundle: Path | None, profile: str) -> Machine:
        """Return the machine that this process runs on."""
        return Machine(this_device(), Sensors(), Path("/"), bundle, profile)
