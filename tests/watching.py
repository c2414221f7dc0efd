"""`lfm-edge watch` in a process of its own, for tests."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictures import QUESTION

HEAD = ["time", "source", "frame", "size", "changed", "question", "text", "finish_reason", "prompt_tokens"]
HEAD += ["image_tokens", "new_tokens", "ms", "peak_mib", "tiles", "encoded_tiles", "cached_tokens", "age_ms"]
PATIENCE_S = 120  # on a busy machine; nothing is judged by it


class Watching:
    """The command in a process of its own, that writes to a file."""

    def __init__(self, bundle: Path, source: str, out: Path, *words: str) -> None:
        command = [sys.executable, "-m", "lfm_runtime", "watch", str(bundle), source, "-p", QUESTION, "-o", str(out)]
        self.out, self.said = out, out.with_suffix(".err")
        with self.said.open("w") as err:
            self.process = subprocess.Popen(
                [*command, "--threads", "1", "--max-new-tokens", "4", *words], stdout=err, stderr=err
            )

    def records(self) -> list[dict]:
        if not self.out.exists():
            return []
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def until(self, ready: Callable[[list[dict]], Any]) -> list[dict]:
        """Records, once `ready` likes them."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            if ready(found := self.records()):
                return found
            assert self.process.poll() is None, self.said.read_text()
            time.sleep(0.05)
        pytest.fail(f"{self.records()[-3:]} {self.said.read_text()}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


def answers(records: list[dict]) -> list[dict]:
    return [one for one in records if "text" in one]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
