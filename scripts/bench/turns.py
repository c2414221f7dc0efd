"""Figures measured by several sides in turns, and whether anything disturbed them: the rules are those of peers.py."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

import numpy as np
import onnx
import onnxruntime
import psutil
from measures import timed_ms

OURS, LLAMA, OPENVINO, GENAI = "lfm-edge", "llama.cpp", "OpenVINO", "onnxruntime-genai"
SPOILED, SLOWED = 0.05, 1.15
Measure = Callable[[], float]


@dataclass
class Row:
    """A figure of all sides."""

    name: str
    unit: str
    sides: dict[str, Measure]
    digits: int = 0
    values: dict[str, list[float]] = field(default_factory=dict)
    dropped: int = 0
    disturbed: bool = False
    """No round was undisturbed: these are the others."""

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Row:
        return cls(
            raw["name"], raw["unit"], {}, raw["digits"], raw["rounds"], raw["dropped"], raw.get("disturbed", False)
        )

    @property
    def less_is_better(self) -> bool:
        return self.unit in ("ms", "s", "MiB")

    def ratio(self, other: str) -> float | None:
        """How many times better we are than `other`, the median over rounds."""
        if OURS not in self.values or other not in self.values:
            return None
        pairs = zip(self.values[OURS], self.values[other], strict=True)
        return statistics.median(b / a if self.less_is_better else a / b for a, b in pairs)

    def to_json(self) -> dict[str, Any]:
        """All that was measured."""
        return {
            "name": self.name,
            "unit": self.unit,
            "digits": self.digits,
            "rounds": self.values,
            "dropped": self.dropped,
            "disturbed": self.disturbed,
            "ratio": self.ratio(LLAMA),
        }


def _fp32_products() -> Callable[[], object]:
    matrix = np.random.default_rng(0).standard_normal((384, 384)).astype(np.float32)
    return lambda: matrix @ matrix @ matrix


def _int8_products() -> Callable[[], object]:
    """Products in 8 bits alone feel a neighbour on the other half of each core (docs/log/2026-11-28.md)."""
    graph = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]> pulse (uint8[512, 1024] x, int8[1024, 1024] w) => (int32[512, 1024] y)
        { y = MatMulInteger(x, w) }"""
    )
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    whole = np.random.default_rng(0)
    given = {
        "x": whole.integers(0, 255, (512, 1024), dtype=np.uint8),
        "w": whole.integers(-127, 127, (1024, 1024), dtype=np.int8),
    }
    return lambda: session.run(None, given)


class Machine:
    """Tells whether a measurement was disturbed. `fastest`: milliseconds of the fixed work in an earlier part of the run."""

    def __init__(self, fastest: dict[str, float] | None = None) -> None:
        self.work = {"fp32": _fp32_products(), "int8": _int8_products()}
        self.pulses: dict[str, list[float]] = {name: [] for name in self.work}
        self.known = fastest or {}
        self.loads: list[float] = []

    def fastest(self) -> dict[str, float]:
        """Milliseconds of each fixed work in the fastest tenth of this run: its slow states may last longer than a row."""
        tenths = {name: float(np.quantile(values, 0.1)) for name, values in self.pulses.items()}
        return {name: min(tenth, self.known.get(name, tenth)) for name, tenth in tenths.items()}

    def _slowed(self) -> bool:
        for name, work in self.work.items():
            self.pulses[name].append(min(timed_ms(work) for _ in range(5)))
        return any(self.pulses[name][-1] > SLOWED * least for name, least in self.fastest().items())

    @staticmethod
    def _times() -> tuple[float, float]:
        """(processor seconds of everything but idling, of this process and its children)."""
        all_of_it = psutil.cpu_times()
        busy = sum(all_of_it) - all_of_it.idle - getattr(all_of_it, "iowait", 0.0)
        busy -= getattr(all_of_it, "guest", 0.0) + getattr(all_of_it, "guest_nice", 0.0)
        ours = sum(os.times()[:4])
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                ours += sum(child.cpu_times()[:4])
        return busy, ours

    def measure(self, work: Measure) -> tuple[float, bool]:
        """(the value, whether nothing disturbed it)."""
        slowed = self._slowed()
        self.loads.append(os.getloadavg()[0])
        (busy, ours), start = self._times(), time.perf_counter()
        value = work()
        (busy_after, ours_after), taken = self._times(), time.perf_counter() - start
        others = (busy_after - busy) - (ours_after - ours)
        room = SPOILED * taken * (psutil.cpu_count() or 1) + 0.05  # /proc/stat counts in hundredths
        return value, others <= room and not slowed


def in_turns(row: Row, rounds: int, machine: Machine) -> None:
    """Fill a row, and print it. A server that ends on the way (a connection breaks) has no figure in it."""
    sides, kept, spoiled = dict(row.sides), list[dict[str, float]](), list[dict[str, float]]()

    def each(measured: Callable[[Measure], Any]) -> dict[str, Any]:
        found = {}
        for name, measure in list(sides.items()):
            try:
                found[name] = measured(measure)
            except (OSError, HTTPException) as e:  # noqa: PERF203  (the other sides go on)
                print(f"  {row.name}: {name} ended ({e}); it has no figure", flush=True)
                del sides[name]
        return found

    each(lambda measure: measure())
    while len(kept) < rounds and len(kept) + len(spoiled) < 2 * rounds:
        found = each(machine.measure)
        quiet = all(undisturbed for _, undisturbed in found.values())
        (kept if quiet else spoiled).append({name: value for name, (value, _) in found.items()})
    row.dropped, row.disturbed = len(spoiled), not kept
    if len(kept) < rounds:
        print(f"  {row.name}: only {len(kept)} undisturbed rounds of {len(kept) + len(spoiled)}", flush=True)
    for values in kept or spoiled:
        for name in sides:
            row.values.setdefault(name, []).append(values[name])
    said = [f"{name} {statistics.median(v):,.{row.digits}f}" for name, v in row.values.items()]
    ratio = row.ratio(LLAMA)
    print(f"{row.name:44} {row.unit:6} {'  '.join(said)}" + (f"  {ratio:.2f} ×" if ratio else ""), flush=True)
