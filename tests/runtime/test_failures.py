"""What a message says of its cause: a table of causes, and memory that really runs out."""

from __future__ import annotations

import builtins
import errno
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lfm_runtime import EdgeError, Model
from lfm_runtime.commands.cli import main
from lfm_runtime.engine.failures import failures_are_ours
from lfm_runtime.errors import BundleError, OutOfMemoryError, is_out_of_memory, more_memory, unreadable
from lfm_runtime.formats.files import check_room, read_json_object
from lfm_runtime.formats.onnx_file import external_bytes

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def onnxruntimes(message: str) -> Exception:
    from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

    return RuntimeException(message)


def numpys() -> MemoryError:
    try:
        np.empty(1 << 46)
    except MemoryError as e:
        return e
    raise AssertionError


CAUSES = [
    (onnxruntimes("Exception during initialization: std::bad_alloc"), True),
    (onnxruntimes("Failed to allocate memory for requested buffer of size 123"), True),
    (onnxruntimes("pthread_create failed, error code: 11"), True),
    (onnxruntimes("Load model from x.onnx failed:Protobuf parsing failed"), False),
    (numpys(), True),
    (MemoryError(), True),
    (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), True),
    (RuntimeError("can't start new thread"), True),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), False),
    (OSError(errno.EIO, os.strerror(errno.EIO)), False),
    (BundleError("x is damaged"), False),
    (ImportError("libx.so: failed to map segment from shared object"), True),
    (ImportError("libx.so: cannot open shared object file"), False),
]


@pytest.mark.parametrize(("cause", "memory"), CAUSES, ids=lambda value: str(value)[:40])
def test_memory_is_told_from_damage(cause, memory) -> None:
    assert is_out_of_memory(cause) == memory
    wrapped = EdgeError("wrapped")
    wrapped.__cause__ = cause
    assert is_out_of_memory(wrapped) == memory


@pytest.mark.parametrize(("cause", "memory"), [c for c in CAUSES if "onnxruntime" in type(c[0]).__module__], ids=str)
def test_onnxruntimes_failures(cause, memory) -> None:
    """Only what is not about memory is blamed on the bundle."""
    with pytest.raises(EdgeError) as raised, failures_are_ours("decoder.onnx"):
        raise cause
    assert isinstance(raised.value, OutOfMemoryError) == memory
    assert ("export it again" in str(raised.value)) != memory


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOENT, "is missing; copy it again"),
        (errno.ENOTDIR, "is missing; copy it again"),
        (errno.ENOMEM, "not enough memory to read x.json; close other programs"),
        (errno.EACCES, "cannot be read: Permission denied; change its permissions"),
        (errno.EIO, "cannot be read: Input/output error; the disk or card fails"),
        (errno.EMFILE, "cannot be read: Too many open files; close files"),
        (errno.EISDIR, "cannot be read: Is a directory; name a file"),
        (errno.ELOOP, "cannot be read: Too many levels of symbolic links"),
    ],
)
def test_files_that_cannot_be_read(number, said, monkeypatch, tmp_path, demo_bundle) -> None:
    """Another copy or export is advised only where the file is missing, by every reader."""
    error = unreadable(Path("x.json"), OSError(number, os.strerror(number)), BundleError, "copy it again")
    assert said in str(error)
    assert "export" not in str(error)
    assert isinstance(error, OutOfMemoryError) == (number == errno.ENOMEM)
    if number in (errno.ENOENT, errno.ENOTDIR):
        return

    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    graph = demo_bundle / "onnx" / "decoder_model_merged.onnx"
    readers = [
        (Path, "read_text", lambda: read_json_object(tmp_path / "x.json", BundleError)),
        (Path, "read_bytes", lambda: external_bytes(graph)),
    ]
    if importlib.util.find_spec("onnx_ir"):
        from lfm_export.checkpoint import tensors
        from lfm_quantize.graph import open_graph

        readers += [(Path, "stat", lambda: tensors._header(graph)), (builtins, "open", lambda: open_graph(graph))]
    for owner, name, read in readers:
        with monkeypatch.context() as patch, pytest.raises(EdgeError) as raised:
            patch.setattr(owner, name, fails)
            read()
        assert os.strerror(number) in str(raised.value) or isinstance(raised.value, OutOfMemoryError)
        assert "export" not in str(raised.value)
        assert "copy the bundle" not in str(raised.value)


