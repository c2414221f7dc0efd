"""Bundles, images and records at URLs: Python's own web server, moto's S3, files."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
from pathlib import Path

import fsspec
import pytest
from clusters import PATIENCE_S, start, texts
from hub import Repository, running
from lfm_fleet import places
from lfm_fleet.bundles import cache_folder, open_bundle
from lfm_fleet.parts import Parts
from lfm_fleet.places import PlaceError, find
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import BundleError
from lfm_serve.captions.output import JournalError
from pictures import IMAGES, QUESTION


@pytest.fixture
def served(tmp_path):
    """(a folder, its address by http)."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    handler.func.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bucket(monkeypatch):
    """An S3 bucket, empty."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("pictures")
    yield "s3://pictures"
    server.stop()


def test_a_bundle_and_images_by_http(command, demo_bundle, served, tmp_path) -> None:
    folder, address = served
    shutil.copytree(demo_bundle, folder / "bundle")
    (folder / "images").mkdir()
    for image in IMAGES[:12]:
        shutil.copy(image, folder / "images")
    assert main(command()) == 0
    where = {"bundle": f"{address}/bundle", "images": f"{address}/images", "out": "far.jsonl"}
    assert main(command("--workers", "1", **where)) == 0
    near = {Path(path).name: text for path, text in texts(tmp_path / "out.jsonl").items()}
    assert {path.rsplit("/", 1)[1]: text for path, text in texts(tmp_path / "far.jsonl").items()} == near
    (fetched,) = (f for f in cache_folder().iterdir() if f.is_dir())
    assert Bundle.open(fetched).manifest
    shutil.rmtree(folder / "bundle" / "onnx")  # in the cache it is
    assert main(command("--workers", "1", **{**where, "out": "again.jsonl"})) == 0
    assert texts(tmp_path / "again.jsonl") == texts(tmp_path / "far.jsonl")


def test_a_bundle_of_the_hub(command, demo_bundle, tmp_path) -> None:
    """The worker asks the hub, too; here both have one cache."""
    pytest.importorskip("huggingface_hub")
    with running(Liquid__Demo=Repository(demo_bundle)) as hub:
        of_hub = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        run = start(command("--workers", "1", bundle="Liquid/Demo"), env={**os.environ, **of_hub}, cwd=tmp_path)
        said = run.communicate(timeout=PATIENCE_S)[1]
    assert run.returncode == 0, said
    assert len(texts(tmp_path / "out.jsonl")) == 12


def test_records_and_images_in_s3(command, bucket, tmp_path) -> None:
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    for image in IMAGES[:12]:
        store.put_file(str(image), f"pictures/in/{image.name}")
    words = command("--workers", "1", images=f"{bucket}/in", out=f"{bucket}/out.jsonl")
    assert main(words) == 0
    lines = store.cat_file("pictures/out.jsonl").decode().splitlines()
    assert sorted(json.loads(line)["path"] for line in lines) == [f"in/{image.name}" for image in IMAGES[:12]]
    assert not store.exists("pictures/out.jsonl.parts")
    store.put_file(str(IMAGES[20]), f"pictures/in/{IMAGES[0].name}")  # changed
    store.rm_file(f"pictures/in/{IMAGES[1].name}")  # gone: its record stays
    assert main(words) == 0
    again = {r["path"]: r for r in map(json.loads, store.cat_file("pictures/out.jsonl").decode().splitlines())}
    assert len(again) == 12
    assert again[f"in/{IMAGES[0].name}"]["size"] == IMAGES[20].stat().st_size
    assert {json.dumps(r) for r in again.values() if r["path"] != f"in/{IMAGES[0].name}"} < set(lines)
    other = command("--workers", "1", "--system", "Be short.", images=f"{bucket}/in", out=f"{bucket}/out.jsonl")
    assert main(other) == 2


def test_fetched_files_have_the_manifests_hashes(demo_bundle, served) -> None:
    folder, address = served
    shutil.copytree(demo_bundle, folder / "bundle")
    name = max((folder / "bundle" / "onnx").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(name.read_bytes())
    content[len(content) // 2] ^= 1
    name.write_bytes(content)
    with pytest.raises(BundleError, match="is damaged"):
        open_bundle(f"{address}/bundle", "generic", {})
    shutil.copytree(demo_bundle, folder / "bundle", dirs_exist_ok=True)
    _, found = open_bundle(f"{address}/bundle", "generic", {})
    with pytest.raises(BundleError, match="is another bundle there"):
        open_bundle(f"{address}/bundle", "generic", {}, "0" * 64)
    assert len(found) == 64


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nothing://x/y", "cannot be used"),
        ("http://127.0.0.1:1/images/a.png", "cannot be read|does not exist"),
        ("file:///nowhere/a.png", "does not exist; name a folder of images"),
    ],
)
def test_places_that_cannot_be_listed(url, said) -> None:
    with pytest.raises(PlaceError, match=said):
        list(find(url, recursive=False, match=[]))


def test_patterns_and_folders_below(folder) -> None:
    (folder / "below").mkdir()
    shutil.copy(IMAGES[30], folder / "below")
    url = f"file://{folder}"
    names = [image.url.rsplit("/", 1)[1] for image in find(url, recursive=False, match=[])]
    assert names == [image.name for image in IMAGES[:12]]
    assert len(list(find(url, recursive=True, match=[]))) == 13
    (only,) = find(url, recursive=True, match=["below/*"])
    assert only.size == IMAGES[30].stat().st_size
    assert only.modified == (folder / "below" / IMAGES[30].name).stat().st_mtime


def record(path: str, text: str, settings: str = "abc") -> dict:
    return {"path": path, "sha256": None, "size": 1, "modified": None, "settings": settings, "text": text}


SETTINGS = {"weights": "w", "question": QUESTION}


def test_parts_of_a_run_that_was_killed_are_there_for_the_next(tmp_path) -> None:
    url = f"file://{tmp_path}/out.jsonl"

    class KilledError(BaseException):
        pass

    with pytest.raises(KilledError), Parts.open(url, SETTINGS, "abc") as parts:
        assert parts.write(record("a", "1")) == ""
        raise KilledError
    assert not (tmp_path / "out.jsonl").exists()
    with Parts.open(url, SETTINGS, "abc") as parts:
        assert list(parts.records) == ["a"]
        parts.write(record("b", "2"))
        parts.write(record("a", "3"))
    assert {r["path"]: r["text"] for r in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())} == {
        "a": "3",
        "b": "2",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.settings.json"]
    with (
        pytest.raises(JournalError, match="was made with other settings"),
        Parts.open(url, {**SETTINGS, "question": "?"}, "def"),
    ):
        pass


def test_another_runs_parts_stay_where_one_merges() -> None:
    """In a store of another kind, too."""
    url = "memory://here/out.jsonl"
    with Parts.open(url, SETTINGS, "abc") as first:
        first.write(record("a", "1"))
    with Parts.open(url, SETTINGS, "abc") as second:
        second.write(record("b", "2"))
        with Parts.open(url, SETTINGS, "abc") as third:
            third.write(record("c", "3"))
            second._flush()
            places = third._places()
        assert len(places) == 2
    store = fsspec.filesystem("memory")
    found = {r["path"] for r in map(json.loads, store.cat_file("/here/out.jsonl").decode().splitlines())}
    assert found == {"a", "b", "c"}
    assert not store.exists("/here/out.jsonl.parts") or not store.ls("/here/out.jsonl.parts")


@pytest.mark.parametrize(
    ("output", "path", "key"),
    [
        ("s3://b/out/o.jsonl", "s3://b/out/in/a.png", "in/a.png"),
        ("s3://b/out/o.jsonl", "s3://other/out/in/a.png", "s3://other/out/in/a.png"),
        ("s3://b/out/o.jsonl", "/photos/a.png", "/photos/a.png"),
        ("file:///photos/o.jsonl", "/photos/in/a.png", "in/a.png"),
        ("file:///photos/o.jsonl", "/other/a.png", "/other/a.png"),
    ],
)
def test_names_of_images(output, path, key) -> None:
    pytest.importorskip("s3fs")
    assert Parts(output, "abc").key(path) == key


def test_urls_keep_their_host() -> None:
    class Ftp:
        protocol = "ftp"

        def find(self, path, **_):
            return {f"{path}/ä b.png": {"size": 1, "type": "file"}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "filesystem", lambda _: (Ftp(), "/d"))
        (image,) = find("ftp://host/d", recursive=False, match=[])
    assert image.url == "ftp://host/d/ä b.png"


def test_what_is_somebody_elses_is_not_touched(tmp_path) -> None:
    (tmp_path / "out.jsonl").write_text('{"mine": 1}\n')
    with (
        pytest.raises(JournalError, match="line 1 is no record"),
        Parts.open(f"file://{tmp_path}/out.jsonl", SETTINGS, "abc"),
    ):
        pass
    assert (tmp_path / "out.jsonl").read_text() == '{"mine": 1}\n'


@pytest.mark.parametrize("method", ["_records", "_put"])
def test_want_of_memory_is_not_the_outputs_fault(monkeypatch, tmp_path, method) -> None:
    """Drivers raise anything, so anything is theirs but this."""

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(Parts, method, fails)
    with pytest.raises(MemoryError), Parts.open(f"file://{tmp_path}/out.jsonl", SETTINGS, "abc") as parts:
        parts.write({"path": "a"})


@pytest.mark.parametrize("where", ["url_to_fs", "cat_file"])
def test_an_image_too_large_for_the_memory_is_called_so(monkeypatch, where) -> None:
    """And not unreadable: what reads it says what it takes."""

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    place = places.fsspec.core if where == "url_to_fs" else fsspec.filesystem("memory")
    fsspec.filesystem("memory").pipe_file("/a.png", b"x")
    monkeypatch.setattr(place, where, full)
    with pytest.raises(MemoryError):
        places.read("memory://a.png", 1)
