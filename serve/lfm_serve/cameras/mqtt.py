"""Records on a topic of MQTT. TOPIC/status says "online", or "offline": where the process was killed too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import paho.mqtt.client as paho
from lfm_runtime.errors import SettingError, counted
from lfm_runtime.formats.files import to_json
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from lfm_serve.cameras.records import Records, Warn

_URL = re.compile(r"(mqtts?)://(?:([^:@/]*)(?::([^@/]*))?@)?([\w.-]+|\[[\da-fA-F:]+\])(?::(\d{1,5}))?/(.+)")
_ADVICE = (
    "--mqtt is mqtt://[USER:PASSWORD@]HOST[:PORT]/TOPIC, mqtts:// for TLS; no + or # in TOPIC; in USER and PASSWORD "
    "write @ as %40, : as %3A and / as %2F"
)
_LONGEST_TOPIC = 65_000
_WAITING = 1000
"""Records that are kept while the broker is away."""
_END_S, _LONGEST_PAUSE_S = 5.0, 30


class Published(Records):
    """On a topic, each as a message that the broker acknowledges (QoS 1)."""

    def __init__(self, url: str, warn: Warn) -> None:
        """`url`: mqtt://[USER[:PASSWORD]@]HOST[:PORT]/TOPIC, or mqtts:// for TLS. A broker that is not there yet is
        waited for, in a thread.

        Raises:
            SettingError: the URL is none.
        """
        found = _URL.fullmatch(url)
        if not found or any(c in found[6] for c in "+#\0") or len(found[6].encode()) > _LONGEST_TOPIC:
            raise SettingError(_ADVICE)
        scheme, user, password, host, port, topic = found.groups()
        if not 1 <= int(port or 1) <= 65535:
            raise SettingError(f"--mqtt: port {port} is impossible; allowed: 1 to 65535")
        try:
            host.encode("idna")
        except UnicodeError as e:
            raise SettingError(f"--mqtt: {host:.80} is no name of a host") from e
        self._topic, self._status, self._warn = topic, f"{topic}/status", warn
        self._shown = f"{scheme}://{host}{f':{port}' if port else ''}/{topic:.80}"
        self._away = False
        self._lost = 0
        self._sent: set[int] = set()  # numbers of records that the broker had not acknowledged when last looked
        self._acknowledged: set[int] = set()  # by the network's thread, which may be faster than `write`
        self._client = client = paho.Client(CallbackAPIVersion.VERSION2)
        if user:
            client.username_pw_set(unquote(user), None if password is None else unquote(password))
        if scheme == "mqtts":
            client.tls_set()
        client.will_set(self._status, "offline", qos=1, retain=True)
        client.max_queued_messages_set(0)  # without limit: `write` has one, and the status must not wait behind it
        client.reconnect_delay_set(1, _LONGEST_PAUSE_S)
        client.on_connect, client.on_connect_fail, client.on_disconnect = self._connected, self._failed, self._gone
        client.on_publish = self._published
        client.connect_async(host.strip("[]"), int(port or (8883 if scheme == "mqtts" else 1883)))
        client.loop_start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Implement Records.write."""
        if self.waiting() < _WAITING:
            self._sent.add(self._client.publish(self._topic, to_json(record, ascii_only=True), qos=1).mid)
        else:
            self._lost += 1
            self.lost += 1
            if self._lost == 1:
                self._warn(f"{self._shown}: {_WAITING} records wait for the broker; more are lost until it is back")

    def waiting(self) -> int:
        """How many records the broker has not acknowledged."""
        done = self._sent.intersection(self._acknowledged.copy())
        self._sent -= done
        self._acknowledged -= done
        return len(self._sent)

    def close(self) -> None:
        """Nothing more is sent but what waits, where the broker is there."""
        last = self._client.publish(self._status, "offline", qos=1, retain=True)
        if self._client.is_connected():
            with suppress(ValueError, RuntimeError):  # the connection is lost meanwhile
                last.wait_for_publish(_END_S)
        self._client.disconnect()
        self._client.loop_stop()
        self._lost += self.waiting()
        self.lost += self.waiting()
        self._tell_lost()

    def _connected(self, _client: Any, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if reason.is_failure:
            self._tell(str(reason))
            return
        if self._away:
            self._warn(f"{self._shown}: the broker is back")
        self._away = False
        self._client.publish(self._status, "online", qos=1, retain=True)
        self._tell_lost()

    def _published(self, _client: Any, _data: Any, number: int, _reason: Any, _properties: Any) -> None:
        self._acknowledged.add(number)

    def _failed(self, _client: Any, _data: Any) -> None:
        self._tell("no connection (host, port, network or TLS)")

    def _gone(self, _client: Any, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if reason.is_failure:
            self._tell(str(reason))

    def _tell(self, why: str) -> None:
        if not self._away:
            self._warn(f"{self._shown}: {why}; trying again")
        self._away = True

    def _tell_lost(self) -> None:
        if self._lost:
            self._warn(f"{self._shown}: {counted(self._lost, 'record')} not delivered")
            self._lost = 0
