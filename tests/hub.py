"""A hub on loopback that speaks as much of the Hugging Face hub's protocol as its client asks for: the commit and the
files of a revision, and files with their ETag and in ranges. Gated and private repositories, and files that break off.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse


class Repository:
    """The files of a folder, as the main branch of a repository."""

    def __init__(self, folder: Path, *, gated: bool = False, token: str | None = None) -> None:
        self.folder, self.gated, self.token = folder, gated, token
        self.breaks_off_at: int | None = None  # no byte of a file behind this one arrives
        self.breaks = 1_000_000  # so many times

    @property
    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    @property
    def commit(self) -> str:
        """Forty hex digits, as git's."""
        return hashlib.sha1("\n".join(self.files).encode()).hexdigest()


class Hub:
    """The server: repositories by id, and what was asked for."""

    def __init__(self, **repositories: Repository) -> None:
        self.repositories: dict[str, Repository] = dict(repositories)
        self.requests: list[tuple[str, str, str | None]] = []  # (method, path, range)
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def fetched(self) -> set[str]:
        """Names of the files that were asked for with their content."""
        return {
            path.split("/resolve/")[1].partition("/")[2]
            for m, path, _ in self.requests
            if m == "GET" and "/resolve/" in path
        }

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlparse(request.path).path)
        self.requests.append((request.command, path, request.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
        else:
            name, rest = "/".join(parts[:2]), parts[2:]
        found = self.repositories.get(name)
        said = request.headers.get("Authorization", "")
        if found is None or (found.token and not found.gated and said != f"Bearer {found.token}"):
            return _refuse(request, 401, "RepoNotFound", body)
        if found.gated and rest[:1] == ["resolve"] and said != f"Bearer {found.token}":
            return _refuse(request, 403 if said else 401, "GatedRepo", body)
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", "v1", found.commit):
            return _refuse(request, 404, "RevisionNotFound", body)
        if rest[:1] == ["resolve"]:
            return _file(request, found, "/".join(rest[2:]), body)
        if rest[:1] == ["tree"]:
            return _json(request, [_entry(found.folder / file, file) for file in found.files], body)
        siblings = [{"rfilename": file} for file in found.files]
        about = {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": found.commit,
            "private": False,
            "gated": "manual" if found.gated else False,
        }
        return _json(
            request, {**about, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}, body
        )


def _entry(path: Path, name: str) -> dict[str, Any]:
    data = path.read_bytes()
    entry: dict[str, Any] = {"type": "file", "oid": _git_hash(data), "size": len(data), "path": name}
    if _large(name):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _large(name: str) -> bool:
    return name.endswith((".safetensors", "_data", ".onnx"))


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _file(request: BaseHTTPRequestHandler, found: Repository, name: str, body: bool) -> None:
    if name not in found.files:
        return _refuse(request, 404, "EntryNotFound", body)
    data = (found.folder / name).read_bytes()
    begin = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
    part = data[begin:]
    request.send_response(206 if begin else 200)
    request.send_header("X-Repo-Commit", found.commit)
    request.send_header("ETag", f'"{hashlib.sha256(data).hexdigest() if _large(name) else _git_hash(data)}"')
    request.send_header("Accept-Ranges", "bytes")
    request.send_header("Content-Length", str(len(part)))
    if begin:
        request.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
    request.end_headers()
    if not body:
        return None
    if found.breaks_off_at is not None and len(data) > found.breaks_off_at and found.breaks:
        found.breaks -= 1
        request.wfile.write(data[begin : found.breaks_off_at])
        request.wfile.flush()
        request.connection.close()
        request.close_connection = True
        return None
    request.wfile.write(part)
    return None


def _json(request: BaseHTTPRequestHandler, value: Any, body: bool) -> None:
    data = json.dumps(value).encode()
    request.send_response(200)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    if body:
        request.wfile.write(data)


def _refuse(request: BaseHTTPRequestHandler, status: int, code: str, body: bool) -> None:
    data = json.dumps({"error": code}).encode()
    request.send_response(status)
    request.send_header("X-Error-Code", code)
    request.send_header("X-Error-Message", code)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    if body:
        request.wfile.write(data)


@contextmanager
def running(**repositories: Repository) -> Iterator[Hub]:
    """A hub that serves until the end of the block; ids are given with __ for /."""
    hub = Hub(**{name.replace("__", "/"): repository for name, repository in repositories.items()})
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
