"""What goes wrong in the field: slow, silent and impatient clients, hosts that lead inside, sockets, signals."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
from lfm_runtime.commands.cli import main  # noqa: E402
from lfm_serve.api.errors import ApiError  # noqa: E402
from lfm_serve.api.images import image_bytes  # noqa: E402
from lfm_serve.api.remote import fetch, is_public  # noqa: E402
from lfm_serve.limits import Limits  # noqa: E402
from PIL import Image  # noqa: E402
from servers import PICTURES, Server, picture, text  # noqa: E402

pytestmark = [pytest.mark.process, pytest.mark.newest_python]
QUESTION = "What is in this image?"


def head_of(body: bytes, more: str = "") -> bytes:
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode()
    )


def body_of(*parts, **more) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": list(parts)}], **more}).encode()


# ---------------------------------------------------------------------------------------------------- many sockets


def test_idle_and_slow_sockets_do_not_keep_others_from_answers(server) -> None:
    """200 connections that are kept and ask nothing, 20 that send a byte of a body now and then; a pipelined request;
    HTTP/1.0 closes.
    """
    body = body_of(text("x"), max_tokens=1)
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    try:
        for n, line in enumerate(slow):
            line.sendall(head_of(body)[: 20 + n] if n % 2 else head_of(body) + body[:n])
        for line in idle[:100]:
            line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in line.recv(4096)
        with ThreadPoolExecutor(4) as pool:
            assert {pool.submit(server.chat, text("x"), max_tokens=1).result()[0] for _ in range(8)} == {200}
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.sendall((head_of(body) + body) * 3)
            said = b""
            while said.count(b'"chat.completion"') < 3:
                part = line.recv(1 << 16)
                assert part, said
                said += part
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.sendall(head_of(body).replace(b"HTTP/1.1", b"HTTP/1.0") + body)
            said = b""
            while part := line.recv(1 << 16):
                said += part
            assert b'"chat.completion"' in said
    finally:
        for line in (*idle, *slow):
            line.close()


def test_headers_and_bodies_that_do_not_come(impatient) -> None:
    """Both are ended by the server: headers without a word, bodies with 408. Connections that have had an answer may
    rest.
    """
    body = body_of(text("x"), max_tokens=1)
    lines = {
        name: socket.create_connection(("127.0.0.1", impatient)) for name in ("headers", "second", "body", "rests")
    }
    lines["headers"].sendall(head_of(body)[:30])
    lines["body"].sendall(head_of(body) + body[:10])
    for name in ("second", "rests"):
        lines[name].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        said = b""
        while not said.endswith(b"}"):  # head and body may come apart
            said += lines[name].recv(4096)
        assert said.split()[1] in (b"200", b"503")
    lines["second"].sendall(b"GET /health HTT")
    for name in ("headers", "second"):
        lines[name].settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            assert lines[name].recv(4096) == b""
    lines["body"].settimeout(60)
    assert b" 408 " in lines["body"].recv(4096)
    lines["rests"].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert lines["rests"].recv(4096)
    for line in lines.values():
        line.close()


@contextlib.contextmanager
def with_limits(bundle: Path, limits: str, *, loaded: bool):
    """The port of a server with limits that the command line has no flags for."""
    code = (
        "import sys; from lfm_serve import limits, server; from lfm_serve.engine import Engine;"
        "from lfm_serve.setup import choose; setup, rows = choose(sys.argv[1], 'generic');"
        "bound = server._bound; server._bound = lambda *a: (s := bound(*a), print(s.getsockname()[1], flush=True))[0];"
        "engine = Engine(setup, rows=rows, waiting=1, cache_mib=0);"
    )
    if loaded:
        code += "engine.start(); engine.wait_until_loaded(); engine.start = lambda: None;"
    code += f"sys.exit(server.serve(engine, limits.Limits({limits}), host='127.0.0.1', port=0, name='m'))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", code, str(bundle)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    yield int(process.stdout.readline())
    process.terminate()
    assert process.wait(60) == 0
    process.stdout.close()


@pytest.fixture
def impatient(demo_bundle):
    """A server that waits half a second for headers, and as long for a body."""
    with with_limits(demo_bundle, "header_s=0.5, body_s=0.5", loaded=False) as port:
        yield port


# ------------------------------------------------------------------------------------------- time, queue, retries


def test_a_full_queue_and_an_image_too_large_are_each_asked_once(demo_bundle) -> None:
    """The SDK comes again after a 429, as it is told, and is answered then; what never fits it does not send again."""
    server = Server(demo_bundle, "--rows", "1", "--queue", "0")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=5)
    asked = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    try:
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            body = body_of(text("x"), max_tokens=3000, ignore_eos=True)
            line.sendall(head_of(body) + body)
            server.becomes("lfm_running", 1)
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(client.chat.completions.create, **asked, max_tokens=1)
                server.becomes_at_least('lfm_requests_total{code="429"}', 1)
                line.close()
                assert answer.result().choices[0].finish_reason in ("stop", "length")
        with pytest.raises(openai.BadRequestError, match="at most 4096"):
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "word " * 9000}])
        assert server.metric('lfm_requests_total{code="400"}') == 1
    finally:
        assert server.stop() == 0


def test_request_timeout(demo_bundle) -> None:
    """A request that takes too long is ended: 504 that is not tried again, or an error in the stream; the row is free."""
    server = Server(demo_bundle, "--rows", "1", "--request-timeout", "0.3")
    try:
        more = {"max_tokens": 4000, "ignore_eos": True}
        status, found, headers = server.chat(text("x"), **more)
        assert status == 504 and found["error"]["code"] == "timeout" and headers["x-should-retry"] == "false"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], stream=True, extra_body=more))  # fmt: skip
        server.becomes("lfm_running", 0)
    finally:
        assert server.stop() == 0


def test_signs_of_life_during_a_long_prompt(slow_server) -> None:
    """Where nothing can be said yet, a comment is sent every so often, which clients pass over."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{slow_server}/v1", api_key="none", max_retries=0)
    parts = [*(picture(path) for path in PICTURES), text("word " * 300)]
    asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": 2, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", slow_server)
    connection.request("POST", "/v1/chat/completions", json.dumps(asked))
    assert b": working\n\n" in connection.getresponse().read()
    assert list(client.chat.completions.create(model="m", **asked))


