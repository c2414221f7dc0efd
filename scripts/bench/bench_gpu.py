"""Time and memory on a GPU against transformers on the same GPU, in turns.

    pip install -e '.[export,quantize]' 'onnxruntime-gpu[cuda,cudnn]' torch transformers     # onnxruntime-gpu instead
    of onnxruntime python scripts/bench/bench_gpu.py --size 450m --size 1.6b -o gpu.json

Random weights of full size. Both sides stay loaded in processes of their own, warmed up, and measure A B A B …; medians
and the ratio of neighbours are printed, all samples are in the JSON. transformers runs in bfloat16 with SDPA, its
decoding also compiled where that works. --device cpu runs the same with fp32, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_sides import ENCODER, Ours, Theirs

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "demo" / "make"))  # torchvision_shim
sys.path.insert(0, str(ROOT / "scripts"))


def main() -> int:
    """Parent of the two sides, which talk in lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", action="append", default=[], choices=("450m", "1.6b"))
    parser.add_argument("--checkpoint", type=Path, help="measure this one instead")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--variant", action="append", default=[], help="of ours: fp16 (default), int4-fp16, fp16-trt; fp32 on the CPU"
    )
    parser.add_argument("--batch", type=int, action="append", default=[], help="views at once (default 1, 8, 32)")
    parser.add_argument("--tokens", type=int, default=128, help="decoded a measurement")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.size and not options.checkpoint and not options.side:
        parser.error("name what to measure: --size 450m, or --checkpoint FOLDER")
    options.batch = options.batch or [1, 8, 32]
    options.variant = options.variant or (["fp16"] if options.device == "cuda" else ["fp32"])
    if options.side:
        return answer_requests(options)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in [str(options.checkpoint)] if options.checkpoint else options.size:
            checkpoint = options.checkpoint or make_checkpoint(name, Path(folder) / name)
            bundle = make_bundle(checkpoint, Path(folder) / f"{Path(name).name}.bundle", options.variant)
            for variant in options.variant:
                results[f"{Path(name).name} {variant}"] = compare(checkpoint, bundle, variant, options)
                if options.output:  # each time: the next may not fit
                    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def make_checkpoint(size: str, folder: Path) -> Path:
    """Write a checkpoint with random weights; returns its folder."""
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts/bench/make_random_checkpoint.py"),
            "--size",
            size,
            "--tokenizer",
            "demo",
            str(folder),
        ],
        check=True,
    )
    return folder


def make_bundle(checkpoint: Path, bundle: Path, variants: list[str]) -> Path:
    """With what the variants need. Weights are rounded to nearest: their values do not matter here."""
    from lfm_export.export import export
    from lfm_quantize.quantize import quantize
    from lfm_quantize.settings import Settings

    export(checkpoint, bundle)
    made = (
        ["fp16"] * (variants != ["fp32"])
        + ["int4", "int4-fp16"] * ("int4-fp16" in variants)
        + ["fp16-trt"] * ("fp16-trt" in variants)
    )
    for variant in made:
        quantize(bundle, Settings(variant, threads=os.cpu_count() or 1), warn=lambda _: None)
    return bundle


def compare(checkpoint: Path, bundle: Path, variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one model on both sides, print and return all measures."""
    shared = [
        "--device",
        options.device,
        "--tokens",
        str(options.tokens),
        *(w for b in options.batch for w in ("--batch", str(b))),
    ]
    sides = {
        "ours": Side(["--side", "ours", "--bundle", str(bundle), "--variant", variant, *shared]),
        "transformers": Side(["--side", "theirs", "--checkpoint", str(checkpoint), *shared]),
    }
    found: dict[str, Any] = {name: side.ready for name, side in sides.items()}
    print(f"\n{bundle.name} {variant}: {json.dumps(found)}\n{'':33} {'ours':>10} {'transformers':>12} {'ratio':>8}")
    for measure in sides["ours"].ready["measures"]:
        samples: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.repeat):
            for name, side in sides.items():
                samples[name].append(side.ask(measure))
        ratio = statistics.median(a / b for a, b in zip(samples["ours"], samples["transformers"], strict=True))
        found[measure] = {**samples, "ratio": ratio}
        middle = [statistics.median(values) for values in samples.values()]
        share = ""
        if measure.startswith(ENCODER) and (rate := found["transformers"].get("matmul_tflops")):
            share = f"   ours {middle[0] * found['transformers']['vision_tflop'] / rate:.0%} of the card's fp16 rate"
        print(f"{measure:33} {middle[0]:10,.1f} {middle[1]:12,.1f} {ratio:8.2f}{share}", flush=True)
    for name, side in sides.items():
        found[name] |= side.end()
        print(f"{name}: {json.dumps({k: v for k, v in found[name].items() if k != 'measures'})}")
    return found


class Side:
    """A child process that measures when it is asked."""

    def __init__(self, words: list[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready = self._line()

    def ask(self, measure: str) -> float:
        """Return one sample of `measure`."""
        self._say(measure)
        return float(self._line()["value"])

    def end(self) -> dict[str, Any]:
        """End the process; return its last line, with the GPU memory that it used."""
        self._say("end")
        last = self._line()
        self._process.wait()
        return last

    def _say(self, text: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{text}\n")
        self._process.stdin.flush()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        sys.exit(2)  # it has said why


def answer_requests(options: argparse.Namespace) -> int:
    """Take measurements in a side's process as stdin asks for them; return the exit code."""
    from lfm_runtime.engine.failures import failures_are_ours
    from lfm_runtime.engine.gpu import gpu_memory_used
    from lfm_runtime.errors import EdgeError

    try:
        with failures_are_ours("a measurement"):
            side = (Ours if options.side == "ours" else Theirs)(options)
            facts, measures = side.facts(), side.measures()
            for measure in measures.values():  # once for whatever is made at the first time, once for captured steps
                measure()
                measure()
            print(json.dumps({**facts, "measures": list(measures)}), flush=True)
            most = 0
            for line in sys.stdin:
                if line.strip() == "end":
                    print(json.dumps({"gpu_mib": most or None}), flush=True)
                    break
                print(json.dumps({"value": measures[line.strip()]()}), flush=True)
                if options.device == "cuda":
                    most = max(most, gpu_memory_used(os.getpid()) or 0)
    except EdgeError as e:
        print(f"bench_gpu: {options.side}: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
