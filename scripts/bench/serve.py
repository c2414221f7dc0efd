"""Our server beside llama.cpp's on the same cores: images a minute, gaps in a running stream, second questions.

    python scripts/bench/serve.py BUNDLE --llama-server PATH --model text.gguf --mmproj mmproj.gguf [--threads 2]
        [--rounds 5] [-o FILE.json]

Both servers are started once and stay loaded; only one of them is asked at a time, in turns A B A B, after a round that
is not counted. Images are 512 × 512 crops of the demo's photos, no two the same, so that no cache helps; 64 tokens are
generated for each, greedy, whatever ends an answer. Without --llama-server only ours is measured. The machine should be
otherwise idle: the load average before each round is in the JSON.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = [Image.open(path).convert("RGB") for path in sorted((ROOT / "demo" / "photos").iterdir())]
QUESTION = "What is in this image, and where is it?"
ROOMS = ("kitchen", "hall", "cellar", "garden", "bedroom", "office")
TOKENS, SIDE = 64, 512
GREEDY = {"temperature": 0, "repeat_penalty": 1.0, "ignore_eos": True, "cache_prompt": True}


@dataclass
class Peer:
    """A server that runs."""

    name: str
    port: int
    process: subprocess.Popen
    rows: dict[str, list[float]] = field(default_factory=dict)

    def ask(self, body: dict) -> tuple[list[float], dict]:
        """(times of every chunk of text, seconds from the request; the usage)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        start = time.perf_counter()
        asked = {**GREEDY, **body, "stream": True, "stream_options": {"include_usage": True}}
        connection.request("POST", "/v1/chat/completions", json.dumps(asked), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{self.name}: {response.read()[:500]!r}")
        times, usage = [], {}
        for line in response:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                if any((choice.get("delta") or {}).get("content") for choice in chunk.get("choices") or ()):
                    times.append(time.perf_counter() - start)
        return times, usage

    def anonymous_mib(self) -> float:
        return int(Path(f"/proc/{self.process.pid}/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def images(seed: int) -> Iterator[str]:
    """Data URIs of images that are all different."""
    r = random.Random(seed)
    while True:
        photo = r.choice(PHOTOS)
        side = r.randint(SIDE // 2, min(photo.size))
        left, top = r.randint(0, photo.width - side), r.randint(0, photo.height - side)
        cut = (
            photo.crop((left, top, left + side, top + side))
            .resize((SIDE, SIDE))
            .filter(ImageFilter.GaussianBlur(r.random()))
        )
        stream = io.BytesIO()
        cut.save(stream, "jpeg", quality=r.randint(70, 95))
        yield f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def about(image: str | None, text: str, tokens: int) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": image}}] if image else []
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], "max_tokens": tokens}


def sentences(peer: Peer, seed: int) -> tuple[float, float]:
    """(first token of the first, median first token of five more), ms: what a voice assistant hears, behind instructions
    of some 1,500 tokens that are the same each time.
    """
    r = random.Random(seed)
    house = "\n".join(f"- light {n}, {r.choice(ROOMS)}, {r.choice(ROOMS)} side, dimmable" for n in range(90))
    system = {"role": "system", "content": f"You control the lights of a house, number {seed}:\n{house}"}
    found = []
    for n in range(6):
        user = {"role": "user", "content": f"Please turn on light {r.randint(0, 89)} in the {ROOMS[n]}."}
        found.append(1e3 * peer.ask({"messages": [system, user], "max_tokens": 2})[0][0])
    return found[0], statistics.median(found[1:])


def rate(peer: Peer, clients: int, number: int, seed: int) -> float:
    """Images a minute."""
    source = images(seed)
    bodies = [about(next(source), QUESTION, TOKENS) for _ in range(number)]
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        usages = [usage for _, usage in pool.map(peer.ask, bodies)]
    if any(usage.get("completion_tokens") != TOKENS for usage in usages):
        raise SystemExit(f"{peer.name}: {usages}")
    return 60 * number / (time.perf_counter() - start)


def beside_a_stream(peer: Peer, work: Callable[[], None], tokens: int) -> list[float]:
    """Gaps between the chunks of a running stream, in ms, while `work` goes on beside it."""
    found: list[float] = []

    def stream() -> None:
        found.extend(peer.ask(about(None, "Tell a long story about a harbour.", tokens))[0])

    thread = threading.Thread(target=stream)
    thread.start()
    time.sleep(1.0)
    start = time.perf_counter()
    work()
    ended = time.perf_counter() - start
    thread.join()
    inside = [t for t in found if 1.0 <= t <= 1.0 + ended]
    return [1e3 * (b - a) for a, b in pairwise(inside)]


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1] if len(values) > 1 else float("nan")


def measure(peer: Peer, seed: int, number: int) -> dict[str, float]:
    source = images(seed + 1)
    first = next(source)
    row = {"images_min_1": rate(peer, 1, number, seed + 2), "images_min_4": rate(peer, 4, 2 * number, seed + 3)}
    peer.ask(about(first, QUESTION, 1))
    seconds: list[float] = []

    def second() -> None:
        for n in range(5):
            times, _ = peer.ask(about(first, f"And what colour is thing number {n}?", 2))
            seconds.append(1e3 * times[0])

    alone = beside_a_stream(peer, lambda: time.sleep(1.5), 300)
    beside_a_stream(peer, second, 400)
    bodies = [about(next(source), QUESTION, TOKENS) for _ in range(3)]

    def arrive() -> None:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(peer.ask, bodies))

    gaps = beside_a_stream(peer, arrive, 700)
    row |= {"gap_alone_p95_ms": p95(alone), "gap_p95_ms": p95(gaps), "gap_max_ms": max(gaps, default=float("nan"))}
    row |= {"second_question_ttft_ms": statistics.median(seconds)}
    row["first_sentence_ttft_ms"], row["sentence_ttft_ms"] = sentences(peer, seed)
    row["anonymous_mib"] = peer.anonymous_mib()
    return row


