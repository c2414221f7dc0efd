"""What can be watched: names of sources and what is hidden of them, stills, videos, and what a stream is late by."""

from __future__ import annotations

import io
import itertools
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from lfm_runtime.errors import SettingError
from lfm_serve.cameras.sources import SourceError, masked, source_of
from PIL import Image

BLANK = Image.new("RGB", (64, 48))


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://admin:hunter2@10.0.0.9:554/stream1",
        "rtsp://admin:hunter2%40@10.0.0.9/stream1",
        "rtsp://admin:hun/ter2@10.0.0.9/stream1",
        "rtsp://admin:a@hunter2@cam/stream1",
        "rtsp://hunter2@cam/stream1",
        "rtmp://cam/bcs/channel0?channel=0&user=admin&password=hunter2",
        "rtsp://cam:554/user=admin_password=hunter2_channel=1_stream=0.sdp",
        "http://cam/video.mjpg?Token=hunter2",
        "http://cam/video.mjpg?apikey=hunter2&channel=1",
        "rtsp://cam/live?auth_key=hunter2",
        "http://cam/snap?token=abc/hunter2==",
        "http://cam/snap?x=1&jwt=hunter2",
        "rtsp://admin:hunter 2hunter2@cam/1",
        "rtsp:/admin:hunter2@cam/1",
        "rtsp+tcp://admin:hunter2@cam/1",
        "admin:hunter2@cam/1",
    ],
)
def test_no_credentials_are_shown(url) -> None:
    assert "hunter2" not in masked(url)
    assert "hunter2" not in masked(f"cannot open {url}: no route")


