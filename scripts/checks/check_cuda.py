"""What onnxruntime's CUDA provider makes of a bundle, where there is no GPU: it runs on a CUDA that computes nothing
and remembers everything (cuda_recorder.cpp).

    python scripts/checks/check_cuda.py BUNDLE --variant fp16 --variant int4-fp16      # needs g++; makes an environment
    in build/cuda-… python scripts/checks/check_cuda.py BUNDLE --kernels                                # also the name
    of every kernel of a step and a view python scripts/checks/check_cuda.py BUNDLE --onnxruntime 1.23.2 --python
    python3.10   # another release, for CUDA 12

The provider is the real one, of the wheel for machines with a GPU: which operators it takes, with which kernels, what
it copies, where it waits, what it captures and allocates is counted, and the host's own time is taken. Nothing is said
of values or of a GPU's time, since no kernel is run. A JSON object for each variant.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDER = Path(__file__).resolve().with_name("cuda_recorder.cpp")
HEADERS = {  # CUDA 12's own package of crt/ has a compiler in it as well
    "12": ("nvidia-cuda-runtime-cu12==12.9.79", "nvidia-cuda-crt==13.0.88"),
    "13": ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-crt==13.0.88"),
}
PROMPT, STEPS = 275, 4


def main() -> int:
    """Build here, then run `inside` in an environment of its own: two onnxruntimes do not go together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--variant", action="append", default=[], help="default fp16")
    parser.add_argument("--memory", type=int, default=81920, help="MiB that the GPU has")
    parser.add_argument("--reported", type=int, help="MiB that nvidia-smi says are free (default all)")
    parser.add_argument("--strict-placement", action="store_true")
    parser.add_argument(
        "--capture", action="store_true", help="capture steps also with releases where the runtime does not"
    )
    parser.add_argument("--kernels", action="store_true", help="names of a step's kernels, and of a view's")
    parser.add_argument("--onnxruntime", default="1.31.1")
    parser.add_argument("--python", default=sys.executable, help="of the environment")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.variant = options.variant or ["fp16"]
    if options.inside:
        return inside(options)
    home = ROOT / "build" / f"cuda-{options.onnxruntime}"
    try:
        environment = prepare(home, options.onnxruntime, options.python)
    except (OSError, subprocess.CalledProcessError) as e:
        print(f"check_cuda: {e}; g++, nm, readelf, Python's venv and a package index are needed", file=sys.stderr)
        return 2
    environment["RECORDED_MIB"] = str(options.reported or options.memory)
    codes = []
    for variant in options.variant:
        words = ["--variant", variant, "--memory", str(options.memory), "--inside"]
        words += ["--strict-placement"] * options.strict_placement + ["--kernels"] * options.kernels
        words += ["--capture"] * options.capture
        command = [str(home / "bin/python"), __file__, str(options.bundle), *words]
        codes.append(subprocess.run(command, env=environment, check=False).returncode)
    return max(codes, key=abs)


# ---------------------------------------------------------------------------------------------------------- the device


def prepare(home: Path, release: str, python: str) -> dict[str, str]:
    """An environment with onnxruntime for GPUs, and the libraries it shall find. Returns the variables to run it with."""
    made_of = hashlib.sha256(RECORDER.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:12]
    libraries = home / f"libraries-{made_of}"
    pip = [str(home / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not (home / "made").exists():
        subprocess.run([python, "-m", "venv", str(home)], check=True)
        subprocess.run(
            [*pip, f"onnxruntime-gpu=={release}", "pillow", "psutil", "tomli; python_version < '3.11'"], check=True
        )
    packages = next(home.glob("lib/python*/site-packages"))
    provider = packages / "onnxruntime/capi/libonnxruntime_providers_cuda.so"
    needed = re.findall(r"\(NEEDED\).*\[(lib(?:cu|nv)\w+\.so\.\d+)\]", _said_by("readelf", "-d", provider))
    if not (home / "made").exists():
        cuda = next(name for name in needed if name.startswith("libcudart")).rpartition(".")[2]
        subprocess.run([*pip, "--no-deps", *HEADERS[cuda]], check=True)
        (home / "made").touch()
    includes = [file.parent for file in packages.glob("nvidia/*/include/cuda_runtime_api.h")]
    includes += [file.parents[1] for file in packages.glob("nvidia/*/include/crt/host_defines.h")]
    if not libraries.exists():
        build(provider, includes, libraries, {*needed, "libcudnn.so.9"})
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(libraries),
        "PATH": f"{libraries}:{os.environ['PATH']}",
        "LFM_EDGE_PROFILE": "x86-cuda",
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("runtime", "profiles")),
    }


