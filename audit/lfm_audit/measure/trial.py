"""One start of a model in a process of its own, with answers of a fixed length: what tuning and audits measure.

A process of its own, because the peak of memory, the first use of everything and the load itself cannot be had twice in
one. The parent keeps out of its way: the child times itself, and what is seen from outside (watch.py) runs in the
parent.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from lfm_profiles import Profile
from lfm_runtime.errors import EdgeError
from lfm_runtime.formats.files import damage_is
from lfm_runtime.process import child_environment, module

if TYPE_CHECKING:
    from lfm_runtime.model import Model

_LONGEST_S = 24 * 3600
_ALIKE_MINUTES, _ALIKE, _ALIKE_C, _SHORTEST_SOAK_MINUTES = 3, 1.02, 1.0, 10
_PR_SET_PDEATHSIG = 1


class TrialError(EdgeError, RuntimeError):
    """The process that was to be measured did not come to its end."""


@dataclass(frozen=True)
class Trial:
    """What the process does: load, then answer `question` about each of `images`, `repeats` times over."""

    bundle: Path
    profile: Profile
    images: Sequence[Path] = ()
    question: str = "Describe this image."
    new_tokens: int = 32
    repeats: int = 2
    soak_s: float = (
        0.0  # instead of repeats: answers about the first image, until nothing changes any more or this time is over
    )
    reference: Path | None = None  # a folder: answers' distributions are written there, or compared with what is there


@dataclass(frozen=True)
class AnswerTimes:
    """One answer. Times are ms since the process was started."""

    image: int  # of Trial.images
    repeat: int  # 0: the first time in this process
    spans: Sequence[tuple[str, float, float]]
    started: float
    ended: float
    prompt_tokens: int
    image_tokens: int
    new_tokens: int
    views: int
    text_sha256: str

    @property
    def total_ms(self) -> float:
        """Time from the question to the last token, in ms."""
        return self.ended - self.started

    def stage_ms(self, stage: str) -> list[float]:
        """Return the length in ms of each span of `stage`."""
        return [end - start for name, start, end in self.spans if name == stage]

    @property
    def token_times(self) -> list[float]:
        """When each token was known, ms since the process was started."""
        from lfm_runtime.report import WRITTEN

        return [start for name, start, _ in self.spans if name == WRITTEN]


@dataclass(frozen=True)
class Outcome:
    """Results of one trial: times in ms, memory in MiB."""

    spawned: float  # time.perf_counter(), which is one clock for all processes of a machine
    variant: str
    prefill: str | None
    threads: int
    prepared: bool
    python_ms: float  # from the start of the process to its first line of ours
    import_ms: float
    open_ms: float
    graphs_ms: Mapping[str, float]
    ready_ms: float  # from the start of the process until it is ready for a question
    answers: Sequence[AnswerTimes]
    loaded_mib: Mapping[str, float | None]
    memory_mib: Mapping[str, float | None]
    cpu_s: float
    kl: float | None  # nats a token, against the reference
    steady: bool = False  # with soak_s: whether it ended because nothing changed any more
    warnings: Sequence[str] = ()


def start(
    trial: Trial, *, environment: Mapping[str, str] | None = None, watch: Callable[[int], None] | None = None
) -> Outcome:
    """Do one trial. `watch` is told the process's number once it runs.

    Raises:
        TrialError: it ended badly; with its own words.
    """
    words = module("lfm_audit.measure.trial")
    spawned = time.perf_counter()
    with subprocess.Popen(  # noqa: S603
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(**(environment or {})),
    ) as process:
        try:
            if watch:
                watch(process.pid)
            given = {name: getattr(trial.profile, name) for name in trial.profile.origin}
            profile = {"name": trial.profile.name, "origin": dict(trial.profile.origin), "settings": given}
            request = {**vars(trial), "profile": profile, "spawned": spawned, "parent": os.getpid()}
            out, complaints = process.communicate(json.dumps(request, default=str), timeout=_LONGEST_S)
        except BaseException:
            process.kill()
            raise
    if process.returncode < 0:
        raise TrialError(
            f"{trial.bundle}: the measured process was killed by signal {-process.returncode}"
            f"{' (the system does that when memory is short)' if process.returncode == -9 else ''}"
        )
    lines = out.splitlines()
    with damage_is(TrialError, trial.bundle, f"the process measured said: {' '.join(complaints.split())[-300:]}"):
        found = json.loads(lines[-1])
        if "error" in found:
            raise TrialError(found["error"])
        answers = [
            AnswerTimes(**{**answer, "spans": [tuple(span) for span in answer["spans"]]})
            for answer in found.pop("answers")
        ]
        warnings = [line.strip() for line in complaints.splitlines() if line.startswith("lfm-edge: ")]
        return Outcome(**found, answers=answers, warnings=warnings)


# ------------------------------------------------------------------------------------------------------ in the child


def main() -> int:
    """Read a trial from standard input, do it, print what it came to."""
    entered = time.perf_counter()
    _end_with_parent()
    request = json.load(sys.stdin)
    if _has_ended(request.pop("parent")):
        return 1  # it was killed before this process could ask to end with it
    try:
        print(json.dumps(_measured(request, entered)))
    except EdgeError as e:
        print(json.dumps({"error": str(e)}))
        return e.exit_code
    return 0


def _measured(request: dict[str, Any], entered: float) -> dict[str, Any]:
    from dataclasses import replace

    from lfm_runtime.bundle import Bundle
    from lfm_runtime.model import Model
    from lfm_runtime.setup.resolve import resolve

    imported = time.perf_counter()
    bundle = Bundle.open(Path(request["bundle"]))
    opened = time.perf_counter()
    settings: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in request["profile"]["settings"].items()
    }
    profile = replace(Profile(request["profile"]["name"]), origin=request["profile"]["origin"], **settings)
    model = Model.of(resolve(bundle, profile, force=True))
    ready = time.perf_counter()
    spawned = request["spawned"]
    loaded = _memory()
    answers = [
        _answered(model, request, at, repeat, spawned)
        for repeat in range(request["repeats"])
        for at in range(len(request["images"]))
    ]
    steady = False
    if request["soak_s"]:
        steady = _soak(
            lambda: answers.append(_answered(model, request, 0, len(answers), spawned)), answers, request["soak_s"]
        )
    memory = _memory()  # before distributions are compared, which takes memory of its own
    used = time.process_time()
    return {
        "spawned": spawned,
        "variant": model.setup.variant,
        "prefill": model.sessions.prefill,
        "threads": model.setup.execution.threads,
        "prepared": model.sessions.is_prepared,
        "python_ms": (entered - spawned) * 1e3,
        "import_ms": (imported - entered) * 1e3,
        "open_ms": (opened - imported) * 1e3,
        "graphs_ms": model.sessions.load_ms,
        "ready_ms": (ready - spawned) * 1e3,
        "answers": answers,
        "loaded_mib": loaded,
        "memory_mib": memory,
        "cpu_s": used,
        "steady": steady,
        "kl": _divergence(model, request, Path(request["reference"])) if request["reference"] else None,
    }


def _answered(model: Model, request: dict[str, Any], at: int, repeat: int, spawned: float) -> dict[str, Any]:
    started = time.perf_counter()
    answer = model.answer(
        [request["images"][at]],
        request["question"],
        temperature=0,
        ignore_eos=True,
        max_new_tokens=request["new_tokens"],
    )
    text = answer.text()
    report = answer.report
    ended = report.spans[-1][2]  # the last token's text; counting the process's memory after it is not the answer's
    return {
        "image": at,
        "repeat": repeat,
        "spans": [(n, (s - spawned) * 1e3, (e - spawned) * 1e3) for n, s, e in report.spans],
        "started": (started - spawned) * 1e3,
        "ended": (ended - spawned) * 1e3,
        "prompt_tokens": report.prompt_tokens,
        "image_tokens": report.image_tokens,
        "new_tokens": report.new_tokens,
        "views": report.tiles,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def _soak(answer: Callable[[], None], answers: Sequence[Mapping[str, Any]], seconds: float) -> bool:
    """Answer until it is steady or `seconds` are over; return whether it became steady."""
    from lfm_profiles.sensors import Sensors

    begun, sensors = time.perf_counter(), Sensors()
    minutes: dict[int, list[float]] = {}
    warmest: list[float] = []  # at the end of each minute
    while (passed := time.perf_counter() - begun) < seconds:
        answer()
        minute = int(passed / 60)
        if minute not in minutes:
            warmest.append(max(sensors.read().temperature_c.values(), default=0.0))
        minutes.setdefault(minute, []).append(answers[-1]["ended"] - answers[-1]["started"])
        whole = [statistics.median(minutes[m]) for m in sorted(minutes)[:-1]][-_ALIKE_MINUTES:]
        alike = len(whole) == _ALIKE_MINUTES and max(whole) <= min(whole) * _ALIKE
        if (
            alike
            and minute >= _SHORTEST_SOAK_MINUTES
            and max(warmest[-_ALIKE_MINUTES:]) - min(warmest[-_ALIKE_MINUTES:]) <= _ALIKE_C
        ):
            return True
    return False


def _end_with_parent() -> None:
    """Linux: when the process that measures is killed, this one is as well."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _has_ended(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _memory() -> dict[str, float | None]:
    """Of this process, MiB; pss and swap as well where /proc tells."""
    from lfm_runtime.report import memory_mib

    found = memory_mib()
    found.update(dict.fromkeys(("pss", "swap")))
    try:
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("Pss", "Swap"):
                found[name.lower()] = int(value.split()[0]) / 1024
    except OSError:
        pass  # not Linux, or hidden from us
    return found


