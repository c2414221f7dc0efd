"""A server in a process of its own, as its users start it."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURES = sorted((ROOT / "demo" / "eval" / "images").iterdir())[:8]


class Server:
    """`lfm-edge serve` on a free port."""

    def __init__(self, bundle: Path, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lfm_runtime", "serve", str(bundle), "--port", "0", "--threads", "1", *words],
            stderr=subprocess.PIPE,
            text=True,
        )
        said = ""
        for line in self.process.stderr:
            said += line
            if found := re.search(r"serving at http://127\.0\.0\.1:(\d+)/v1", line):
                self.port = int(found[1])
                self.url = f"http://127.0.0.1:{self.port}"
                return
        raise AssertionError(f"it did not start: {said}")

    def ask(self, path: str, body=None, **headers: str):
        """(status, JSON or text, headers)."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request) as found:
                status, text, head = found.status, found.read(), found.headers
        except urllib.error.HTTPError as e:
            status, text, head = e.code, e.read(), e.headers
        return status, json.loads(text) if "json" in head["content-type"] else text.decode(), head

    def chat(self, *parts, **more):
        """As `ask`, for one user's message of these parts."""
        return self.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": list(parts)}], **more})

    def metric(self, name: str) -> float:
        return float(re.search(rf"^{re.escape(name)} (.+)$", self.ask("/metrics")[1], re.MULTILINE)[1])

    def becomes(self, name: str, value: float) -> None:
        """Wait until a metric has a value; a minute is for machines that are busy."""
        ends = time.monotonic() + 60
        while self.metric(name) != value:
            assert time.monotonic() < ends, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)

    def becomes_at_least(self, name: str, value: float) -> None:
        """As `becomes`, for a metric that may not be there yet."""
        ends = time.monotonic() + 60
        while not (found := re.search(rf"^{re.escape(name)} (.+)$", self.ask("/metrics")[1], re.MULTILINE)) or float(found[1]) < value:  # fmt: skip
            assert time.monotonic() < ends
            time.sleep(0.02)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.said = self.process.communicate(timeout=60)[1]
        return self.process.returncode


def text(said: str):
    return {"type": "text", "text": said}


def picture(source, kind: str = "png"):
    """An image part of a path, bytes or a PIL image."""
    if isinstance(source, Path):
        data = source.read_bytes()
    elif isinstance(source, bytes):
        data = source
    else:
        stream = io.BytesIO()
        source.save(stream, kind)
        data = stream.getvalue()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}