@contextmanager
def started(name: str, words: list[str], port: int) -> Iterator[Peer]:
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            time.sleep(0.1)
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            if process.poll() is not None:
                raise SystemExit(f"{name} ended: {' '.join(words)}")
        yield Peer(name, port, process)
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--variant", default="int4")
    parser.add_argument("--prefill", default="int8")
    parser.add_argument("--llama-server")
    parser.add_argument("--model")
    parser.add_argument("--mmproj")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=6, help="for one client; twice as many for four")
    parser.add_argument("-o", "--output", type=Path)
    o = parser.parse_args()
    ours = [sys.executable, "-m", "lfm_runtime", "serve", o.bundle, "--port", "8191", "--threads", str(o.threads)]
    ours += ["--variant", o.variant, "--prefill", o.prefill, "--rows", "4", "--context", "2048", "--quiet"]
    theirs = [o.llama_server, "-m", o.model, "--mmproj", o.mmproj, "--port", "8192", "--threads", str(o.threads)]
    theirs += ["--threads-batch", str(o.threads), "-np", "4", "-c", "8192", "--no-webui", "--image-min-tokens", "64"]
    theirs += ["--image-max-tokens", "256"]
    with ExitStack() as stack:
        peers = [stack.enter_context(started("lfm-edge", ours, 8191))]
        if o.llama_server:
            peers.append(stack.enter_context(started("llama.cpp", theirs, 8192)))
        loads = []
        for n in range(o.rounds + 1):
            loads.append(os.getloadavg()[0])
            for peer in peers:
                row = measure(peer, 1000 * n, o.images)
                print(n, peer.name, {k: round(v, 1) for k, v in row.items()}, flush=True)
                for name, value in row.items() if n else ():
                    peer.rows.setdefault(name, []).append(value)
    medians = {p.name: {k: statistics.median(v) for k, v in p.rows.items()} for p in peers}
    found: dict = {"load": loads, "median": medians, "rounds": {p.name: p.rows for p in peers}}
    if len(peers) == 2:
        a, b = (p.rows for p in peers)
        found["ratio"] = {k: statistics.median(x / y for x, y in zip(a[k], b[k], strict=True)) for k in a}
    for name in peers[0].rows:
        print(
            f"{name:26}",
            *(f"{medians[p.name][name]:10.1f}" for p in peers),
            f"{found['ratio'][name]:7.2f}" if "ratio" in found else "",
        )
    if o.output:
        o.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
