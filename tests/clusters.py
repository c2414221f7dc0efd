"""A Dask cluster as its users start it: a scheduler and workers, each a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PATIENCE_S = 120  # on a busy machine; nothing is judged by it


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Cluster:
    """A scheduler, workers, and the folder of what they say."""

    def __init__(self, folder: Path, *words: str, before: str = "", environment: dict[str, str] | None = None) -> None:
        """`words`: more arguments of the scheduler; `before`: Python that runs in it first."""
        self.folder, self.port, self._words, self._before = folder, free_port(), words, before
        self.scheme = "tls" if "--tls-cert" in words else "tcp"
        self.address = f"{self.scheme}://127.0.0.1:{self.port}"
        self._environment = {**os.environ, **(environment or {})}
        self.workers: list[subprocess.Popen] = []
        self.scheduler = self._start_scheduler()

    def _start(self, program: str, name: str, *words: str, before: str = "") -> subprocess.Popen:
        code = f"{before}\nimport sys\nfrom distributed.cli.{program} import main\nif __name__ == '__main__': main(sys.argv[1:])"
        script = self.folder / f"{name}.py"  # a nanny's child imports it
        script.write_text(code)
        with (self.folder / f"{name}.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, str(script), *words], stdout=log, stderr=log, env=self._environment, cwd=self.folder
            )

    def _start_scheduler(self) -> subprocess.Popen:
        where = ("--host", f"{self.scheme}://127.0.0.1", "--port", str(self.port), "--no-dashboard")
        return self._start("dask_scheduler", "scheduler", *where, *self._words, before=self._before)

    def restart_scheduler(self) -> None:
        self.scheduler.kill()
        self.scheduler.wait()
        self.scheduler = self._start_scheduler()

    def work(self, name: str, *words: str, offers: str = "lfm-edge=1", before: str = "", nanny: bool = False) -> None:
        """Start a worker."""
        offered = ("--resources", offers) if offers else ()
        kind = "--nanny" if nanny else "--no-nanny"
        more = ("--name", name, "--nthreads", "1", "--no-dashboard", kind, *offered, *words)
        self.workers.append(self._start("dask_worker", f"worker-{name}", self.address, *more, before=before))

    def has_registered(self, name: str) -> bool:
        """Whether the scheduler knows a worker, as its log says."""
        return "Registered to:" in (self.folder / f"worker-{name}.log").read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.workers, self.scheduler):
            process.send_signal(signal.SIGTERM)
        for process in (*self.workers, self.scheduler):
            _end(process)


def _end(process: subprocess.Popen) -> None:
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def until(ready, what: str = "it") -> None:
    end = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.02)


def start(words: list[str], **more) -> subprocess.Popen:
    """The command in a process of its own."""
    run = [sys.executable, "-m", "lfm_runtime", *words]
    return subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def texts(out: Path) -> dict[str, str]:
    """Path → text of every line; the same path twice fails."""
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({record["path"] for record in records}) == len(records)
    return {record["path"]: record.get("text", f"error: {record.get('error')}") for record in records}