def limited(kib: int, *words: object) -> subprocess.CompletedProcess[str]:
    """`lfm-edge WORDS` with so much address space."""
    script = f'ulimit -v {kib}; exec "$0" "$@"'
    command = ["bash", "-c", script, sys.executable, "-m", "lfm_runtime", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def says_memory(found: subprocess.CompletedProcess[str]) -> None:
    assert found.returncode == 2, found.stderr
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("lfm-edge: ")][-1:]
    assert "memory" in line or "of address space" in line
    assert "Traceback" not in re.sub(r"Exception i.*", "", found.stderr, flags=re.DOTALL)
    assert "export" not in line
    assert "--verify" not in line


@pytest.fixture(scope="session")
def start_kib(demo_bundle) -> int:
    """Address space of a process that has imported everything and loaded nothing."""
    code = (
        "import psutil, lfm_runtime.model, lfm_runtime.golden, lfm_runtime.commands.prepare;"
        "print(psutil.Process().memory_info().vms >> 10)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    return int(done.stdout)


@pytest.mark.process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit -v")
@pytest.mark.parametrize("more_mib", [20, 40, 60, 90, 130, 180, 250])
def test_memory_that_runs_out(bundle_copy, photo, start_kib, more_mib) -> None:
    """Wherever it does, loading or answering, the message says so; with enough, there is an answer."""
    limit = start_kib + (more_mib << 10)
    words = ("run", bundle_copy, photo, "-p", "x", "--variant", "fp32", "--max-new-tokens", 2, "--threads", 2)
    forced = limited(limit, *words, "--force")
    # Where not even their threads have room, onnxruntime crashes (below 0), or the C library ends the process (127).
    if forced.returncode > 0 and "thread-local data: ABORT" not in forced.stderr:
        says_memory(forced)
    planned = limited(limit, *words)
    if planned.returncode and "not enough memory to load numpy and onnxruntime" not in planned.stderr:
        assert "would need about" in planned.stderr, planned.stderr  # before anything is loaded
        assert "ulimit -v leaves" in planned.stderr
    prepared = limited(limit, "prepare", bundle_copy, "--variant", "fp32")
    if prepared.returncode:
        says_memory(prepared)


@pytest.mark.process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit -v")
@pytest.mark.parametrize("mib", [60, 80, 100, 120, 140])
def test_too_little_to_load_libraries(demo_bundle, mib) -> None:
    """Some of them end the process themselves where they have no memory."""
    done = limited(mib << 10, "doctor", demo_bundle)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.fullmatch(r"lfm-edge: not enough memory to load .*; raise the limit, ulimit -v\n", done.stderr)


@pytest.mark.process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit -v")
@pytest.mark.parametrize("more_mib", [1, 40])
def test_the_api_says_it_too(demo_bundle, more_mib) -> None:
    code = (
        "import sys, resource, json; from lfm_runtime import Model, EdgeError\n"
        "model = Model.load(sys.argv[1], threads=1, force=True)\n"
        "import psutil, numpy as np; image = np.zeros((5000, 5000, 3), np.uint8)\n"
        "most = psutil.Process().memory_info().vms + (int(sys.argv[2]) << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        "try: model.answer(image, 'x', max_new_tokens=2).text()\n"
        "except MemoryError as e: print(json.dumps([isinstance(e, EdgeError), str(e)]))"
    )
    command = [sys.executable, "-c", code, str(demo_bundle), str(more_mib)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    ours, said = json.loads(done.stdout)
    assert ours
    assert "not enough memory" in said
    assert "was forecast" in said


def test_what_helps_against_a_limit(monkeypatch) -> None:
    assert more_memory() == "close other programs"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 30, resource.RLIM_INFINITY))
    assert more_memory() == "raise the limit, ulimit -v"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "prompt.json",
        "onnx/vision_encoder.onnx",
        "onnx/decoder_model_merged.onnx_data",
    ],
)
@pytest.mark.parametrize("manifest", [True, False])
def test_git_lfs_pointers_are_named_as_such(bundle_copy, name, manifest, capsys) -> None:
    """Of every file, whether the manifest knows its size or nothing does."""
    if not manifest:
        (bundle_copy / "manifest.json").unlink()
        if name == "tokenizer.json":
            (bundle_copy / "prompt.json").unlink()  # what is read instead
    (bundle_copy / name).write_text(POINTER)
    for words in ("run", bundle_copy, "-p", "x", "--max-new-tokens", 1), ("verify", bundle_copy):
        if words[0] == "verify" and not manifest:
            continue
        assert main([*map(str, words)]) == 2
        said = capsys.readouterr().err
        assert f"{bundle_copy / name} is a Git LFS pointer, not the file; fetch it: git lfs pull" in said
        assert said.count("\n") == 1


def test_an_image_that_is_a_pointer(demo_bundle, tmp_path, capsys) -> None:
    (tmp_path / "cat.jpg").write_text(POINTER)
    assert main(["run", str(demo_bundle), str(tmp_path / "cat.jpg"), "-p", "x"]) == 2
    assert "cat.jpg is a Git LFS pointer" in capsys.readouterr().err


