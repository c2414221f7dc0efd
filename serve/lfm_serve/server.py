"""The process: a socket, uvicorn, signals, and the engine's life beside them."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from lfm_runtime.errors import SettingError
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from lfm_serve.api.app import Api
from lfm_serve.api.counted import Counted
from lfm_serve.api.guard import Guard
from lfm_serve.engine import Engine
from lfm_serve.hurried import Hurried
from lfm_serve.limits import Limits
from lfm_serve.systemd import passed_socket, tell

_log = logging.getLogger(__name__)
_BACKLOG = 128


def serve(
    engine: Engine,
    limits: Limits,
    *,
    host: str,
    port: int,
    name: str,
    keys: Sequence[bytes] = (),
    anybody: bool = False,
    hosts: Collection[str] = (),
    origins: Sequence[str] = (),
    quiet: bool = False,
) -> int:
    """Serve until a signal, on the socket that systemd passes, else on this address; returns the exit code.

    Raises:
        SettingError: the address cannot be used, or is open to other machines where everybody could ask.
        EdgeError: the model cannot be loaded.
    """
    listening = passed_socket() or _bound(host, port)
    if not keys and not anybody and not is_loopback(listening.getsockname()):
        raise SettingError(OPEN.format(listening.getsockname()[0]))
    api = Api(engine, name, limits)
    app: ASGIApp = Guard(api.application(), keys=keys, hosts=(*hosts, host))
    if origins:  # in front of the guard: a browser asks beforehand without a key
        app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    app = Counted(app, api.metrics)
    config = uvicorn.Config(
        app,
        http=type("Connection", (Hurried,), {"header_s": limits.header_s}),
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        lifespan="off",
    )
    logging.getLogger("uvicorn.error").addFilter(_is_no_abort)
    server = _Server(config)
    engine.start()
    told = None if quiet else f"serving at {_address(listening.getsockname())}"
    watcher = threading.Thread(target=_tell_when_ready, args=(engine, server, name, told), daemon=True)
    watcher.start()
    server.run(sockets=[listening])
    if engine.failure:
        raise engine.failure
    if server.force_exit:
        os._exit(0)  # Python would wait for the engine's thread, or end it inside onnxruntime
    engine.close()
    return 0


def _is_no_abort(record: logging.LogRecord) -> bool:
    """A second signal cancels what is being answered, which uvicorn takes for a fault of the application."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


class _Server(uvicorn.Server):
    """The first signal lets requests be answered, a second one does not; uvicorn knows that of Ctrl-C alone."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without raising them again at the end, as uvicorn does: a server that was told to stop has not failed."""
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        tell("STOPPING=1")
        if self.should_exit:
            self.force_exit = True
        super().handle_exit(sig, frame)


OPEN = (
    "{} is open to other machines: give keys with --api-key-file FILE (openssl rand -hex 32 > FILE), or allow "
    "everybody with --no-auth"
)


def is_loopback(name: Any) -> bool:
    """Whether only this machine reaches a socket of this name."""
    if not isinstance(name, tuple):  # a path
        return True
    return ipaddress.ip_address(name[0].partition("%")[0]).is_loopback


def resolved(host: str, port: int) -> tuple[Any, ...]:
    """What socket.getaddrinfo says first of an address of this machine.

    Raises:
        SettingError: there is none.
    """
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, OverflowError, UnicodeError) as e:
        raise SettingError(_unheard(host, port, e)) from e


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket."""
    family, kind, protocol, _, address = resolved(host, port)
    try:
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)
    except OSError as e:
        raise SettingError(_unheard(host, port, e)) from e
    return found


def _unheard(host: str, port: int, e: Exception) -> str:
    said = getattr(e, "strerror", None) or e
    return f"{host}:{port} cannot be listened on ({said}); choose another --port or --host"


def _tell_when_ready(engine: Engine, server: uvicorn.Server, name: str, where: str | None) -> None:
    """Say where the server is once it answers, unless it was stopped before; end it with its engine."""
    engine.wait_until_loaded()
    if engine.failure is None and not server.should_exit:
        tell("READY=1")
        if where:
            rows = f"{engine.rows} at once, {engine.capacity} tokens each"
            print(f"{name}, {engine.setup.summary}, {rows}\n{where}", file=sys.stderr, flush=True)
    engine.wait_until_over()
    server.should_exit = True  # the engine's failure ends the process, whose supervisor starts it again


def _address(name: Any) -> str:
    """The base URL of a socket of this name."""
    if not isinstance(name, tuple):
        return str(name)
    host, port = name[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
