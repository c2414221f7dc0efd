"""What PyAV (ffmpeg's libraries) opens: streams of cameras, devices of Video4Linux, videos."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import av
from lfm_runtime.errors import ImageError
from PIL import Image

from lfm_serve.cameras.sources import OLD_S, Frame, SourceError, masked

_SHORT_S, _SHORT_SHARE = 1.0, 0.1
"""So much of a video's length may be missing, whichever is less: files count it in many ways."""
_LOOK = "look at it with: ffprobe FILE"
_AGAIN_S, _SLICE_S = 1.0, 0.2
"""After which a picture that is alone at its address is fetched again, where no longer time was asked for."""
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class Stream:
    """A live stream, a device of Video4Linux, or a camera's newest picture at an address."""

    live = True

    def __init__(self, address: str, stall: float, *, device: bool, every: float = 0.0) -> None:
        self.shown, self._address, self.stall, self._device = masked(address), address, stall, device
        self._again = min(max(every, _AGAIN_S), stall)
        self._stopped = False

    def frames(self) -> Generator[Frame, None, None]:
        """Implement Source.frames. What is one picture by HTTP is fetched again and again."""
        number = 0
        while not self._stopped:
            before = number
            for frame in self._once(number):
                yield frame
                number += 1
            if number - before != 1 or not self._address.lower().startswith("http"):
                raise SourceError("the stream ended")
            until = time.monotonic() + self._again
            while not self._stopped and (left := until - time.monotonic()) > 0:
                time.sleep(min(left, _SLICE_S))

    def _once(self, number: int) -> Generator[Frame, None, None]:
        """Open it, and give its pictures until it ends; the first has this number."""
        how: dict[str, Any] = {"timeout": (self.stall, self.stall)}
        if self._device:
            how["format"] = "video4linux2"
        elif self._address.lower().startswith("rtsp"):
            how["options"] = {"rtsp_transport": "tcp"}  # over UDP lost packets are smeared pictures
        with _opened(self._address, **how) as container, closing(self._pictures(container, number)) as pictures:
            yield from pictures

    def _pictures(self, container: Any, number: int) -> Generator[Frame, None, None]:
        """What is decoded. A generator of its own, so that closing it lets go of packets before the container closes:
        those of a device lie in its buffers, and freeing one later ends the process.
        """
        lag, held = Lag(), None
        stream = _video(container)
        stream.thread_type = "SLICE"  # threads by frame would hold back as many frames
        in_buffers = self._device and stream.codec_context.name == "rawvideo"  # frames too: nothing decodes them
        last, why = time.monotonic(), f"no picture for {self.stall:g} s"
        for packet, waited in self._packets(container.demux(stream)):
            if time.monotonic() - last >= 0.99 * self.stall:  # ffmpeg gives a rest of one when it has waited enough
                raise SourceError(why)
            if held and not packet.size:  # the end: the decoder gives what it holds back, which may be cut off
                continue
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:  # what was lost on the way is in the next ones
                continue
            for frame in frames:
                now = time.monotonic()
                late = lag.note(now, frame.time, waited)
                stream.codec_context.skip_frame = "NONKEY" if lag.behind else "DEFAULT"
                if late <= OLD_S:
                    last = now
                why = f"pictures come {late:.0f} s late" if late > OLD_S else f"no picture for {self.stall:g} s"
                picture = _converted(frame) if in_buffers else partial(_picture, frame)
                held = Frame(number, picture, received=now - late, moment=time.time() - late, whole=self._device)
                if lag.caught_up:
                    yield held
                    number += 1
        if held and not lag.caught_up:  # a snapshot: the only picture of its address
            yield held

    def _packets(self, packets: Iterator[Any]) -> Iterator[tuple[Any, float]]:
        """Packets, and how long each was waited for."""
        while True:
            begun = time.monotonic()
            packet = next(packets, None)
            if packet is None or self._stopped:
                return
            yield packet, time.monotonic() - begun

    def stop(self) -> None:
        """Implement Source.stop: at the next packet, or when ffmpeg has waited long enough for one."""
        self._stopped = True


