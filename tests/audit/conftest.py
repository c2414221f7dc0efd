"""An audit whose processes are made up, put together by the code that puts real ones together: no field can be one that
audits do not have.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from lfm_audit import audit as audit_module
from lfm_audit.audit import check_limits, judge
from lfm_audit.images import make_images
from lfm_audit.measure.power import Power
from lfm_audit.measure.trial import AnswerTimes, Outcome
from lfm_audit.measure.watch import Counters, MemorySample, StateSample, Watch
from lfm_audit.summary import Measured, Run, summary
from lfm_audit.workload import Subject, Workload
from lfm_profiles import detect, read
from lfm_profiles.sensors import Sensors
from lfm_runtime.bundle import Bundle
from lfm_runtime.report import WRITTEN

TOKENS = 12
MS_A_TOKEN = {"int8": 2.0, "int4": 1.2}
STAGES = {"image": 4.0, "prompt": 0.5, "preprocess": 3.0, "vision": 9.0, "embed": 0.2, "prefill": 12.0}


@pytest.fixture(scope="session")
def made(demo_bundle, tmp_path_factory) -> Path:
    """Of int8 and int4, three images, eight warm starts and a cold one each."""
    folder = tmp_path_factory.mktemp("made")
    bundle, profile, chance = Bundle.open(demo_bundle), read("generic"), random.Random(0)
    quality = {variant: {"kl": 0.01 / ms} for variant, ms in MS_A_TOKEN.items()}
    manifest = replace(bundle.manifest, quality=quality)
    bundle = replace(bundle, variants=dict.fromkeys(MS_A_TOKEN, bundle.variants["fp32"]), manifest=manifest)
    work = Workload(bundle, profile, [Subject(v, profile) for v in MS_A_TOKEN], make_images(folder), new_tokens=TOKENS)
    sensors = Sensors(folder)
    kinds = ["warm"] * 8 + ["cold"]
    runs = [
        Run(variant, kind, outcome(variant, kind, 60.0 * n, chance), watch(sensors, 60.0 * n))
        for n, (variant, kind) in enumerate((v, k) for k in kinds for v in MS_A_TOKEN)
    ]
    prepare = dict.fromkeys(MS_A_TOKEN, 900.0)
    idle = watch(sensors, -5.0)
    measured = Measured(work, detect(), sensors, 1.8e9, 600.0, None, idle, runs, None, prepare, Power(), None)
    found = summary(measured)
    found = replace(found, limits=check_limits(found, {}))
    found = replace(found, verdict=judge(found, changed_files=False, elapsed=(600.0, 600.0)))
    path = folder / "made.json"
    path.write_text(found.to_text())
    return path


@pytest.fixture
def audit(made) -> dict:
    """Its JSON."""
    return json.loads(made.read_text())


def outcome(variant: str, kind: str, spawned: float, chance: random.Random) -> Outcome:
    ready = 300.0 * (3 if kind == "cold" else 1) * chance.gauss(1, 0.01)
    repeats, images = (2, 3) if kind == "warm" else (1, 1)
    answers, at = [], ready
    for repeat in range(repeats):
        for image in range(images):
            answers.append(answer(variant, image, repeat, at + 1, chance))
            at = answers[-1].ended
    memory = {"rss": 95.0, "peak": 101.0, "rss_anon": 60.0, "rss_file": 35.0, "pss": 80.0, "swap": 0.0}
    graphs = {"vision_encoder.onnx": 20.0, "decoder_model_merged.onnx": 30.0}
    start = (200.0, 50.0, 10.0, graphs, ready)
    return Outcome(spawned, variant, None, 2, False, *start, answers, memory, memory, 1.0, None)


def answer(variant: str, image: int, repeat: int, begin: float, chance: random.Random) -> AnswerTimes:
    views, spans, at = 1 + 2 * image, [], begin
    for stage, ms in STAGES.items():
        for _ in range(views if stage == "vision" else 1):
            end = at + ms * (1 + image) * chance.gauss(1, 0.005)
            spans.append((stage, at, end))
            at = end
    for _ in range(TOKENS):
        spans.append((WRITTEN, at, at + 0.01))
        at += MS_A_TOKEN[variant] * chance.gauss(1, 0.005)
    tokens = 16 * views
    return AnswerTimes(image, repeat, spans, begin, spans[-1][2], 15 + tokens, tokens, TOKENS, views, variant)


def watch(sensors: Sensors, at: float) -> Watch:
    states = [StateSample(at + n, 1.8e9 + at + n, sensors.read(), 9000.0) for n in range(4)]
    memory = [MemorySample(at + 0.05 * n, min(60.0, 10.0 + n), 35.0) for n in range(80)]
    return Watch(sensors, False, memory, states, [], Counters(at, 100.0 + at, 0.0), Counters(at + 4, 101.0 + at, 0.0))


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    monkeypatch.setattr(audit_module, "_IDLE_S", 0.1)


@pytest.fixture
def images(tmp_path) -> dict[str, Path]:
    found = make_images(tmp_path)
    return {"small": found["small"]}


@pytest.fixture
def processes(monkeypatch):
    """A function: audits measure so many processes, however busy the machine is with other tests."""
    return lambda count: monkeypatch.setattr(
        audit_module, "_schedule", lambda work: [("warm", s) for _ in range(count) for s in work.subjects]
    )
