"""Images by URL, from hosts that the server's owner allows, and never from inside the network.

The name is looked up once, every address of it must be a public one, and the connection goes to the address that was
looked at: a name cannot be public when it is checked and private when it is used. The same again after each redirect.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Collection
from contextlib import closing
from urllib.parse import SplitResult, urljoin, urlsplit

from lfm_serve.api.errors import refused_image

_MOST_REDIRECTS = 3
_SECONDS = 20.0
"""For connecting, and for a whole image."""
_PART = 1 << 16
Address = str
IsAllowed = Callable[[Address], bool]


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet: not private, loopback, link-local, multicast or reserved, nor one of
    these written as IPv6.
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    return (
        found.is_global and not found.is_multicast and (inner is None or (inner.is_global and not inner.is_multicast))
    )


def fetch(url: str, hosts: Collection[str], most: int, *, is_allowed: IsAllowed = is_public) -> bytes:
    """The bytes that a URL gives.

    Args:
        url: http or https.
        hosts: the names that may be asked; `*.example.org` allows the names below it.
        most: bytes.
        is_allowed: which addresses a name may have.

    Raises:
        ApiError: it is of no allowed host, has an address that is not allowed, is too large or too slow, or fails.
    """
    ends = time.monotonic() + _SECONDS
    for _ in range(1 + _MOST_REDIRECTS):
        parts = _checked(url, hosts)
        try:
            response, connection = _asked(parts, is_allowed, ends)
            with closing(connection):
                if response.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, response.headers.get("location", ""))
                    continue
                if response.status != 200:
                    raise refused_image(f"the image's host answers {response.status}")
                return _read(response, most, ends)
        except (OSError, http.client.HTTPException, UnicodeError) as e:
            raise refused_image(f"the image cannot be fetched ({str(e)[:100] or type(e).__name__})") from e
    raise refused_image("the image's URL leads to too many others")


def _checked(url: str, hosts: Collection[str]) -> SplitResult:
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as e:
        raise refused_image("the image's URL is none") from e
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise refused_image("the image's URL is not of http or https")
    for allowed in hosts:
        if host == allowed.lower() or (allowed.startswith("*.") and host.endswith(allowed[1:].lower())):
            return parts
    raise refused_image(f"images of {host[:100]} are not fetched; the server's owner can allow it: --image-host")


def _asked(
    parts: SplitResult, is_allowed: IsAllowed, ends: float
) -> tuple[http.client.HTTPResponse, http.client.HTTPConnection]:
    """The response to a GET, from an address that was checked."""
    host, secure = (parts.hostname or "").rstrip("."), parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    addresses = [found[4][0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not addresses or not all(is_allowed(str(address)) for address in addresses):
        raise refused_image(f"{host[:100]} has an address that is not a public one")
    connection = http.client.HTTPConnection(host, port)
    plain = socket.create_connection((str(addresses[0]), port), timeout=max(0.1, ends - time.monotonic()))
    connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "lfm-edge"})
        return connection.getresponse(), connection
    except BaseException:
        connection.close()
        raise


def _read(response: http.client.HTTPResponse, most: int, ends: float) -> bytes:
    found = bytearray()
    while part := response.read1(_PART):
        found += part
        if len(found) > most:
            raise refused_image(f"the image has more than {most >> 20} MiB")
        if time.monotonic() > ends:
            raise refused_image(f"the image did not come within {_SECONDS:g} s")
    return bytes(found)
