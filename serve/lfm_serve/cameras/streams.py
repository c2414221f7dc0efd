"""What PyAV (ffmpeg's libraries) opens: streams of cameras, devices of Video4Linux, videos."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import av
from lfm_runtime.errors import ImageError
from PIL import Image

from lfm_serve.cameras.sources import Frame, SourceError, masked

_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class Stream:
    """A live stream, or a device of Video4Linux."""

    live = True

    def __init__(self, address: str, stall: float, *, device: bool) -> None:
        self.shown, self._address, self._stall, self._device = masked(address), address, stall, device

    def frames(self) -> Generator[Frame, None, None]:
        """Implement Source.frames."""
        how: dict[str, Any] = {"timeout": (self._stall, self._stall)}
        if self._device:
            how["format"] = "video4linux2"
        elif self._address.lower().startswith("rtsp"):
            how["options"] = {"rtsp_transport": "tcp"}  # over UDP lost packets are smeared pictures
        lag, number = Lag(), 0
        with _opened(self._address, **how) as container:
            stream = _video(container)
            stream.thread_type = "SLICE"  # threads by frame would hold back as many frames
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:  # what was lost on the way is in the next ones
                    continue
                for frame in frames:
                    lag.note(time.monotonic(), frame.time)
                    stream.codec_context.skip_frame = "NONKEY" if lag.behind else "DEFAULT"
                    yield Frame(number, partial(_picture, frame))
                    number += 1
        raise SourceError("the stream ended")

    def stop(self) -> None:
        """Implement Source.stop: at the next picture, or when ffmpeg has waited long enough for one."""


class Video:
    """A video file, a frame each `every` seconds of it."""

    live = False

    def __init__(self, path: str, every: float) -> None:
        self.shown = self._path = path
        self._every = every

    def frames(self) -> Generator[Frame, None, None]:
        """Implement Source.frames; SourceError where it is cut off."""
        due = last = 0.0
        with _opened(self._path) as container:
            stream = _video(container)
            stream.thread_type = "AUTO"
            try:
                for number, frame in enumerate(container.decode(stream)):
                    at = last if frame.time is None else frame.time - (stream.start_time or 0) * float(stream.time_base)
                    last = at
                    if at >= due - 1e-6:
                        yield Frame(number, partial(_picture, frame), round(at, 3))
                        due = at + self._every if self._every else at
            except av.FFmpegError as e:
                raise SourceError(f"damaged or cut off after {last:.1f} s ({e.strerror})") from e

    def stop(self) -> None:
        """Implement Source.stop: nothing is waited for."""


class Lag:
    """Whether a stream is read slower than it comes: pictures then wait longer and longer on the way.

    What a picture waited for is not known, but how much longer than those that waited least: by the stream's clock,
    which may run up to a thousandth faster or slower than ours, and may be set.
    """

    MOST_S, ENOUGH_S, _JUMP_S, _DRIFT = 1.0, 0.2, 10.0, 1e-3

    def __init__(self) -> None:
        self.behind = False
        """Whether only key frames should be decoded, until it has caught up."""
        self._least: float | None = None
        self._before = self._at = 0.0

    def note(self, now: float, clock: float | None) -> None:
        """A picture of this time of the stream's clock is there now (both in seconds)."""
        if clock is None:
            return
        offset = now - clock
        if self._least is None or abs(offset - self._before) > self._JUMP_S:
            self._least = offset
        else:
            self._least = min(offset, self._least + self._DRIFT * max(0.0, now - self._at))
        self._before, self._at = offset, now
        late = offset - self._least
        self.behind = late > (self.ENOUGH_S if self.behind else self.MOST_S)


@contextmanager
def _opened(address: str, **how: Any) -> Iterator[Any]:
    """A container; what ffmpeg says of it is a SourceError, without the address, which may hold a password."""
    try:
        with av.open(address, **how) as container:
            yield container
    except av.FFmpegError as e:
        raise SourceError(str(e.strerror or type(e).__name__)) from None
    except OSError as e:
        raise SourceError(str(e.strerror or type(e).__name__)) from None


def _video(container: Any) -> Any:
    if not container.streams.video:
        raise SourceError("it has no video")
    return container.streams.video[0]


def _picture(frame: Any) -> Image.Image:
    try:
        image: Image.Image = frame.to_image()
        turned = round(frame.rotation) % 360
    except (av.FFmpegError, ValueError, OSError) as e:
        raise ImageError(f"a frame cannot be converted ({e})") from e
    return image.transpose(_TURNS[turned]) if turned in _TURNS else image
