"""Bundles as they are written, in transformers.js under Node (scripts/test.sh installs it): the same answers as ours."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from lfm_runtime import Model

ROOT = Path(__file__).resolve().parents[2]
NODE = ROOT / "build" / "node"
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not shutil.which("node"), reason="Node is not installed"),
    pytest.mark.skipif(
        not (NODE / "node_modules" / "@huggingface" / "transformers").is_dir()
        and not os.environ.get("LFM_EDGE_TEST_ALL"),
        reason="transformers.js is not installed: scripts/test.sh does it",
    ),
]
QUESTIONS = 20


@pytest.fixture(scope="module")
def questions() -> list[dict[str, str]]:
    lines = (ROOT / "demo" / "eval" / "eval.jsonl").read_text().splitlines()
    chosen = [json.loads(line) for line in lines[:: len(lines) // QUESTIONS][:QUESTIONS]]
    return [{"image": str(ROOT / "demo" / "eval" / str(q["image"])), "question": q["question"]} for q in chosen]


def answers(bundle: Path, dtype: str, questions: list[dict[str, str]], tmp_path: Path) -> list[str]:
    """What transformers.js says."""
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    shutil.copy(ROOT / "tests" / "node" / "answers.mjs", NODE / "answers.mjs")
    words = ["node", str(NODE / "answers.mjs"), str(bundle), dtype, str(tmp_path / "questions.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=NODE)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("variant", "dtype", "same"), [("fp32", '"fp32"', 20), ("int8", '"int8"', 20), ("int4", "config", 19)]
)
def test_transformers_js_answers_as_we_do(quantized, questions, tmp_path, variant, dtype, same) -> None:
    """`config`: what the bundle's own config.json tells it to take."""
    model = Model.load(quantized, variant=variant, threads=1)
    wanted = [
        model.answer([q["image"]], q["question"], temperature=0, repetition_penalty=1.0, max_new_tokens=24).text()
        for q in questions
    ]
    said = answers(quantized, dtype, questions, tmp_path)
    assert len(said) == QUESTIONS
    assert sum(a == b for a, b in zip(said, wanted, strict=True)) >= same, (said, wanted)


def test_a_packed_variant_tells_what_it_has(quantized, questions, tmp_path) -> None:
    """Its config.json names no graph that is not in it, and it answers without being told anything."""
    from lfm_runtime.commands.cli import main

    assert main(["pack", str(quantized), "--variant", "int8", "-o", str(tmp_path / "cam.tar")]) == 0
    assert main(["unpack", str(tmp_path / "cam.tar"), "-o", str(tmp_path / "cam")]) == 0
    told = json.loads((tmp_path / "cam" / "config.json").read_text())["transformers.js_config"]
    assert set(told["dtype"].values()) == {"int8"}
    assert {f"{name}_data" for name in told["use_external_data_format"]} <= {
        p.name for p in (tmp_path / "cam" / "onnx").iterdir()
    }
    model = Model.load(tmp_path / "cam", threads=1)
    question = questions[0]
    wanted = model.answer([question["image"]], question["question"], temperature=0, repetition_penalty=1.0).text()
    assert answers(tmp_path / "cam", "config", questions[:1], tmp_path) == [wanted]


class _Server:
    """What a browser fetches: the page, the package, the bundle, pictures; and where it posts what was said."""

    def __init__(self, bundle: Path, asked: dict[str, object]) -> None:
        modules = NODE / "node_modules"
        places = {
            "/transformers/": modules / "@huggingface" / "transformers" / "dist",
            "/ort/": modules / "onnxruntime-web" / "dist",
            "/models/bundle/": bundle,
            "/images/": ROOT / "demo" / "eval" / "images",
        }
        texts = {"/": (ROOT / "tests" / "node" / "page.html").read_bytes(), "/asked.json": json.dumps(asked).encode()}
        self.said: queue.Queue[dict[str, object]] = queue.Queue()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def translate_path(self, path: str) -> str:
                path = path.partition("?")[0]
                found = next(((at, place) for at, place in places.items() if path.startswith(at)), None)
                return str(found[1] / path.removeprefix(found[0])) if found else os.devnull

            def do_GET(self) -> None:
                if self.path not in texts:
                    return super().do_GET()
                self.send_response(200)
                self.send_header("Content-Type", "text/html" if self.path == "/" else "application/json")
                self.send_header("Content-Length", str(len(texts[self.path])))
                self.end_headers()
                self.wfile.write(texts[self.path])
                return None

            def do_POST(self) -> None:
                server.said.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
@pytest.mark.parametrize("dtype", ["fp32", "int8", None])
def test_a_browser_answers_as_we_do(quantized, questions, tmp_path, dtype) -> None:
    """A bundle for browsers with WebAssembly in Chromium; without a dtype, what its config.json says."""
    from lfm_runtime.commands.cli import main

    assert main(["export", str(quantized), "--web", "-o", str(tmp_path / "web")]) == 0
    variant = {"fp32": "fp32", "int8": "int8", None: "int4"}[dtype]
    few = questions[:3]
    model = Model.load(quantized, variant=variant, threads=1)
    wanted = [
        model.answer([q["image"]], q["question"], temperature=0, repetition_penalty=1.0, max_new_tokens=24).text()
        for q in few
    ]
    asked = [{"image": f"/images/{Path(q['image']).name}", "question": q["question"]} for q in few]
    server = _Server(tmp_path / "web", {"device": "wasm", "dtype": dtype, "questions": asked})
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    browser = subprocess.Popen([*words, f"http://127.0.0.1:{server.http.server_port}/"], stderr=subprocess.DEVNULL)
    try:
        assert server.said.get(timeout=600) == {"answers": wanted}
    finally:
        browser.kill()
        browser.wait()
        server.http.shutdown()