@pytest.fixture
def slow_server(demo_bundle):
    """A server whose streams have a sign of life every millisecond."""
    with with_limits(demo_bundle, "ping_s=0.001", loaded=True) as port:
        yield port


def test_a_port_that_is_taken_and_a_model_that_is_loaded_later(demo_bundle, server, capsys) -> None:
    assert main(["serve", str(demo_bundle), "--port", str(server.port)]) == 2
    assert "cannot be listened on (Address already in use)" in capsys.readouterr().err
    words = [sys.executable, "-m", "lfm_runtime", "serve", str(demo_bundle), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    process.send_signal(signal.SIGTERM)  # before it is ready: it ends all the same
    assert process.wait(60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    process.stderr.close()


# ------------------------------------------------------------------------------------------------ images by URL


class Host(BaseHTTPRequestHandler):
    """A host of images, one that leads elsewhere, and one that never ends."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        if self.path == "/large":
            with_suppress = (BrokenPipeError, ConnectionResetError)
            try:
                for _ in range(64):
                    self.wfile.write(bytes(1 << 16))
            except with_suppress:
                pass
        else:
            self.wfile.write(PICTURES[0].read_bytes())


@pytest.fixture
def host():
    found = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://localhost:{found.server_port}"
    found.shutdown()


def test_images_of_hosts_that_are_allowed(host) -> None:
    """The fetching itself, with this machine's addresses allowed; and what is refused even then."""
    anywhere = {"hosts": ["localhost"], "is_allowed": lambda _: True}
    assert fetch(f"{host}/a.png", most=1 << 20, **anywhere) == PICTURES[0].read_bytes()
    assert fetch(f"{host}/to//a.png", most=1 << 20, **anywhere) == PICTURES[0].read_bytes()
    for path, said in (
        ("/none", "answers 404"),
        ("/large", "more than 1 MiB"),
        ("/to/http://169.254.169.254/latest", "images of 169.254.169.254 are not fetched"),
        ("/to/file:///etc/passwd", "not of http or https"),
        ("/to//to//to//to//to//a.png", "too many others"),
    ):
        with pytest.raises(ApiError, match=said):
            fetch(host + path, most=1 << 20, **anywhere)
    with pytest.raises(ApiError, match="not fetched"):
        fetch(f"{host}/a.png", ["example.org"], 1 << 20)
    with pytest.raises(ApiError, match="cannot be fetched"):
        fetch("http://localhost:1/a.png", ["localhost"], 1 << 20, is_allowed=lambda _: True)


def test_a_name_that_leads_inside_is_refused(host) -> None:
    """The owner's list allows the name; its address is this machine: refused, also behind a redirect."""
    with pytest.raises(ApiError, match="not a public one"):
        fetch(f"{host}/a.png", ["localhost"], 1 << 20)
    first = iter([True])
    with pytest.raises(ApiError, match="not a public one"):
        fetch(f"{host}/to/{host}/a.png", ["localhost"], 1 << 20, is_allowed=lambda _: next(first, False))


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::"],
)  # fmt: skip
def test_addresses_of_the_inside(address) -> None:
    assert not is_public(address)
    assert is_public("93.184.215.14") and is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")


def test_hosts_below_a_name() -> None:
    for url, allowed in (("https://a.example.org/x", True), ("https://example.org/x", False), ("https://example.org.evil/x", False), ("https://evil-example.org/x", False)):  # fmt: skip
        with pytest.raises(ApiError) as caught:
            fetch(url, ["*.example.org"], 1, is_allowed=lambda _: False)
        assert ("are not fetched" not in caught.value.message) is allowed


def test_files_below_the_media_path_alone(tmp_path) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a b.png").write_bytes(PICTURES[0].read_bytes())
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "media" / "link.png").symlink_to(tmp_path / "secret.png")
    limits = Limits(media_path=tmp_path / "media")
    assert image_bytes(f"file://{tmp_path}/media/a%20b.png", limits) == PICTURES[0].read_bytes()
    for url in (f"file://{tmp_path}/secret.png", f"file://{tmp_path}/media/../secret.png", f"file://{tmp_path}/media/link.png", "file:///etc/passwd", f"file://{tmp_path}/media"):  # fmt: skip
        with pytest.raises(ApiError, match="no such file below"):
            image_bytes(url, limits)


