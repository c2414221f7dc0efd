"""Instructions of a 450M on the processors of a Raspberry Pi 5 and 4, counted by an emulator: for choosing variants where
no board is at hand. Counts are exact and repeat; times they are not.

    scripts/checks/arm64_sandbox.sh        # once: makes the root for aarch64 in build/arm64
    python scripts/bench/instructions.py [--onnxruntime 1.32.0] [--cpu cortex-a76 …] [-o FILE.json]

`i8mm` is a processor with products of 8-bit matrices, as an Apple M2 or a Graviton 3, without SVE.

Needs root on Debian with qemu-user (7.2 or another with plugin interface 1) and gcc. A whole model would take hours, so two
are counted whose towers have 2 and 4 layers: the difference is what layers cost, and 12 and 16 of them are reckoned.
One thread, no prepared weights; an image of 256 patches, a prompt of 32 tokens, 8 tokens after it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parents[1]
WORK = ROOT / "build" / "arm64"
PACKAGES = ("numpy==2.4.6", "pillow==13.0.0", "psutil==7.2.2")
CPUS = {"cortex-a76": "cortex-a76", "cortex-a72": "cortex-a72", "i8mm": "max,sve=off,sme=off"}
"""By the names of their /proc/cpuinfo in WORK, what qemu calls them."""
VARIANTS = ("fp32", "int8", "int4")
MARK = 5000  # of instructions.c
STAGES = {"image": (256, 12), "prompt": (32, 16), "token": (8, 16)}
"""What is counted, of how many, and the layers of the 450M's tower that does it."""
CUTS = (2, 4)
KINDS = ("vector", "memory", "other")


@dataclass(frozen=True)
class Count:
    """Instructions: arithmetic on vectors and floats, loads and stores, everything else."""

    vector: float
    memory: float
    other: float

    def reckoned(self, more: Count, layers: int) -> Count:
        """Of a tower of so many layers; `self` has CUTS[0] of them, `more` CUTS[1]."""
        times = (layers - CUTS[0]) / (CUTS[1] - CUTS[0])
        return Count(*(a + times * (b - a) for a, b in ((getattr(self, k), getattr(more, k)) for k in KINDS)))


def inside(bundle: str, variant: str) -> None:
    """In the emulator: every stage between two marks."""
    import ctypes

    from lfm_runtime import Model
    from lfm_runtime.report import Report
    from PIL import Image

    mark = ctypes.CDLL(None).syscall
    settings = {"do_image_splitting": False, "max_image_tokens": 64, "threads": 1, "spinning": False}
    model = Model.load(bundle, profile="generic", variant=variant, prefill="none", prepared=False, **settings)
    image = [model.open(Image.new("RGB", (256, 256), (90, 120, 150)))]
    (view,) = image[0].layout.views
    prompt, steps = STAGES["prompt"][0], STAGES["token"][0]
    assert view.rows * view.columns == STAGES["image"][0], view
    model.sessions.vision()
    state = model.decoder.start(prompt + steps)
    embeds = model.decoder.embed([10 + n for n in range(prompt)])
    mark(MARK, 0)
    model.encode(image, Report())
    mark(MARK, 1)
    state.step(embeds)
    mark(MARK, 2)
    for n in range(steps):
        state.step_token(10 + n)
    mark(MARK, 3)


def made(layers: int) -> Path:
    """A bundle of a checkpoint with so many layers; what is there is kept."""
    from peers_made import rounded, run  # not in the emulator, which has no tools for quantizing

    folder = WORK / f"450m-{layers}"
    bundle = folder / "bundle"
    if not (bundle / "manifest.json").exists():
        run(sys.executable, BENCH / "make_random_checkpoint.py", "--size", f"450m-{layers}", folder / "checkpoint")
        run(sys.executable, "-m", "lfm_runtime", "export", folder / "checkpoint", "-o", bundle)
    variants = json.loads((bundle / "manifest.json").read_text())["variants"]
    for variant in {"int8", "int4"} - variants.keys():
        recipe = ("--recipe", rounded(bundle)) if variant == "int4" else ("--method", "rtn")
        run(sys.executable, "-m", "lfm_runtime", "quantize", bundle, "--variant", variant, *recipe)
    return bundle


