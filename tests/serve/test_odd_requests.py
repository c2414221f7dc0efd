"""Requests that a first reader sent: none is the server's fault, each is told what it can change."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance")
from lfm_runtime.commands.cli import main
from servers import PICTURES, Server, picture, text

pytestmark = [pytest.mark.process, pytest.mark.newest_python]


def raw(body: str) -> bytes:
    return body.encode()


@pytest.mark.parametrize(
    "schema",
    [
        '{"type": "integer", "minimum": 1e400}',
        f'{{"type": "integer", "maximum": {10**400}}}',
        '{"type": "string", "enum": ["\\ud800"]}',
        '{"$ref": "#"}',
        '{"type": "number", "minimum": NaN}',
    ],
)
def test_schemas_that_json_cannot_hold(server, demo_bundle, tmp_path, capsys, schema) -> None:
    """In every API, and on the command line: before anything is generated."""
    form = f'{{"messages": [{{"role": "user", "content": "x"}}], "response_format": {{"type": "json_schema", "schema": {schema}}}}}'
    status, found, _ = server.ask("/v1/chat/completions", raw(form))
    assert status == 400 and "schema" in found["error"]["message"], found
    status, found, _ = server.ask(
        "/api/chat", raw(f'{{"messages": [{{"role": "user", "content": "x"}}], "format": {schema}}}')
    )
    assert status == 400 and "schema" in found["error"]
    (tmp_path / "schema.json").write_text(schema)
    assert main(["run", str(demo_bundle), "-p", "x", "--schema", str(tmp_path / "schema.json")]) == 2
    assert "schema" in capsys.readouterr().err


def test_half_a_character(server) -> None:
    """JSON may hold one; it is answered, or refused, and never the server's fault."""
    url = picture(PICTURES[0])["image_url"]["url"]
    body = f'{{"images": ["{url}"], "question": "\\ud800?", "choices": ["\\ud800", "b"]}}'
    assert server.ask("/v1/choose", raw(body))[0] == 200
    image = '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "\\ud800://x"}]}]}'
    assert server.ask("/v1/chat/completions", raw(image))[0] == 400
    assert (
        server.ask(
            "/v1/chat/completions", raw('{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}')
        )[0]
        == 200
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"temperature": 1e-300}, "temperature 1e-300 is impossible; allowed: 0 (greedy), 0.000001 to 1000000"),
        ({"temperature": 1e308}, "is impossible; allowed: 0 (greedy), 0.000001 to 1000000"),
        ({"temperature": 10**400}, "is impossible; allowed: 0 (greedy), 0.000001"),
        ({"temperature": float("nan")}, "temperature nan is impossible"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty 1e-300 is impossible"),
        ({"repeat_penalty": 1e8}, "allowed: 0.000001 to 1000000"),
        ({"max_tokens": 0}, "max_tokens 0 is impossible"),
        ({"max_completion_tokens": -2}, "max_completion_tokens -2 is impossible"),
    ],
)
def test_numbers_that_are_too_small_or_too_large(server, more, said) -> None:
    status, found, _ = server.chat(text("x"), **more)
    assert status == 400 and said in found["error"]["message"]


def test_what_has_no_effect_is_no_fault(server) -> None:
    """The demo is greedy by its own files: clients that send a seed or top_p without a temperature are answered."""
    for more in ({"seed": 1}, {"top_p": 0.9}, {"top_k": 40, "min_p": 0.1}):
        assert server.chat(text("x"), max_tokens=1, **more)[0] == 200
        ollama = {
            "messages": [{"role": "user", "content": "x"}],
            "stream": False,
            "options": {**more, "num_predict": 1},
        }
        assert server.ask("/api/chat", ollama)[0] == 200
    assert server.chat(text("x"), max_tokens=-1, max_completion_tokens=2)[1]["usage"]["completion_tokens"] <= 2


def test_advice_that_a_client_can_follow(server) -> None:
    from PIL import Image

    found = server.chat(picture(Image.new("L", (6000, 5000))), text("x"))[1]["error"]["message"]
    assert "larger than the 25 megapixels that this server takes; send it smaller" in found
    found = server.chat(text("word " * 6000))[1]["error"]["message"]
    assert "shorten the text" in found and "--" not in found
    found = server.chat({"type": "text", "text": None})[1]["error"]["message"]
    assert "text is missing" in found
    found = server.chat(picture(b"no image at all, only words"), text("x"))[1]["error"]["message"]
    assert "0x" not in found
    status, found, _ = server.ask("/api/chat", {"messages": [{"role": "user", "content": "x", "images": {}}]})
    assert status == 400 and "a list is needed" in found["error"]
    both = {"question": "a", "choices": ["b", "c"], "questions": [{"question": "a", "choices": ["b", "c"]}]}
    assert server.ask("/v1/choose", both)[0] == 400


