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
        self._stopped = False

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
            for packet, waited in self._packets(container.demux(stream)):
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:  # what was lost on the way is in the next ones
                    continue
                for frame in frames:
                    now = time.monotonic()
                    late = lag.note(now, frame.time, waited)
                    stream.codec_context.skip_frame = "NONKEY" if lag.behind else "DEFAULT"
                    if lag.caught_up:
                        yield Frame(number, partial(_picture, frame), received=now - late, moment=time.time() - late)
                        number += 1
        raise SourceError("the stream ended")

    def _packets(self, packets: Iterator[Any]) -> Iterator[tuple[Any, float]]:
        """Packets, and how long each was waited for; ffmpeg may give a rest of one when it has waited long enough."""
        while True:
            begun = time.monotonic()
            packet = next(packets, None)
            waited = time.monotonic() - begun
            if waited >= 0.99 * self._stall:
                raise SourceError(f"no picture for {self._stall:g} s")
            if packet is None or self._stopped:
                return
            yield packet, waited

    def stop(self) -> None:
        """Implement Source.stop: at the next packet, or when ffmpeg has waited long enough for one."""
        self._stopped = True


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
    """How long pictures have waited on the way, in the network or the camera: after it was cut for a moment, or where
    they come faster than they are decoded.

    A picture that had to be waited for is new. One that was there already, or that comes after a gap, has waited for as
    long as the stream's clock, since the last new one, is behind ours. That clock need not be right, and may be set.
    """

    _WAITED_S, _GAP_S, _DRIFT_S = 0.005, 1.0, 0.5
    _MOST_S, _ENOUGH_S = 1.0, 0.2
    _START_S = 3.0

    def __init__(self) -> None:
        self.behind = False
        """Whether only key frames should be decoded, until it has caught up."""
        self.caught_up = False
        """Whether what came while the stream was being opened is read."""
        self._least: float | None = None  # of our clock before the stream's, when a picture was new
        self._clock, self._begun = 0.0, 0.0

    def note(self, now: float, clock: float | None, waited: float) -> float:
        """A picture of this time of the stream's clock is there now, and was waited for so long; returns how long it
        has waited itself. All in seconds.
        """
        self._begun = self._begun or now
        late = 0.0
        if clock is not None:
            if self._least is not None and clock >= self._clock:
                late = max(0.0, now - clock - self._least)
            if self._WAITED_S <= waited < self._GAP_S or (waited >= self._GAP_S and late < self._DRIFT_S):
                late = 0.0
            if late == 0.0:
                self._least = now - clock
            self._clock = clock
        self.caught_up |= waited >= self._WAITED_S or now - self._begun > self._START_S
        self.behind = late > (self._ENOUGH_S if self.behind else self._MOST_S)
        return late


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
