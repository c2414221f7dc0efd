"""exec:COMMAND: any program that writes JPEG or PNG pictures to its standard output."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from functools import partial
from typing import IO

from lfm_runtime.errors import SettingError
from lfm_runtime.images.files import MAX_BYTES
from lfm_runtime.images.pixels import open_image

from lfm_serve.cameras.sources import Frame, SourceError, masked
from lfm_serve.cameras.splitting import NoPictureError, pictures

_CHUNK = 1 << 16
_END_S = 2.0
"""That a program gets to end by itself."""


class Program:
    """Pictures that a command of the shell writes, in a process group of its own."""

    live = True

    def __init__(self, command: str, stall: float) -> None:
        """Raises SettingError for an empty command."""
        if not command.strip():
            raise SettingError("exec: names no command; write exec:'rpicam-vid -t 0 --codec mjpeg -o -'")
        self._command, self._stall = command, stall
        self.shown = f"exec:{command.split(maxsplit=1)[0]}"  # its arguments may hold a password
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def frames(self) -> Generator[Frame, None, None]:
        """Implement Source.frames."""
        process = subprocess.Popen(  # noqa: S603  (the user's own command)
            ["/bin/sh", "-c", self._command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self._process = process
        if self._stopped:
            _end(process)
        assert process.stdout
        assert process.stderr
        said: deque[str] = deque(maxlen=1)
        listener = threading.Thread(target=_listen, args=(process.stderr, said), daemon=True)
        listener.start()
        watch = _Watch(self._stall)
        try:
            for number, content in enumerate(pictures(watch.chunks(process.stdout), most=MAX_BYTES)):
                watch.seen()
                yield Frame(number, partial(open_image, content))
        except NoPictureError as e:
            raise SourceError(f"it wrote {MAX_BYTES >> 20} MiB without a JPEG or PNG picture") from e
        finally:
            _end(process)
            listener.join(_END_S)
            process.stderr.close()
        what = f": {masked(said[0])[:200]}" if said else ""
        raise SourceError(f"the command ended with {process.returncode}{what}")

    def stop(self) -> None:
        """Implement Source.stop."""
        self._stopped = True
        if self._process:
            _end(self._process)


class _Watch:
    """Reads a program's output, and notes how long there was no picture."""

    def __init__(self, stall: float) -> None:
        self._stall = stall
        self.seen()

    def seen(self) -> None:
        """There is a picture."""
        self._last = time.monotonic()

    def chunks(self, stream: IO[bytes]) -> Iterator[bytes]:
        """What the program writes, until it closes its output."""
        with stream:
            while True:
                left = self._last + self._stall - time.monotonic()
                if left <= 0 or not select.select([stream], [], [], left)[0]:
                    raise SourceError(f"no picture for {self._stall:g} s")
                chunk = os.read(stream.fileno(), _CHUNK)
                if not chunk:
                    return
                yield chunk


def _listen(stream: IO[bytes], said: deque[str]) -> None:
    """Keep the last line of what a program says."""
    with contextlib.suppress(OSError, ValueError):  # closed
        for line in stream:
            if text := line.decode(errors="replace").strip():
                said.append(text)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
