"""Who may ask: the Host header against DNS rebinding, bearer keys, the size of a body."""

from __future__ import annotations

import codecs
import hmac
import ipaddress
import socket
from collections.abc import Collection, Sequence
from pathlib import Path

from lfm_runtime.errors import SettingError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lfm_serve.api.errors import ApiError

_OPEN = ("/", "/health", "/v1/health")
"""Without a key: the page, which asks for one, and what a supervisor asks."""

_LARGEST = 1 << 20


class Guard:
    """In front of the application."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[bytes] = (), hosts: Collection[str] = ()) -> None:
        """`keys`: one of them is needed, none where there are none; `hosts`: names that clients may call this machine
        by, beside its own, localhost and addresses.
        """
        self._app, self._keys = app, tuple(keys)
        own = socket.gethostname().lower()
        self._hosts = {"localhost", own, own.partition(".")[0], f"{own.partition('.')[0]}.local"}
        self._hosts |= {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 401 or 403."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                self._check_host(headers.get("host", ""))
                if scope["path"] not in _OPEN:
                    self._check_key(headers.get("authorization", ""))
            except ApiError as e:
                await e.response(scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_host(self, host: str) -> None:
        """A name must be one of ours, or a page's owner could point his here; HTTP/1.0 has none."""
        name = host.rpartition("]")[0].lstrip("[") or host.partition(":")[0]
        try:
            ipaddress.ip_address(name)
        except ValueError:
            if name and name.lower().rstrip(".") not in self._hosts:
                said = f"this server is not {name[:100]}; to allow the name: --allow-host {name[:100]}"
                raise ApiError(403, said, "foreign_host") from None

    def _check_key(self, header: str) -> None:
        if not self._keys:
            return
        kind, _, key = header.partition(" ")
        given = key.strip().encode()
        fits = [hmac.compare_digest(given, known) for known in self._keys]  # each, so that time tells nothing
        if kind.lower() != "bearer" or not any(fits):
            wrong = "the key is none of this server's; it needs" if header else "this server needs a key:"
            said = f"{wrong} Authorization: Bearer KEY"
            raise ApiError(401, said, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def read_keys(path: Path) -> list[bytes]:
    """The keys in a file, one a line; lines that begin with # are not.

    Raises:
        SettingError: it cannot be read, or has no key.
    """
    try:
        with path.open("rb") as file:  # a device would not end
            text = file.read(_LARGEST)
    except OSError as e:
        raise SettingError(f"{path} cannot be read ({e.strerror}); it has one key a line") from e
    keys = keys_of(text.removeprefix(codecs.BOM_UTF8).decode("latin-1"), str(path))
    if not keys:
        raise SettingError(f"{path} has no key; write one a line, for example of: openssl rand -hex 32")
    return keys


def keys_of(text: str, where: str) -> list[bytes]:
    """The keys in a text, one a line or with commas between; lines that begin with # are not.

    Raises:
        SettingError: a line is no key; `where` it is.
    """
    lines = text.splitlines()
    parts = [(n, part.strip()) for n, line in enumerate(lines, 1) if line[:1] != "#" for part in line.split(",")]
    keys = [key for _, key in parts if key]
    for n, key in parts:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise SettingError(f"{where}, line {n} is no key; write one a line, of: openssl rand -hex 32")
    return [key.encode() for key in keys]
