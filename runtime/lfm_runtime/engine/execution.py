"""How graphs are run: threads, providers, what is kept in memory. Decided once, before anything is loaded."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
from lfm_profiles import Profile, adds_int8_in_16_bits, default_threads, physical_cores

from lfm_runtime.engine.gpu_wheel import CPU, CUDA
from lfm_runtime.engine.ort_release import PLACEMENT_SINCE, onnxruntime_is
from lfm_runtime.errors import SettingError, counted

_log = logging.getLogger(__name__)
RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"
_MANY_THREADS = 64  # slow on few processors, but not for minutes
_FATAL_SEVERITY = 4  # errors are raised as well, and said once


@dataclass(frozen=True)
class Execution:
    """How sessions are made and run: threads, memory, providers."""

    threads: int  # of each operator
    affinity: tuple[int, ...] = ()  # processors, one for each thread; empty: wherever the system puts them
    spinning: bool | int = (
        True  # how long threads wait for the next operator without sleeping, µs; True: as onnxruntime does
    )
    arena: bool = True
    packed: bool = (
        True  # make the copy of the weights that kernels are fast with; else they are used as the file has them, mapped
    )
    providers: tuple[str, ...] = (CPU,)
    low_memory: bool = False  # one graph in memory at a time
    prepared: bool = True  # graphs are loaded as `lfm-edge prepare` wrote them, where it did
    strict_placement: bool = False  # on a GPU: an operator of the decode loop that is left to the CPU is an error
    cuda_graphs: bool = False  # steps of the decode loop are captured and replayed
    engines: Path | None = None  # where TensorRT keeps what it made
    most_patches: int = 0  # of a view

    @property
    def on_gpu(self) -> bool:
        """Whether steps of the decode loop are computed on a device with memory of its own."""
        return CUDA in self.providers

    @staticmethod
    def from_profile(profile: Profile) -> Execution:
        """What a profile asks for, here.

        Raises:
            SettingError: processors that are not there, or a provider this onnxruntime lacks.
        """
        if profile.is_flag("strict_placement") and CUDA not in profile.providers:
            raise SettingError(
                f"strict_placement has no effect: profile {profile.name} computes on the CPU; leave it out"
            )
        available = ort.get_available_providers()
        if missing := [name for name in profile.providers if name not in available]:
            raise SettingError(
                f"profile {profile.name} needs {missing[0]}, this onnxruntime {ort.__version__} has "
                f"{', '.join(available)}; "
                "install an onnxruntime for the GPU, or choose another profile"
            )
        usable = _processors()
        threads = profile.threads or (
            len(profile.affinity) if isinstance(profile.affinity, tuple) else default_threads()
        )
        check_threads(threads)
        if threads > len(usable):
            _log.warning(
                "lfm-edge: %d threads on %d processors slow each other down; use fewer threads", threads, len(usable)
            )
        cores: tuple[int, ...] = ()
        if profile.affinity != "none":
            cores = profile.affinity if isinstance(profile.affinity, tuple) else tuple(physical_cores())
            if not hasattr(os, "sched_setaffinity"):
                raise SettingError("affinity cannot be set on this operating system; leave it out")
            if strangers := sorted(set(cores) - set(usable)):
                listed = ", ".join(map(str, usable))
                raise SettingError(f"affinity: this process may not use processor {strangers[0]}; it may use {listed}")
            if len(cores) < threads:
                named = f"affinity has {counted(len(cores), 'processor')} for {counted(threads, 'thread')}"
                raise SettingError(f"{named}; name as many, or lower threads")
        spinning = profile.spinning
        if type(spinning) is int and not onnxruntime_is("1.26"):
            _log.warning(
                "lfm-edge: onnxruntime %s cannot limit spinning (1.26 or later can); its default is used",
                ort.__version__,
            )
            spinning = True
        return Execution(
            threads,
            cores[:threads],
            spinning,
            profile.arena,
            providers=profile.providers,
            low_memory=profile.low_memory,
            prepared=profile.prepared,
            strict_placement=profile.strict_placement,
        )

    def options(self) -> ort.SessionOptions:
        """Return the SessionOptions that a session of this execution is made with."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_SEVERITY
        # Every step has new shapes (context grows by one), so a memory pattern would be planned and kept for each.
        options.enable_mem_pattern = False
        options.enable_cpu_mem_arena = self.arena
        if not self.packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self.affinity[
            1:
        ]:  # onnxruntime counts processors from 1, and the calling thread is the first of its threads
            options.add_session_config_entry(
                "session.intra_op_thread_affinities", ";".join(str(core + 1) for core in self.affinity[1:])
            )
        if self.spinning is not True:
            options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spinning else "0")
        if type(self.spinning) is int:
            options.add_session_config_entry("session.intra_op.spin_duration_us", str(self.spinning))
        # Where int8 products overflow (a demo encoder falls from 0.999 to 0.96 cosine) another kernel is asked for:
        # right, 19 % slower, and with a copy of the weights. Where they do not, the same request makes the encoder 1.6
        # times as slow for nothing.
        if adds_int8_in_16_bits():
            options.add_session_config_entry("session.x64quantprecision", "1")
        if self.on_gpu and onnxruntime_is(PLACEMENT_SINCE):
            options.add_session_config_entry(RECORD_PLACEMENT, "1")
        return options

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """The calling thread computes as well: keep it on the first processor meanwhile, where it may go there."""
        if not self.affinity:
            yield
            return
        before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, self.affinity[:1])
        except OSError as e:
            _say_not_pinned(self.affinity[0], str(e.strerror))
        try:
            yield
        finally:
            with suppress(OSError):
                os.sched_setaffinity(0, before)


def check_threads(count: int) -> int:
    """The number of threads; SettingError where so many would only wait for each other, for minutes."""
    most = max(_MANY_THREADS, 4 * len(_processors()))
    if not 1 <= count <= most:
        raise SettingError(
            f"threads {count} is impossible on {counted(len(_processors()), 'processor')}; allowed: 1 to {most}"
        )
    return count


def _processors() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@functools.cache
def _say_not_pinned(processor: int, why: str) -> None:
    """Warn that the thread cannot be pinned, once a process for the same reason."""
    _log.warning("lfm-edge: affinity: this process may not move to processor %d: %s", processor, why)
