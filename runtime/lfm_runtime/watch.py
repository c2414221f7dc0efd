"""What is seen of a process from outside while it works: its memory twenty times a second, the machine's state twice a second.

Runs in the process that waits, so that the one measured is not slowed by more than the kernel's answers (some 20 µs each).
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from lfm_profiles.sensors import Reading, Sensors

MIB = float(1 << 20)
_MEMORY_S, _STATE_S = 0.05, 0.5


@dataclass(frozen=True)
class MemorySample:
    """Resident memory of the process. MiB; `at` is time.perf_counter()."""

    at: float
    anonymous: float
    mapped: float


@dataclass(frozen=True)
class StateSample:
    """The machine."""

    at: float  # time.perf_counter()
    unix_s: float
    reading: Reading
    available_mib: float
    busy_s: float  # of all processors, since the machine started; what a host took away included
    swapped_mib: float  # read from and written to swap since the machine started


def machine_state(sensors: Sensors) -> StateSample:
    """Now."""
    times = psutil.cpu_times()
    # Guest time is in user time already; time stolen by the host is time that somebody else had.
    busy = times.user + times.system + getattr(times, "nice", 0.0) + getattr(times, "irq", 0.0) + getattr(times, "softirq", 0.0)
    swap = _pages_swapped() * os.sysconf("SC_PAGE_SIZE") / MIB if hasattr(os, "sysconf") else 0.0
    return StateSample(
        time.perf_counter(), time.time(), sensors.read(), psutil.virtual_memory().available / MIB,
        busy + getattr(times, "steal", 0.0), swap,
    )  # fmt: skip


@dataclass
class Watch:
    """Everything seen from `of(pid)` to `end()`."""

    sensors: Sensors
    memory: list[MemorySample] = field(default_factory=list)
    states: list[StateSample] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def of(self, pid: int) -> None:
        """Begin."""
        self.states.append(machine_state(self.sensors))
        self._thread = threading.Thread(target=self._run, args=(pid,), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """The process has ended."""
        self._done.set()
        if self._thread:
            self._thread.join()
        self.states.append(machine_state(self.sensors))

    def _run(self, pid: int) -> None:
        statm = Path(f"/proc/{pid}/statm")
        next_state = time.perf_counter() + _STATE_S
        while not self._done.wait(_MEMORY_S):
            try:
                fields = statm.read_text().split()
            except OSError:  # it has ended, or there is no /proc
                fields = []
            if len(fields) > 2 and fields[1] != "0":
                page = os.sysconf("SC_PAGE_SIZE") / MIB
                resident, shared = int(fields[1]) * page, int(fields[2]) * page
                self.memory.append(MemorySample(time.perf_counter(), resident - shared, shared))
            if time.perf_counter() >= next_state:
                self.states.append(machine_state(self.sensors))
                next_state += _STATE_S


def _pages_swapped() -> int:
    """Read and written, since the machine started. (psutil's counter warns in containers.)"""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("pswpin ", "pswpout ")))