def test_folders_that_are_no_bundle(bundle_copy, tmp_path, capsys) -> None:
    """By what they hold; nothing is to be copied or exported again."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.JPG").write_bytes(b"")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoint").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "checkpoint" / name).write_text("{}")
    (tmp_path / "above" / "b").mkdir(parents=True)
    (tmp_path / "above" / "b" / "config.json").write_text("{}")
    for name, said in {
        "empty": "it is empty",
        "photos": "it holds images: name the bundle first, then the images",
        "weights": "copy config.json and the tokenizer's files beside the weights",
        "checkpoint": f"is a checkpoint, not a bundle; make a bundle with: lfm-edge export {tmp_path}/checkpoint -o",
        "above": f"did you mean {tmp_path}/above/b?",
    }.items():
        for command in ("plan", "doctor"):
            assert main([command, str(tmp_path / name)]) in (1, 2)
            told = capsys.readouterr()
            assert said in told.err + told.out, (name, command)
    assert main(["run", str(bundle_copy / "onnx"), "-p", "What?", "--max-new-tokens", "1", "--quiet"]) == 0


@pytest.mark.parametrize("name", ["downsample_factor", "encoder_patch_size"])
def test_image_settings_that_are_not_the_encoders(bundle_copy, photo, name, capsys) -> None:
    """Of a folder without manifest.json, whose settings nothing checked."""
    (bundle_copy / "manifest.json").unlink()
    file = bundle_copy / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, name: 2 * settings[name]}))
    assert main(["run", str(bundle_copy), str(photo), "-p", "x", "--max-new-tokens", "1"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"correct {name} in preprocessor_config.json" in said


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("place", ["", "onnx"])
def test_folders_that_may_not_be_read(bundle_copy, place, capsys) -> None:
    folder = bundle_copy / place
    folder.chmod(0)
    try:
        codes = {words: main([words, str(bundle_copy)]) for words in ("verify", "doctor")}
    finally:
        folder.chmod(0o755)
    assert codes["verify"] == 2
    assert codes["doctor"] == 1
    assert "cannot be read" in capsys.readouterr().err


def test_missing_room_is_the_difference_of_the_other_figures(tmp_path, monkeypatch) -> None:
    for free, needed in ((1, 2), (3 << 20, (3 << 20) + 1), ((5 << 20) - 1, 5 << 20), (7_654_321, 987_654_321)):
        monkeypatch.setattr(
            "shutil.disk_usage", lambda _, free=free: type("Usage", (), {"free": free, "total": 1 << 40})
        )
        with pytest.raises(BundleError) as raised:
            check_room(tmp_path, needed, "x", BundleError)
        have, takes, more = map(int, re.findall(r"(\d+) MiB free, x needs (\d+): (\d+) MiB", str(raised.value))[0])
        assert takes - have == more > 0
        check_room(tmp_path, free, "x", BundleError)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "PHOTO", "BUNDLE", "-p", "x"], "is a bundle; name it first, then the images"),
        (["run", "PHOTO", "-p", "x"], "is a file; give the bundle folder first"),
        (["unpack", "BUNDLE", "-o", "out"], "a bundle in a folder needs no unpacking"),
        (["unpack", "PHOTOS", "-o", "out"], "name the .tar that lfm-edge pack wrote"),
        (["export", "BUNDLE", "-o", "out"], "is a bundle already, not a checkpoint"),
        (["export", "PHOTOS", "-o", "out"], "is not a checkpoint: it has neither config.json nor weights"),
        (["make", "BUNDLE", "--target", "pi5", "-o", "cam"], "is a bundle, and make starts from a checkpoint"),
        (["verify", "PHOTO"], "is not a folder; name a bundle"),
    ],
)
def test_arguments_that_were_exchanged(demo_bundle, tmp_path, monkeypatch, capsys, words, said) -> None:
    if words[0] in ("export", "make"):
        pytest.importorskip("onnx_ir")
    monkeypatch.chdir(tmp_path)
    photo = Path(__file__).parents[2] / "demo" / "photos" / "coffee.jpg"
    places = {"PHOTO": photo, "PHOTOS": photo.parent, "BUNDLE": demo_bundle}
    assert main([str(places.get(word, word)) for word in words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_room_for_a_thread_is_want_of_memory(demo_bundle, monkeypatch) -> None:
    """Where a thread that loads graphs cannot be started, the message has the numbers."""

    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", start)
    with pytest.raises(OutOfMemoryError, match=r"can't start new thread.* was forecast"):
        Model.load(demo_bundle, threads=1)
