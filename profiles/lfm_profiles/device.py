"""What the machine is, read from the files Linux keeps about it. Every file may be missing or unreadable: then the fact
is None, or empty.

`detect` takes the root of the tree, so that recorded trees of other devices can be read as well.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from lfm_profiles.cgroup import MIB, memory_limits
from lfm_profiles.cpu import features_of

# Arm's part numbers (and implementer, where it is not Arm), as in /proc/cpuinfo.
_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
    "0xd44": "Cortex-X1",
    "0xd80": "Cortex-A520",
    "0xd81": "Cortex-A720",
}
_SOCS = {
    "bcm2837": "BCM2837",
    "bcm2711": "BCM2711",
    "bcm2712": "BCM2712",
    "tegra210": "Tegra X1",
    "tegra194": "Xavier",
    "tegra234": "Orin",
}
_JETPACK = {32: "4", 34: "5", 35: "5", 36: "6", 38: "7"}  # L4T release → JetPack
THROTTLED = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
    16: "under-voltage before",
    17: "frequency capped before",
    18: "throttled before",
    19: "soft temperature limit before",
}


@dataclass(frozen=True)
class CoreType:
    """Processor cores of one kind: how many, their name and highest frequency."""

    count: int
    name: str  # "" where nothing tells
    max_mhz: int | None


@dataclass(frozen=True)
class Device:
    """Facts about a machine. Sizes are MiB."""

    system: str
    machine: str
    pointer_bits: int  # of this Python: 32 on a 32-bit userland, also under a 64-bit kernel
    page_size: int
    board: str | None = None
    compatible: tuple[str, ...] = ()
    soc: str | None = None
    cpu: str | None = None
    cores: tuple[CoreType, ...] = ()
    features: tuple[str, ...] = ()
    caches: Mapping[str, int] = field(default_factory=dict)  # name → KiB of one
    ram_total_mib: int | None = None
    ram_available_mib: int | None = None
    limit_mib: int | None = None  # of this process's control group, or of its address space
    limit_free_mib: int | None = None  # the least of all such limits
    limit_by: str | None = None
    address_free_mib: int | None = None  # of the address space, which `ulimit -v` limits
    gpu: str | None = None
    cuda: bool = False
    jetpack: str | None = None
    governor: str | None = None
    throttled: tuple[str, ...] | None = None  # None: no such sensor

    @property
    def usable_mib(self) -> int | None:
        """MiB that this process may use when nothing else runs; None where unknown."""
        return min((n for n in (self.ram_total_mib, self.limit_mib) if n is not None), default=None)

    @property
    def free_mib(self) -> int | None:
        """MiB that this process may use now; None where unknown."""
        return min((n for n in (self.ram_available_mib, self.limit_free_mib) if n is not None), default=None)

    @property
    def limit_binds(self) -> bool:
        """Whether a limit, and not what other programs take, keeps more from this process now."""
        return self.limit_free_mib is not None and self.limit_free_mib == self.free_mib

    def as_dict(self) -> dict[str, Any]:
        """Return all fields, usable_mib and free_mib as plain values for JSON."""
        return {**asdict(self), "usable_mib": self.usable_mib, "free_mib": self.free_mib}


def detect(
    root: Path = Path("/"),
    *,
    system: str = "",
    machine: str = "",
    pointer_bits: int = 8 * struct.calcsize("P"),
    page_size: int = 0,
) -> Device:
    """The device whose files lie under `root`; the rest of what Python says of this machine, unless given."""
    system, machine = system or platform.system(), machine or platform.machine()
    cpuinfo = read(root / "proc/cpuinfo") or ""
    memory = _memory_of(root, system)
    compatible = tuple(s for s in (read(root / "proc/device-tree/compatible") or "").split("\0") if s)
    limit = _limits(root)
    l4t = re.search(r"# R(\d+) .*REVISION: ([\d.]+)", read(root / "etc/nv_tegra_release") or "")
    gpu = _gpu(root, compatible)
    return Device(
        system,
        machine,
        pointer_bits,
        page_size or _page_size(),
        board=_board(root),
        compatible=compatible,
        soc=next((name for key, name in _SOCS.items() if any(key in entry for entry in compatible)), None),
        cpu=_cpu_name(cpuinfo),
        cores=_cores(root, cpuinfo),
        features=features_of(cpuinfo, machine),
        caches=_caches(root),
        ram_total_mib=memory[0],
        ram_available_mib=memory[1],
        limit_mib=limit[0],
        limit_free_mib=limit[1],
        limit_by=limit[2],
        address_free_mib=_address_free(root),
        gpu=gpu,
        cuda=bool(gpu),
        jetpack=f"{_JETPACK.get(int(l4t[1]), '?')} (L4T {l4t[1]}.{l4t[2]})" if l4t else None,
        governor=read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        throttled=_throttled(root),
    )


@functools.cache
def this_device() -> Device:
    """This machine, looked at once a process: what of it changes, `now` tells."""
    return detect()


def now(device: Device, root: Path = Path("/")) -> Device:
    """Return `device` with the memory that is free now."""
    return replace(
        device,
        ram_available_mib=_memory_of(root, device.system)[1],
        limit_free_mib=_limits(root)[1],
        address_free_mib=_address_free(root),
    )


def read(path: Path) -> str | None:
    """A small file's text without the end of line; None where there is none, it may not be read, or it is empty."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \t\r\n\0") or None
    except OSError:
        return None


