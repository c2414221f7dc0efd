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
    """When to end: at a time, or with an answer; what comes first, where there are several ends."""

    deadlines: tuple[float, ...] = ()  # time.monotonic()
    moments: tuple[float, ...] = ()  # time.time(), which may be set while it is waited for
    answers: tuple[str, ...] = ()

    @staticmethod
    def parse(texts: Sequence[str]) -> Until:
        """Each is a duration (30m), a time of day (18:00), or answer:TEXT for the first answer with the text in it
        (`said`).

        Raises:
            SettingError: one is none of them.
        """
        deadlines, moments, answers = [], [], []
        for text in texts:
            if text.startswith("answer:"):
                answers.append(text.removeprefix("answer:").strip())
                if not answers[-1]:
                    raise SettingError("--until answer: names no text; write answer:yes")
            elif clock := re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", text):
                now = datetime.now()  # noqa: DTZ005  (local, without a zone: summer time may begin between)
                then = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
                moments.append((then + timedelta(days=then <= now)).timestamp())
            else:
                try:
                    deadlines.append(time.monotonic() + seconds(text, "--until"))
                except SettingError:
                    said = f"--until {text!r:.40} is no end; write 30m, 18:00 or answer:TEXT"
                    raise SettingError(said) from None
        return Until(tuple(deadlines), tuple(moments), tuple(answers))

    def check(self, asked: Sequence[Asking]) -> None:
        """Raise SettingError where only given answers are made, and one that would end it is none of them."""
        if not all(one.choices for one in asked):
            return
        choices = [answer for one in asked for answer in one.choices]
        for answer in self.answers:
            if not any(_has_words(choice, answer) for choice in choices):
                raise SettingError(f"--until answer:{answer} never comes: --choices are {', '.join(choices)}")

    def left(self) -> float | None:
        """Seconds until then; None without a time."""
        left = [moment - time.time() for moment in self.moments]
        left += [deadline - time.monotonic() for deadline in self.deadlines]
        return max(0.0, min(left)) if left else None

    def over(self) -> bool:
        """Whether the time has come."""
        return self.left() == 0

    def said(self, text: str) -> bool:
        """Whether an answer ends it: it has one of the texts in it, as whole words, in upper or lower case."""
        return any(_has_words(text, answer) for answer in self.answers)


def _has_words(text: str, words: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE))
