"""What a bundle costs on this machine, measured so that the number can be trusted: times of every stage, memory, the
machine's state, and a verdict on whether the run was a fair one.

Every start is a process of its own (trial.py), seen from outside while it works (watch.py). Variants take turns, A B A
B …, so that whatever the machine does meanwhile meets them all. The result is an Audit (result.py).
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import PIL
from lfm_profiles import Device, changed
from lfm_profiles.sensors import Sensors
from lfm_runtime.bundle import Bundle
from lfm_runtime.engine.gpu_wheel import CUDA
from lfm_runtime.engine.prepared import folder_of
from lfm_runtime.errors import SettingError
from lfm_runtime.formats.files import linked_copy
from lfm_runtime.process import last_line, run_command
from lfm_runtime.setup.setup import settle

from lfm_audit.measure.page_cache import drop_from_page_cache, read_into_page_cache
from lfm_audit.measure.power import Power, read_meter
from lfm_audit.measure.trial import Outcome, Trial, TrialError, start
from lfm_audit.measure.watch import StateSample, Watch, sees_the_machine
from lfm_audit.result import Audit
from lfm_audit.summary import Measured, Run, summary
from lfm_audit.verdict import check_limits, judge
from lfm_audit.workload import Subject, Workload

_ROUNDS = {"warm": (0, float("inf")), "cold": (3, 8), "first_ever": (3, 3)}
"""Kind of start → first and last round."""
_IDLE_S = 2.0
_COOL_C, _COOL_S = 3.0, 30.0
"""Between processes: until the machine is no warmer than this above its start, or so long."""


Progress = Callable[[str], None]


def audit(work: Workload, device: Device, sensors: Sensors, progress: Progress = print) -> Audit:
    """Measure, summarize and judge one workload; parameters and errors are those of `measure`."""
    marks, begun = _file_marks(work), (time.perf_counter(), time.time())
    found = summary(measure(work, device, sensors, progress))
    elapsed = time.perf_counter() - begun[0], time.time() - begun[1]
    found = replace(found, limits=check_limits(found, work.limits))
    return replace(found, verdict=judge(found, changed_files=_file_marks(work) != marks, elapsed=elapsed))


def measure(work: Workload, device: Device, sensors: Sensors, progress: Progress) -> Measured:
    """Measure until the time is over (each variant once at least). What ends it earlier, KeyboardInterrupt or a process
    that fails, is told in the result, with what was measured until then.

    Args:
        work: what to measure.
        device: where.
        sensors: read while it runs.
        progress: told what is being done.

    Raises:
        SettingError: the time does not suffice for one process, or other programs' load cannot be seen here.
        TrialError: a process ended badly before anything was measured.
    """
    if not sees_the_machine():
        raise SettingError(
            "/proc/stat and /proc/meminfo are missing (systemd's ProcSubset=pid?), so the load of other programs "
            "cannot be measured; run the audit without that restriction"
        )
    begun, begun_unix = time.perf_counter(), time.time()
    idle = _watch_idle(sensors, progress)
    runs: list[Run] = []
    soak: Run | None = None
    prepare_ms: dict[str, float | str] = {}
    stopped: str | None = None
    try:
        _measure_starts(work, sensors, progress, runs, idle.states[0])
        prepare_ms = _prepare_ms(work, progress)
        if work.soak_minutes:
            soak = _soak(work, sensors, progress)
    except (KeyboardInterrupt, TrialError) as e:
        if not any(r.kind == "warm" for r in runs):
            raise
        stopped = str(e) or "interrupted"
    power, no_meter = _power(work, [*runs, *([soak] if soak else [])])
    duration = time.perf_counter() - begun
    return Measured(work, device, sensors, begun_unix, duration, stopped, idle, runs, soak, prepare_ms, power, no_meter)


def _watch_idle(sensors: Sensors, progress: Progress) -> Watch:
    progress("measuring the idle machine")
    idle = Watch(sensors)
    idle.start(os.getpid())
    time.sleep(_IDLE_S)
    idle.end()
    return idle


def _measure_starts(
    work: Workload, sensors: Sensors, progress: Progress, runs: list[Run], coolest: StateSample
) -> None:
    """Start processes until the time is over, and add each to `runs`, which an interruption leaves as they are."""
    begun = time.perf_counter()
    for kind, subject in _schedule(work):
        left = work.budget_s - (time.perf_counter() - begun)
        if left < 0 and {r.variant for r in runs if r.kind == "warm"} >= {s.variant for s in work.subjects}:
            break
        what = f"{subject.variant}, {kind.replace('_', '-')} start"
        progress(f"{what}; {len(runs)} processes measured, {max(0.0, left):.0f} s left")
        runs.append(_run(work, subject, kind, sensors))
        passed = time.perf_counter() - begun
        if len(runs) == 1 and passed > work.budget_s:
            raise SettingError(
                f"a budget of {work.budget_s:.0f} s is too short: one process took {passed:.0f} s; give more"
            )
        _cool_down(sensors, coolest)


def _schedule(work: Workload) -> Iterator[tuple[str, Subject]]:
    """(kind of start, variant), without end. Warm ones first: a short audit of a slow board has enough of them to tell
    their spread.
    """
    for round_ in itertools.count():
        for kind in ("warm", "cold", "first_ever"):
            for subject in work.subjects:
                first, last = _ROUNDS[kind]
                if first <= round_ <= last and not (kind == "first_ever" and subject.too_large):
                    yield kind, subject


def _run(work: Workload, subject: Subject, kind: str, sensors: Sensors) -> Run:
    """One process. Warm: its files are in the page cache, and it answers everything twice. Cold: they are not, and it
    answers once about the first image. First-ever: neither are the libraries, Python compiles its modules anew, and
    nothing is prepared.
    """
    images, profile = list(work.images.values()), subject.profile
    files = _files_of(work.bundle, subject)
    seen, environment = Watch(sensors, gpu=CUDA in profile.providers), {}
    with tempfile.TemporaryDirectory(prefix="lfm-edge-") as folder:
        if kind == "warm":
            read_into_page_cache(files)
        else:
            drop_from_page_cache([*files, *(_libraries() if kind == "first_ever" else [])])
        if kind == "first_ever":
            profile = changed(profile, {"prepared": False}, "audit")
            environment["PYTHONPYCACHEPREFIX"] = folder
        trial = Trial(
            work.bundle.folder,
            profile,
            images if kind == "warm" else images[:1],
            work.question,
            work.new_tokens,
            repeats=2 if kind == "warm" else 1,
        )
        try:
            outcome = start(trial, environment=environment, watch=seen.start)
        finally:
            seen.end()
    _check_known(work, outcome)
    return Run(subject.variant, kind, outcome, seen)


def _check_known(work: Workload, outcome: Outcome) -> None:
    """Raise TrialError where a process used a variant that was not there when the audit began."""
    if outcome.prefill and outcome.prefill not in work.bundle.variants:
        raise TrialError(
            f"{work.bundle.folder} was given {outcome.prefill} meanwhile, which is used now; measure again"
        )


def _cool_down(sensors: Sensors, idle: StateSample) -> None:
    """Wait until the machine is about as cool as it was."""
    until = time.monotonic() + _COOL_S
    warmest = max(idle.reading.temperature_c.values(), default=None)
    while warmest is not None and time.monotonic() < until:
        now = max(sensors.read().temperature_c.values(), default=None)
        if now is None or now <= warmest + _COOL_C:
            return
        time.sleep(0.5)


def _prepare_ms(work: Workload, progress: Progress) -> dict[str, float | str]:
    """Variant → what its first-ever prepare takes, in a process of its own and into a folder of its own; or the reason
    why not.
    """
    found: dict[str, float | str] = {}
    for subject in work.subjects:
        if not subject.profile.prepared:
            found[subject.variant] = "the profile does not use prepared graphs"
            continue
        progress(f"{subject.variant}, prepare for the first time")
        prefill = settle(work.bundle, subject.profile).prefill
        try:
            with tempfile.TemporaryDirectory(
                prefix=".lfm-edge-audit-", dir=work.bundle.folder.resolve().parent
            ) as folder:
                # prepare writes beside the bundle: beside a folder of links nothing of the user's is touched
                copy = Path(folder) / "bundle"
                linked_copy(work.bundle.folder, copy)
                words = [
                    "prepare",
                    str(copy),
                    "--variant",
                    subject.variant,
                    *(["--prefill", prefill] if prefill else []),
                ]
                begun = time.perf_counter()
                done = run_command(words)
                passed = (time.perf_counter() - begun) * 1e3
                found[subject.variant] = f"not measured: {last_line(done.stderr)}" if done.returncode else passed
        except OSError as e:
            found[subject.variant] = f"not measured: {e}"
    return found


def _soak(work: Workload, sensors: Sensors, progress: Progress) -> Run:
    """One process that answers about the first image without a pause, until nothing changes any more or the time is
    over.
    """
    subject = work.subjects[0]
    seen = Watch(sensors, gpu=CUDA in subject.profile.providers)
    progress(f"soak: {subject.variant} answers for up to {work.soak_minutes:g} minutes")
    trial = Trial(
        work.bundle.folder,
        subject.profile,
        list(work.images.values())[:1],
        work.question,
        work.new_tokens,
        repeats=0,
        soak_s=work.soak_minutes * 60,
    )
    try:
        outcome = start(trial, watch=seen.start)
    finally:
        seen.end()
    _check_known(work, outcome)
    return Run(subject.variant, "soak", outcome, seen)


def _power(work: Workload, runs: Sequence[Run]) -> tuple[Power, str | None]:
    """Where energy is known from, and why the meter that was given is of no use: it is read now, when it has seen
    everything.
    """
    if work.meter is None:
        return Power(), None
    try:
        power = Power(read_meter(work.meter))
    except SettingError as e:
        return Power(), str(e)
    if not any(power.watts(run.watch.states) for run in runs):
        return Power(), f"{work.meter} has no sample of the time of this audit: is time_s in seconds since 1970?"
    return power, None


def _files_of(bundle: Bundle, subject: Subject) -> list[Path]:
    """What a start of a variant reads: what describes the bundle, its graphs and weights, or their prepared form."""
    setup = settle(bundle, subject.profile)
    graphs = bundle.graphs_read(setup.variant, setup.prefill)
    places = [folder_of(bundle.folder) / path.stem for path in graphs]
    small = [path for path in bundle.folder.iterdir() if path.is_file()]
    weights = [file for path in graphs for file in path.parent.glob(f"{path.name}*")]
    return [*small, *weights, *(file for place in places if place.is_dir() for file in place.iterdir())]


def _libraries() -> list[Path]:
    """Files of the packages that a start imports, and of the libraries that wheels keep beside them."""
    folders = [Path(str(module.__file__)).parent for module in (ort, np, PIL)]
    folders += [folder.with_name(f"{folder.name.lower()}.libs") for folder in folders] + [
        folders[-1].with_name("pillow.libs")
    ]
    return [path for folder in folders if folder.is_dir() for path in folder.rglob("*") if path.is_file()]


def _file_marks(work: Workload) -> list[tuple[str, int, int, int]]:
    """Return (path, inode, size, mtime) of each file of the bundle, to tell whether one was replaced."""
    marks = []
    for path in sorted(work.bundle.folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            marks.append((str(path), status.st_ino, status.st_size, status.st_mtime_ns))
    return marks