def test_what_is_no_secret_is_shown() -> None:
    for text in ("rtsp://10.0.0.9:554/cam/realmonitor?channel=1&subtype=0", "/dev/video0", "a=b"):
        assert masked(text) == text
    pytest.importorskip("av")
    assert source_of("rtsp://a:b@cam/1?channel=2", every=0, stall=1).shown == "rtsp://…@cam/1?channel=2"
    for command in ("curl -u me:hunter2 http://cam", "CAM_PASSWORD=hunter2 curl http://cam"):
        assert source_of(f"exec:{command}", every=0, stall=1).shown == "exec:curl"
    assert source_of("exec:A=hunter2", every=0, stall=1).shown == "exec:…"
    assert source_of("exec:'rtsp://me:hunter2@cam/1'", every=0, stall=1).shown == "exec:'rtsp://…@cam/1'"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nowhere.mp4", "does not exist"),
        ("exec:", "names no command"),
        ("exec:  ", "names no command"),
        ("gopher://cam/1", "cannot be watched"),
        ("file:///etc/passwd", "cannot be watched"),
        ("admin:hunter2@cam/1", "^…@cam/1 does not exist"),
        (" rtsp+tcp://admin:hunter2@cam/1", "^rtsp[+]tcp://…@cam/1 cannot be watched"),
        ("pipe", "exec:'cat pipe'"),
    ],
)
def test_sources_that_are_none(text, says, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(SettingError, match=says):
        source_of(text, every=0, stall=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match="no images"):
        source_of("empty", every=0, stall=1)


def lag_of(steps: list[tuple[float, float, float]]) -> list[float]:
    """How late each picture is said to be, of (now, clock, waited)."""
    from lfm_serve.cameras.streams import Lag

    lag = Lag()
    return [lag.note(*step) for step in steps]


def test_lag() -> None:
    """By simulated streams of 25 a second: what is waited for is new; what follows a gap is as old as the gap."""
    pytest.importorskip("av")
    steady = [(100 + n / 25, n / 25, 0.03) for n in range(150)]
    assert lag_of(steady) == [0] * 150
    slow_clock = [(100 + n / 25, n / 26, 0.03) for n in range(50_000)]  # a camera whose clock is 4 % slow
    assert max(lag_of(slow_clock)) < 0.5
    set_back = [*steady, *((106 + n / 25, n / 25, 0.03) for n in range(50))]
    assert max(lag_of(set_back)) == 0
    cut_8s = [
        *steady,
        *((114 + n / 1000, 6 + n / 25, 8.0 if n == 0 else 0.0) for n in range(200)),
        (114.24, 14.2, 0.04),
    ]
    found = lag_of(cut_8s)[150:]
    assert found[0] == pytest.approx(8, abs=0.5)
    assert found[100] == pytest.approx(8 + 0.1 - 4, abs=0.5)
    assert found[-1] < 0.1
    camera_stopped = [*steady, (114, 14, 8.0)]
    assert lag_of(camera_stopped)[-1] == 0
    slow_stream = [(100 + 10 * n, 10.2 * n, 9.9) for n in range(100)]  # a picture each ten seconds
    assert max(lag_of(slow_stream)) == 0


def test_a_clock_that_is_none_is_not_believed() -> None:
    """Pictures by HTTP have no time of their own: ffmpeg counts 25 a second, however many there are."""
    pytest.importorskip("av")
    for apart in (0.02, 0.2, 1.5, 60.0):
        assert max(lag_of([(100 + apart * n, n / 25, apart - 0.01) for n in range(500)])) == 0


def test_a_network_that_is_too_slow_is_found() -> None:
    """Right at first, then 20 of 25 pictures a second come through, each waited for."""
    pytest.importorskip("av")
    steady = [(100 + n / 25, n / 25, 0.03) for n in range(150)]
    found = lag_of([*steady, *((106 + n / 20, 6 + n / 25, 0.045) for n in range(600))])
    assert max(found[:150]) == 0
    assert found[-1] == pytest.approx(30 * 0.2 - 30 * 0.05, abs=0.5)


def test_a_decoder_that_is_too_slow_is_found() -> None:
    pytest.importorskip("av")
    from lfm_serve.cameras.streams import Lag

    lag = Lag()
    for n in range(150):
        lag.note(100 + n / 25, n / 25, 0.03)
    behind = []
    for n in range(1, 400):  # pictures for 25 a second, decoded at 20
        lag.note(106 + n / 20, 6 + n / 25, 0.0)
        behind.append(lag.behind)
    assert not any(behind[:90])
    assert all(behind[200:])
    lag.note(126.1, 26, 0.03)
    assert not lag.behind


def test_names_of_stills_are_in_order(tmp_path) -> None:
    for name in ("b.png", "a.png", "c.PNG", ".hidden.png", "notes.txt"):
        BLANK.save(tmp_path / name, "PNG")
    found = list(source_of(str(tmp_path), every=0, stall=1).frames())
    assert [(one.number, one.at) for one in found] == [(0, "a.png"), (1, "b.png"), (2, "c.PNG")]
    assert all(one.picture().size == BLANK.size for one in found)


def film(path: Path, frames: int, rate: int, *, noise: int = 0) -> Path:
    """A video whose frames are of one grey each, brighter and brighter; written by ffmpeg's libraries."""
    av, random = pytest.importorskip("av"), np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(frames):
            grey = 5 * n % 250 + random.integers(0, noise + 1, (48, 64, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey.clip(0, 255).astype(np.uint8))))
        container.mux(stream.encode(None))
    return path


def test_videos_are_looked_at_by_their_own_time(tmp_path) -> None:
    path = film(tmp_path / "v.mp4", 50, rate=10)
    found = [(one.number, one.at, one.picture()) for one in source_of(str(path), every=1.0, stall=1).frames()]
    assert [(number, at) for number, at, _ in found] == [(10 * n, float(n)) for n in range(5)]
    for number, _, picture in found:
        assert np.asarray(picture).mean() == pytest.approx(5 * number, abs=4)
    assert len(list(source_of(str(path), every=0, stall=1).frames())) == 50