def _divergence(model: Model, request: dict[str, Any], folder: Path) -> float:
    """The mean KL divergence, in nats a token, of this model's next-token distributions to those stored in `folder`,
    along the answers stored with them, up to where they end. Where there are none yet, this model's own are stored, and
    0 is returned.
    """
    import numpy as np
    from lfm_runtime.decode.context import Context
    from lfm_runtime.text.messages import Message

    found = []
    for at, image in enumerate(request["images"]):
        path = folder / f"{at}.npz"
        job = model.prepare_answer(
            [Message.user(request["question"], 1)], [image], temperature=0, max_new_tokens=request["new_tokens"]
        )
        context = Context(model.decoder)
        logits = _log_softmax(model.read(job, context))
        known = np.load(path) if path.exists() else None
        ids, rows = [], []
        length = len(known["ids"]) if known else request["new_tokens"]
        for step in range(length):
            rows.append(logits)
            ids.append(int(known["ids"][step] if known else logits.argmax()))
            if not known and ids[-1] in model.bundle.eos:
                break
            if step + 1 < length:
                logits = _log_softmax(context.feed(model.decoder.embed(ids[-1:]), np.array(ids[-1:])))
        if known:
            theirs = known["log_probabilities"].astype(np.float64)
            found.append(
                max(0.0, float(np.mean(np.sum(np.exp(theirs) * (theirs - np.stack(rows)), axis=1))))
            )  # stored in float32
        else:
            np.savez(path, ids=np.array(ids), log_probabilities=np.stack(rows).astype(np.float32))
            found.append(0.0)
    return float(np.mean(found))


def _log_softmax(logits: Any) -> Any:
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


if __name__ == "__main__":
    sys.exit(main())
