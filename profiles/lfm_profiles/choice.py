"""Which shipped profile fits a device, and why."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lfm_profiles.device import Device
from lfm_profiles.files import names, read, read_match
from lfm_profiles.schema import Match, Profile

# A board says more than a GPU, that more than the processor, that more than its architecture; memory decides between
# two of a kind.
_WEIGHTS = {"board": 1000, "gpu": 100, "cpu": 10, "machine": 2, "system": 2, "max_ram_mib": 1, "min_ram_mib": 1}
FALLBACK = "generic"


@dataclass(frozen=True)
class Choice:
    """A profile, and the reasons why it was chosen."""

    profile: Profile
    reasons: tuple[str, ...]


def choose(device: Device, providers: Container[str] = ()) -> Choice:
    """The profile `auto` means.

    Args:
        device: see device.detect.
        providers: execution providers that onnxruntime has here; a profile for a GPU is taken only with its first one.
    """
    found: list[tuple[int, str, tuple[str, ...]]] = []
    for name in names():
        match = read_match(name)
        reasons = _reasons(match, device)
        if reasons and (not match.gpu or read(name).providers[0] in providers):
            found.append((sum(_WEIGHTS[key] for key in reasons), name, tuple(reasons.values())))
    if not found:
        return Choice(read(FALLBACK), ("no other profile fits",))
    _, name, why = max(found)
    return Choice(read(name), why)


def _reasons(match: Match, device: Device) -> dict[str, str]:
    """Rule → how the device meets it, for people; empty when there are no rules, or one is not met."""
    ram = device.usable_mib
    board = next((b for b in (*device.compatible, device.board or "") for p in match.board if fnmatchcase(b, p)), None)
    features = [next((f for f in device.features if fnmatchcase(f, p)), None) for p in match.cpu]
    rules: dict[str, tuple[bool, bool, str]] = {  # rule → (is there, holds, reason)
        "board": (bool(match.board), board is not None, f"the board is {board}"),
        "machine": (bool(match.machine), device.machine in match.machine, f"the architecture is {device.machine}"),
        "system": (bool(match.system), device.system == match.system, f"the system is {device.system}"),
        "cpu": (bool(match.cpu), None not in features, f"the processor has {', '.join(f for f in features if f)}"),
        "gpu": (bool(match.gpu), device.cuda, f"there is a GPU ({device.gpu})"),
        "min_ram_mib": (
            match.min_ram_mib > 0,
            ram is not None and ram >= match.min_ram_mib,
            f"{ram} MiB are at least {match.min_ram_mib}",
        ),
        "max_ram_mib": (
            match.max_ram_mib > 0,
            ram is not None and ram <= match.max_ram_mib,
            f"{ram} MiB are at most {match.max_ram_mib}",
        ),
    }
    there = {key: (holds, reason) for key, (there, holds, reason) in rules.items() if there}
    return {key: reason for key, (_, reason) in there.items()} if all(holds for holds, _ in there.values()) else {}
