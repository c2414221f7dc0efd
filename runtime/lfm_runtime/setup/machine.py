"""What this machine is and what onnxruntime can compute on here, found out once a process."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import onnxruntime as ort
from lfm_profiles import Device, this_device

from lfm_runtime.engine.gpu_wheel import CUDA, gpu_problem


@dataclass(frozen=True)
class Machine:
    """This machine. Its free memory is that of the moment when it was looked at: see lfm_profiles.now."""

    device: Device
    providers: tuple[str, ...]  # of the onnxruntime installed
    gpu_problem: str | None  # why a GPU cannot be used; None where nothing is known to be in the way

    @property
    def usable_providers(self) -> tuple[str, ...]:
        """Providers of this onnxruntime that can compute on this machine."""
        return tuple(name for name in self.providers if not (name == CUDA and self.gpu_problem))


def room_advice(device: Device) -> str:
    """What gives this process more memory."""
    return f"raise the limit ({device.limit_by})" if device.limit_binds else "close other programs"


@functools.cache
def this_machine() -> Machine:
    """Return this machine, which is looked at once, at the first call."""
    device = this_device()
    return Machine(device, tuple(ort.get_available_providers()), gpu_problem(device))
