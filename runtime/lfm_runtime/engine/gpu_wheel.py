"""Which GPUs and which CUDA an onnxruntime wheel was built for, read off its CUDA library. Otherwise "no kernel image"
comes at the first run, and a library of another version is a line on stderr and a model that silently runs on the CPU.

A library keeps its GPU code in fat binaries (CUDA binary utilities, "fatbin"): a header of 16 bytes (magic, version,
header size, size of what follows), then entries with a header each: kind (1 PTX, 2 machine code), header size at byte
4, size at 8, architecture at 28.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import mmap
import os
import re
import struct
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from lfm_profiles import Device

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
_NEEDED = re.compile(rb"\0(lib(?:cublasLt|cublas|cudart|cudnn|cufft|curand|nvrtc)\.so\.(\d+))(?=\0)")
_CUDNN = ("libcudnn.so.9", 9)
"""Loaded when it is first needed, by sums of whole numbers for one, so that the library does not name it (onnxruntime
1.31).
"""
_STRINGS = 16 << 20  # names of what a library needs stand at its beginning
_MAJORS = range(8, 20)  # of CUDA and cuDNN, to tell which is there instead
_MAGIC = bytes.fromhex("50ed55ba")
_PTX, _MACHINE_CODE = 1, 2
_OF_SOC = {"Orin": 87, "Xavier": 72, "Tegra X1": 53}


def cuda_library() -> Path | None:
    """Of the onnxruntime that is installed, which is not imported; None where it is for the CPU alone."""
    found = importlib.util.find_spec("onnxruntime")
    for folder in (found.submodule_search_locations if found else None) or ():
        library = Path(folder) / "capi" / "libonnxruntime_providers_cuda.so"
        if library.exists():
            return library
    return None


def gpu_problem(device: Device) -> str | None:
    """Why the onnxruntime that is installed cannot compute on this machine's GPU; None where nothing is known to be in
    the way.
    """
    if not device.gpu:
        return "there is no NVIDIA GPU with a driver"
    library = cuda_library()
    if library is None:
        return "the onnxruntime installed is only for the CPU (install onnxruntime-gpu; on a Jetson NVIDIA's own wheel)"
    capability = compute_capability(device)
    if capability is not None and not has_kernels(_names(library), capability, integrated=device.soc is not None):
        built = ", ".join(sorted(kernel_architectures(library))) or "no GPU"
        return f"the onnxruntime installed has kernels for {built}, this chip is sm_{capability}"
    return library_problem(library)


@functools.cache  # libraries that were loaded stay
def library_problem(library: Path) -> str | None:
    """Which of the CUDA libraries it needs cannot be loaded, and of which version they are here; None where all can.
    They are looked for in Python's packages (nvidia-cublas …) and wherever the system looks, and stay loaded.
    """
    with library.open("rb") as f:
        needed = [(found[1].decode(), int(found[2])) for found in _NEEDED.finditer(f.read(_STRINGS))]
    if needed and not any(name.startswith("libcudnn") for name, _ in needed):
        needed.append(_CUDNN)
    _preload()
    missing = [(name, major) for name, major in needed if not _loads(name)]
    if not missing:
        return None
    name, major = missing[0]
    others = [n for n in _MAJORS if n != major and _loads(f"{name.rpartition('.')[0]}.{n}")]
    there = f"version {others[0]} is here" if others else "no other version is here either"
    return (
        f"the onnxruntime installed was built for CUDA libraries that are not here: {name} ({there}); install that "
        "version "
        "(pip install 'onnxruntime-gpu[cuda,cudnn]'), or an onnxruntime built for yours"
    )


def _preload() -> None:
    """CUDA's libraries that came as Python packages, which the system does not find by itself."""
    import onnxruntime as ort  # reading a wheel needs none

    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(AttributeError, OSError),
    ):  # it prints what it does not find
        ort.preload_dlls()  # since onnxruntime 1.21


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def kernel_architectures(library: Path) -> dict[str, int]:
    """How many kernels there are by architecture: sm_87 (machine code), compute_90 (PTX, compiled for later chips)."""
    found: dict[str, int] = {}
    for name in _names(library):
        found[name] = found.get(name, 0) + 1
    return found


def _names(library: Path) -> Iterator[str]:
    """As they are found: the library has hundreds of megabytes, and the first that fits is enough."""
    with library.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(_MAGIC)
        while at >= 0:
            yield from _entries(data, at)
            at = data.find(_MAGIC, at + 4)


def _entries(data: mmap.mmap, at: int) -> list[str]:
    """Of the fat binary at this place; none where the magic number stands there by chance."""
    if at + 16 > len(data):
        return []
    version, header, size = struct.unpack_from("<HHQ", data, at + 4)
    place, end = at + header, at + header + size
    if version != 1 or header != 16 or end > len(data):
        return []
    found = []
    while place + 64 <= end:
        kind, _, entry_header, length = struct.unpack_from("<HHIQ", data, place)
        if kind not in (_PTX, _MACHINE_CODE) or not 64 <= entry_header <= 1024:
            return []
        found.append(f"{'compute' if kind == _PTX else 'sm'}_{struct.unpack_from('<I', data, place + 28)[0]}")
        place += entry_header + length
    return found


def compute_capability(device: Device) -> int | None:
    """Return the GPU's compute capability times ten, 87 for 8.7; None where nothing tells."""
    return _OF_SOC[device.soc] if device.soc in _OF_SOC else _asked_capability(gpu_in_use())


def gpu_in_use() -> str:
    """Return the first GPU that CUDA_VISIBLE_DEVICES names, else "0", as nvidia-smi's -i takes it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"


@functools.cache  # asking takes tens of milliseconds
def _asked_capability(gpu: str) -> int | None:
    words = ["nvidia-smi", "--query-gpu=compute_cap", "-i", gpu, "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
        return int(float(done.stdout.split()[0]) * 10 + 0.5)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def has_kernels(architectures: Iterable[str], capability: int, *, integrated: bool) -> bool:
    """Whether one of these runs on the chip. Machine code runs on its own chip and, except on a Jetson, on later ones
    of the same major number; PTX on all later ones (CUDA C++ Programming Guide, "Application Compatibility").
    """
    for name in architectures:
        kind, number = name.split("_")
        built = int(number)
        same = built // 10 == capability // 10
        if built == capability or (built < capability and (kind == "compute" or (same and not integrated))):
            return True
    return False
