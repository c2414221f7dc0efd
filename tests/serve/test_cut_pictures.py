"""A picture of which the end never came is not looked at: connections end in the middle of one, and so do files."""

from __future__ import annotations

import functools
import io
import itertools
import socketserver
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from lfm_serve.cameras import live
from lfm_serve.cameras.live import Live, Lost
from lfm_serve.cameras.sources import Frame, SourceError, source_of
from PIL import Image

SIZE = (160, 120)
CODECS = {"mpjpeg": "mjpeg", "h264": "libx264", "avi": "mjpeg", "mp4": "libx264", "matroska": "libx264"}
PAUSE_S = 0.02
"""Between two pictures that are sent: what is there without waiting is taken for old."""


@functools.cache
def pictures(count: int = 200) -> list[np.ndarray]:
    """Coarse blocks of random grey: all differ everywhere. So many that some are left when ffmpeg has looked at a
    stream for as long as it does.
    """
    random = np.random.default_rng(0)
    return [np.kron(random.integers(0, 256, (6, 8)), np.ones((20, 20))).astype(np.uint8) for _ in range(count)]


def film(target: io.BytesIO | Path, form: str, x264: str = "bframes=0:rc-lookahead=0") -> list[int]:
    """Has ffmpeg's libraries write the pictures; where each of them begins."""
    av, begins, mjpeg = pytest.importorskip("av"), [], CODECS[form] == "mjpeg"
    options = {"movflags": "faststart"} if form == "mp4" else {}
    with av.open(target, "w", format=form, options=options) as container:
        stream = container.add_stream(CODECS[form], rate=25)
        (stream.width, stream.height), stream.pix_fmt = SIZE, "yuvj420p" if mjpeg else "yuv420p"
        stream.options = {} if mjpeg else {"preset": "ultrafast", "x264-params": f"keyint=5:slices=2:{x264}"}
        for picture in pictures():
            begins.append(target.tell() if isinstance(target, io.BytesIO) else 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([picture] * 3, -1), format="rgb24")))
        container.mux(stream.encode(None))
    return begins


@contextmanager
def camera(pieces: list[bytes], kind: str) -> Iterator[str]:
    """An address that sends these and then breaks off: by HTTP, or without a kind by TCP alone."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                if kind:
                    self.request.recv(1 << 16)
                    self.request.sendall(f"HTTP/1.0 200 OK\r\nContent-Type: {kind}\r\n\r\n".encode())
                for piece in pieces:
                    self.request.sendall(piece)
                    time.sleep(PAUSE_S)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{'http' if kind else 'tcp'}://127.0.0.1:{server.server_address[1]}{'/video' * bool(kind)}"
        server.shutdown()


def is_one_that_was_sent(picture: Image.Image) -> bool:
    """Everywhere the same picture, within what a codec of 160x120 pixels loses."""
    grey = np.asarray(picture.convert("L"), np.float32).reshape(6, 20, 8, 20)[:, 5:15, :, 5:15].mean((1, 3))
    return any(np.abs(grey - sent[10::20, 10::20]).max() < 40 for sent in pictures())


@pytest.mark.parametrize(
    ("form", "kind", "x264"),
    [
        ("mpjpeg", "multipart/x-mixed-replace; boundary=ffmpeg", ""),
        ("h264", "video/h264", "bframes=0:rc-lookahead=0"),
        ("h264", "", "bframes=2"),  # pictures that the decoder holds back come after the last one
    ],
    ids=["MJPEG", "H.264", "H.264 with B-frames"],
)
def test_a_stream_that_ends_in_the_middle_of_a_picture(monkeypatch, form, kind, x264) -> None:
    """ffmpeg gives what it has of it as a picture, in which the rest is grey or of another one."""
    monkeypatch.setattr(live, "_GOES_ON_S", 1000.0)  # a busy machine's reader may be late
    begins = film(content := io.BytesIO(), form, x264)
    pieces = [content.getvalue()[begin:end] for begin, end in itertools.pairwise([*begins, None])]

    def seen_until_it_ends(share: float) -> list[Frame]:
        """`share`: what comes of the last picture."""
        seen = []
        with camera([*pieces[:-1], pieces[-1][: int(len(pieces[-1]) * share)]], kind) as address:
            found = Live(source_of(address, every=0, stall=30))
            while not isinstance(sight := found.take(60), Lost):
                assert isinstance(sight, Frame)
                seen.append(sight)
            found.close()
        return seen

    with ThreadPoolExecutor() as together:  # each takes seconds, in which nothing is computed
        for seen in together.map(seen_until_it_ends, (0.15, 0.5, 0.9)):
            assert len(seen) >= 3
            assert all(is_one_that_was_sent(one.picture()) for one in seen)


def test_what_may_be_cut_is_taken_when_the_source_goes_on(monkeypatch) -> None:
    blank, goes_on, ends, stopped = Image.new("RGB", SIZE), threading.Event(), threading.Event(), threading.Event()

    class Pretended:
        shown, live, stall = "pretended", True, 1000.0

        def frames(self):
            yield Frame(0, lambda: blank, whole=False)
            goes_on.wait()
            yield Frame(1, lambda: blank, whole=False)
            ends.wait()
            raise SourceError("away")

        def stop(self) -> None:
            stopped.set()

    monkeypatch.setattr(live, "_GOES_ON_S", 1000.0)
    found = Live(Pretended())
    assert found.take(0.1) is None
    goes_on.set()
    assert found.take(60).number == 0
    assert found.take(0.1) is None
    ends.set()
    assert isinstance(found.take(60), Lost)
    found.close()
    monkeypatch.setattr(live, "_GOES_ON_S", 0.01)  # and where nothing comes after it, but no end either
    goes_on.clear()
    ends.clear()
    found = Live(Pretended())
    assert found.take(60).number == 0
    goes_on.set()
    assert found.take(60).number == 1
    ends.set()
    found.close()


@pytest.mark.parametrize("form", ["avi", "mp4", "matroska"])
def test_a_file_that_ends_in_the_middle_of_a_picture(tmp_path, form) -> None:
    film(path := tmp_path / "film", form)
    content = path.read_bytes()
    for share in np.linspace(0.5, 0.8, 10):
        path.write_bytes(content[: int(len(content) * share)])
        seen: list[Image.Image] = []
        with pytest.raises(SourceError, match="cut off"):
            seen.extend(frame.picture() for frame in source_of(str(path), every=0, stall=1).frames())
        assert seen
        assert all(is_one_that_was_sent(picture) for picture in seen)
