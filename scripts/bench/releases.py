"""Releases of onnxruntime beside each other on one decoder, in turns: ms a token, and which operators they take.

    python scripts/bench/releases.py BUNDLE 1.31.1 1.32.0 [--variant int4 int4-kv8] [--threads 2] [--hide amx,avx512] [--rounds 7]
        [-o FILE.json]

Each release is installed once into build/releases/ and measured in processes of its own, A B A B …, not prepared; `--hide` takes
instruction sets away from it, as instruction_sets.py does. Where pages of
memory happen to lie makes one process up to 15 % faster than the next, so that only medians over processes say anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path

from instruction_sets import hiding

ROOT = Path(__file__).resolve().parents[2]
PASTS = (0, 512, 1500)


def measure(bundle: str, variant: str, threads: int) -> dict:
    """In a process with one release: ms a token after each of PASTS, and ms a token by operator after 512 (profiled)."""
    from lfm_runtime import Model
    from sides import decode

    model = Model.load(bundle, profile="generic", variant=variant, threads=threads, prefill="none", prepared=False)
    found = {}
    for past in PASTS:
        rate = decode(model, past)
        rate()
        found[f"after {past:,}"] = 1e3 / statistics.median(rate() for _ in range(5))
    return {**found, **profiled(str(model.bundle.graphs(variant)[1]["decoder_model_merged"]), threads)}


def profiled(path: str, threads: int, past: int = 512, steps: int = 60) -> dict:
    """ms a token by operator, as onnxruntime's profiler says."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(tempfile.mkdtemp()) / "profile")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    binding, arrays = session.io_binding(), []
    sizes = {"batch_size": 1, "sequence_length": 1, "positions": 1, "total_sequence_length": past + 1}
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int8)": np.int8}
    for value in (*session.get_inputs(), session.get_outputs()[0]):
        kv = value.name.startswith("past_key")
        shape = [d if isinstance(d, int) else sizes.get(d, past + steps) for d in value.shape]
        arrays.append(
            np.ones(shape, types[value.type]) if value.name == "attention_mask" else np.zeros(shape, types[value.type])
        )
        bound = (value.name, "cpu", 0, arrays[-1].dtype, shape, arrays[-1].ctypes.data)
        if value.name == "logits":
            binding.bind_output(*bound)
            continue
        binding.bind_input(*bound)
        if value.name.startswith("past"):
            arrays.append(arrays[-1] if kv else np.zeros_like(arrays[-1]))
            name = value.name.replace("past_key_values", "present").replace("past_conv", "present_conv")
            binding.bind_output(name, "cpu", 0, arrays[-1].dtype, shape, arrays[-1].ctypes.data)
    for _ in range(steps):
        session.run_with_iobinding(binding)
    runs, current = [], Counter()
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            current[event["args"]["op_name"]] += event["dur"] / 1e3
        elif event["name"] == "model_run":
            runs, current = [*runs, current], Counter()
    warm = runs[steps // 4 :]
    return {name: statistics.median(run[name] for run in warm) for name in max(warm, key=len)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("releases", nargs="*", help="two or more, the first is what others are compared with")
    parser.add_argument("--variant", nargs="+", default=["int4"], metavar="VARIANT")
    parser.add_argument(
        "--hide", default="", metavar="SETS", help="instruction sets, as SETS of instruction_sets.py names them"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.bundle, *options.variant, options.threads)))
        return
    if len(options.releases) < 2:
        parser.error("name two releases of onnxruntime or more, such as 1.31.1 1.32.0")
    places = {release: ROOT / "build" / "releases" / release for release in options.releases}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    for release, place in places.items():
        if not place.exists():
            subprocess.run([*pip, str(place), f"onnxruntime=={release}"], check=True)
    hidden = hiding()(options.hide) if options.hide else {}
    sides = list(product(places, options.variant))
    found: dict[str, list[dict]] = {" ".join(side): [] for side in sides}
    words = [sys.executable, __file__, options.bundle, "--one", "--threads", str(options.threads), "--variant"]
    for _ in range(options.rounds):
        for release, variant in sides:
            environment = {**os.environ, **hidden, "PYTHONPATH": str(places[release])}
            done = subprocess.run([*words, variant], env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found[f"{release} {variant}"].append(json.loads(done.stdout))
    first = next(iter(found))
    print(f"{'':36}" + "".join(f"{side:>16}" for side in found) + "   ratio to the first, by rounds")
    for name in sorted(found[first][0], key=lambda n: (not n.startswith("after"), -found[first][0][n])):
        medians = [statistics.median(row.get(name, 0.0) for row in rows) for rows in found.values()]
        ratios = [
            statistics.median(b.get(name, 0) / a[name] for a, b in zip(found[first], rows, strict=True) if a.get(name))
            for rows in found.values()
        ]
        print(f"{name:36}" + "".join(f"{m:16.3f}" for m in medians) + "   " + " ".join(f"{r:.3f}" for r in ratios))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
