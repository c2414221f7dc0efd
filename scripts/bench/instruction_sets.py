"""What a bundle costs with the kernels that onnxruntime has for older x86 processors, measured on this one in turns.

    python scripts/bench/instruction_sets.py build/peers/bundle [--threads 2] [--rounds 3] [-o FILE.json]

Instruction sets are hidden from onnxruntime, which then takes its other kernels (cpuid.c; needs a processor whose
/proc/cpuinfo names cpuid_fault, and cc). Clock, caches and memory are this machine's: ratios between variants carry over to
an older processor, absolute times do not. Each set and variant is a process of its own; medians of rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from lfm_runtime import Model
from lfm_runtime.decode.batch_state import BatchState
from measures import PHOTO, encode, timed_ms
from PIL import Image
from sides import decode, fed

BENCH = Path(__file__).resolve().parent
SETS = {  # what is hidden
    "AVX2": "amx,avx512,avx-vnni",
    "AVX2 + AVX-VNNI": "amx,avx512",
    "AVX-512": "amx,avx512-vnni,avx-vnni",
    "AVX-512 VNNI": "amx",
    "AMX": "",
}
VARIANTS = ("fp32", "int8", "int4")
VIEW, PROMPT, PAST, ROWS = (512, 512), 275, 512, (2, 4, 8)


def measure(bundle: str, variant: str, threads: int) -> dict[str, float]:
    """In a process with one set: ms of an image, of a prompt, of a token, of a step of several answers."""
    how = {"profile": "generic", "prefill": "none", "prepared": False, "spinning": True}
    model = Model.load(bundle, variant=variant, threads=threads, **how)
    image = encode(model, Image.open(PHOTO).convert("RGB").resize(VIEW))
    token = decode(model, PAST)

    def of(measured: Callable[[], float], times: int = 3) -> float:
        measured()
        return statistics.median(measured() for _ in range(times))

    found = {
        f"image of {VIEW[0]}×{VIEW[1]}": of(image),
        f"prompt of {PROMPT} tokens": of(lambda: timed_ms(lambda: fed(model, PROMPT, 1))),
        f"token after {PAST}": 1e3 / of(token),
    }
    for rows in ROWS:
        found[f"step of {rows} answers"] = of(lambda rows=rows: step(model, rows))
    return found


def step(model: Model, rows: int, past: int = 64, steps: int = 16) -> float:
    """ms of a decode step of so many answers at once, sampling left out."""
    state = BatchState(model.decoder, rows, past + steps + 1)
    embeds = model.decoder.embed([10 + n for n in range(past)])
    for row in range(rows):
        one = state.reading(row)
        one.step(embeds)
        state.join(row, one)
    tokens = model.decoder.embed([20 + n for n in range(rows)]).reshape(rows, 1, -1)
    return timed_ms(lambda: [state.step(tokens) for _ in range(steps)]) / steps


def hiding() -> Callable[[str], dict[str, str]]:
    """Instruction sets, as SETS names them → the environment of a process that does not see them."""
    if "cpuid_fault" not in Path("/proc/cpuinfo").read_text():
        raise SystemExit(
            "instruction sets can be hidden only where /proc/cpuinfo names cpuid_fault; not on this machine"
        )
    library = str(Path(tempfile.mkdtemp()) / "cpuid.so")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, str(BENCH / "cpuid.c")], check=True)
    return lambda hidden: {"CPUID_HIDES": hidden, "LD_PRELOAD": library}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.bundle, options.one, options.threads)))
        return
    hide = hiding()
    words = [sys.executable, __file__, options.bundle, "--threads", str(options.threads), "--one"]
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for name, hidden in SETS.items():
            environment = {**os.environ, **hide(hidden)}
            for variant in VARIANTS:
                done = subprocess.run([*words, variant], env=environment, stdout=subprocess.PIPE, text=True, check=True)
                found.setdefault(f"{name} | {variant}", []).append(json.loads(done.stdout))
    measures = list(next(iter(found.values()))[0])
    print(f"| ms, {options.threads} threads | | {' | '.join(measures)} |\n| --- | --- |{' --- |' * len(measures)}")
    for name, rows in found.items():
        print(f"| {name} | " + " | ".join(f"{statistics.median(row[m] for row in rows):,.1f}" for m in measures) + " |")
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