def test_the_page_asks_for_the_key_itself(demo_bundle, tmp_path) -> None:
    """A browser sends no key for a page: the page comes, and nothing else does."""
    (tmp_path / "keys").write_text("k\n")
    server = Server(demo_bundle, "--api-key-file", str(tmp_path / "keys"))
    try:
        status, found, headers = server.ask("/")
        assert (
            status == 200
            and "<title>lfm-edge</title>" in found
            and "default-src 'none'" in headers["Content-Security-Policy"]
        )
        assert server.ask("/v1/models")[0] == server.ask("/props")[0] == server.ask("/metrics")[0] == 401
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-megapixels", "nan"], "--max-megapixels nan is impossible"),
        (["--request-timeout", "nan"], "--request-timeout nan is impossible"),
        (["--image-host", "https://x.org/"], "is no name of a host"),
        (["--allow-host", "http://x:80/"], "is no name of a host"),
        (["--context", "100000000"], "the model has"),
        (["--api-key-file", "/dev/zero"], ", line 1 is no key; write one a line"),
    ],
)
def test_flags_that_cannot_be(demo_bundle, capsys, words, said) -> None:
    assert main(["serve", str(demo_bundle), "--port", "0", *words]) == 2
    assert said in capsys.readouterr().err


def test_keys_that_are_none(demo_bundle, tmp_path, capsys) -> None:
    (tmp_path / "keys").write_bytes(bytes(range(128, 256)))
    assert main(["serve", str(demo_bundle), "--api-key-file", str(tmp_path / "keys")]) == 2
    assert ", line 1 is no key; write one a line" in capsys.readouterr().err
    (tmp_path / "keys").write_text("\ufefffirst\nmy key\n")  # of an editor of Windows
    assert main(["serve", str(demo_bundle), "--api-key-file", str(tmp_path / "keys")]) == 2
    assert ", line 2 is no key" in capsys.readouterr().err


def test_keys_of_the_environment(demo_bundle, monkeypatch) -> None:
    """They open a host beyond loopback as a file does."""
    monkeypatch.setenv("LFM_EDGE_API_KEYS", "first, second")
    server = Server(demo_bundle, "--host", "127.0.0.1")
    try:
        assert server.ask("/v1/models")[0] == 401
        assert server.ask("/v1/models", Authorization="Bearer second")[0] == 200
    finally:
        assert server.stop() == 0


def test_devices_and_pipes_are_never_replaced(demo_bundle, photo, tmp_path, capsys) -> None:
    """An output that is no plain file is refused before the work; so is the image that is asked about."""
    import os
    import shutil

    os.mkfifo(tmp_path / "pipe.png")
    words = ["run", str(demo_bundle), str(photo), "-p", "x", "--threads", "1", "--boxes"]
    assert main([*words, str(tmp_path / "pipe.png")]) == 2
    assert "is not a plain file" in capsys.readouterr().err
    assert (tmp_path / "pipe.png").is_fifo()
    assert main(["audit", str(demo_bundle), "-o", str(tmp_path / "pipe.png")]) == 2
    assert "is not a plain file" in capsys.readouterr().err and (tmp_path / "pipe.png").is_fifo()
    mine = tmp_path / "mine.png"
    shutil.copy(PICTURES[0], mine)
    before = mine.read_bytes()
    assert main(["run", str(demo_bundle), str(mine), "-p", "x", "--boxes", str(mine), "--force"]) == 2
    assert "remove it first" in capsys.readouterr().err and mine.read_bytes() == before
    assert main([*words, str(tmp_path / "o.jpg")]) == 2
    assert "a PNG is written" in capsys.readouterr().err
    (tmp_path / "bom.json").write_text(json.dumps({"type": "null"}), encoding="utf-8-sig")
    assert main([*words[:-1], "--schema", str(tmp_path / "bom.json"), "--quiet"]) == 0
    assert main([*words[:-1], "--schema", "/dev/zero"]) == 2
    assert "more than 4 MiB" in capsys.readouterr().err


def test_what_is_missing_or_too_much_is_said(server) -> None:
    """A user's message without content, a number of 5,000 digits, a stream of choices."""
    status, found, _ = server.ask("/v1/chat/completions", raw('{"messages": [{"role": "user"}]}'))
    assert status == 400 and "content is missing" in found["error"]["message"], found
    status, found, _ = server.ask("/v1/chat/completions", raw(f'{{"messages": [], "seed": {"1" * 5000}}}'))
    assert status == 400 and "4300 digits" in found["error"]["message"] and "sys." not in found["error"]["message"]
    status, found, _ = server.ask("/v1/choose", raw('{"question": "x", "choices": ["a", "b"], "stream": true}'))
    assert status == 400 and "stream" in found["error"]["message"], found
    for image in ("/etc/passwd", "data:image/png;base64,bm8gaW1hZ2U=", "http://nowhere.invalid/a.png"):
        status, found, _ = server.ask("/v1/choose", {"images": [image], "question": "x", "choices": ["a", "b"]})
        assert (status, found["error"]["param"]) == (400, "images"), found