class Video:
    """A video file, a frame each `every` seconds of it."""

    live, stall = False, 0.0

    def __init__(self, path: str, every: float) -> None:
        self.shown = self._path = path
        self._every = every

    def frames(self) -> Generator[Frame, None, None]:
        """Implement Source.frames; SourceError where it is cut off."""
        due = last = shown = 0.0
        number = -1
        with _opened(self._path) as container:
            stream = _video(container)
            stream.thread_type = "AUTO"
            try:
                packets = _but_a_cut_one(container.demux(stream))
                for number, frame in enumerate(frame for packet in packets for frame in packet.decode()):
                    at = last if frame.time is None else frame.time - (stream.start_time or 0) * float(stream.time_base)
                    last, shown = at, float((frame.duration or 0) * (frame.time_base or 0))
                    if at >= due - 1e-6:
                        yield Frame(number, partial(_picture, frame), round(at, 3))
                        due = at + self._every if self._every else at
            except av.FFmpegError as e:
                raise SourceError(f"damaged or cut off after {last:.1f} s ({e.strerror})") from e
            length = _length(container, stream)
            if length - (last + shown) > min(_SHORT_S, _SHORT_SHARE * length):
                raise SourceError(f"cut off: it ends after {last:.1f} of {length:.1f} s")
            if number < 0:
                raise SourceError(f"no picture can be read of it: {_LOOK}")

    def stop(self) -> None:
        """Implement Source.stop: nothing is waited for."""


class Lag:
    """How long pictures have waited on the way, in the network or the camera: after it was cut for a moment, or where
    they come faster than it carries them or than they are decoded.

    By the stream's clock: how much later a picture comes than those that came soonest. Some streams have none (ffmpeg
    then counts pictures), so it is believed only once it has kept pace with ours; cameras' clocks may be a few percent
    wrong, and be set.
    """

    _WAITED_S = 0.005  # less: it was there already
    _PACE, _PACE_S = 0.05, 2.0
    _MOST_S, _ENOUGH_S = 1.0, 0.2
    _START_S = 3.0

    def __init__(self) -> None:
        self.behind = False
        """Whether only key frames should be decoded, until it has caught up."""
        self.caught_up = False
        """Whether what came while the stream was being opened is read."""
        self._believed = False
        self._least = self._now = self._clock = 0.0  # of our clock before the stream's; of the picture before
        self._since: tuple[float, float] | None = None  # both clocks, from where its pace is measured
        self._begun: float | None = None

    def note(self, now: float, clock: float | None, waited: float) -> float:
        """A picture of this time of the stream's clock is there now, and was waited for so long; returns how long it
        has waited itself. All in seconds.
        """
        self._begun = now if self._begun is None else self._begun
        late = 0.0
        if clock is not None:
            if self._since is None or clock < self._clock:
                self._since, self._least, self._believed = (now, clock), now - clock, False
            self._least = min(now - clock, self._least + self._PACE * (now - self._now))
            if waited >= self._WAITED_S:
                self._measure(now, clock)
                if not self._believed:
                    self._least = now - clock
            late = max(0.0, now - clock - self._least)
            self._now, self._clock = now, clock
        self.caught_up |= waited >= self._WAITED_S or now - self._begun > self._START_S
        self.behind = late > (self._ENOUGH_S if self.behind else self._MOST_S)
        return late

    def _measure(self, now: float, clock: float) -> None:
        """Believe a clock that has kept pace. One that was believed stays so: it is the pictures that are late then."""
        assert self._since
        seconds = now - self._since[0]
        if seconds >= self._PACE_S:
            self._believed |= abs((clock - self._since[1]) / seconds - 1) <= self._PACE
            self._since = now, clock


@contextmanager
def _opened(address: str, **how: Any) -> Iterator[Any]:
    """A container; what ffmpeg says of it is a SourceError, without the address, which may hold a password."""
    unread = "its host is not known, or what it sends is no video"
    try:
        with av.open(address, **how) as container:
            unread = "the stream ended in the middle of a picture"
            yield container
    except av.error.ExitError:
        raise SourceError(f"no answer for {how['timeout'][0]:g} s") from None
    except (av.FFmpegError, OSError) as e:
        why = unread if e.errno == errno.EIO else e.strerror
        if isinstance(e, av.error.InvalidDataError | av.error.EOFError):
            why = f"no video that ffmpeg knows, or cut off ({why}); {_LOOK}"
        raise SourceError(str(why or type(e).__name__)) from None


def _but_a_cut_one(packets: Iterator[Any]) -> Iterator[Any]:
    """All but the last one, where that is marked as damaged: the file is cut off. One in the middle lacks what was lost
    on the way, and those after it need it.
    """
    damaged = None
    for packet in packets:
        if damaged and packet.size:
            yield damaged
            damaged = None
        if packet.is_corrupt:
            damaged = packet
        else:
            yield packet


def _length(container: Any, stream: Any) -> float:
    """Seconds that a video says it has; 0 where it does not say, or says it of its sound too. Of an AVI that was cut
    off ffmpeg guesses the length by what is left, but still says how many frames there were.
    """
    if stream.duration:
        counted = stream.frames / stream.average_rate if stream.average_rate else 0
        return float(max(stream.duration * stream.time_base, counted))
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else 0.0


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


def _converted(frame: Any) -> Callable[[], Image.Image]:
    """Its picture, made now."""
    try:
        image = _picture(frame)
    except ImageError as e:
        raise SourceError(str(e)) from e
    return lambda: image
