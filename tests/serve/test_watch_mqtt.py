"""Records of `lfm-edge watch` at a real mosquitto."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lfm_runtime.errors import counted
from watching import PATIENCE_S, free_port

pytestmark = pytest.mark.process


@pytest.fixture
def broker(tmp_path) -> Iterator[Callable[[], tuple[subprocess.Popen, int]]]:
    """A function that starts mosquitto, at the same port each time."""
    pytest.importorskip("paho.mqtt")
    program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
    if not program:
        pytest.skip("mosquitto is not installed")
    port, running = free_port(), []
    (tmp_path / "passwords").touch(mode=0o600)
    subprocess.run(["mosquitto_passwd", "-b", str(tmp_path / "passwords"), "me", "se@cret"], check=True)
    (tmp_path / "mosquitto.conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous false\npassword_file {tmp_path}/passwords\nuser root\n"
    )

    def start() -> tuple[subprocess.Popen, int]:
        running.append(subprocess.Popen([program, "-c", str(tmp_path / "mosquitto.conf")], stderr=subprocess.DEVNULL))
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return running[-1], port
            time.sleep(0.05)
        pytest.fail("mosquitto does not listen")

    yield start
    for process in running:
        process.kill()
        process.wait()


class Listener:
    """A client of the broker: what it was told, by topic."""

    def __init__(self, port: int) -> None:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        self.told: list[tuple[str, str]] = []
        self.client = Client(CallbackAPIVersion.VERSION2)
        self.client.username_pw_set("me", "se@cret")
        self.client.on_connect = lambda client, *_: client.subscribe("home/#", qos=1)
        self.client.on_message = lambda _c, _d, message: self.told.append((message.topic, message.payload.decode()))
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def until(self, ready: Callable[[list[tuple[str, str]]], Any]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not ready(self.told):
            assert time.monotonic() < end, self.told[-3:]
            time.sleep(0.05)


def test_records_on_a_topic(watching, broker, stills) -> None:
    """As in the file, each once and in order; a broker that goes away is waited for, and gets what it missed."""
    process, port = broker()
    heard = Listener(port)
    source = f"exec:while :; do for n in 0 1 2; do cat {stills}/$n.png; sleep 0.3; done; done"
    found = watching(source, "--mqtt", f"mqtt://me:se%40cret@127.0.0.1:{port}/home/gate")
    heard.until(lambda told: sum(topic == "home/gate" for topic, _ in told) >= 3)
    assert ("home/gate/status", "online") in heard.told
    process.kill()
    process.wait()
    count = len(found.records())
    found.until(lambda records: len(records) >= count + 3)
    _, _ = broker()
    heard.until(lambda told: sum(topic == "home/gate" for topic, _ in told) >= count + 5)
    assert found.stop() == 0
    heard.until(lambda told: told[-1] == ("home/gate/status", "offline"))
    records = [json.loads(text) for topic, text in heard.told if topic == "home/gate"]
    missed = {one["frame"] for one in found.records()} - {one["frame"] for one in records}
    # What was published while the listener itself was away, the broker cannot keep for it.
    assert len(missed) <= len(found.records()) - count
    assert all(one in found.records() for one in records)
    said = found.said.read_text()
    assert "cret" not in said
    assert "trying again" in said
    assert "the broker is back" in said


def test_a_killed_process_is_said_to_be_offline(watching, broker, stills) -> None:
    _, port = broker()
    heard = Listener(port)
    found = watching(
        f"exec:while :; do cat {stills}/0.png; sleep 0.1; done",
        "--mqtt",
        f"mqtt://me:se%40cret@127.0.0.1:{port}/home/gate",
    )
    heard.until(lambda told: sum(topic == "home/gate" for topic, _ in told) >= 1)
    found.process.kill()
    heard.until(lambda told: told[-1] == ("home/gate/status", "offline"))


@pytest.mark.parametrize("known", [True, False])
def test_tls(tmp_path, monkeypatch, known) -> None:
    """A broker whose certificate an authority of one's own has signed, which OpenSSL is told of; or is not."""
    pytest.importorskip("paho.mqtt")
    from lfm_serve.cameras.mqtt import Published

    program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
    if not program or not shutil.which("openssl"):
        pytest.skip("mosquitto or openssl is not installed")
    port, said = free_port(), []
    for words in (
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=authority -days 2",
        "req -newkey rsa:2048 -nodes -keyout broker.key -out broker.csr -subj /CN=localhost -addext subjectAltName=DNS:localhost",
        "x509 -req -in broker.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out broker.pem -days 2 -copy_extensions copy",
    ):
        subprocess.run(["openssl", *words.split()], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "tls.conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nuser root\ncertfile {tmp_path}/broker.pem\nkeyfile {tmp_path}/broker.key\n"
        f"log_dest file {tmp_path}/log\nlog_type all\n"
    )
    broker = subprocess.Popen([program, "-c", str(tmp_path / "tls.conf")], stderr=subprocess.DEVNULL)
    if known:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    try:
        published = Published(f"mqtts://localhost:{port}/home/gate", said.append)
        published.write({"text": "open"})
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end and (published.waiting() if known else not said):
            time.sleep(0.05)
        published.close()
    finally:
        broker.kill()
        broker.wait()
    if known:
        assert "Received PUBLISH" in (tmp_path / "log").read_text()
        assert not any("not delivered" in line for line in said)
    else:
        assert "no connection (host, port, network or TLS); trying again" in said[0]
        assert "1 record not delivered" in said[-1]


def test_a_wrong_password_is_told(watching, broker, stills) -> None:
    _, port = broker()
    found = watching(
        f"exec:while :; do cat {stills}/0.png; sleep 0.1; done", "--mqtt", f"mqtt://me:wrong@127.0.0.1:{port}/home/gate"
    )
    found.until(lambda records: len(records) >= 2 and "Not authorized" in found.said.read_text())
    assert found.stop() == 3, "no record arrived"
    assert "wrong" not in found.said.read_text()
    assert f"{counted(len(found.records()), 'record')} not delivered" in found.said.read_text()
