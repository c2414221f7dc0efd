"""`lfm-edge watch` of GStreamer's RTSP server: killed, stopped, too fast, away."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from lfm_serve.cameras.live import Back, Live, Lost
from lfm_serve.cameras.sources import Frame, source_of
from PIL import Image
from watching import HEAD, PATIENCE_S, answers, free_port

pytestmark = pytest.mark.process

CAMERA = Path(__file__).with_name("rtsp_camera.py")


def system_python() -> str:
    """The Python that has GStreamer's bindings, or ""."""
    check = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
    found = shutil.which("python3", path="/usr/bin:/bin")
    works = found and subprocess.run([found, "-c", check], capture_output=True, check=False).returncode == 0
    return found if works else ""


class Camera:
    """GStreamer's RTSP server, with the time in its pictures."""

    def __init__(self, fps: int = 25) -> None:
        self.port, self._fps = free_port(), fps
        self.url = f"rtsp://user:secret@127.0.0.1:{self.port}/live"
        self.start()

    def start(self) -> None:
        command = [system_python(), str(CAMERA), str(self.port), str(self._fps), "1"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def camera() -> Iterator[Camera]:
    pytest.importorskip("av")
    if not system_python():
        pytest.skip("GStreamer's RTSP server is not installed (apt install gir1.2-gst-rtsp-server-1.0 python3-gi)")
    found = Camera()
    yield found
    found.process.send_signal(signal.SIGCONT)
    found.kill()


def made(picture: Image.Image) -> float:
    """When a picture of the camera was made, by what is in it."""
    blocks = np.asarray(picture.convert("L")).reshape(6, 40, 8, 40)[:, 10:30, :, 10:30].mean((1, 3)) > 128
    return sum(int(bit) << n for n, bit in enumerate(blocks.ravel())) / 1000


def test_ages_are_true(camera) -> None:
    """Of a stream that is read, that was stopped for a while, and that was killed: what is said to be new is new.

    The camera's own time is in its pictures, so that the network's and the codec's part is seen as well.
    """
    live = Live(source_of(camera.url, every=0, stall=5))
    said: list[Frame | Lost | Back] = []

    def look(until: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not until():
            assert time.monotonic() < end, said[-3:]
            if (sight := live.take(1)) is None:
                continue
            if isinstance(sight, Frame):
                picture = sight.picture()
                untold = time.time() - made(picture) - sight.age
                assert untold < 2.5, untold  # milliseconds; the rest is for a busy machine's encoder
            said.append(sight)

    frames = lambda: sum(isinstance(one, Frame) for one in said)  # noqa: E731
    look(lambda: frames() > 100)  # its clock is believed once it has kept pace for two seconds
    camera.process.send_signal(signal.SIGSTOP)
    pauses = threading.Timer(3.5, camera.process.send_signal, [signal.SIGCONT])
    pauses.start()
    before = frames()
    look(lambda: frames() > before + 20)
    assert not any(isinstance(one, Lost) for one in said)
    camera.process.send_signal(signal.SIGSTOP)
    look(lambda: any(isinstance(one, Lost) for one in said))
    camera.process.send_signal(signal.SIGCONT)
    before = frames()
    look(lambda: frames() > before + 5)
    camera.kill()
    look(lambda: sum(isinstance(one, Lost) for one in said) == 2)
    camera.start()
    before = frames()
    look(lambda: frames() > before + 5)
    assert [type(one) for one in said if not isinstance(one, Frame)] == [Lost, Back, Lost, Back]
    live.close()


def test_a_camera_that_goes_and_comes(watching, camera) -> None:
    """The process never ends by itself; what it wrote before is there; no password is anywhere."""
    found = watching(camera.url, "--every", "100ms", "--stall", "3s")
    records = found.until(lambda records: len(answers(records)) >= 3)
    assert all(list(one) == HEAD for one in records)
    camera.kill()
    found.until(lambda records: records[-1].get("event") == "lost")
    camera.start()
    count = len(answers(found.records()))
    records = found.until(lambda records: len(answers(records)) >= count + 3)
    events = [one["event"] for one in records if "event" in one]
    assert events[:2] == ["lost", "back"]
    assert events == ["lost", "back"] * (len(events) // 2)
    camera.process.send_signal(signal.SIGSTOP)
    found.until(lambda records: records[-1].get("event") == "lost")
    assert found.stop() == 0
    camera.process.send_signal(signal.SIGCONT)
    assert found.records()[: len(records)] == records
    everything = found.said.read_text() + found.out.read_text()
    assert "secret" not in everything
    assert "trying again until it is there" in everything
    assert "there again after" in everything


def test_a_wrong_address_is_tried_again(watching) -> None:
    pytest.importorskip("av")
    found = watching(f"rtsp://user:secret@127.0.0.1:{free_port()}/live")
    records = found.until(bool)
    assert (records[0]["event"], records[0]["error"]) == ("lost", "Connection refused")
    assert found.stop() == 0
    assert "secret" not in found.said.read_text() + found.out.read_text()


@pytest.mark.slow
def test_half_an_hour_of_a_camera(watching, camera) -> None:
    """Killed, stopped for 30 s, faster than the model: every answer is about a picture younger than 2 s and one answer;
    memory is flat. LFM_EDGE_WATCH_MINUTES shortens it.
    """
    minutes = float(os.environ.get("LFM_EDGE_WATCH_MINUTES", "30"))
    found = watching(camera.url)
    found.until(lambda records: len(answers(records)) >= 50)
    process, begun, memory = psutil.Process(found.process.pid), time.monotonic(), []
    for tenth in range(10):
        camera.kill() if tenth % 2 else camera.process.send_signal(signal.SIGSTOP)
        time.sleep(min(30.0, minutes * 2))
        camera.start() if tenth % 2 else camera.process.send_signal(signal.SIGCONT)
        count = len(answers(found.records()))
        found.until(lambda records, count=count: len(answers(records)) > count)
        while time.monotonic() - begun < 60 * minutes * (tenth + 1) / 10:
            time.sleep(0.5)
            assert found.process.poll() is None
        memory.append(process.memory_full_info().uss / 2**20)
    assert found.stop() == 0
    records = found.records()
    for one in answers(records):
        assert one["age_ms"] <= 2000 + one["ms"]["total"] + 1000  # a second for the machine
    events = [one["event"] for one in records if "event" in one]
    assert events[::2] == ["lost"] * len(events[::2])
    assert events[1::2] == ["back"] * len(events[1::2])
    print(len(records), [round(m, 1) for m in memory])
    assert max(memory[1:]) <= 1.01 * memory[0] + 2, memory
