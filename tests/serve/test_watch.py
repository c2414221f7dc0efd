"""`lfm-edge watch` against cameras, programs and brokers that we did not write."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from lfm_runtime.commands.cli import main
from lfm_serve.cameras.live import Back, Live, Lost
from lfm_serve.cameras.sources import Frame, source_of
from PIL import Image

IMAGES = sorted((Path(__file__).resolve().parents[2] / "demo" / "eval" / "images").glob("*.png"))
QUESTION = "What is in this image?"
CAMERA = Path(__file__).with_name("rtsp_camera.py")
HEAD = ["time", "source", "frame", "size", "changed", "question", "text", "finish_reason", "prompt_tokens"]
HEAD += ["image_tokens", "new_tokens", "ms", "peak_mib", "tiles", "encoded_tiles", "cached_tokens", "age_ms"]
PATIENCE_S = 120  # on a busy machine; nothing is judged by it


@pytest.fixture
def watch(demo_bundle, capsys):
    """A function that runs the command here; returns its records."""

    def run(source: str, *words: str, code: int = 0) -> list[dict]:
        asked = () if {"-p", "--fields"}.intersection(words) else ("-p", QUESTION)
        capsys.readouterr()
        assert main(["watch", str(demo_bundle), source, *asked, "--threads", "1", *words]) == code
        out, run.said = capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()]

    return run


@pytest.fixture
def stills(tmp_path) -> Path:
    (tmp_path / "stills").mkdir()
    for n, image in enumerate(IMAGES[:6]):
        shutil.copy(image, tmp_path / "stills" / f"{n}.png")
    return tmp_path / "stills"


def test_a_folder_of_stills(watch, stills, demo_model) -> None:
    """Each once, in order; texts are those of single answers."""
    found = watch(str(stills))
    wanted = [demo_model.answer(path, QUESTION, temperature=0).text() for path in IMAGES[:6]]
    assert [(one["at"], one["text"]) for one in found] == [(f"{n}.png", text) for n, text in enumerate(wanted)]
    assert all(list(one) == [*HEAD[:3], "at", *HEAD[3:]] for one in found)
    assert "6 answers" in watch.said


def test_several_questions_about_each(watch, stills) -> None:
    found = watch(str(stills), "-p", QUESTION, "-p", "How many shapes?")
    assert [one["question"] for one in found] == [QUESTION, "How many shapes?"] * 6
    assert {one["encoded_tiles"] for one in found[1::2]} == {0}
    assert all(one["cached_tokens"] >= one["image_tokens"] for one in found[1::2])


def test_unreadable_stills_are_records(watch, stills) -> None:
    (stills / "2.png").write_bytes(b"")
    (stills / "3.png").write_bytes((stills / "4.png").read_bytes()[:60])
    with contextlib.suppress(OSError):
        shutil.copy(stills / "4.png", os.fsencode(stills) + b"/\xff.png")
    found = watch(str(stills), code=3)
    assert [one["at"] for one in found if "error" in one] == ["2.png", "3.png"]
    assert [os.fsencode(one["at"]) for one in found][6:] in ([], [b"\xff.png"])
    assert sum("text" in one for one in found) == len(found) - 2 >= 4
    assert "2 errors" in watch.said


def test_only_what_has_changed(watch, stills) -> None:
    for n in range(6):
        shutil.copy(IMAGES[n // 3], stills / f"{n}.png")
    found = watch(str(stills), "--changed", "0.02")
    assert [one["frame"] for one in found] == [0, 3]
    assert "4 pictures unchanged" in watch.said
    found = watch(str(stills))
    assert [one["encoded_tiles"] for one in found] == [1, 0, 0, 1, 0, 0]
    assert [one["changed"] == 0 for one in found] == [False, True, True, False, True, True]


def test_a_region(watch, stills, demo_model) -> None:
    found = watch(str(stills), "--roi", "0,0,64,64")
    assert {tuple(one["size"]) for one in found} == {(64, 64)}
    wanted = demo_model.answer(Image.open(IMAGES[0]).convert("RGB").crop((0, 0, 64, 64)), QUESTION, temperature=0)
    assert found[0]["text"] == wanted.text()


def test_until_an_answer(watch, stills) -> None:
    texts = [one["text"] for one in watch(str(stills))]
    word = texts[3].split()[0]
    first = next(n for n, text in enumerate(texts) if word in text.split())
    assert len(watch(str(stills), "--until", f"answer:{word}")) == first + 1
    assert watch(str(stills), "--until", "0s") == []
    assert len(watch(str(stills), "--until", "answer:zebra", code=1)) == 6


def test_choices_schemas_and_fields(watch, stills, tmp_path) -> None:
    found = watch(str(stills), "--choices", "red cross,green circle")
    assert all(set(one["probabilities"]) == {"red cross", "green circle"} for one in found)
    pytest.importorskip("llguidance")
    (tmp_path / "fields.yaml").write_text("shape: the shape that is seen\n")
    found = watch(str(stills), "--fields", str(tmp_path / "fields.yaml"), "--max-new-tokens", "40")
    assert all("fields" in one for one in found)


def test_records_are_appended_to_a_file(watch, stills, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    assert watch(str(stills), "-o", str(out)) == []
    with out.open("a") as f:
        f.write('{"time": "20')
    watch(str(stills), "-o", str(out))
    assert [json.loads(line)["frame"] for line in out.read_text().splitlines()] == [*range(6), *range(6)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere.mp4"], "nowhere.mp4 does not exist"),
        (["stills", "--changed", "2"], "--changed 2 is impossible"),
        (["stills", "--changed", "nan"], "--changed nan is impossible"),
        (["stills", "--tile-tolerance", "-1"], "--tile-tolerance -1 is impossible"),
        (["stills", "--every", "2s"], "--every has no effect on a folder"),
        (["stills", "--stall", "2s"], "--stall is about cameras"),
        (["exec:x", "--stall", "0"], "--stall 0 is impossible"),
        (["exec:x", "--every", ""], "--every '' is no duration"),
        (["exec:x", "--every", "99999999999d"], "--every '99999999999d' is no duration"),
        (["stills", "--until", ""], "--until '' is no end"),
        (["stills", "--roi", ""], "--roi '' is no region"),
        (["admin:secret@cam/1"], "^lfm-edge: …@cam/1 does not exist"),
        (["stills", "--roi", "1,2"], "--roi '1,2' is no region"),
        (["stills", "--roi", "9999,0,5,5"], "lies outside of the picture of 128×128"),
        (["stills", "--until", "later"], "--until 'later' is no end"),
        (["exec:x", "--every", "soon"], "--every 'soon' is no duration"),
        (["stills", "-o", "out.txt"], "name it OUT.jsonl"),
        (["stills", "-o", "nowhere/out.jsonl"], "nowhere"),
        (["stills", "--mqtt", "broker/topic"], "--mqtt is mqtt://"),
        (["stills", "--mqtt", "mqtt://me:se@cret@broker/a"], "write @ as %40"),
        (["stills", "--mqtt", "mqtt://broker:0/a"], "port 0 is impossible"),
        (["stills", "--mqtt", "mqtt://broker:99999/a"], "port 99999 is impossible"),
        (["stills", "--mqtt", "mqtt://a..b/a"], "a..b is no name of a host"),
        (["stills", "--mqtt", "mqtt://broker/" + 66_000 * "a"], "--mqtt is mqtt://"),
        (["stills", "-p", "word " * 40_000], "the prompt has"),
        (["stills", "--mqtt", "mqtt://me:secret@broker/a/+/b"], "no [+] or # in TOPIC"),
        (["stills", "-p", " "], "the question is missing"),
        (["stills", "--choices", "a,b", "--max-new-tokens", "3"], "no effect beside --choices"),
        (["stills", "--schema", "a.json", "--choices", "a,b"], "exclude each other"),
    ],
)
def test_wrong_words(demo_bundle, stills, capfd, monkeypatch, words, says) -> None:
    """One line, exit code 2, and no secret in it."""
    monkeypatch.chdir(stills.parent)
    asked = () if "-p" in words else ("-p", QUESTION)
    assert main(["watch", str(demo_bundle), *words, *asked, "--quiet"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.search(says, err)
    assert err.count("\n") == 1
    assert "secret" not in err


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


@pytest.fixture
def watching(demo_bundle, tmp_path) -> Iterator[Callable[..., Watching]]:
    started: list[Watching] = []

    def start(source: str, *words: str) -> Watching:
        started.append(Watching(demo_bundle, source, tmp_path / f"out{len(started)}.jsonl", *words))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


def answers(records: list[dict]) -> list[dict]:
    return [one for one in records if "text" in one]


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


# ------------------------------------------------------------------------------------------------------------- RTSP


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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
    # ffmpeg's buffers come and go with each connection, by some 10 MiB: what stays is judged.
    assert min(memory[5:]) <= 1.01 * max(memory[:5]) + 2, memory


# ------------------------------------------------------------------------------------------------------------- MQTT


@pytest.fixture
def broker(tmp_path) -> Iterator[Callable[[], tuple[subprocess.Popen, int]]]:
    """A function that starts mosquitto, at the same port each time."""
    pytest.importorskip("paho.mqtt")
    program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
    if not program:
        pytest.skip("mosquitto is not installed")
    port, running = free_port(), []
    (tmp_path / "passwords").touch(mode=0o600)
    subprocess.run(["mosquitto_passwd", "-b", str(tmp_path / "passwords"), "me", "se@cret"], check=True)
    (tmp_path / "mosquitto.conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous false\npassword_file {tmp_path}/passwords\nuser root\n"
    )

    def start() -> tuple[subprocess.Popen, int]:
        running.append(subprocess.Popen([program, "-c", str(tmp_path / "mosquitto.conf")], stderr=subprocess.DEVNULL))
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return running[-1], port
            time.sleep(0.05)
        pytest.fail("mosquitto does not listen")

    yield start
    for process in running:
        process.kill()
        process.wait()


class Listener:
    """A client of the broker: what it was told, by topic."""

    def __init__(self, port: int) -> None:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        self.told: list[tuple[str, str]] = []
        self.client = Client(CallbackAPIVersion.VERSION2)
        self.client.username_pw_set("me", "se@cret")
        self.client.on_connect = lambda client, *_: client.subscribe("home/#", qos=1)
        self.client.on_message = lambda _c, _d, message: self.told.append((message.topic, message.payload.decode()))
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def until(self, ready: Callable[[list[tuple[str, str]]], Any]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not ready(self.told):
            assert time.monotonic() < end, self.told[-3:]
            time.sleep(0.05)


def test_records_on_a_topic(watching, broker, stills) -> None:
    """As in the file, each once and in order; a broker that goes away is waited for, and gets what it missed."""
    process, port = broker()
    heard = Listener(port)
    source = f"exec:while :; do for n in 0 1 2; do cat {stills}/$n.png; sleep 0.3; done; done"
    found = watching(source, "--mqtt", f"mqtt://me:se%40cret@127.0.0.1:{port}/home/gate")
    heard.until(lambda told: sum(topic == "home/gate" for topic, _ in told) >= 3)
    assert ("home/gate/status", "online") in heard.told
    process.kill()
    process.wait()
    count = len(found.records())
    found.until(lambda records: len(records) >= count + 3)
    _, _ = broker()
    heard.until(lambda told: sum(topic == "home/gate" for topic, _ in told) >= count + 5)
    assert found.stop() == 0
    heard.until(lambda told: told[-1] == ("home/gate/status", "offline"))
    records = [json.loads(text) for topic, text in heard.told if topic == "home/gate"]
    missed = {one["frame"] for one in found.records()} - {one["frame"] for one in records}
    # What was published while the listener itself was away, the broker cannot keep for it.
    assert len(missed) <= len(found.records()) - count
    assert all(one in found.records() for one in records)
    said = found.said.read_text()
    assert "cret" not in said
    assert "trying again" in said
    assert "the broker is back" in said


def test_a_killed_process_is_said_to_be_offline(watching, broker, stills) -> None:
    _, port = broker()
    heard = Listener(port)
    found = watching(
        f"exec:while :; do cat {stills}/0.png; sleep 0.1; done",
        "--mqtt",
        f"mqtt://me:se%40cret@127.0.0.1:{port}/home/gate",
    )
    heard.until(lambda told: sum(topic == "home/gate" for topic, _ in told) >= 1)
    found.process.kill()
    heard.until(lambda told: told[-1] == ("home/gate/status", "offline"))


def test_a_wrong_password_is_told(watching, broker, stills) -> None:
    _, port = broker()
    found = watching(
        f"exec:while :; do cat {stills}/0.png; sleep 0.1; done", "--mqtt", f"mqtt://me:wrong@127.0.0.1:{port}/home/gate"
    )
    found.until(lambda records: len(records) >= 2 and "Not authorized" in found.said.read_text())
    assert found.stop() == 0
    assert "wrong" not in found.said.read_text()
    assert f"{len(found.records())} records were not delivered" in found.said.read_text()


def test_times_are_utc(watch, stills) -> None:
    moment = datetime.fromisoformat(watch(str(stills))[0]["time"].replace("Z", "+00:00"))
    assert abs(moment.timestamp() - time.time()) < PATIENCE_S


def test_without_the_extras_it_says_which(demo_bundle, capsys, monkeypatch, stills) -> None:
    for name in ("av", "paho"):
        if importlib.util.find_spec(name):
            monkeypatch.setitem(sys.modules, name, None)
            for loaded in [module for module in sys.modules if module.startswith((f"{name}.", "lfm_serve.cameras."))]:
                monkeypatch.delitem(sys.modules, loaded)
    assert main(["watch", str(demo_bundle), "rtsp://me:secret@cam/1", "-p", QUESTION]) == 2
    assert main(["watch", str(demo_bundle), str(stills), "-p", QUESTION, "--mqtt", "mqtt://broker/a"]) == 2
    said = capsys.readouterr().err
    assert "needs the extra video: pip install 'lfm-edge[video]'" in said
    assert "needs the extra mqtt: pip install 'lfm-edge[mqtt]'" in said
    assert "secret" not in said