def build(provider: Path, includes: list[Path], libraries: Path, names: set[str]) -> None:
    """One library under all their names. Functions that the recorder lacks return 0; each has the version that the
    provider asks for.
    """
    work = Path(tempfile.mkdtemp(dir=libraries.parent))
    recorder, rest, script, made = (work / name for name in ("recorder.o", "rest.c", "versions", "librecorder.so"))
    subprocess.run(
        ["g++", "-O1", "-fPIC", *(f"-I{i}" for i in includes), "-c", str(RECORDER), "-o", str(recorder)], check=True
    )
    wanted = [
        (name, version or "recorder")
        for name, version in re.findall(r" U (cu\w+|__cuda\w+)(?:@(libcu\S+))?", _said_by("nm", "-D", provider))
    ]
    if not any(
        name.startswith("cudnn") for name, _ in wanted
    ):  # since 1.31 they are looked up by name when they are first needed
        wanted += [
            (name.decode(), "recorder")
            for name in sorted(set(re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", provider.read_bytes())))
        ]
    there = set(re.findall(r" T (\w+)", _said_by("nm", recorder)))
    rest.write_text(
        "".join(f"int {name}(void) {{ return 0; }}\n" for name, _ in wanted if name not in there), encoding="utf-8"
    )
    of_version: dict[str, list[str]] = {"recorder": ["recorder_*"]}
    for name, version in wanted:
        of_version.setdefault(version, []).append(name)
    script.write_text("".join(f"{v} {{ global: {'; '.join(n)}; }};\n" for v, n in of_version.items()), encoding="utf-8")
    link = [
        "g++",
        "-shared",
        "-fPIC",
        f"-Wl,--version-script={script}",
        "-Wl,-soname,librecorder.so",
        str(recorder),
        "-x",
        "c",
        str(rest),
    ]
    subprocess.run([*link, "-o", str(made)], check=True)
    for name in names:
        (work / name).symlink_to(made.name)
    smi = work / "nvidia-smi"  # as it answers the queries of gpu.py and gpu_wheel.py
    smi.write_text(
        '#!/bin/sh\ncase "$*" in *compute_cap*) echo 9.0 ;; *memory.free*) echo "$RECORDED_MIB, $RECORDED_MIB" ;; '
        "esac\n",
        encoding="utf-8",
    )
    smi.chmod(0o755)
    with contextlib.suppress(OSError):  # another run has made them
        work.rename(libraries)


def _said_by(*words: str | Path) -> str:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=True).stdout


class Recorder:
    """The recorder, as this process and onnxruntime have loaded it."""

    def __init__(self, memory_mib: int) -> None:
        name = next(path.name for path in Path(os.environ["LD_LIBRARY_PATH"]).glob("libcudart.so.*"))
        self._library = ctypes.CDLL(name)
        self._library.recorder_take.restype = ctypes.c_char_p
        self._library.recorder_peak_memory.restype = ctypes.c_size_t
        self._library.recorder_set_memory(ctypes.c_size_t(memory_mib << 20))

    @property
    def peak_mib(self) -> int:
        """Peak of the memory allocated on the device, in MiB."""
        return int(self._library.recorder_peak_memory()) >> 20

    def reads(self, size: int, value: int) -> None:
        """What the host shall find when it copies so many bytes from the device."""
        self._library.recorder_reads(ctypes.c_size_t(size), ctypes.c_ulonglong(value))

    def median_ms(self, work: Callable[[], Any], times: int = 15) -> float:
        """What the host takes for it, while nothing is remembered and the device takes no time."""
        self._library.recorder_set_quiet(True)
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            work()
            taken.append((time.perf_counter() - start) * 1e3)
        self._library.recorder_set_quiet(False)
        return round(statistics.median(taken), 3)

    def during(self, work: Callable[[], Any]) -> list[str]:
        """Call `work`; return what the recorder logged meanwhile, one call a line."""
        self._library.recorder_take()
        work()
        return str(self._library.recorder_take().decode()).splitlines()


def counted(lines: list[str]) -> dict[str, Any]:
    """Of what happened: work that was started on the device piece by piece and as graphs, bytes that crossed, waits,
    allocations.
    """

    def numbers(pattern: str) -> list[int]:
        return [int(found[1]) for line in lines if (found := re.match(pattern, line))]

    return {
        "launched": sum(bool(re.match("run (kernel|copy within|fill)", line)) for line in lines),
        "replayed": numbers(r"replay (\d+)"),
        "captured": numbers(r"captured (\d+)"),
        "to_device": numbers(r"\w+ copy to-device\S* (\d+)"),
        "to_host": numbers(r"\w+ copy to-host\S* (\d+)"),
        "waits": lines.count("wait"),
        "mallocs": sum(line.startswith("malloc") for line in lines),
        "stale": numbers(
            r"stale (\d+)"
        ),  # bytes of the host that a graph reads at every replay, and that are others by then
        "prohibited": [
            line.split()[1] for line in lines if line.startswith("prohibited")
        ],  # while a graph was captured
    }


# ------------------------------------------------------------------------------------------------------------ the check


def inside(options: argparse.Namespace) -> int:
    """Load a bundle, take in a prompt, write tokens, encode views, answer about a photo."""
    from lfm_runtime.errors import EdgeError

    recorder = Recorder(options.memory)
    found: dict[str, Any] = {"variant": options.variant[0]}
    lines: dict[str, list[str]] = {}
    try:
        check(options, recorder, found, lines)
    except EdgeError as e:
        found["error"] = str(e)
    parts = {name: counted(happened) for name, happened in lines.items()}
    print(json.dumps({**found, **parts, "device_mib": recorder.peak_mib}))
    for name in ("step 1 in larger buffers", "1 view") if options.kernels else ():
        print(f"\n{name}:")
        happened = lines.get(name, [])
        how = (
            "capture " if any(line.startswith("captured") for line in happened) else "run "
        )  # before a capture a step is run as well
        work = (line.removeprefix(how) for line in happened if line.startswith(how))
        for what, count in Counter(re.sub(r"kernel \S+x\d+ \d+x\S+ ", "kernel ", w) for w in work).most_common():
            print(f"{count:5} {what[:150]}")
    if "error" in found:
        return 2
    return int(any(part["stale"] or part["prohibited"] for part in [*parts.values(), found["load"]]))


def check(options: argparse.Namespace, recorder: Recorder, found: dict[str, Any], lines: dict[str, list[str]]) -> None:
    """Fills in what is found, and what happened in each part."""
    from dataclasses import replace

    import onnxruntime as ort
    from lfm_runtime import Model
    from lfm_runtime.engine.gpu import left_to_cpu
    from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, VISION_ENCODER
    from lfm_runtime.setup import machine, setup

    if options.capture:
        setup.CUDA_GRAPHS_SINCE = "0.0"
    device = machine.this_device()
    machine.this_device = lambda: replace(device, gpu="a recorder", cuda=True)
    found["onnxruntime"] = ort.__version__
    settings = {
        "max_image_tokens": 64,
        "do_image_splitting": False,
        "strict_placement": options.strict_placement or None,
    }
    loaded: list[Model] = []
    happened = counted(
        recorder.during(lambda: loaded.append(Model.load(options.bundle, variant=options.variant[0], **settings)))
    )
    found["load"] = {name: happened[name] for name in ("captured", "prohibited", "stale")}
    (model,) = loaded
    graphs, decoder = model.sessions, model.decoder
    sessions = {DECODER: decoder.load().decoder, EMBED_TOKENS: decoder.load().embed, VISION_ENCODER: graphs.vision()}
    found["left_to_cpu"] = {
        graph.stem: left_to_cpu(session, graphs.paths[graph.stem]) for graph, session in sessions.items()
    }

    with graphs.failures_are_ours():
        found["host_ms"] = check_decoder(decoder, recorder, lines) | check_encoder(model, recorder, lines)
    photo = model.open(ROOT / "demo/photos/coffee.jpg")
    recorder.reads(4, sum(view.tokens for view in photo.layout.views))
    answer = model.answer([photo.image], "What is in this image?", max_new_tokens=STEPS, temperature=0)
    lines["answer"] = recorder.during(answer.text)
    found["answer_tokens"] = answer.report.new_tokens


def check_decoder(decoder: Any, recorder: Recorder, lines: dict[str, list[str]]) -> dict[str, float]:
    """A prompt, steps of one token, back to a mark, on in larger buffers. Returns the host's milliseconds."""
    state, prompt = decoder.start(1000), decoder.embed([10 + i % 300 for i in range(PROMPT)])
    lines["prompt"] = recorder.during(lambda: state.step(prompt))
    for i in range(STEPS):
        lines[f"step {i + 1}"] = recorder.during(lambda: state.step_token(5))
    mark = state.mark()
    lines["step after going back"] = recorder.during(lambda: (state.rewind(mark), state.step_token(5)))
    larger = decoder.start(1100, state.snapshot())
    for i in range(STEPS):
        lines[f"step {i + 1} in larger buffers"] = recorder.during(lambda: larger.step_token(5))
    return {
        "prompt": recorder.median_ms(lambda: decoder.start(1000).step(prompt)),
        "step": recorder.median_ms(lambda: larger.step_token(5), 99),
    }


def check_encoder(model: Any, recorder: Recorder, lines: dict[str, list[str]]) -> dict[str, float]:
    """One of the largest views, and eight together. Returns the host's milliseconds."""
    import numpy as np

    host_ms: dict[str, float] = {}
    images, run = model.bundle.images, model.sessions.vision().run
    side = int((images.max_image_tokens * images.downsample_factor**2) ** 0.5)
    recorder.reads(1, 1)  # a condition: nothing is padded
    for count, name in ((1, "1 view"), (8, "8 views")):
        recorder.reads(4, count * side**2 // images.downsample_factor**2)  # a size: tokens that are gathered
        feeds = {
            "pixel_values": np.zeros((count, side * side, 768), np.float32),
            "pixel_attention_mask": np.ones((count, side * side), np.int64),
            "spatial_shapes": np.full((count, 2), side, np.int64),
        }
        lines[name] = recorder.during(lambda feeds=feeds: run(["image_features"], feeds))  # type: ignore[misc]
        host_ms[name] = recorder.median_ms(lambda feeds=feeds: run(["image_features"], feeds))  # type: ignore[misc]
    return host_ms


if __name__ == "__main__":
    sys.exit(main())
