"""What is seen of a process from outside while it works: its memory twenty times a second, the machine's state twice a
second, and what it has of a GPU as often as the driver's program can be asked.

Runs in the process that waits, so that the one measured loses no more than the processor's time for these looks: a
quarter of a percent of one core (docs/performance.md), which is why files stay open and counters are read at the two
ends alone.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import psutil
from lfm_profiles.sensors import Reading, Sensors
from lfm_runtime.engine.gpu import gpu_memory_used

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
    """Sensors and available memory of the machine at one moment."""

    at: float  # time.perf_counter()
    unix_s: float
    reading: Reading
    available_mib: float


@dataclass(frozen=True)
class Counters:
    """Processor time and swap traffic of the machine since it started."""

    at: float  # time.perf_counter()
    busy_s: float  # of all processors; what a host took away included
    swapped_mib: float  # read from and written to swap


def machine_state(sensors: Sensors) -> StateSample:
    """Return the machine's sensors and available memory now; 0 MiB where psutil cannot read it."""
    try:
        available = psutil.virtual_memory().available / MIB
    except OSError:
        available = 0.0
    return StateSample(time.perf_counter(), time.time(), sensors.read(), available)


def sees_the_machine() -> bool:
    """Whether what other programs do can be seen: not where /proc is mounted with processes alone (systemd's
    ProcSubset=pid).
    """
    try:
        psutil.cpu_times()
        psutil.virtual_memory()
    except OSError:
        return False
    return True


def counters() -> Counters:
    """Return the machine's counters now; busy_s and swapped_mib are 0 where psutil cannot read them."""
    try:
        times = psutil.cpu_times()
    except OSError:
        return Counters(time.perf_counter(), 0.0, 0.0)
    # Guest time is in user time already; time stolen by the host is time that somebody else had.
    busy = (
        times.user
        + times.system
        + getattr(times, "nice", 0.0)
        + getattr(times, "irq", 0.0)
        + getattr(times, "softirq", 0.0)
    )
    swap = _pages_swapped() * os.sysconf("SC_PAGE_SIZE") / MIB if hasattr(os, "sysconf") else 0.0
    return Counters(time.perf_counter(), busy + getattr(times, "steal", 0.0), swap)


@dataclass
class Watch:
    """Everything seen from `of(pid)` to `end()`. `gpu`: the process computes on one."""

    sensors: Sensors
    gpu: bool = False
    memory: list[MemorySample] = field(default_factory=list)
    states: list[StateSample] = field(default_factory=list)
    gpu_mib: list[int] = field(default_factory=list)
    begun: Counters = field(default_factory=counters)
    ended: Counters = field(default_factory=counters)
    _watching: bool = False
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, pid: int) -> None:
        """Start to sample process `pid` and the machine, in daemon threads."""
        self.states.append(machine_state(self.sensors))
        self.begun, self._watching = counters(), True
        for run in (self._run, *([self._ask_the_gpu] if self.gpu else [])):
            thread = threading.Thread(target=run, args=(pid,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def end(self) -> None:
        """Stop the threads and take the last sample of the machine."""
        self._watching = False
        for thread in self._threads:
            thread.join()
        self.ended = counters()
        self.states.append(machine_state(self.sensors))

    def _run(self, pid: int) -> None:
        next_state = time.perf_counter() + _STATE_S
        with ExitStack() as open_files:
            try:
                statm = open_files.enter_context(Path(f"/proc/{pid}/statm").open("rb", buffering=0))
            except OSError:  # there is no /proc
                statm = None
            while self._watching:
                time.sleep(_MEMORY_S)
                if statm:
                    self._look(statm)
                if time.perf_counter() >= next_state:
                    self.states.append(machine_state(self.sensors))
                    next_state += _STATE_S

    def _ask_the_gpu(self, pid: int) -> None:
        while self._watching:
            if (used := gpu_memory_used(pid)) is not None:
                self.gpu_mib.append(used)
            time.sleep(_STATE_S)

    def _look(self, statm: FileIO) -> None:
        try:
            statm.seek(0)
            fields = statm.read().split()
        except OSError:  # the process has ended
            return
        if len(fields) > 2 and fields[1] != b"0":
            page = os.sysconf("SC_PAGE_SIZE") / MIB
            resident, shared = int(fields[1]) * page, int(fields[2]) * page
            self.memory.append(MemorySample(time.perf_counter(), resident - shared, shared))


def _pages_swapped() -> int:
    """Read and written, since the machine started. (psutil's counter warns in containers.)"""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("pswpin ", "pswpout ")))