def prepared(release: str) -> Path:
    """The plugin; returns a folder with the packages for aarch64."""
    from peers_made import run

    plugin, packages = WORK / "instructions.so", WORK / f"packages-{release}"
    run("gcc", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-o", plugin, BENCH / "instructions.c")
    if not packages.exists():
        platforms = [f"--platform=manylinux{glibc}_aarch64" for glibc in ("_2_28", "_2_27", "2014")]
        where = ("--target", packages, "--python-version", "3.13", "--only-binary", ":all:", "--no-deps")
        run(sys.executable, "-m", "pip", "install", *where, *platforms, *PACKAGES, f"onnxruntime=={release}")
    known = (WORK / "cortex-a76").read_text()
    (WORK / "i8mm").write_text(known.replace("asimddp", "asimddp i8mm bf16"))
    return packages


def counted(bundle: Path, cpu: str, variant: str, packages: Path) -> dict[str, Count]:
    """Of each stage; of one token."""
    paths = ":".join(str(p) for p in (packages, ROOT / "runtime", ROOT / "profiles", BENCH))
    emulator = ["qemu-aarch64", "-cpu", CPUS[cpu], "-L", WORK / "root", "-E", f"PYTHONPATH={paths}"]
    python = ["-plugin", WORK / "instructions.so", WORK / "root" / "usr" / "bin" / "python3", "-B"]
    words = [*emulator, *python, __file__, "--inside", bundle, variant]
    # onnxruntime looks into /proc/cpuinfo for what the processor can do
    mounted = f"mount --bind '{WORK / cpu}' /proc/cpuinfo && exec \"$@\""
    shell = ["unshare", "-m", "sh", "-c", mounted, "sh"]
    done = subprocess.run([*shell, *map(str, words)], capture_output=True, text=True, check=False)
    marks = re.findall(r"^LFM (\d) (\d+) (\d+) (\d+)$", done.stderr, re.MULTILINE)
    if done.returncode or [m[0] for m in marks] != ["0", "1", "2", "3"]:
        raise SystemExit(f"{done.stderr[-2000:]}\n{cpu}, {variant}: the emulator ended with {done.returncode}")
    image, prompt, tokens = (Count(*map(float, mark[1:])) for mark in marks[1:])
    steps = STAGES["token"][0]
    return {"image": image, "prompt": prompt, "token": Count(*(getattr(tokens, k) / steps for k in KINDS))}


def table(found: dict[str, dict[str, dict[str, Count]]]) -> str:
    """Millions of instructions of the whole 450M."""
    rows = ["| | | image | prompt | token |", "| --- | --- | --- | --- | --- |"]
    for cpu, variants in found.items():
        for variant, stages in variants.items():
            cells = [" + ".join(f"{getattr(stages[s], k) / 1e6:,.0f}" for k in KINDS) for s in STAGES]
            rows.append(f"| {cpu} | {variant} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnxruntime", default="1.32.0", metavar="RELEASE")
    parser.add_argument("--cpu", nargs="+", choices=CPUS, default=list(CPUS))
    parser.add_argument("-o", "--output", type=Path, default=WORK / "instructions.json")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(*options.inside)
        return
    if not (WORK / "root" / ".complete").exists():
        parser.error(f"no root for aarch64 in {WORK}; run scripts/checks/arm64_sandbox.sh first")
    packages = prepared(options.onnxruntime)
    fewer, more = (made(layers) for layers in CUTS)
    found: dict[str, dict[str, dict[str, Count]]] = {}
    for cpu in options.cpu:
        for variant in VARIANTS:
            small, large = (counted(bundle, cpu, variant, packages) for bundle in (fewer, more))
            found.setdefault(cpu, {})[variant] = {
                stage: small[stage].reckoned(large[stage], layers) for stage, (_, layers) in STAGES.items()
            }
            print(f"{cpu} {variant} done", flush=True)
    options.output.write_text(json.dumps(found, default=vars, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
