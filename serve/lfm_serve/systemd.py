"""What systemd gives and wants: a socket, and word of being ready (sd_listen_fds(3), sd_notify(3))."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

_FIRST = 3
"""The descriptor of the first socket that systemd passes."""


def passed_socket() -> socket.socket | None:
    """The socket of a .socket unit; None where this process was not started by one."""
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()) or int(os.environ.pop("LISTEN_FDS", "0")) < 1:
        return None
    os.set_inheritable(_FIRST, False)
    return socket.socket(fileno=_FIRST)


def tell(state: str) -> None:
    """Send a state, READY=1 or STOPPING=1, where somebody waits for it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + address[1:] if address.startswith("@") else address)
        notify.sendall(state.encode())
