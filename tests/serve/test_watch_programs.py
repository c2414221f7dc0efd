"""`lfm-edge watch` of programs and of pictures by HTTP: nothing of them is left, and nothing of them piles up."""

from __future__ import annotations

import contextlib
import http.server
import io
import signal
import threading
import time

import psutil
import pytest
from lfm_runtime.commands.cli import main
from pictures import QUESTION
from PIL import Image
from watching import PATIENCE_S, answers


def test_a_program_that_writes_pictures(watching, stills) -> None:
    """It ends and is started again; what it says is told without what may be secret; nothing of it is left."""
    # The picture between two headers, as `curl http://camera/video.mjpg` gives them.
    command = (
        f"PASSWORD=secret; for n in 0 1 2; do printf -- '--b\\r\\n\\r\\n'; cat {stills}/$n.png; sleep 0.3; done; sleep 0.2 & "
        "echo cannot open rtsp://me:secret@cam/1 >&2; wait; exit 7"
    )
    found = watching(f"exec:{command}")
    records = found.until(lambda records: sum(one.get("event") == "back" for one in records) >= 1)
    assert {one["source"] for one in records} == {"exec:for"}
    lost = next(one for one in records if one.get("event") == "lost")
    assert lost["error"] == "the command ended with 7: cannot open rtsp://…@cam/1"
    assert {one["frame"] for one in answers(records)} <= {0, 1, 2}
    children = psutil.Process(found.process.pid).children(recursive=True)
    assert found.stop() == 0
    psutil.wait_procs(children, timeout=PATIENCE_S)
    assert not any(child.is_running() for child in children)
    assert "secret" not in found.said.read_text() + found.out.read_text()


def test_a_program_that_stalls_or_is_not_there(watching, stills) -> None:
    stalled = watching(f"exec:cat {stills}/0.png; sleep 600", "--stall", "500ms")
    records = stalled.until(lambda records: sum(one.get("event") == "back" for one in records) >= 2)
    assert [one["error"] for one in records if one.get("event") == "lost"][:2] == ["no picture for 0.5 s"] * 2
    assert stalled.stop() == 0
    missing = watching("exec:no-such-program -o -")
    records = missing.until(bool)
    assert "ended with 127" in records[0]["error"]
    text = watching("exec:echo hello")
    assert text.until(bool)[0]["error"] == "the command ended with 0 without a JPEG or PNG picture"
    assert text.stop() == 0
    assert missing.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL, signal.SIGTERM])
def test_nothing_of_a_program_is_left(watching, stills, number) -> None:
    """However the command ends; a program that ignores SIGTERM is killed, where somebody is left to do it."""
    deaf = "" if number == signal.SIGKILL else "trap '' TERM; "
    found = watching(f"exec:{deaf}while :; do cat {stills}/0.png; sleep 0.2; done")
    found.until(bool)
    children = psutil.Process(found.process.pid).children(recursive=True)
    assert children
    found.process.send_signal(number)
    found.process.wait(PATIENCE_S)
    _, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
    assert not alive


def test_a_program_that_talks_without_end_takes_no_memory(watching, stills) -> None:
    """ffmpeg writes how far it is into one line that never ends."""
    talk = "while :; do printf 'frame= 1 fps=25 q=2.0 size=N/A\\r%.0s' $(seq 500) >&2; done"
    found = watching(f"exec:({talk}) & while :; do cat {stills}/0.png; sleep 0.1; done")
    found.until(lambda records: len(records) >= 10)
    process = psutil.Process(found.process.pid)
    before, count = process.memory_full_info().uss, len(found.records())
    found.until(lambda records: len(records) >= count + 30)
    assert process.memory_full_info().uss - before < 8 << 20
    assert found.stop() == 0


def test_pictures_by_http(watching, stills) -> None:
    """A camera that sends a picture each 1.5 s, to which ffmpeg gives times of its own: they are not called old. And one
    whose address gives a single picture.
    """
    pytest.importorskip("av")
    picture = io.BytesIO()
    Image.open(stills / "0.png").convert("RGB").save(picture, "JPEG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            if self.path == "/one.jpg":
                self.send_header("Content-Type", "image/jpeg")
                self.send_header("Content-Length", str(len(picture.getvalue())))
                self.end_headers()
                self.wfile.write(picture.getvalue())
                return
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=b")
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"--b\r\nContent-Type: image/jpeg\r\n\r\n" + picture.getvalue() + b"\r\n")
                    time.sleep(1.5)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stream = watching(f"http://127.0.0.1:{server.server_port}/video")
    one = watching(f"http://127.0.0.1:{server.server_port}/one.jpg")
    records = stream.until(lambda records: len(answers(records)) >= 4)
    assert not any("event" in one for one in records)
    one.until(lambda records: len(answers(records)) >= 2)
    assert stream.stop() == one.stop() == 0
    server.shutdown()


def test_a_second_writer_and_a_device_that_is_none(demo_bundle, watching, stills, capfd) -> None:
    found = watching(f"exec:while :; do cat {stills}/0.png; sleep 0.1; done")
    found.until(bool)
    assert main(["watch", str(demo_bundle), "exec:true", "-p", QUESTION, "-o", str(found.out)]) == 2
    assert "is being written by another lfm-edge watch" in capfd.readouterr().err
    assert found.stop() == 0
    pytest.importorskip("av")
    device = watching("/dev/null")
    assert device.until(bool)[0]["event"] == "lost"
    assert device.stop() == 0
