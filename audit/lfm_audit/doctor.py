"""What matters on this machine, each with what to do about it. Nothing here needs onnxruntime or numpy to be
importable: that is looked at first.

Facts come from `lfm_profiles.detect` and `Sensors`, so recorded trees of other machines can be examined as well.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from lfm_profiles import FINEST, Device, choose, this_device
from lfm_profiles.device import read
from lfm_profiles.sensors import Sensors
from lfm_runtime.engine import gpu_wheel
from lfm_runtime.errors import EdgeError, is_out_of_memory, more_memory
from lfm_runtime.formats.manifest import PROFILE
from lfm_runtime.installation import REFUSE_LINKS, WITHOUT_LINKS
from lfm_runtime.process import child_environment, last_line, python

if TYPE_CHECKING:
    from lfm_runtime.setup.setup import Setup

_HOT_C = 80.0
_LITTLE_DISK_MIB, _NO_DISK_MIB = 1024, 64
_LITTLE_MEMORY_MIB = 512
_MATTERS = {"asimddp", "asimdhp", "i8mm", "sve", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "f16c"}
# What an import of onnxruntime says when it fails, and what helps.
_CPU_WHEEL = "pip uninstall -y onnxruntime-gpu onnxruntime; pip install onnxruntime"
"""Both first: what of the two is left over shares files with what is taken away."""
_IMPORT_FAILURES = (
    (
        "GLIBCXX_",
        "the system's C++ library is too old (JetPack 5, old Ubuntu): install a newer system; JetPack 6 has it",
    ),
    ("GLIBC_", "the system's C library is too old for this wheel: install a newer system"),
    ("No module named", "install it: pip install 'onnxruntime>=1.20,!=1.21.0,!=1.24.0,!=1.24.1'"),
    (
        "cannot open shared object file",
        "a library is missing; for a GPU wheel it is CUDA's or cuDNN's: install them, or the CPU wheel",
    ),
    ("numpy", "numpy and onnxruntime are incompatible: pip install --upgrade numpy onnxruntime"),
)


@dataclass(frozen=True)
class Finding:
    """`state`: ok, warning or problem; `fix` is what to do, where it is not ok."""

    name: str
    state: str
    said: str
    fix: str = ""


def _judged(name: str, state: str | bool, said: str, fix: str) -> Finding:
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


def examine(machine: Machine) -> Iterator[Finding]:
    """Every check, one after the other; those of the bundle only where onnxruntime can be imported."""
    importable = True
    for check in CHECKS:
        for finding in _safely(check, machine):
            importable &= not (check is _onnxruntime and finding.state == "problem")
            yield finding
    if machine.bundle is not None and importable:
        for check in BUNDLE_CHECKS:
            for finding in _safely(check, machine):
                yield finding
                if finding.state == "problem":
                    return  # the rest would only say it again


def _safely(check: Callable[[Machine], Iterator[Finding]], machine: Machine) -> Iterator[Finding]:
    """Yield the findings of a check; an exception becomes a finding, and later checks still run."""
    try:
        yield from check(machine)
    except EdgeError as e:
        yield Finding(check.__name__.strip("_"), "problem", str(e))
    except PermissionError as e:
        said = f"{e.filename} cannot be read: {e.strerror}"
        yield Finding(check.__name__.strip("_"), "problem", said, "change its permissions")
    except Exception as e:  # noqa: BLE001
        if is_out_of_memory(e):
            said = f"not enough memory for this check ({' '.join(str(e).split()) or type(e).__name__})"
            yield Finding(check.__name__.strip("_"), "problem", said, more_memory())
            return
        yield Finding(check.__name__.strip("_"), "warning", f"this check failed ({type(e).__name__}: {e})", "report it")


# ------------------------------------------------------------------------------------------------ software


def _python(machine: Machine) -> Iterator[Finding]:
    where = "in a virtual environment" if sys.prefix != sys.base_prefix else "the system's own"
    said = f"{sys.version.split()[0]}, {machine.device.pointer_bits} bits, {where}"
    if machine.device.pointer_bits != 64:
        fix = (
            "install the 64-bit system (Raspberry Pi OS 64-bit): onnxruntime, numpy and pillow have no 32-bit "
            "wheels for Arm"
        )
        yield Finding("python", "problem", said, fix)
    else:
        yield Finding("python", "ok", said)


def _packages(_: Machine) -> Iterator[Finding]:
    found = {name: _version(name) for name in ("lfm-edge", "numpy", "pillow", "psutil")}
    missing = [name for name, there in found.items() if there is None]
    said = ", ".join(f"{name} {there}" for name, there in found.items() if there)
    if missing:
        yield Finding("packages", "problem", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    else:
        yield Finding("packages", "ok", said)


def _onnxruntime(machine: Machine) -> Iterator[Finding]:
    """Imported by another process: a wheel for another processor kills the one that imports it."""
    wheels = {name: there for name in ("onnxruntime", "onnxruntime-gpu") if (there := _version(name))}
    installed = ", ".join(f"{name} {there}" for name, there in wheels.items()) or "no onnxruntime"
    code = (
        "import onnxruntime as o; print(*(name.removesuffix('ExecutionProvider') for name in "
        "o.get_available_providers()))"
    )
    environment = child_environment(ORT_DISABLE_TELEMETRY="1")
    done = subprocess.run(python(code), capture_output=True, text=True, check=False, env=environment)  # noqa: S603
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        fix = "install another version; 1.21.0 does this on Cortex-A53 and A72: pip install 'onnxruntime!=1.21.0'"
        yield Finding("onnxruntime", "problem", f"{installed} crashes when imported ({name})", fix)
    elif done.returncode:
        said = last_line(done.stderr)
        fix = next((fix for part, fix in _IMPORT_FAILURES if part in said), "pip install --force-reinstall onnxruntime")
        yield Finding("onnxruntime", "problem", f"{installed} cannot be imported: {said}", fix)
    elif len(wheels) > 1:
        fix = (
            "they overwrite each other's files: pip uninstall -y onnxruntime onnxruntime-gpu, then install the "
            "one you want"
        )
        yield Finding("onnxruntime", "problem", f"{installed} are both installed", fix)
    else:
        yield Finding("onnxruntime", "ok", f"{installed}, providers {done.stdout.strip()}")
    if (there := wheels.get("onnxruntime")) in REFUSE_LINKS:
        said = f"{there} refuses weights behind a link, as in the hub's cache"
        yield Finding("onnxruntime", "warning", said, WITHOUT_LINKS)
    if wheels.get("onnxruntime") == "1.21.0" and machine.device.machine in ("aarch64", "arm64"):
        yield Finding(
            "onnxruntime",
            "problem",
            "1.21.0 kills processes on Cortex-A53 and A72",
            "pip install 'onnxruntime!=1.21.0'",
        )


def _gpu(machine: Machine) -> Iterator[Finding]:
    device, library = machine.device, gpu_wheel.cuda_library()
    if not device.gpu:
        unused = "; the GPU wheel is larger and has no use here" if library else ""
        yield _judged("gpu", library is not None and "warning", f"none, the CPU is used{unused}", _CPU_WHEEL)
    elif library is None:
        yield Finding("gpu", "ok", f"{device.gpu}; this onnxruntime is for the CPU and does not use it")
    else:
        problem = gpu_wheel.gpu_problem(device)
        other = "NVIDIA's wheel for this JetPack" if device.soc else "a wheel built for this chip"
        fix = f"use the CPU wheel ({_CPU_WHEEL}), or {other}"
        yield _judged(
            "gpu",
            problem is not None and "problem",
            f"{device.gpu}: {problem or 'this onnxruntime has kernels for it'}",
            fix,
        )


def _telemetry(_: Machine) -> Iterator[Finding]:
    said = os.environ.get("ORT_DISABLE_TELEMETRY", "not set")
    yield _judged(
        "telemetry", said != "1" and "warning", f"ORT_DISABLE_TELEMETRY is {said}", "unset it: lfm-edge sets 1"
    )


# ------------------------------------------------------------------------------------------------ hardware


def _processor(machine: Machine) -> Iterator[Finding]:
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


def _memory(machine: Machine) -> Iterator[Finding]:
    device = machine.device
    limit = f", at most {device.limit_mib} MiB by {device.limit_by}" if device.limit_mib is not None else ""
    said = f"{device.ram_total_mib} MiB, {device.free_mib} free now{limit}"
    if (device.free_mib or 0) < _LITTLE_MEMORY_MIB:
        fix = "end other programs, or see what fits: lfm-edge plan BUNDLE IMAGE"
        yield Finding("memory", "warning", said, fix)
    else:
        yield Finding("memory", "ok", said)


def _swap(machine: Machine) -> Iterator[Finding]:
    rows = [line.split() for line in (read(machine.root / "proc/swaps") or "").splitlines()[1:]]
    used = sum(int(row[3]) for row in rows if len(row) > 3) // 1024
    names = [row[0] for row in rows if row]
    little = (machine.device.ram_total_mib or 0) < 2100
    if not names:
        fix = "add compressed swap in memory: sudo apt install systemd-zram-generator"
        yield _judged("swap", little and "warning", "none: a process that needs too much memory is killed at once", fix)
    elif on_card := [name for name in names if "zram" not in name and not name.startswith("/dev/nvme")]:
        fix = "slow, and wears an SD card; better: sudo apt install systemd-zram-generator"
        yield _judged("swap", bool(used or little) and "warning", f"{', '.join(on_card)}, {used} MiB used", fix)
    else:
        yield Finding("swap", "ok", f"{', '.join(names)}, {used} MiB used")


def _disk(machine: Machine) -> Iterator[Finding]:
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


def _clocks(machine: Machine) -> Iterator[Finding]:
    governor = machine.device.governor
    if governor in ("powersave", "conservative"):
        fix = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        yield Finding("governor", "warning", f"{governor}: keeps the CPU slow", fix)
    else:
        yield Finding("governor", "ok", governor or "the kernel has no governor here")
    if machine.device.jetpack and (program := shutil.which("nvpmodel")):
        done = subprocess.run([program, "-q"], capture_output=True, text=True, check=False)  # noqa: S603
        yield Finding("power mode", "ok", " ".join(done.stdout.split()) or "unknown")


def _throttling(machine: Machine) -> Iterator[Finding]:
    bits = machine.device.throttled
    if bits is None:  # other boards have no firmware that tells
        if "Raspberry Pi" in (machine.device.board or ""):
            yield Finding("throttling", "ok", machine.sensors.missing.get("throttle", "no such sensor"))
        return
    now, before = ([b for b in bits if b.endswith(" before") == past] for past in (False, True))
    power = any("voltage" in bit for bit in bits)
    fix = "a stronger power supply (5 V at the board, 27 W for a Pi 5)" if power else "a heat sink or a fan"
    said = f"now: {', '.join(now) or 'no'}; since boot: {', '.join(b.removesuffix(' before') for b in before) or 'no'}"
    yield _judged("throttling", "problem" if now else bool(before) and "warning", said, fix)


def _sensors(machine: Machine) -> Iterator[Finding]:
    found = machine.sensors.read()
    warmest = max(found.temperature_c.values(), default=None)
    power = machine.sensors.power_from or machine.sensors.missing.get("power", "none")
    if warmest is None:
        yield Finding("temperature", "ok", machine.sensors.missing.get("temperature", "no sensor"))
    else:
        fix = "add a heat sink or a fan, or the board will be throttled"
        yield _judged("temperature", warmest >= _HOT_C and "warning", f"{warmest:.0f} °C", fix)
    yield Finding("power", "ok", power)


def _profile(machine: Machine) -> Iterator[Finding]:
    said = f"{choose(machine.device, ['CPUExecutionProvider']).profile.name} fits this machine"
    packed = machine.bundle / PROFILE if machine.bundle else None
    named = machine.profile or os.environ.get("LFM_EDGE_PROFILE") or (packed if packed and packed.is_file() else "")
    yield Finding("profile", "ok", f"{said}; {named} is selected" if named else said)


# ------------------------------------------------------------------------------------------------ the bundle


def _bundle(machine: Machine) -> Iterator[Finding]:
    from lfm_runtime.engine.loader import check_onnxruntime
    from lfm_runtime.setup.variants import unmet

    setup = _setup(machine)
    bundle = setup.bundle
    for path in bundle.graphs_read(setup.variant, setup.prefill):
        check_onnxruntime(bundle, path)
    size = sum(file.bytes for file in bundle.files.values())
    signed = ", signed" if (bundle.folder / "SHA256SUMS.sig").exists() else ""
    said = f"{', '.join(bundle.variants)}; {size / 1e6:,.0f} MB{signed}; {setup.profile.name} takes {setup.variant}"
    if not bundle.manifest:
        fix = "make a bundle with: lfm-edge export"
        yield Finding("bundle", "warning", f"{said}; a folder without manifest.json: nothing to check against", fix)
        return
    for wish in unmet(bundle, setup.profile):
        why = f"profile {setup.profile.name} would use {wish}, which the bundle lacks"
        do = f"lfm-edge quantize {bundle.folder} --variant {wish}"
        if not set(FINEST).intersection(bundle.variants):
            do = f"where the bundle was made: lfm-edge quantize BUNDLE --variant {wish}, then pack or stick it again"
        yield Finding("variants", "warning", why, do)
    steps = f"; to fit the memory: {'; '.join(setup.steps)}" if setup.steps else ""
    yield _judged("bundle", bool(steps) and "warning", f"{said}{steps}", "end other programs")


def _setup(machine: Machine) -> Setup:
    """Return the setup that `run` would use for the bundle on this machine."""
    from lfm_runtime import golden
    from lfm_runtime.model import Model  # noqa: F401  (what the process has once it is loaded is part of the forecast)
    from lfm_runtime.setup.resolve import resolve
    from lfm_runtime.setup.setup import Ask

    assert machine.bundle is not None
    ask = Ask((golden.SIZE,), golden.QUESTION)
    return resolve(machine.bundle, machine.profile, ask, device=machine.device)


def _prepared(machine: Machine) -> Iterator[Finding]:
    from lfm_runtime.engine.prepared import find, remove_damaged
    from lfm_runtime.formats.contract import DECODER, VISION_ENCODER

    setup = _setup(machine)
    bundle, variant, prefill = setup.bundle, setup.variant, setup.prefill
    if not setup.execution.prepared:
        yield Finding("prepared", "ok", f"profile {setup.profile.name} does not use prepared graphs")
        return
    paths = [setup.paths[graph.stem] for graph in (VISION_ENCODER, DECODER)]
    paths += [bundle.graphs(prefill)[1][DECODER.stem]] if prefill else []
    notes = remove_damaged(bundle, paths)
    found = [find(bundle, path) for path in paths]
    notes += [one.note for one in found if one.note]
    fix = f"lfm-edge prepare {machine.bundle} --variant {variant}" + (f" --prefill {prefill}" if prefill else "")
    if notes:
        yield Finding("prepared", "warning", notes[0], fix)
    elif all(one.path != path for one, path in zip(found, paths, strict=True)):
        yield Finding("prepared", "ok", f"{variant}, for this processor and onnxruntime")
    else:
        yield Finding(
            "prepared", "warning", f"{variant} is not prepared: it starts more slowly and takes more memory", fix
        )


CHECKS = (
    _python,
    _packages,
    _onnxruntime,
    _gpu,
    _telemetry,
    _processor,
    _memory,
    _swap,
    _disk,
    _clocks,
    _throttling,
    _sensors,
    _profile,
)
BUNDLE_CHECKS = (_bundle, _prepared)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
