"""Ids of the hub, with huggingface_hub itself against a hub on loopback (tests/hub.py): its releases before 1 and since."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")
from hub import Hub, Repository, running
from lfm_runtime.setup.hub import HubError, HubId, checkpoint_folder

pytestmark = [pytest.mark.process, pytest.mark.transformers5]
ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "demo" / "checkpoint"
PHOTO = ROOT / "demo" / "eval" / "images" / "0000.png"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """The demo checkpoint with what else lies in repositories."""
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "repository"))
    for name in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "model.gguf",
        "photo.png",
        "onnx/decoder_model_merged.onnx",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"large")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: lfm1.0\n---\n# Demo\n")
    return folder


def edge(hub: Hub | str, home: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`lfm-edge WORDS` as a user of this hub with a cache of its own."""
    url = hub if isinstance(hub, str) else hub.url
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    own = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_HUB_ETAG_TIMEOUT": "30",
    }
    command = [sys.executable, "-m", "lfm_runtime", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=home.parent, env={**kept, **own, **environment}
    )


def failed(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error that we can explain, behind progress bars."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_want_of_memory_is_not_the_hubs_fault(monkeypatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def model_info(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(MemoryError):
        checkpoint_folder("Liquid/None-Such", quiet=True)


def test_a_checkpoint_is_fetched_and_named(checkpoint, tmp_path) -> None:
    """Only the files needed; revision, licence and name in the manifest; a second export fetches nothing."""
    with running(Liquid__Demo=Repository(checkpoint)) as hub:
        done = edge(hub, tmp_path / "home", "export", "Liquid/Demo", "-o", tmp_path / "b")
        assert done.returncode == 0, done.stderr
        assert "model.safetensors" in hub.fetched()
        assert not {
            name
            for name in hub.fetched()
            if name.endswith((".bin", ".gguf", ".png", ".onnx")) or "consolidated" in name
        }
        source = json.loads((tmp_path / "b" / "manifest.json").read_text())["source"]
        commit = hub.repositories["Liquid/Demo"].commit
        assert (source["name"], source["revision"], source["license"]) == ("Liquid/Demo", commit, "lfm1.0")
        hub.requests.clear()
        assert (
            edge(hub, tmp_path / "home", "export", "Liquid/Demo@v1", "-o", tmp_path / "b2", "--quiet").returncode == 0
        )
        assert not hub.fetched() - {""}
    offline = edge(
        hub, tmp_path / "home", "export", "Liquid/Demo", "-o", tmp_path / "b3", "--quiet", HF_HUB_OFFLINE="1"
    )
    assert offline.returncode == 0, offline.stderr
    gone = edge(hub, tmp_path / "home", "export", "Liquid/Demo", "-o", tmp_path / "b4", "--quiet")
    assert gone.returncode == 0, "what is cached is used where the hub cannot be reached"


def test_an_adapter_by_its_id(checkpoint, tmp_path) -> None:
    """Of which only its two files are fetched."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    (adapter / "training_args.bin").write_bytes(b"")
    with running(Liquid__Demo=Repository(checkpoint), me__lora=Repository(adapter)) as hub:
        done = edge(
            hub, tmp_path / "home", "export", "Liquid/Demo", "--adapter", "me/lora", "-o", tmp_path / "b", "--quiet"
        )
        assert "LOHA" in failed(done)
        assert "adapter_config.json" in hub.fetched()
        assert "training_args.bin" not in hub.fetched()


def test_graphs_of_a_hub_repository(demo_bundle, tmp_path) -> None:
    """`run ID`: of its graphs those alone that will be used; then without a network."""
    folder = Path(shutil.copytree(demo_bundle, tmp_path / "repository"))
    for name in ("manifest.json", "prompt.json"):
        (folder / name).unlink()
    for path in list((folder / "onnx").iterdir()):
        for suffix in ("_q4", "_fp16", "_bnb4"):
            stem, dot, rest = path.name.partition(".")
            (folder / "onnx" / f"{stem}{suffix}{dot}{rest}").write_bytes(b"not needed")
    words = (
        "run",
        "onnx-community/Demo",
        PHOTO,
        "-p",
        "What is in this image?",
        "--temperature",
        "0",
        "--variant",
        "fp32",
    )
    with running(**{"onnx-community__Demo": Repository(folder)}) as hub:
        done = edge(hub, tmp_path / "home", *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "red cross, orange circle\n"
        graphs = {name for name in hub.fetched() if name.startswith("onnx/")}
        assert graphs == {path.relative_to(demo_bundle).as_posix() for path in (demo_bundle / "onnx").iterdir()}
        assert "has no variant 'int8'" in failed(edge(hub, tmp_path / "home", *words[:-1], "int8"))
    done = edge(hub, tmp_path / "home", *words, "--quiet", HF_HUB_OFFLINE="1")
    assert done.stdout == "red cross, orange circle\n", done.stderr


def test_a_bundle_of_ours_on_the_hub(demo_bundle, tmp_path) -> None:
    """Of two variants one is fetched, and is whole."""
    folder = Path(shutil.copytree(demo_bundle, tmp_path / "repository"))
    assert edge("", tmp_path / "home0", "quantize", folder, "--variant", "int8", "--quiet").returncode in (0, 2)
    with running(me__cam=Repository(folder)) as hub:
        done = edge(
            hub,
            tmp_path / "home",
            "run",
            "me/cam",
            PHOTO,
            "-p",
            "What is in this image?",
            "--variant",
            "fp32",
            "--quiet",
        )
        assert done.returncode == 0, done.stderr
        assert not [name for name in hub.fetched() if "_int8" in name]
    (snapshot,) = (tmp_path / "home" / "hub").glob("models--me--cam/snapshots/*")
    done = edge(hub, tmp_path / "home", "verify", snapshot)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Liquid/Gated", "Liquid/Gated is gated: accept its licence at http://127.0.0.1"),
        ("Liquid/Private", "is no folder here and not on the hub, or is private"),
        ("Liquid/None", "is no folder here and not on the hub, or is private"),
        ("Liquid/Demo@v9", "Liquid/Demo has no revision v9"),
    ],
)
def test_what_the_hub_refuses(checkpoint, tmp_path, name, says) -> None:
    with running(
        Liquid__Demo=Repository(checkpoint),
        Liquid__Gated=Repository(checkpoint, gated=True, token="secret"),
        Liquid__Private=Repository(checkpoint, token="secret"),
    ) as hub:
        said = failed(edge(hub, tmp_path / "home", "export", name, "-o", tmp_path / "b", "--quiet"))
        assert says in said
        assert not (tmp_path / "b").exists()
        if "@" not in name and name != "Liquid/None":
            with_token = edge(
                hub, tmp_path / "home", "export", name, "-o", tmp_path / "b", "--quiet", HF_TOKEN="secret"
            )
            assert with_token.returncode == 0, with_token.stderr


def test_a_download_that_breaks_off_goes_on(checkpoint, tmp_path) -> None:
    """Releases before 1 go on in the next process, those since within one; what they ask for again is the rest alone."""
    repository = Repository(checkpoint)
    words = ("export", "Liquid/Demo", "-o", tmp_path / "b", "--quiet")
    with running(Liquid__Demo=repository) as hub:
        repository.breaks_off_at = 11_000_000  # the client keeps 10 MiB at a time
        said = failed(edge(hub, tmp_path / "home", *words))
        assert "fetching Liquid/Demo broke off" in said
        assert "the same command goes on with what is missing" in said
        assert "config.json" in hub.fetched()
        repository.breaks = 1
        hub.requests.clear()
        if edge(hub, tmp_path / "home", *words).returncode:
            assert edge(hub, tmp_path / "home", *words).returncode == 0
        assert hub.fetched() == {"model.safetensors"}
        begun = [span for method, path, span in hub.requests if method == "GET" and path.endswith("model.safetensors")]
        assert f"bytes={10 << 20}-" in {(span or "").partition("-")[0] + "-" for span in begun}


def test_no_network_and_nothing_cached(tmp_path) -> None:
    nobody = "http://127.0.0.1:9"  # discard: no server listens there
    said = failed(edge(nobody, tmp_path / "home", "export", "Liquid/Demo", "-o", tmp_path / "b", "--quiet"))
    assert "Liquid/Demo is no folder here, and the hub cannot be reached for it (Connection refused)" in said
    said = failed(edge(nobody, tmp_path / "home", "export", "Liquid/Demo", "-o", tmp_path / "b", HF_HUB_OFFLINE="1"))
    assert "is no folder here and not in the cache, and HF_HUB_OFFLINE is set" in said


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk(checkpoint, tmp_path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(home)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        with running(Liquid__Demo=Repository(checkpoint)) as hub:
            said = failed(edge(hub, home, "export", "Liquid/Demo", "-o", tmp_path / "b", "--quiet"))
        assert f"no space is left in {home}" in said
        assert "HF_HOME" in said
    finally:
        subprocess.run(["umount", str(home)], check=True)


def test_without_the_package(tmp_path) -> None:
    """As on a device: how the folder gets there instead."""
    block = tmp_path / "block"
    block.mkdir()
    (block / "huggingface_hub.py").write_text("raise ImportError('none here')")
    path = os.pathsep.join([str(block), *sys.path])
    done = edge("", tmp_path / "home", "run", "onnx-community/Demo", "-p", "x", PYTHONPATH=path)
    said = failed(done)
    assert "needs the Python package huggingface_hub" in said
    assert "hf download onnx-community/Demo --local-dir Demo, and copy that folder here" in said


def test_what_is_an_id_and_what_a_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").mkdir()
    assert HubId.parse("LiquidAI/LFM2-VL-450M") == HubId("LiquidAI/LFM2-VL-450M")
    with pytest.raises(HubError, match="names no revision behind @"):
        HubId.parse("LiquidAI/LFM2-VL-450M@")
    assert HubId.parse("LiquidAI/LFM2-VL-450M@refs/pr/1") == HubId("LiquidAI/LFM2-VL-450M", "refs/pr/1")
    for path in ("bundle", "./a/b", "../a", "/a/b", "a/b/c", "models/typo", "there/x", "~/a", "a/", "a//b", "C:\\a"):
        assert HubId.parse(path) is None, path
    snapshot = tmp_path / "hub" / "models--Liquid--LFM2--VL" / "snapshots" / "0123"
    assert HubId.of_cache(snapshot) == HubId("Liquid/LFM2--VL", "0123")
    assert HubId.of_cache(tmp_path) is None
