"""What a Dask cluster adds: throughput of processes here, batching for boards that sleep, the scheduler's load.

    python scripts/bench/fleet.py here BUNDLE [--images 2000] [--rounds 3]    one process, and --workers 1 and 2, in turns
    python scripts/bench/fleet.py boards --seconds 6 --workers 64             workers that sleep as long as a board takes
    python scripts/bench/fleet.py keys [--images 1000000]                     empty batches: time and memory of the scheduler

Prints a line for each row, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
import psutil
from captions import IMAGES, QUESTION, links
from distributed import Client, LocalCluster
from lfm_fleet.batches import Batches
from lfm_fleet.crew import RESOURCE
from lfm_fleet.job import Item, Job
from lfm_fleet.worker import Answered
from lfm_runtime import __version__
from lfm_serve.asking import Asking

JOB = Job("bundle", "0" * 64, {}, Asking("What?"), "none")
WORKER = {"host": "here", "onnxruntime": ort.__version__, "lfm_edge": __version__}


def sleeping(job: Job, items: Sequence[Item], *, seconds: float) -> Answered:  # noqa: ARG001  (as worker.answer)
    """A batch on a board that takes so long for an image."""
    start = time.monotonic()
    time.sleep(seconds * len(items))
    records = [{"path": item.key, "text": "a text of an answer, as long as they are " * 3} for item in items]
    return Answered(records, time.monotonic() - start, WORKER)


def boards(workers: int, seconds: float, each: int) -> dict[str, Any]:
    """How much of the time of `workers` boards goes into answers."""
    items = [Item(f"{n}.png", f"{n}.png") for n in range(workers * each)]
    with (
        LocalCluster(
            n_workers=workers, processes=False, threads_per_worker=1, resources={RESOURCE: 1}, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(workers)
        start = time.monotonic()
        found = sum(1 for _ in Batches(client, JOB, items, print, partial(sleeping, seconds=seconds)).records())
        wall = time.monotonic() - start
    assert found == len(items)
    return {"workers": workers, "images": found, "wall_s": wall, "efficiency": seconds * found / (workers * wall)}


def keys(images: int, workers: int) -> list[dict[str, Any]]:
    """Time and memory of a scheduler, tenth by tenth of a run whose batches do nothing."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "scheduler.json"
        dask, where = [sys.executable, "-m", "dask"], ["--scheduler-file", str(place), "--no-dashboard"]
        with (Path(name) / "log").open("w") as log:
            scheduler = subprocess.Popen(
                [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", *where], stdout=log, stderr=log
            )
            others = [
                subprocess.Popen(
                    [*dask, "worker", *where, "--nthreads", "1", "--no-nanny", "--resources", f"{RESOURCE}=1"],
                    stdout=log,
                    stderr=log,
                )
                for _ in range(workers)
            ]
        try:
            with Client(scheduler_file=str(place)) as client:
                client.wait_for_workers(workers)
                return list(_tenths(client, images, psutil.Process(scheduler.pid)))
        finally:
            for process in (*others, scheduler):
                process.kill()
                process.wait()


def _tenths(client: Client, images: int, scheduler: psutil.Process):
    items = [Item(f"images/{n:07}.png", f"images/{n:07}.png") for n in range(images)]
    start, cpu = time.monotonic(), sum(scheduler.cpu_times()[:2])
    batches = Batches(client, JOB, items, print, partial(sleeping, seconds=0.0))
    for n, _ in enumerate(batches.records(), 1):
        if n % (images // 10) == 0:
            yield {
                "images": n,
                "wall_s": time.monotonic() - start,
                "scheduler_cpu_s": sum(scheduler.cpu_times()[:2]) - cpu,
                "scheduler_mib": scheduler.memory_info().rss / 2**20,
            }


def here(bundle: Path, images: int, rounds: int, words: Sequence[str]) -> list[dict[str, Any]]:
    """Images a minute of one process and of clusters of processes, starts included, in turns."""
    took: dict[str, list[float]] = {"one process": [], "--workers 1": [], "--workers 2": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        folder.mkdir()
        links(folder, images, IMAGES)
        for number in range(rounds):
            for kind, seconds in took.items():
                out = Path(name) / f"{number}{kind}.jsonl"
                run = [sys.executable, "-m", "lfm_runtime", "caption", str(bundle), str(folder), "-r", "-p", QUESTION]
                more = kind.split() if kind.startswith("--") else []
                start = time.monotonic()
                subprocess.run([*run, "-o", str(out), "--quiet", *more, *words], check=True)
                seconds.append(time.monotonic() - start)
    return [{"what": kind, "images_a_minute": 60 * images / statistics.median(s)} for kind, s in took.items()]


def main() -> int:
    """Measure one of the three; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("here", "boards", "keys"))
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--images", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=6.0, help="an image of a board")
    parser.add_argument("--each", type=int, default=30, help="images for each board")
    options, words = parser.parse_known_args()
    if options.what == "here":
        rows = here(options.bundle, options.images or 2_000, options.rounds, words)
    elif options.what == "boards":
        rows = [boards(options.workers, options.seconds, options.each)]
    else:
        rows = keys(options.images or 1_000_000, min(options.workers, 2))
    for row in rows:
        print("  ".join(f"{k} {v:,.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
