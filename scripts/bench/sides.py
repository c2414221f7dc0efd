"""What peers.py asks of lfm-edge, of llama.cpp's programs, of others.py, and of processes and servers."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfm_runtime import Model
from lfm_runtime.decode.context import MOST_AT_ONCE
from measures import timed_ms
from turns import GENAI, OPENVINO, Measure

from serve import QUESTION, Peer, about, rate

# -------------------------------------------------------------------------------------------------------- lfm-edge


def fed(model: Model, past: int, room: int) -> Any:
    """A state after `past` tokens, read as prompts are."""
    state, ids = model.decoder.start(past + room), [10 + n % 300 for n in range(past)]
    for start in range(0, past, MOST_AT_ONCE):
        state.step(model.decoder.embed(ids[start : start + MOST_AT_ONCE]))
    return state


def warmed(measure: Measure) -> Measure:
    """Done twice, of which the second counts."""
    return lambda: (measure(), measure())[1]


def prefill(model: Model, tokens: int) -> Measure:
    return lambda: tokens / timed_ms(lambda: fed(model, tokens, 1)) * 1e3


def decode(model: Model, past: int, tokens: int = 32) -> Measure:
    """Embedding and decoder; no sampling, as llama-bench."""
    state = fed(model, past, tokens)
    mark = state.mark()

    def measure() -> float:
        state.rewind(mark)
        return tokens / timed_ms(lambda: [state.step_token(10 + n) for n in range(tokens)]) * 1e3

    return measure


# ------------------------------------------------------------------------------------------------------- llama.cpp


@dataclass(frozen=True)
class Llama:
    """llama.cpp's own programs."""

    programs: Path
    folder: Path
    threads: int

    def bench(self, *words: object) -> Measure:
        """Tokens a second, by llama-bench."""
        command = [self.programs / "llama-bench", "-m", self.folder / "text-q4_0.gguf", "-t", self.threads]
        command += ["-r", 1, "-o", "json", *words]

        def measure() -> float:
            done = subprocess.run(
                [str(w) for w in command], capture_output=True, text=True, errors="replace", check=True
            )
            return float(json.loads(done.stdout)[-1]["avg_ts"])

        return measure

    def one_shot(self, image: Path, tokens: int) -> list[str]:
        words = [self.programs / "llama-mtmd-cli", *self.model, "-t", self.threads, "-c", 4096, "--image", image]
        words += ["-p", QUESTION, "-n", tokens, "--temp", 0, "--image-min-tokens", 64, "--image-max-tokens", 256]
        return [str(w) for w in words]

    @property
    def model(self) -> list[object]:
        return ["-m", self.folder / "text-q4_0.gguf", "--mmproj", self.folder / "mmproj-f16.gguf"]

    def vision(self, image: Path) -> Measure:
        """ms for all views, as llama-mtmd-cli says them."""
        command = [*self.one_shot(image, 1), "-lv", "4"]

        def measure() -> float:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
            found = re.findall(r"encoding done in (\d+) ms", done.stdout + done.stderr)
            return float(sum(map(int, found)))

        return measure

    def server(self, rows: int, port: int) -> list[str]:
        words = [self.programs / "llama-server", *self.model, "--port", port, "-t", self.threads, "-tb", self.threads]
        words += ["-np", rows, "-c", 2048 * rows, "--no-webui", "--image-min-tokens", 64, "--image-max-tokens", 256]
        return [str(w) for w in words]


# ---------------------------------------------------------------------------------------------------------- others


class Other:
    """A process of others.py."""

    def __init__(self, python: Path | str, *words: object) -> None:
        command = [str(python), str(Path(__file__).with_name("others.py")), *map(str, words)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.version = self._answer()["version"]
        self.process.send_signal(signal.SIGSTOP)  # threads that wait for work may spin

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise OSError(f"it ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def measure(self, name: str, value: object) -> Measure:
        def ask() -> float:
            assert self.process.stdin
            self.process.send_signal(signal.SIGCONT)
            print(json.dumps({name: value}), file=self.process.stdin, flush=True)
            found = float(self._answer()["value"])
            self.process.send_signal(signal.SIGSTOP)
            return found

        return ask


def others_of(folder: Path, threads: int, views: Path) -> dict[str, Other]:
    """Those that are installed."""
    found = {OPENVINO: Other(sys.executable, "openvino", folder / "portable", threads, views)}
    python = folder / "genai-environment" / "bin" / "python"
    if python.with_name("pip").exists() and (folder / "genai-environment" / ".wanted").exists():
        found[GENAI] = Other(python, "genai", folder / "genai", threads)
    return found


# --------------------------------------------------------------------------------------------- processes and servers


@dataclass
class Process:
    """What a program took from its start to its end."""

    words: list[str]
    peaks: list[float] = field(default_factory=list)
    anonymous: list[float] = field(default_factory=list)

    def run(self) -> float:
        """ms from start to end; notes its largest memory beside. Not wait4's: that of this process, from which it was
        forked, counts there.
        """
        start, peak, anonymous = time.perf_counter(), 0.0, 0.0
        process = subprocess.Popen(self.words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        done = threading.Event()

        def sample() -> None:
            nonlocal peak, anonymous
            while not done.wait(0.01):
                with suppress(OSError, IndexError):  # it has ended
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    peak = max(peak, int(status.split("VmHWM:")[1].split()[0]) / 1024)
                    anonymous = max(anonymous, int(status.split("RssAnon:")[1].split()[0]) / 1024)

        watcher = threading.Thread(target=sample)
        watcher.start()
        code = process.wait()
        taken = 1e3 * (time.perf_counter() - start)
        done.set()
        watcher.join()
        if code:
            raise SystemExit(f"{self.words} ended with {code}")
        self.peaks.append(peak)
        self.anonymous.append(anonymous)
        return taken


def first_token(peer: Peer, seeds: Any) -> Measure:
    """ms from a request about a new image to its first token."""

    def measure() -> float:
        times, _ = peer.ask(about(next(seeds), QUESTION, 2))
        return 1e3 * times[0]

    return measure


def images_a_minute(peer: Peer, rows: int) -> Measure:
    """That many asked at a time, new images each time."""
    seeds = iter(range(3, 10_000))
    return lambda: rate(peer, rows, 4 if rows == 1 else 2 * rows, next(seeds))


def second_question(peer: Peer, image: str) -> Measure:
    """The same image with another question each time."""
    peer.ask(about(image, QUESTION, 1))
    asked = iter(range(10_000))
    return lambda: 1e3 * peer.ask(about(image, f"And what colour is thing number {next(asked)}?", 2))[0][0]