# -------------------------------------------------------------------------------------------- browsers, systemd


def test_a_page_of_an_origin_that_is_allowed(demo_bundle, tmp_path) -> None:
    """A preflight with the headers that openai's JavaScript client sends; none for other origins; keys all the same."""
    (tmp_path / "keys").write_text("k\n")
    server = Server(demo_bundle, "--cors-origin", "https://app.example", "--api-key-file", str(tmp_path / "keys"))
    try:
        for origin, allowed in (("https://app.example", True), ("https://evil.example", False)):
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"}  # fmt: skip
            connection.request("OPTIONS", "/v1/chat/completions", headers=headers)
            found = connection.getresponse()
            found.read()
            assert (found.getheader("Access-Control-Allow-Origin") == origin) is allowed
            assert not allowed or "x-stainless-lang" in found.getheader("Access-Control-Allow-Headers").lower()
        status, _, headers = server.ask("/v1/models", Origin="https://app.example", Authorization="Bearer k")
        assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert server.ask("/v1/models", Origin="https://app.example")[0] == 401
    finally:
        assert server.stop() == 0


@pytest.mark.skipif(not Path("/usr/bin/systemd-socket-activate").exists(), reason="no systemd-socket-activate here")
def test_a_socket_of_systemd(demo_bundle, tmp_path) -> None:
    """systemd's own program passes the socket at the first connection, and hears READY and STOPPING."""
    notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notified.bind(str(tmp_path / "notify"))
    notified.settimeout(60)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["systemd-socket-activate", "-l", f"127.0.0.1:{port}", "-E", f"NOTIFY_SOCKET={tmp_path}/notify"]
    for name in ("PATH", "PYTHONPATH", "HOME"):
        words += ["-E", f"{name}={os.environ.get(name, '')}"]
    words += [sys.executable, "-m", "lfm_runtime", "serve", str(demo_bundle), "--threads", "1", "--port", "9"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        ends = time.monotonic() + 60
        while True:
            try:
                line = socket.create_connection(("127.0.0.1", port))
                break
            except ConnectionRefusedError:
                assert time.monotonic() < ends
                time.sleep(0.02)
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert notified.recv(99) == b"READY=1"
        assert line.recv(4096).split()[1] in (b"200", b"503")
        line.close()
        process.terminate()
        assert notified.recv(99) == b"STOPPING=1"
        assert process.wait(60) == 0
        assert f"serving at http://127.0.0.1:{port}/v1" in process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()
        notified.close()


# ------------------------------------------------------------------------------------------------- killed, soaked


def test_killed_at_any_moment_the_next_start_is_clean(demo_bundle, tmp_path) -> None:
    """SIGKILL at 20 moments, with requests under way: nothing is left that the next one trips over."""
    before = sorted(p.relative_to(demo_bundle) for p in demo_bundle.rglob("*"))
    moments = random.Random(1)
    for _ in range(20):
        server = Server(demo_bundle)
        body = body_of(picture(PICTURES[0]), text("x"), max_tokens=500, ignore_eos=True, stream=True)
        lines = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        for line in lines:
            line.sendall(head_of(body) + body)
        time.sleep(moments.random() / 10)
        server.process.kill()
        server.process.communicate()
        for line in lines:
            line.close()
    assert sorted(p.relative_to(demo_bundle) for p in demo_bundle.rglob("*")) == before
    server = Server(demo_bundle)
    assert server.chat(picture(PICTURES[0]), text("x"), max_tokens=1)[0] == 200
    assert server.stop() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_stays_where_it_was(demo_bundle, number) -> None:
    """Images and questions of all sizes: anonymous memory grows by 1 % at most after the first 50; 2 MiB are the noise of
    onnxruntime's arena, which is no percent of a real model.
    """
    server = Server(demo_bundle, "--cache-mib", "8")
    sizes = random.Random(0)
    try:
        at = {}
        for n in range(number + 1):
            if n in (50, number):
                status = Path(f"/proc/{server.process.pid}/status").read_text()
                at[n] = int(status.split("RssAnon:")[1].split()[0]) / 1024
            if n == number:
                break
            stream = io.BytesIO()
            size = (1300, 1300) if n == 0 else (sizes.randint(20, 512), sizes.randint(20, 512))
            Image.effect_noise(size, 50).save(stream, "jpeg", quality=50)
            words = "word " * (700 if n == 0 else sizes.randint(1, 300))
            assert (
                server.chat(picture(stream.getvalue(), "jpeg"), text(words), max_tokens=sizes.randint(1, 40))[0] == 200
            )
        assert at[number] < 1.01 * at[50] + 2, at
    finally:
        assert server.stop() == 0
