"""What a bundle costs on this machine, measured so that the number can be trusted: times of every stage, memory, the machine's state, and a
verdict on whether the run was a fair one.

Every start is a process of its own (trial.py), seen from outside while it works (watch.py). Variants take turns, A B A B …, so that
whatever the machine does meanwhile meets them all. The result is plain values, described by audit.schema.json.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import PIL
import psutil
from lfm_profiles import Device, Profile
from lfm_profiles.schema import SETTINGS
from lfm_profiles.sensors import Sensors

from lfm_runtime import __version__
from lfm_runtime.audit_result import Run, machine_result, plain, soak_result, variant_result
from lfm_runtime.bundle import Bundle, file_hash, read_manifest
from lfm_runtime.errors import EdgeError, SettingError
from lfm_runtime.images import image_size
from lfm_runtime.measured import fingerprint
from lfm_runtime.page_cache import drop_from_page_cache
from lfm_runtime.power import Power
from lfm_runtime.prepared import folder_of
from lfm_runtime.trial import Trial, start
from lfm_runtime.verdict import check_limits, verdict
from lfm_runtime.watch import StateSample, Watch

SCHEMA = 1
"""Of the result; changes when a field does."""
QUESTION = "Describe this image."
_COLD_ROUNDS, _FIRST_ROUNDS = 3, 1
_IDLE_S = 2.0
_COOL_C, _COOL_S = 3.0, 30.0
"""Between processes: until the machine is no warmer than this above its start, or so long."""


@dataclass(frozen=True)
class Workload:
    """What is asked, of which variants, for how long."""

    bundle: Bundle
    profile: Profile  # what it comes to, for the record
    profile_name: str  # as trials are told
    settings: Mapping[str, Any]  # beside the profile, as flags
    variants: Sequence[str]
    images: Mapping[str, Path]
    skipped: Sequence[Mapping[str, str]] = ()
    steps: Sequence[str] = ()  # what was given up to fit the memory
    question: str = QUESTION
    new_tokens: int = 32
    budget_s: float = 180.0
    soak_minutes: float = 0.0
    limits: Mapping[str, float] = field(default_factory=dict)


Progress = Callable[[str], None]


def audit(work: Workload, device: Device, sensors: Sensors, power: Power, progress: Progress = print) -> dict[str, Any]:
    """Measure until the time is over (each variant once at least); KeyboardInterrupt ends it earlier and marks the result partial.

    Args:
        work: what to measure.
        device: where.
        sensors: read while it runs.
        power: where energy is known from.
        progress: told what is being done.

    Raises:
        SettingError: the time does not suffice for one process.
        TrialError: a process measured ended badly.
    """
    begun, begun_unix, marks = time.perf_counter(), time.time(), _file_marks(work)
    progress("watching the machine idle")
    idle = Watch(sensors)
    idle.of(os.getpid())
    time.sleep(_IDLE_S)
    idle.end()
    runs: list[Run] = []
    soak: dict[str, Any] | None = None
    prepare_ms: dict[str, float | str] = {}
    partial = False
    try:
        for kind, variant in _schedule(work):
            left = work.budget_s - (time.perf_counter() - begun)
            if left < 0 and {r.variant for r in runs if r.kind == "warm"} >= set(work.variants):
                break
            progress(f"{variant}, {kind.replace('_', '-')} start; {len(runs)} processes measured, {max(0.0, left):.0f} s left")
            runs.append(_run(work, variant, kind, sensors))
            passed = time.perf_counter() - begun
            if len(runs) == 1 and passed > work.budget_s:
                raise SettingError(f"a budget of {work.budget_s:.0f} s is too short: one process took {passed:.0f} s; give more")
            _cool_down(sensors, idle.states[0])
        prepare_ms = _prepare_ms(work, progress)
        if work.soak_minutes:
            soak = _soak(work, sensors, progress)
    except KeyboardInterrupt:
        partial = True
        if not any(r.kind == "warm" for r in runs):
            raise
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "tool": {"name": "lfm-edge audit", "version": __version__},
        "created_unix_s": round(begun_unix, 3),
        "duration_s": time.perf_counter() - begun,
        "partial": partial,
        "bundle": _bundle(work),
        "device": device.as_dict(),
        "software": {
            "python": platform.python_version(), "onnxruntime": ort.__version__, "numpy": np.__version__, "pillow": PIL.__version__,
            "psutil": psutil.__version__, "kernel": platform.release(),
        },
        "profile": {
            "name": work.profile.name, "settings": {name: getattr(work.profile, name) for name in SETTINGS},
            "steps_down": list(work.steps), "budget": asdict(work.profile.budget),
        },
        "workload": {
            "question": work.question, "new_tokens": work.new_tokens, "skipped_images": list(work.skipped),
            "images": {name: _image(path) for name, path in work.images.items()},
        },
        "variants": {
            variant: variant_result(
                work.bundle, variant, list(work.images), [r for r in runs if r.variant == variant],
                prepare_ms.get(variant, "the audit was interrupted before"), power,
            )
            for variant in work.variants if any(r.variant == variant and r.kind == "warm" for r in runs)
        },
        "machine": machine_result(idle, sensors, runs, power),
        "soak": soak,
    }  # fmt: skip
    result["limits"] = check_limits(result, work.limits)
    elapsed = time.perf_counter() - begun, time.time() - begun_unix
    result["verdict"] = verdict(result, changed_files=_file_marks(work) != marks, elapsed=elapsed)
    done: dict[str, Any] = plain(result)
    return done


def _schedule(work: Workload) -> Iterator[tuple[str, str]]:
    """(kind of start, variant), without end."""
    round_ = 0
    while True:
        kinds = ["warm", *(["cold"] if round_ < _COLD_ROUNDS else []), *(["first_ever"] if round_ < _FIRST_ROUNDS else [])]
        for kind in kinds:
            for variant in work.variants:
                yield kind, variant
        round_ += 1


def _run(work: Workload, variant: str, kind: str, sensors: Sensors) -> Run:
    """One process. Warm: the files are in the page cache, and it answers everything twice. Cold: the bundle's files are not; it loads only.
    First-ever: neither are the libraries, Python compiles its modules anew, and nothing is prepared.
    """
    settings = {**work.settings, "variant": variant}
    images: Sequence[Path] = list(work.images.values()) if kind == "warm" else []
    seen = Watch(sensors)
    with tempfile.TemporaryDirectory(prefix="lfm-edge-") as folder:
        environment = {}
        if kind != "warm":
            drop_from_page_cache(_files_read(work, first_ever=kind == "first_ever"))
        if kind == "first_ever":
            settings["prepared"] = False
            environment["PYTHONPYCACHEPREFIX"] = folder
        try:
            trial = Trial(work.bundle.folder, work.profile_name, settings, images, work.question, work.new_tokens)
            outcome = start(trial, environment=environment, watch=seen.of)
        finally:
            seen.end()
    return Run(variant, kind, outcome, seen)


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
    """Variant → what its first-ever prepare takes, in a process of its own and into a folder of its own; or the reason why not."""
    found: dict[str, float | str] = {}
    for variant in work.variants:
        if not work.profile.prepared:
            found[variant] = "the profile does not use what prepare writes"
            continue
        progress(f"{variant}, prepare for the first time")
        try:
            with tempfile.TemporaryDirectory(prefix=".lfm-edge-audit-", dir=work.bundle.folder.resolve().parent) as folder:
                # prepare writes beside the bundle: beside a folder of links nothing of the user's is touched
                copy = Path(folder) / "bundle"
                for path in work.bundle.folder.resolve().rglob("*"):
                    if path.is_file():
                        place = copy / path.relative_to(work.bundle.folder.resolve())
                        place.parent.mkdir(parents=True, exist_ok=True)
                        place.symlink_to(path)
                found[variant] = _timed_command(["prepare", str(copy), "--variant", variant])
        except (OSError, EdgeError) as e:
            found[variant] = f"not measured: {e}"
    return found


def _timed_command(words: Sequence[str]) -> float:
    """ms."""
    begun = time.perf_counter()
    code = "import sys; from lfm_runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SettingError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"it ended with {done.returncode}")
    return (time.perf_counter() - begun) * 1e3


def _soak(work: Workload, sensors: Sensors, progress: Progress) -> dict[str, Any]:
    """One process that answers about the first image without a pause, until three minutes in a row are alike or the time is over."""
    progress(f"soak: {work.variants[0]} answers for up to {work.soak_minutes:g} minutes")
    seen = Watch(sensors)
    trial = Trial(
        work.bundle.folder, work.profile_name, {**work.settings, "variant": work.variants[0]}, list(work.images.values())[:1],
        work.question, work.new_tokens, repeats=0, soak_s=work.soak_minutes * 60,
    )  # fmt: skip
    try:
        outcome = start(trial, watch=seen.of)
    finally:
        seen.end()
    return soak_result(outcome, seen)


def _bundle(work: Workload) -> dict[str, Any]:
    manifest = read_manifest(work.bundle.folder) or {}
    return {
        "name": work.bundle.folder.resolve().name, "source": manifest.get("source"), "licence": manifest.get("licence"),
        "fingerprint": {v: fingerprint(work.bundle, v) for v in work.variants},
    }  # fmt: skip


def _image(path: Path) -> dict[str, Any]:
    width, height = image_size(path)
    return {"width": width, "height": height, "sha256": file_hash(path)}


def _files_read(work: Workload, *, first_ever: bool) -> list[Path]:
    """What a start reads: the bundle's files and what was prepared; a first start the libraries as well."""
    folders = [work.bundle.folder, folder_of(work.bundle.folder)]
    if first_ever:
        folders += [Path(str(module.__file__)).parent for module in (ort, np, PIL)]
    return [path for folder in folders if folder.is_dir() for path in folder.rglob("*") if path.is_file()]


def _file_marks(work: Workload) -> list[tuple[str, int, int, int]]:
    """Tells whether a file of the bundle was exchanged meanwhile."""
    marks = []
    for path in sorted(work.bundle.folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            marks.append((str(path), status.st_ino, status.st_size, status.st_mtime_ns))
    return marks
