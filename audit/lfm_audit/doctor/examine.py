"""Every check, one after the other. Neither onnxruntime nor numpy is imported before that is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lfm_runtime.errors import EdgeError, is_out_of_memory, more_memory

from lfm_audit.doctor import hardware, software
from lfm_audit.doctor.finding import Finding, Machine

CHECKS = (
    software.python,
    software.packages,
    software.onnxruntime,
    software.gpu,
    software.telemetry,
    hardware.processor,
    hardware.memory,
    hardware.swap,
    hardware.disk,
    hardware.clocks,
    hardware.throttling,
    hardware.sensors,
    hardware.profile,
)


def examine(machine: Machine) -> Iterator[Finding]:
    """Every check, one after the other; those of the bundle only where it could be run: onnxruntime can be imported,
    and the profile can be read.
    """
    runs = True
    for check in CHECKS:
        for finding in _safely(check, machine):
            runs &= not (check in (software.onnxruntime, hardware.profile) and finding.state == "problem")
            yield finding
    if machine.bundle is not None and runs:
        from lfm_audit.doctor import bundle

        for check in (bundle.bundle, bundle.prepared):
            for finding in _safely(check, machine):
                yield finding
                if finding.state == "problem":
                    return  # the rest would only say it again


def _safely(check: Callable[[Machine], Iterator[Finding]], machine: Machine) -> Iterator[Finding]:
    """Yield the findings of a check; an exception becomes a finding, and later checks still run."""
    try:
        yield from check(machine)
    except EdgeError as e:
        yield Finding(check.__name__, "problem", str(e))
    except PermissionError as e:
        said = f"{e.filename} cannot be read: {e.strerror}"
        yield Finding(check.__name__, "problem", said, "change its permissions")
    except Exception as e:  # noqa: BLE001
        if is_out_of_memory(e):
            said = f"not enough memory for this check ({' '.join(str(e).split()) or type(e).__name__})"
            yield Finding(check.__name__, "problem", said, more_memory())
            return
        yield Finding(check.__name__, "warning", f"this check failed ({type(e).__name__}: {e})", "report it")
