"""The page in Chromium: with mouse and keyboard, on a phone's width and a desktop's, with a camera; nothing moves while an
answer streams, and nothing is asked of any other host.

    LFM_EDGE_SCREENSHOTS=docs/images pytest tests/serve/test_page.py        # the pictures of docs/serve.md
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance")
playwright = pytest.importorskip("playwright.sync_api")
from servers import PICTURES  # noqa: E402

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
pytestmark = [
    pytest.mark.process,
    pytest.mark.newest_python,
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed"),
]
QUESTION = "What is in this image?"
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
SHIFTS = """new PerformanceObserver((list) => { for (const entry of list.getEntries()) window.shifted = (window.shifted ?? 0) + entry.value; })
    .observe({type: "layout-shift", buffered: true});"""
BOX = {"type": "array", "minItems": 1, "maxItems": 1, "items": {"type": "object", "required": ["label", "bbox"], "additionalProperties": False,
       "properties": {"label": {"const": "cross"}, "bbox": {"const": [0.25, 0.25, 0.75, 0.75]}}}}  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        words = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--no-sandbox"]
        found = driver.chromium.launch(executable_path=CHROMIUM, args=words)
        yield found
        found.close()


@pytest.fixture
def page(browser, server):
    """A function that opens the page: (width and height, light or dark)."""
    contexts, wrong = [], []

    def open_page(size=DESKTOP, scheme: str = "light"):
        context = browser.new_context(viewport=size, color_scheme=scheme, permissions=["camera"])
        contexts.append(context)
        found = context.new_page()
        found.set_default_timeout(60_000)
        found.on("pageerror", lambda error: wrong.append(str(error)))
        found.on(
            "console",
            lambda said: (
                wrong.append(said.text)
                if said.type == "error" and not any(word in said.text for word in ("400", "example.org"))
                else None
            ),
        )
        found.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith((server.url, "blob:", "data:")) else None)  # fmt: skip
        found.add_init_script(SHIFTS)
        found.goto(server.url)
        return found

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def until(page, condition: str) -> None:
    """Wait for a condition; playwright's own way would evaluate text in the page, which forbids it."""
    ends = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < ends, (condition, page.text_content("#said"))
        page.wait_for_timeout(20)


def answered(page) -> str:
    """Wait for the end of the answer; returns it."""
    until(page, "!document.getElementById('ask').disabled && Boolean(document.getElementById('answer').textContent)")
    return page.text_content("#answer")


def figures(page) -> dict[str, str]:
    return dict(row.split("\t") for row in page.inner_text("#figures").splitlines())


@pytest.mark.parametrize(("size", "scheme", "name"), [(PHONE, "dark", "phone"), (DESKTOP, "light", "desktop")])
def test_an_image_a_question_an_answer(page, demo_model, size, scheme, name) -> None:
    """The model's own text, its tokens, times and memory; no side scrolling, and no layout shift."""
    found = page(size, scheme)
    found.set_input_files("#file", str(PICTURES[0]))
    found.wait_for_selector("#canvas:visible")
    found.fill("#question", QUESTION)
    found.evaluate("window.shifted = 0")
    found.click("#ask")
    said = answered(found)
    wanted = demo_model.answer([PICTURES[0]], QUESTION, special=False, temperature=0)
    assert said == wanted.text()
    assert found.evaluate("window.shifted ?? 0") == 0
    shown = figures(found)
    assert shown["prompt tokens"] == str(wanted.report.prompt_tokens)
    assert shown["of them image"] == str(wanted.report.image_tokens) and shown["memory"].endswith(" MiB")
    assert found.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if folder := os.environ.get("LFM_EDGE_SCREENSHOTS"):
        found.screenshot(path=str(Path(folder) / f"serve-{name}.png"), full_page=True)


