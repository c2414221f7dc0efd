"""What the command's options mean."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from lfm_runtime.errors import ImageError, SettingError
from PIL import Image

from lfm_serve.asking import Asking

_LONGEST_S = 1e9
_ROUNDING = 1e-6
"""Of shares that are to add up to one."""
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str, option: str) -> float:
    """A duration: 500ms, 2s, 10m, 1.5h. Without a unit it is seconds. `option`: for the message.

    Raises:
        SettingError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d)?", text.strip())
    value = float(found[1]) * _UNITS[found[2] or "s"] if found else _LONGEST_S
    if value >= _LONGEST_S:
        raise SettingError(f"{option} {text!r:.40} is no duration; write 500ms, 2s, 10m or 1h")
    return value


@dataclass(frozen=True)
class Roi:
    """A region of pictures: in pixels, or in shares of width and height."""

    x: float
    y: float
    width: float
    height: float
    shares: bool

    @staticmethod
    def parse(text: str) -> Roi:
        """x,y,w,h: pixels, or with a decimal point shares from 0.0 to 1.0.

        Raises:
            SettingError: it is none.
        """
        parts = text.split(",")
        shares = "." in text
        advice = "write x,y,width,height in pixels (100,50,640,480) or shares (0.25,0.0,0.5,1.0)"
        try:
            x, y, width, height = (float(part) for part in parts) if shares else (int(part) for part in parts)
        except ValueError:
            raise SettingError(f"--roi {text!r:.40} is no region; {advice}") from None
        most = 1.0 + _ROUNDING if shares else float("inf")
        if shares and max(x + width, y + height) > most and max(x, y, width, height) <= most:
            raise SettingError(
                f"--roi {text!r:.40} reaches over the picture's edge: x + width or y + height is above 1; {advice}"
            )
        if not (x >= 0 and y >= 0 and width > 0 and height > 0 and x + width <= most and y + height <= most):
            raise SettingError(f"--roi {text!r:.40} is no region of a picture; {advice}")
        if not shares and width <= 1 and height <= 1:
            raise SettingError(f"--roi {text!r:.40} is one pixel: shares have decimal points; {advice}")
        return Roi(x, y, width, height, shares)

    def of(self, picture: Image.Image, *, first: bool) -> Image.Image:
        """The region of a picture.

        Raises:
            SettingError: it is not inside of the `first` picture, or less than a pixel of it.
            ImageError: it is not inside of a later one, of another size.
        """
        of = picture.size if self.shares else (1, 1)
        left, top = round(self.x * of[0]), round(self.y * of[1])
        right, bottom = round((self.x + self.width) * of[0]), round((self.y + self.height) * of[1])
        if not (left < right <= picture.width and top < bottom <= picture.height):
            size, region = f"{picture.width}×{picture.height}", f"{left},{top},{right - left},{bottom - top}"
            said = f"the region {region} is not inside of the picture of {size} pixels"
            raise SettingError(f"--roi: {said}") if first else ImageError(said)
        return picture.crop((left, top, right, bottom))


@dataclass(frozen=True)
class Until:
    """When to end: at a time, or with an answer."""

    deadline: float | None = None  # time.monotonic()
    moment: float | None = None  # time.time(), which may be set while it is waited for
    answer: str = ""

    @staticmethod
    def parse(text: str) -> Until:
        """A duration (30m), a time of day (18:00), or answer:TEXT for the first answer with the text in it (`said`).

        Raises:
            SettingError: it is none of them.
        """
        if text.startswith("answer:"):
            wanted = text.removeprefix("answer:").strip()
            if not wanted:
                raise SettingError("--until answer: names no text; write answer:yes")
            return Until(answer=wanted)
        if clock := re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", text):
            now = datetime.now()  # noqa: DTZ005  (local, without a zone: summer time may begin between)
            then = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
            return Until(moment=(then + timedelta(days=then <= now)).timestamp())
        try:
            return Until(time.monotonic() + seconds(text, "--until"))
        except SettingError:
            raise SettingError(f"--until {text!r:.40} is no end; write 30m, 18:00 or answer:TEXT") from None

    def check(self, asked: Sequence[Asking]) -> None:
        """Raise SettingError where only given answers are made, and none of them ends it."""
        answers = [answer for one in asked for answer in one.choices]
        if self.answer and all(one.choices for one in asked) and not any(map(self.said, answers)):
            raise SettingError(f"--until answer:{self.answer} never comes: --choices are {', '.join(answers)}")

    def left(self) -> float | None:
        """Seconds until then; None without a time."""
        if self.moment is not None:
            return max(0.0, self.moment - time.time())
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def over(self) -> bool:
        """Whether the time has come."""
        return self.left() == 0

    def said(self, text: str) -> bool:
        """Whether an answer ends it: it has the text in it, as whole words, in upper or lower case."""
        return bool(self.answer) and bool(re.search(rf"(?<!\w){re.escape(self.answer)}(?!\w)", text, re.IGNORECASE))