def number(path: Path) -> int | None:
    """Return the whole number in a file; None where the file is missing or holds something else."""
    text = read(path)
    return int(text) if text and re.fullmatch(r"-?\d+", text) else None


def _board(root: Path) -> str | None:
    tree = read(root / "proc/device-tree/model")
    if tree:
        return tree
    parts = [read(root / f"sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name")]
    return " ".join(part for part in parts if part) or None


def _cpu_name(cpuinfo: str) -> str | None:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else None


def _cores(root: Path, cpuinfo: str) -> tuple[CoreType, ...]:
    """Return the physical cores by kind, the fastest kind first."""
    kinds: dict[tuple[str, int | None], int] = {}
    seen: set[str] = set()
    for block in re.split(r"\n\s*\n", cpuinfo):
        values = dict(re.findall(r"^([^:\n]+?)\s*:[ \t]*(.*)$", block, re.MULTILINE))
        if not values.get("processor", "").isdigit():
            continue
        folder = root / f"sys/devices/system/cpu/cpu{values['processor']}"
        siblings = read(folder / "topology/thread_siblings_list") or f"alone {values['processor']}"
        if siblings in seen:
            continue
        seen.add(siblings)
        part = values.get("CPU part", "")
        name = (
            _PARTS.get(part, f"part {part}" if part else "")
            if values.get("CPU implementer", "0x41") == "0x41"
            else f"part {part}"
        )
        khz = number(folder / "cpufreq/cpuinfo_max_freq")
        kind = name, khz // 1000 if khz else None
        kinds[kind] = kinds.get(kind, 0) + 1
    found = [CoreType(count, name, mhz) for (name, mhz), count in kinds.items()]
    return tuple(sorted(found, key=lambda core: -(core.max_mhz or 0)))


def _caches(root: Path) -> dict[str, int]:
    """Return the sizes of the first core's caches in KiB, by name: L1d, L2, L3."""
    found = {}
    for folder in listed(root / "sys/devices/system/cpu/cpu0/cache", "index*"):
        level, kind, size = (read(folder / name) for name in ("level", "type", "size"))
        if level and size and kind != "Instruction" and (amount := re.fullmatch(r"(\d+)([KM])", size)):
            found[f"L{level}{'d' if level == '1' else ''}"] = int(amount[1]) * (1024 if amount[2] == "M" else 1)
    return dict(sorted(found.items()))


def listed(folder: Path, pattern: str) -> list[Path]:
    """What is in a folder; nothing where it is not there or may not be read."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _memory(root: Path) -> tuple[int | None, int | None]:
    """(total, available) in MiB; None where /proc is mounted without them (subset=pid, systemd's ProcSubset=pid)."""
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB", read(root / "proc/meminfo") or "", re.MULTILINE))
    total, available = (int(values[key]) // 1024 if key in values else None for key in ("MemTotal", "MemAvailable"))
    return total, available


def _memory_of(root: Path, system: str) -> tuple[int | None, int | None]:
    return _memory_elsewhere() if root == Path("/") and system != "Linux" else _memory(root)


def _limits(root: Path) -> tuple[int | None, int | None, str | None]:
    """(MiB, MiB free, who limits): the lowest limit, and the least that is free of any: a group around may be nearer to
    its end.
    """
    limits = [*memory_limits(root), *([space] if root == Path("/") and (space := _address_space()) else [])]
    limit, _, limited_by = min(limits, default=(None, None, None), key=lambda entry: entry[0] or 0)
    return limit, min((free for _, free, _ in limits if free is not None), default=None), limited_by


def _memory_elsewhere() -> tuple[int | None, int | None]:
    memory = psutil.virtual_memory()
    return memory.total // MIB, memory.available // MIB


def _address_space() -> tuple[int, int | None, str] | None:
    """Return (MiB, MiB free, "ulimit -v") of the address space's limit; None where there is none."""
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most in (resource.RLIM_INFINITY, -1) or most >= 1 << 60:
        return None
    return most // MIB, max(0, most - psutil.Process().memory_info().vms) // MIB, "ulimit -v"


def _address_free(root: Path) -> int | None:
    space = _address_space() if root == Path("/") else None
    return space[1] if space else None


def _page_size() -> int:
    return os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def _gpu(root: Path, compatible: tuple[str, ...]) -> str | None:
    """Return the model of an NVIDIA GPU that has a driver, "integrated" for a Jetson's; None without one."""
    if any("tegra" in entry for entry in compatible):
        driver = any(
            (root / name).exists() for name in ("dev/nvhost-gpu", "dev/nvgpu", "dev/nvidia0", "sys/devices/gpu.0")
        )
        return "integrated" if driver else None
    for folder in listed(root / "proc/driver/nvidia/gpus", "*"):
        model = re.search(r"^Model:\s*(.+)$", read(folder / "information") or "", re.MULTILINE)
        return model[1].strip() if model else "NVIDIA"
    return None


def _throttled(root: Path) -> tuple[str, ...] | None:
    """Return the meanings of a Raspberry Pi's throttle bits that are set; None elsewhere."""
    for path in listed(root / "sys/devices/platform", "soc*/soc*:firmware/get_throttled"):
        text = read(path)
        if text and re.fullmatch(r"(0x)?[0-9a-fA-F]+", text):
            bits = int(text, 16)
            return tuple(meaning for bit, meaning in THROTTLED.items() if bits >> bit & 1)
    return None
