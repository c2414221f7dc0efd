"""Processor, memory, disk, clocks, sensors, and the profile that fits them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lfm_profiles import choose
from lfm_profiles.device import read
from lfm_runtime.errors import EdgeError
from lfm_runtime.formats.manifest import PROFILE, Manifest
from lfm_runtime.setup.machine import room_advice
from lfm_runtime.setup.profile import find_profile

from lfm_audit.doctor.finding import Finding, Machine, judged

_HOT_C = 80.0
_LITTLE_DISK_MIB, _NO_DISK_MIB = 1024, 64
_LITTLE_MEMORY_MIB = 512
_MATTERS = {"asimddp", "asimdhp", "i8mm", "sve", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "f16c"}


def processor(machine: Machine) -> Iterator[Finding]:
    """Board, cores, and the instructions that matter."""
    device = machine.device
    cores = " + ".join(" ".join(filter(None, (str(c.count), c.name))) for c in device.cores)
    matters = " ".join(name for name in device.features if name in _MATTERS)
    said = (
        f"{device.board or 'unknown board'}; {device.cpu or device.soc or device.machine}; cores: "
        f"{cores or '?'}; {matters}"
    )
    if device.machine in ("aarch64", "arm64") and "asimddp" not in device.features:
        yield Finding("processor", "warning", f"{said}; no dot products: int8 is slow here", "take the int4 variant")
    elif device.machine == "x86_64" and "avx2" not in device.features:
        yield Finding(
            "processor", "warning", f"{said}; no AVX2: everything is slow here", "take int4 and few image tokens"
        )
    else:
        yield Finding("processor", "ok", said)


def memory(machine: Machine) -> Iterator[Finding]:
    """Memory that is free, and limits on it."""
    device = machine.device
    limit = f", at most {device.limit_mib} MiB by {device.limit_by}" if device.limit_mib is not None else ""
    said = f"{device.ram_total_mib} MiB, {device.free_mib} free now{limit}"
    if (device.free_mib or 0) < _LITTLE_MEMORY_MIB:
        fix = f"{room_advice(device)}, or see what fits: lfm-edge plan BUNDLE IMAGE"
        yield Finding("memory", "warning", said, fix)
    else:
        yield Finding("memory", "ok", said)


def swap(machine: Machine) -> Iterator[Finding]:
    """Swap: none, in memory, or on a card."""
    rows = [line.split() for line in (read(machine.root / "proc/swaps") or "").splitlines()[1:]]
    used = sum(int(row[3]) for row in rows if len(row) > 3) // 1024
    names = [row[0] for row in rows if row]
    little = (machine.device.ram_total_mib or 0) < 2100
    if not names:
        fix = "add compressed swap in memory: sudo apt install systemd-zram-generator"
        yield judged("swap", little and "warning", "none: a process that needs too much memory is killed at once", fix)
    elif on_card := [name for name in names if "zram" not in name and not name.startswith("/dev/nvme")]:
        fix = "slow, and wears an SD card; better: sudo apt install systemd-zram-generator"
        yield judged("swap", bool(used or little) and "warning", f"{', '.join(on_card)}, {used} MiB used", fix)
    else:
        yield Finding("swap", "ok", f"{', '.join(names)}, {used} MiB used")


def disk(machine: Machine) -> Iterator[Finding]:
    """Room where the bundle lies."""
    place = (machine.bundle if machine.bundle and machine.bundle.exists() else Path.cwd()).resolve()
    free = shutil.disk_usage(place).free >> 20
    said = f"{free} MiB free at {place}"
    if free < _LITTLE_DISK_MIB:
        yield Finding(
            "disk",
            "problem" if free < _NO_DISK_MIB else "warning",
            said,
            "make room: prepare and unpack write whole models",
        )
    else:
        yield Finding("disk", "ok", said)


def clocks(machine: Machine) -> Iterator[Finding]:
    """What keeps the CPU slow: governor and power mode."""
    governor = machine.device.governor
    if governor in ("powersave", "conservative"):
        fix = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        yield Finding("governor", "warning", f"{governor}: keeps the CPU slow", fix)
    else:
        yield Finding("governor", "ok", governor or "the kernel has no governor here")
    if machine.device.jetpack and (program := shutil.which("nvpmodel")):
        done = subprocess.run([program, "-q"], capture_output=True, text=True, check=False)  # noqa: S603
        yield Finding("power mode", "ok", " ".join(done.stdout.split()) or "unknown")


def throttling(machine: Machine) -> Iterator[Finding]:
    """What a Raspberry Pi's firmware says of voltage and heat."""
    bits = machine.device.throttled
    if bits is None:  # other boards have no firmware that tells
        if "Raspberry Pi" in (machine.device.board or ""):
            yield Finding("throttling", "ok", machine.sensors.missing.get("throttle", "no such sensor"))
        return
    now, before = ([b for b in bits if b.endswith(" before") == past] for past in (False, True))
    power = any("voltage" in bit for bit in bits)
    fix = "a stronger power supply (5 V at the board, 27 W for a Pi 5)" if power else "a heat sink or a fan"
    said = f"now: {', '.join(now) or 'no'}; since boot: {', '.join(b.removesuffix(' before') for b in before) or 'no'}"
    yield judged("throttling", "problem" if now else bool(before) and "warning", said, fix)


def sensors(machine: Machine) -> Iterator[Finding]:
    """Temperature, and where power is read."""
    found = machine.sensors.read()
    warmest = max(found.temperature_c.values(), default=None)
    power = machine.sensors.power_from or machine.sensors.missing.get("power", "none")
    if warmest is None:
        yield Finding("temperature", "ok", machine.sensors.missing.get("temperature", "no sensor"))
    else:
        fix = "add a heat sink or a fan, or the board will be throttled"
        yield judged("temperature", warmest >= _HOT_C and "warning", f"{warmest:.0f} °C", fix)
    yield Finding("power", "ok", power)


def profile(machine: Machine) -> Iterator[Finding]:
    """The profile that fits, and the one selected instead. Raises SettingError where that one cannot be read."""
    said = f"{choose(machine.device, ['CPUExecutionProvider']).profile.name} fits this machine"
    named = machine.profile or os.environ.get("LFM_EDGE_PROFILE") or _packed(machine.bundle)
    if named:
        find_profile(named)
    yield Finding("profile", "ok", f"{said}; {named} is selected" if named else said)


def _packed(bundle: Path | None) -> str:
    """The profile that was packed with a bundle; "" where none was. What is wrong with a bundle is said later."""
    with suppress(EdgeError):
        manifest = Manifest.read(bundle) if bundle else None
        return str(bundle / PROFILE) if bundle and manifest and PROFILE in manifest.files else ""
    return ""
