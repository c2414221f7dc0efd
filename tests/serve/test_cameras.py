"""What a camera's pictures go through before anything is computed: sources, the newest one, regions, ends, files."""

from __future__ import annotations

import errno
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lfm_runtime.errors import ImageError, SettingError
from lfm_serve.cameras import live, records
from lfm_serve.cameras.live import Back, Live, Lost
from lfm_serve.cameras.records import Appended, RecordsError
from lfm_serve.cameras.scene import patch_means, share_changed, small
from lfm_serve.cameras.settings import Roi, Until, seconds
from lfm_serve.cameras.sources import Frame, SourceError, masked, source_of
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


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("2", 2), ("2s", 2), ("500ms", 0.5), ("10m", 600), ("1.5h", 5400), ("2 min", 120), ("1d", 86400)],
)
def test_durations(text, wanted) -> None:
    assert seconds(text, "--every") == pytest.approx(wanted)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 week", "nan", "inf", "1e3", "2s3", "99999999d"])
def test_no_durations(text) -> None:
    with pytest.raises(SettingError, match=r"--every .* no duration"):
        seconds(text, "--every")


def test_ends() -> None:
    assert Until.parse("10m").left() == pytest.approx(600, abs=5)
    assert not Until.parse("10m").over()
    assert Until.parse("0s").over()
    assert 0 < Until.parse("00:00").left() <= 24 * 3600 + 3600  # summer time
    assert not Until().over()
    assert Until().left() is None
    until = Until.parse("answer: yes")
    assert [until.said(text) for text in ("Yes.", "yes", "Oh YES, it is", "eyes", "yesterday", "no", "")] == [
        *[True] * 3,
        *[False] * 4,
    ]
    assert not Until().said("")
    for text in ("soon", "25:00", "answer:", ""):
        with pytest.raises(SettingError, match="--until"):
            Until.parse(text)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 63), st.integers(0, 47), st.integers(1, 100), st.integers(1, 100), st.booleans())
def test_regions(x, y, width, height, shares) -> None:
    """Those of Pillow's crop, cut at the picture's edges."""
    array = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
    text = f"{x},{y},{width},{height}"
    if shares:
        width, height = min(width, 64), min(height, 48)
        text = f"{x / 64:.6f},{y / 48:.6f},{width / 64:.6f},{height / 48:.6f}"
    found = Roi.parse(text).of(Image.fromarray(array), first=True)
    assert np.array_equal(np.asarray(found), array[y : y + height, x : x + width])


@pytest.mark.parametrize(
    "text", ["", "1,2,3", "a,b,c,d", "0,0,0,5", "-1,0,5,5", "0.5,0.5,2.0,1.0", "nan,0,1,1", "1e999,.0,1,1"]
)
def test_no_regions(text) -> None:
    with pytest.raises(SettingError, match="--roi"):
        Roi.parse(text)


def test_a_region_outside() -> None:
    """Of the first picture it is the user's mistake; of a later one the camera's size has changed."""
    roi = Roi.parse("64,0,10,10")
    with pytest.raises(SettingError, match="outside of the picture of 64×48"):
        roi.of(BLANK, first=True)
    with pytest.raises(ImageError, match="outside"):
        roi.of(BLANK, first=False)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 1000))
