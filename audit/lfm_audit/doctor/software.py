"""Python, the packages, onnxruntime and its GPU, none of which is imported: whether it can be is looked at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from lfm_runtime import process
from lfm_runtime.engine import gpu_wheel
from lfm_runtime.installation import REFUSE_LINKS, WITHOUT_LINKS, from_stick

from lfm_audit.doctor.finding import Finding, Machine, judged

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


def _here(fix: str) -> str:
    """A remedy; what a stick has installed has no pip, and comes whole from a stick again."""
    return "install again from the stick: sh STICK/install.sh" if from_stick() and "pip " in fix else fix


def python(machine: Machine) -> Iterator[Finding]:
    """The interpreter, which must be of 64 bits."""
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


def packages(_: Machine) -> Iterator[Finding]:
    """What lfm-edge cannot do without."""
    found = {name: _version(name) for name in ("lfm-edge", "numpy", "pillow", "psutil")}
    missing = [name for name, there in found.items() if there is None]
    said = ", ".join(f"{name} {there}" for name, there in found.items() if there)
    if missing:
        fix = _here(f"pip install {' '.join(missing)}")
        yield Finding("packages", "problem", f"missing: {', '.join(missing)}", fix)
    else:
        yield Finding("packages", "ok", said)


def onnxruntime(machine: Machine) -> Iterator[Finding]:
    """Imported by another process: a wheel for another processor kills the one that imports it."""
    wheels = {name: there for name in ("onnxruntime", "onnxruntime-gpu") if (there := _version(name))}
    installed = ", ".join(f"{name} {there}" for name, there in wheels.items()) or "no onnxruntime"
    code = (
        "import onnxruntime as o; print(*(name.removesuffix('ExecutionProvider') for name in "
        "o.get_available_providers()))"
    )
    environment = process.child_environment(ORT_DISABLE_TELEMETRY="1")
    done = subprocess.run(process.python(code), capture_output=True, text=True, check=False, env=environment)  # noqa: S603
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        fix = "install another version; 1.21.0 does this on Cortex-A53 and A72: pip install 'onnxruntime!=1.21.0'"
        yield Finding("onnxruntime", "problem", f"{installed} crashes when imported ({name})", _here(fix))
    elif done.returncode:
        said = process.last_line(done.stderr)
        fix = next((fix for part, fix in _IMPORT_FAILURES if part in said), "pip install --force-reinstall onnxruntime")
        yield Finding("onnxruntime", "problem", f"{installed} cannot be imported: {said}", _here(fix))
    elif len(wheels) > 1:
        fix = (
            "they overwrite each other's files: pip uninstall -y onnxruntime onnxruntime-gpu, then install the "
            "one you want"
        )
        yield Finding("onnxruntime", "problem", f"{installed} are both installed", _here(fix))
    else:
        yield Finding("onnxruntime", "ok", f"{installed}, providers {done.stdout.strip()}")
    if (there := wheels.get("onnxruntime")) in REFUSE_LINKS:
        said = f"{there} refuses weights behind a link, as in the hub's cache"
        yield Finding("onnxruntime", "warning", said, _here(WITHOUT_LINKS))
    if wheels.get("onnxruntime") == "1.21.0" and machine.device.machine in ("aarch64", "arm64"):
        yield Finding(
            "onnxruntime",
            "problem",
            "1.21.0 kills processes on Cortex-A53 and A72",
            _here("pip install 'onnxruntime!=1.21.0'"),
        )


def gpu(machine: Machine) -> Iterator[Finding]:
    """A GPU, and whether this onnxruntime has kernels for it."""
    device, library = machine.device, gpu_wheel.cuda_library()
    if not device.gpu:
        unused = "; the GPU wheel is larger and has no use here" if library else ""
        yield judged("gpu", library is not None and "warning", f"none, the CPU is used{unused}", _CPU_WHEEL)
    elif library is None:
        yield Finding("gpu", "ok", f"{device.gpu}; this onnxruntime is for the CPU and does not use it")
    else:
        problem = gpu_wheel.gpu_problem(device)
        other = "NVIDIA's wheel for this JetPack" if device.soc else "a wheel built for this chip"
        fix = f"use the CPU wheel ({_CPU_WHEEL}), or {other}"
        yield judged(
            "gpu",
            problem is not None and "problem",
            f"{device.gpu}: {problem or 'this onnxruntime has kernels for it'}",
            fix,
        )


def telemetry(_: Machine) -> Iterator[Finding]:
    """Whether onnxruntime may send any."""
    said = os.environ.get("ORT_DISABLE_TELEMETRY", "not set")
    yield judged(
        "telemetry", said != "1" and "warning", f"ORT_DISABLE_TELEMETRY is {said}", "unset it: lfm-edge sets 1"
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