@pytest.mark.parametrize(
    ("name", "frames", "rate", "said"),
    [
        ("long.mp4", 50, 10, "no video that ffmpeg knows, or cut off"),  # its index is at the end
        ("long.mkv", 50, 10, "cut off: it ends after .* of 5.0 s"),
        ("long.avi", 50, 10, "cut off: it ends after .* of 5.0 s"),
        ("short.mkv", 20, 25, "cut off: it ends after .* of 0.8 s"),
        ("short.avi", 20, 25, "cut off: it ends after .* of 0.8 s"),
        ("slides.mkv", 3, 1, "cut off: it ends after .* of 3.0 s"),
        ("one.mkv", 1, 25, "cut off: it ends after 0.0 of 0.0 s"),
    ],
)
def test_a_video_that_is_cut_off_is_no_success(tmp_path, name, frames, rate, said) -> None:
    """However short it is; and a whole one is none."""
    path = film(tmp_path / name, frames, rate, noise=200)
    assert len(list(source_of(str(path), every=0, stall=1).frames())) == frames
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(SourceError, match=said):
        list(source_of(str(path), every=0, stall=1).frames())


@pytest.mark.parametrize("left", [b"no video" * 1000, -200], ids=["no video", "the end of its index is missing"])
def test_what_ffmpeg_cannot_open_says_what_to_look_at(tmp_path, left) -> None:
    path = film(tmp_path / "one.mp4", 1, rate=25)
    path.write_bytes(left if isinstance(left, bytes) else path.read_bytes()[:left])
    with pytest.raises(
        SourceError, match=r"no video that ffmpeg knows, or cut off \(.*\); look at it with: ffprobe FILE"
    ):
        list(source_of(str(path), every=0, stall=1).frames())


def test_nothing_of_a_device_outlives_it(tmp_path, monkeypatch) -> None:
    """A raw picture of Video4Linux lies in the device's buffers, and freeing it after the device ends the process
    (scripts/checks/usb_camera.sh tries it with a kernel's driver). A file of raw pictures stands for one.
    """
    av = pytest.importorskip("av")
    from lfm_serve.cameras import streams

    given, real = [], av.open
    (raw := tmp_path / "raw").write_bytes(bytes(64 * 48 * 2 * 50))
    form = {"video_size": "64x48", "pixel_format": "yuyv422", "framerate": "100"}

    class Watched:
        """A container whose packets and frames are known."""

        def __init__(self) -> None:
            self._real = real(str(raw), format="rawvideo", options=form)
            self.streams = self._real.streams

        def demux(self, stream):
            for packet in self._real.demux(stream):
                given.append(packet)
                yield Packet(packet)

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            (alone,) = (sys.getrefcount(one) for one in [object()])  # as below, without others
            self.left = [type(one).__name__ for one in given if sys.getrefcount(one) > alone]
            self._real.close()

    class Packet:
        def __init__(self, packet) -> None:
            self._packet, self.size = packet, packet.size

        def decode(self):
            frames = self._packet.decode()
            given.extend(frames)
            return frames

    opened: list[Watched] = []
    monkeypatch.setattr(streams.Lag, "_WAITED_S", 0.0)
    monkeypatch.setattr(streams.av, "open", lambda *a, **k: opened.append(Watched()) or opened[-1])
    frames = streams.Stream("/dev/video0", 5.0, device=True).frames()
    held = [next(frames), next(frames)]
    frames.close()
    assert len(given) >= 4
    assert opened[0].left == [], "somebody still holds packets or frames"
    assert [one.picture().size for one in held] == [(64, 48)] * 2


def test_one_picture_by_http_is_fetched_again_and_again(monkeypatch) -> None:
    """As many cameras give their newest: no stream that is lost after each picture."""
    streams = pytest.importorskip("lfm_serve.cameras.streams", exc_type=ImportError)
    monkeypatch.setattr(streams, "_AGAIN_S", 0.01)
    greys = iter(range(0, 250, 50))

    class Camera(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = io.BytesIO()
            Image.new("RGB", (64, 48), (next(greys),) * 3).save(content, "jpeg")
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(content.tell()))
            self.end_headers()
            self.wfile.write(content.getvalue())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    frames = streams.Stream(f"http://127.0.0.1:{server.server_port}/snap.jpg", 10.0, device=False).frames()
    seen = [next(frames) for _ in range(4)]
    assert [frame.number for frame in seen] == [0, 1, 2, 3]
    brightness = [np.asarray(frame.picture()).mean() for frame in seen]
    assert all(later > earlier + 20 for earlier, later in itertools.pairwise(brightness))
    server.shutdown()
    server.server_close()
    with pytest.raises(SourceError):
        list(frames)