def test_the_keyboard_alone(page) -> None:
    """Every control is reached by Tab, with a visible focus; Enter asks."""
    found = page()
    reached = []
    for _ in range(9):
        found.keyboard.press("Tab")
        reached.append(found.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert found.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    wanted = ["drop", "camera", "clear", "every", "seconds", "question"]
    assert reached[:6] == wanted and {"SUMMARY", "ask", "answer"} <= set(reached)
    found.focus("#question")
    found.keyboard.press("Control+A")
    found.keyboard.type("red?")
    found.keyboard.press("Enter")
    until(
        found,
        "!document.getElementById('ask').disabled && /\\d MiB/.test(document.getElementById('figures').textContent)",
    )


def test_boxes_are_drawn_and_a_schema_that_is_none_is_told(page) -> None:
    found = page()
    found.set_input_files("#file", str(PICTURES[0]))
    found.wait_for_selector("#canvas:visible")
    found.click("summary")
    found.fill("#schema", json.dumps(BOX))
    before = found.evaluate("document.getElementById('canvas').toDataURL()")
    found.click("#ask")
    assert json.loads(answered(found))[0]["label"] == "cross"
    assert found.evaluate("document.getElementById('canvas').toDataURL()") != before
    corner = "(() => { const c = document.getElementById('canvas'); return [...c.getContext('2d').getImageData(c.width / 4, c.height / 2, 1, 1).data]; })()"
    inside = corner.replace("c.width / 4", "c.width * 0.6")
    colour = found.evaluate(corner)
    assert max(colour[:3]) - min(colour[:3]) > 60 and found.evaluate(inside) != colour
    for schema, said in (("{", "The schema is not JSON"), ('{"not": {}}', "cannot be enforced")):
        found.fill("#schema", schema)
        found.click("#ask")
        until(found, f"document.getElementById('said').textContent.includes({json.dumps(said)})")


def test_stop_ends_the_answer_on_the_server(page, server) -> None:
    found = page()
    found.click("summary")
    found.fill("#schema", '{"type": "string", "minLength": 3000}')
    found.fill("#tokens", "4000")
    before = server.metric("lfm_cancelled_total")
    found.click("#ask")
    until(found, "document.getElementById('answer').textContent.length > 20")
    found.click("#stop")
    assert answered(found)
    server.becomes("lfm_running", 0)
    assert server.metric("lfm_cancelled_total") == before + 1


def test_the_camera_every_second(page) -> None:
    """A photograph each time, until it is stopped; one question alone ends the camera and keeps the picture."""
    found = page(PHONE)
    found.fill("#seconds", "1")
    found.check("#every")
    found.click("#camera")
    found.wait_for_selector("#video:visible")
    with found.expect_request(lambda asked: asked.url.endswith("/v1/chat/completions")):
        found.click("#ask")
    with found.expect_request(lambda asked: asked.url.endswith("/v1/chat/completions")) as second:
        pass
    assert "data:image/jpeg;base64," in second.value.post_data
    found.uncheck("#every")
    assert answered(found)
    found.click("#ask")
    found.wait_for_selector("#canvas:visible")
    assert answered(found) and not found.is_visible("#video")


def test_pasted_and_dropped(page) -> None:
    data = base64.b64encode(PICTURES[0].read_bytes()).decode()
    for kind in ("paste", "drop"):
        found = page()
        found.evaluate(
            """([kind, data]) => {
                const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
                const transfer = new DataTransfer();
                transfer.items.add(new File([bytes], "a.png", {type: "image/png"}));
                const event = kind === "paste" ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true})
                    : new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
                document.body.dispatchEvent(event);
            }""",
            [kind, data],
        )
        found.wait_for_selector("#canvas:visible")
        found.click("#clear")
        assert not found.is_visible("#canvas")


def test_what_a_model_says_stays_text(page) -> None:
    """Markup in an answer is shown, not run; the page may load nothing and talk to its own server alone."""
    found = page()
    found.click("summary")
    found.fill("#schema", json.dumps({"const": "<img src=x onerror=alert(1)>"}))
    found.click("#ask")
    assert json.loads(answered(found)) == "<img src=x onerror=alert(1)>"
    assert found.evaluate("document.querySelectorAll('#answer img').length") == 0
    assert found.evaluate("fetch('https://example.org').then(() => 'sent', () => 'refused')") == "refused"
