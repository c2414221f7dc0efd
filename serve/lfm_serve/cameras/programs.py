"""exec:COMMAND: any program that writes JPEG or PNG pictures to its standard output."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Generator, Iterator
from functools import partial
from typing import IO

import psutil
from lfm_runtime.errors import SettingError
from lfm_runtime.images.pixels import open_image

from lfm_serve.cameras.sources import Frame, SourceError, masked
from lfm_serve.cameras.splitting import NoPictureError, pictures

_CHUNK = 1 << 16
_MOST = 32 << 20
"""Bytes of a picture."""
_SAID = 300
"""Bytes that are kept of what a program says."""
_END_S = 2.0
"""That a program gets to end by itself."""
_SHELL = 'exec 3<&0; (read -r _ <&3; kill -s TERM 0) >/dev/null 2>&1 & exec /bin/sh -c "$0" </dev/null 3<&-'
"""Runs a command, and ends its group when nobody holds the other end of standard input any more: also where this
process is killed.
"""


class Program:
    """Pictures that a command of the shell writes, in a process group of its own."""

    live = True

    def __init__(self, command: str, stall: float) -> None:
        """Raises SettingError for an empty command."""
        if not command.strip():
            raise SettingError("exec: names no command; write exec:'rpicam-vid -t 0 --codec mjpeg -o -'")
        self._command, self.stall = command, stall
        words = [word for word in command.split() if not re.match(r"\w+=", word)]
        self.shown = f"exec:{masked(words[0]) if words else '…'}"  # arguments and variables may hold a password
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = threading.Lock()
        self._stopped = False

    def frames(self) -> Generator[Frame, None, None]:
        """Implement Source.frames."""
        process = subprocess.Popen(  # noqa: S603  (the user's own command)
            ["/bin/sh", "-c", _SHELL, self._command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        assert process.stdin
        assert process.stdout
        assert process.stderr
        self._process = process
        if self._stopped:
            self._end(process)
        said = bytearray()
        listener = threading.Thread(target=_listen, args=(process.stderr, said), daemon=True)
        listener.start()
        watch, number = _Watch(self.stall), -1
        try:
            for number, content in enumerate(pictures(watch.chunks(process.stdout), most=_MOST)):
                watch.seen()
                yield Frame(number, partial(open_image, content))
        except NoPictureError as e:
            raise SourceError(f"it wrote {_MOST >> 20} MiB without a JPEG or PNG picture") from e
        finally:
            self._end(process)
            process.stdin.close()
            listener.join(_END_S)  # which closes what it reads: a child in another session may still hold it
        lines = [line.strip() for line in re.split(r"[\r\n]", said.decode(errors="replace")) if line.strip()]
        what = f": {masked(lines[-1])[-200:]}" if lines else ""
        none = " without a JPEG or PNG picture" if number < 0 and process.returncode == 0 else ""
        raise SourceError(f"the command ended with {process.returncode}{none}{what}")

    def stop(self) -> None:
        """Implement Source.stop."""
        self._stopped = True
        if self._process:
            self._end(self._process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """End a command and what it has started; what has another user, or another session, is left."""
        with self._ending:
            if process.returncode is not None:  # it was reaped: its number may be somebody else's by now
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGTERM)
                until = time.monotonic() + _END_S
                while time.monotonic() < until and _alive(process.pid):
                    time.sleep(0.02)
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)


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


def _listen(stream: IO[bytes], said: bytearray) -> None:
    """Keep the end of what a program says: ffmpeg writes a line without end."""
    with stream:
        while chunk := os.read(stream.fileno(), _CHUNK):
            said += chunk
            del said[:-_SAID]


def _alive(group: int) -> bool:
    """Whether a process of a group is still at work."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False
