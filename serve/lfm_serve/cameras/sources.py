"""Where pictures come from: a camera's stream, a device, a program, a video, a still or a folder of them."""

from __future__ import annotations

import re
import stat
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lfm_runtime.errors import EdgeError, SettingError
from lfm_runtime.images.names import is_image
from lfm_runtime.installation import install_advice
from PIL import Image

_SCHEMES = ("rtsp", "rtsps", "http", "https", "rtmp", "rtmps", "srt", "udp", "tcp")
OLD_S = 2.0
"""An older picture is not looked at: a newer one is waited for."""
_LOGIN = re.compile(r"(:/+).*@")
_NAME = re.compile(r"[^\s…]*:[^\s…]*@")
_SECRET = re.compile(
    r"(?i)([\w-]*(?:user|usr|login|pass|pw|psw|token|auth|key|secret|sig|cred|jwt|session|sid)[\w-]*)=[^&\s]*"
)


class SourceError(EdgeError):
    """A source gives no pictures (now): the message says why."""


@dataclass(frozen=True)
class Frame:
    """A picture of a source."""

    number: int  # pictures that the source gave before it, looked at or not
    picture: Callable[[], Image.Image]
    """Decodes it: upright RGB. Raises ImageError."""
    at: float | str | None = None  # seconds from the beginning of a video; the name of a still
    received: float = field(default_factory=time.monotonic)  # here; what network and camera need is not known
    moment: float = field(default_factory=time.time)
    whole: bool = True
    """Whether it is certain that nothing of it is missing; else it is where the source goes on after it."""

    @property
    def age(self) -> float:
        """Seconds since it was received."""
        return time.monotonic() - self.received


class Source(Protocol):
    """What can be opened for pictures, again and again."""

    shown: str
    """How it is named in records and messages, without credentials."""
    live: bool
    """Whether pictures come whether anybody looks or not."""
    stall: float
    """Of a live one: seconds without a picture after which it is lost."""

    def frames(self) -> Generator[Frame, None, None]:
        """Open it, and give its pictures until it ends or is lost; closed with the generator.

        Raises:
            SourceError: it cannot be opened, or was lost.
        """
        ...

    def stop(self) -> None:
        """End `frames`, from another thread, where that is waiting for a picture; nothing is opened after it."""
        ...


def source_of(text: str, *, every: float, stall: float) -> Source:
    """The source that a user names.

    Args:
        text: a URL, exec:COMMAND, a device, an image, a video or a folder.
        every: seconds between two pictures that are wanted.
        stall: seconds without a picture after which a live source counts as lost.

    Raises:
        SettingError: there is no such source, or what reads it is not installed.
    """
    if text.startswith("exec:"):
        from lfm_serve.cameras.programs import Program

        return Program(text.removeprefix("exec:"), stall)
    text = text.strip()
    scheme = re.match(r"([\w+.-]+)://", text)
    if scheme and scheme[1].lower() not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise SettingError(
            f"{masked(text)} cannot be watched; known are {known}, exec:COMMAND, devices, files, folders"
        )
    path = Path(text)
    if not scheme and (path.is_dir() or (path.is_file() and is_image(text))):
        from lfm_serve.cameras.stills import Stills

        return Stills(text)
    device = text.startswith("/dev/")  # which may be plugged in later
    if not (scheme or device or path.exists()):
        raise SettingError(
            f"{masked(text)} does not exist; name rtsp://…, exec:COMMAND, a device, an image, a video or a folder"
        )
    if not (scheme or device) and not stat.S_ISREG(path.stat().st_mode):
        raise SettingError(f"{text} is no plain file; exec:'cat {text}' reads JPEG or PNG pictures from it")
    try:
        from lfm_serve.cameras.streams import Stream, Video
    except ImportError as e:
        as_what = "" if scheme or device else " is no image, and as a video"
        raise SettingError(f"{masked(text)}{as_what} needs the extra video: {install_advice('video')}") from e
    if scheme or device:
        return Stream(text, stall, device=device, every=every)
    return Video(text, every)


def masked(text: str) -> str:
    """A text in which URLs have no user, password, token or key: they reach no log. Rather too much than too little is
    left out.
    """
    return _SECRET.sub(r"\1=…", _NAME.sub("…@", _LOGIN.sub(r"\1…@", text)))
