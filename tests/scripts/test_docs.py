"""The page of the documentation that asks the demo model in the reader's browser, built by mkdocs and used in Chromium."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from lfm_runtime import Model

ROOT = Path(__file__).resolve().parents[2]
TRANSFORMERS = ROOT / "build" / "node" / "node_modules" / "@huggingface" / "transformers"
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
QUESTION = "Where is the red cross?"

# What a reader does: write a question, choose the second picture, ask, wait for the line below the answer.
READER = """
<script type="module">
const part = (name) => document.getElementById(`ask-${name}`);
const until = async (ready) => { while (!ready()) await new Promise((resolve) => setTimeout(resolve, 100)); };
await until(() => !document.getElementById("ask").hidden);
part("question").value = QUESTION;
part("images").querySelectorAll("button")[1].click();
part("button").click();
await until(() => /tokens of prompt|did not work/.test(part("state").textContent));
const missing = document.getElementById("ask-missing").hidden;
await fetch("/said", {method: "POST", body: JSON.stringify([part("answer").textContent, part("state").textContent, missing])});
</script>
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
@pytest.mark.skipif(not TRANSFORMERS.is_dir(), reason="transformers.js is not installed: scripts/test.sh does it")
def test_the_demo_model_answers_on_the_page(tmp_path) -> None:
    site = tmp_path / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(site)]
    subprocess.run(words, check=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    page = site / "try.html"
    page.write_text(page.read_text().replace("</body>", f"{READER.replace('QUESTION', json.dumps(QUESTION))}</body>"))
    said: queue.Queue[list[str | bool]] = queue.Queue()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            said.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    browser = subprocess.Popen([*words, f"http://127.0.0.1:{server.server_port}/try.html"], stderr=subprocess.DEVNULL)
    try:
        answer, state, complete = said.get(timeout=600)
    finally:
        browser.kill()
        browser.wait()
        server.shutdown()
    assert complete, "the page says that it cannot"
    picture = ROOT / "demo" / "eval" / "images" / json.loads((site / "try/assets/pictures.json").read_text())[1]
    model = Model.load(site / "try" / "assets" / "model", variant="int8", threads=1)
    wanted = model.answer([picture], QUESTION, temperature=0, repetition_penalty=1.0, max_new_tokens=64)
    assert answer == wanted.text(), state
    assert str(state).startswith(f"{wanted.report.prompt_tokens} tokens of prompt"), state
