"""The newest picture of a source that is read all the time, and opened again when it is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator

import pytest
from lfm_serve.cameras import live
from lfm_serve.cameras.live import Back, Live, Lost
from lfm_serve.cameras.sources import Frame, SourceError
from PIL import Image

BLANK = Image.new("RGB", (64, 48))


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