def test_means_of_patches(height, width, seed) -> None:
    """Against each patch's own mean; what is left at the edges belongs to the last patches."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    tops, lefts = (list(range(0, max(side - 15, 1), 16)) for side in (height, width))
    bottoms, rights = [*tops[1:], height], [*lefts[1:], width]
    wanted = [
        [pixels[a:b, c:d].reshape(-1, 3).mean(axis=0) for c, d in zip(lefts, rights, strict=True)]
        for a, b in zip(tops, bottoms, strict=True)
    ]
    np.testing.assert_allclose(patch_means(pixels), wanted)


def test_the_share_that_has_changed() -> None:
    one = Image.new("RGB", (640, 360), (10, 100, 200))
    other = one.copy()
    other.paste((10, 160, 200), (0, 0, 320, 90))  # an eighth, in one colour
    assert share_changed(small(one), small(one)) == 0
    assert share_changed(small(one), small(other)) == pytest.approx(1 / 8, abs=0.01)
    noise = np.random.default_rng(0).normal(0, 4, (360, 640, 3))
    noisy = Image.fromarray(np.clip(np.asarray(one) + noise, 0, 255).astype(np.uint8))
    assert share_changed(small(one), small(noisy)) == 0
    assert share_changed(small(Image.new("RGB", (9, 5))), small(Image.new("RGB", (9, 5), "white"))) == 1


class Pretended:
    """A source that does what a test says: each call of `frames` is the next of its `lives`."""

    shown, live, stall = "pretended", True, 1000.0

    def __init__(self, *lives: Callable[[], Generator[Frame, None, None]]) -> None:
        self._lives = iter(lives)
        self.stopped = threading.Event()

    def frames(self) -> Generator[Frame, None, None]:
        following = next(self._lives, None)
        if following is None:
            self.stopped.wait()
            return
        yield from following()

    def stop(self) -> None:
        self.stopped.set()


def frame(number: int, late: float = 0.0) -> Frame:
    return Frame(number, lambda: BLANK, received=time.monotonic() - late)


@pytest.fixture
def soon(monkeypatch) -> None:
    monkeypatch.setattr(live, "_PAUSES_S", (0.01, 0.02))


def test_the_newest_picture_is_taken() -> None:
    """All others are dropped: the reader is never kept waiting."""
    read = threading.Event()

    def many() -> Generator[Frame, None, None]:
        for n in range(1000):
            yield frame(n)
        read.set()
        source.stopped.wait()

    source = Pretended(many)
    found = Live(source)
    assert read.wait(30)
    assert found.take(30).number == 999
    assert found.take(0.01) is None
    found.close()


def test_old_pictures_are_not_looked_at() -> None:
    """Nor one that waited on the way: a newer one is waited for."""
    go = threading.Event()

    def old_then_new() -> Generator[Frame, None, None]:
        yield frame(0, late=2.5)
        go.wait()
        yield frame(1)
        source.stopped.wait()

    source = Pretended(old_then_new)
    found = Live(source)
    assert found.take(0.2) is None
    go.set()
    assert found.take(30).number == 1
    found.close()


def test_a_lost_source_is_opened_again(soon) -> None:
    """However it ends; each loss and each return is told once."""

    def fails() -> Generator[Frame, None, None]:
        raise SourceError("no route to host")
        yield

    def dies() -> Generator[Frame, None, None]:
        yield frame(0)
        raise ZeroDivisionError("a bug")

    def ends() -> Generator[Frame, None, None]:
        yield frame(0)

    def stays() -> Generator[Frame, None, None]:
        yield frame(7)
        source.stopped.wait()

    source = Pretended(fails, fails, dies, fails, ends, stays)
    found = Live(source)
    said = []
    while not (said and isinstance(said[-1], Frame) and said[-1].number == 7):
        said.append(found.take(30))
        assert said[-1] is not None
    found.close()
    events = [one for one in said if not isinstance(one, Frame)]
    assert [type(one) for one in events] == [Lost, Back] * 3
    assert [one.why for one in events if isinstance(one, Lost)] == [
        "no route to host",
        "ZeroDivisionError: a bug",
        "it ended",
    ]
    assert [one.attempts for one in events if isinstance(one, Back)] == [2, 2, 1]


def test_pauses_grow(monkeypatch) -> None:
    waited: list[float] = []
    found = Live(Pretended())
    found.close()
    monkeypatch.setattr(live, "_PAUSES_S", (1.0, 2.0, 5.0))
    for _ in range(5):
        found._attempts += 1
        waited.append(found._pause)
    assert waited == [1.0, 2.0, 5.0, 5.0, 5.0]


def test_stopping_ends_waiting() -> None:
    found = Live(Pretended())
    threading.Timer(0.1, found.stop).start()
    assert found.take(None) is None
    found.close()


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


RECORD = {"time": "2026-01-01T00:00:00.000Z", "source": "cam", "frame": 1, "text": "ä"}


def test_records_are_appended_whole(tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    for _ in range(2):
        file = Appended(out, print)
        file.write(RECORD)
        with pytest.raises(RecordsError, match="is being written by another"):
            Appended(out, print)
        file.close()
    assert [json.loads(line) for line in out.read_text().splitlines()] == [RECORD] * 2


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 300))
def test_a_torn_last_record_is_dropped(tmp_path_factory, at) -> None:
    out = tmp_path_factory.mktemp("torn") / "out.jsonl"
    line = (json.dumps(RECORD, ensure_ascii=False) + "\n").encode()
    out.write_bytes((3 * line)[:at])
    file = Appended(out, print)
    file.write(RECORD)
    file.close()
    assert out.read_bytes() == line * (min(at, 3 * len(line)) // len(line) + 1)


@pytest.mark.parametrize(
    "content", ["notes\n", '{"a": 1}\n', '{"path": "a.png", "text": "x"}\n', "notes", "5", '{"tim']
)
def test_nobody_elses_file_is_written(tmp_path, content) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    if content == '{"tim':  # which is how ours begins
        Appended(out, print).close()
        return
    with pytest.raises(RecordsError, match="did not write it"):
        Appended(out, print)
    assert out.read_text() == content


def test_a_full_disk_loses_records_and_says_how_many(tmp_path, monkeypatch) -> None:
    said: list[str] = []
    file = Appended(tmp_path / "out.jsonl", said.append)
    file.write(RECORD)
    with monkeypatch.context() as full:
        full.setattr(records, "append", raises(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        for _ in range(3):
            file.write(RECORD)
    file.write(RECORD)
    with monkeypatch.context() as broken:
        broken.setattr(records, "append", raises(OSError(errno.EIO, os.strerror(errno.EIO))))
        with pytest.raises(RecordsError, match="Input/output error"):
            file.write(RECORD)
    file.close()
    assert len(said) == 2
    assert "records are lost until there is room" in said[0]
    assert "3 records were lost" in said[1]
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 2


def raises(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path, monkeypatch) -> None:
    """As logrotate does it, without a signal."""
    monkeypatch.setattr(records, "_SYNC_S", -1.0)
    out = tmp_path / "out.jsonl"
    file = Appended(out, print)
    file.write(RECORD)
    out.rename(tmp_path / "out.1.jsonl")
    file.write(RECORD)
    file.write(RECORD)
    file.close()
    assert [path.read_text().count("\n") for path in (tmp_path / "out.1.jsonl", out)] == [1, 2]


def test_names_of_stills_are_in_order(tmp_path) -> None:
    for name in ("b.png", "a.png", "c.PNG", ".hidden.png", "notes.txt"):
        BLANK.save(tmp_path / name, "PNG")
    found = list(source_of(str(tmp_path), every=0, stall=1).frames())
    assert [(one.number, one.at) for one in found] == [(0, "a.png"), (1, "b.png"), (2, "c.PNG")]
    assert all(one.picture().size == BLANK.size for one in found)


def test_videos_are_looked_at_by_their_own_time(tmp_path) -> None:
    """Frames of ffmpeg's test source, made and turned by its own command."""
    av = pytest.importorskip("av")
    path = Path(tmp_path) / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(50):
            image = Image.new("RGB", (64, 48), (5 * n, 5 * n, 5 * n))
            for packet in itertools.chain(stream.encode(av.VideoFrame.from_image(image)), []):
                container.mux(packet)
        container.mux(stream.encode(None))
    found = [(one.number, one.at, one.picture()) for one in source_of(str(path), every=1.0, stall=1).frames()]
    assert [(number, at) for number, at, _ in found] == [(10 * n, float(n)) for n in range(5)]
    for number, _, picture in found:
        assert np.asarray(picture).mean() == pytest.approx(5 * number, abs=4)
    assert len(list(source_of(str(path), every=0, stall=1).frames())) == 50
    content = path.read_bytes()
    (cut := tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError):
        list(source_of(str(cut), every=0, stall=1).frames())
    with av.open(str(path)) as container, av.open(str(tmp_path / "v.mkv"), "w") as copy:
        stream = copy.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(container.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    content = (tmp_path / "v.mkv").read_bytes()
    (cut := tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match=r"cut off: it ends after .* of 5.0 s"):
        list(source_of(str(cut), every=0, stall=1).frames())
    (none := tmp_path / "none.mp4").write_bytes(b"no video" * 1000)
    with pytest.raises(SourceError):
        list(source_of(str(none), every=0, stall=1).frames())
