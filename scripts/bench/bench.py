"""Every figure of docs/performance.md in one run: encode, prefill, decode, first token, memory, start; each beside a
baseline.

    python scripts/bench/bench.py BUNDLE --variant int4 --prefill int8 [--threads 2] [--repeat 7] [--json FILE]

BUNDLE is usually the random 450M checkpoint of make_random_checkpoint.py, quantized and prepared. A is the variant as
`run` uses it, B the baseline (`--baseline`, by default the bundle's first variant); they are measured A B A B … after
one warm-up of each, which is reported. Medians with minimum and maximum. What A answers is hashed beside what the
unoptimized path answers: a fast path that says something else is marked. Nothing else should run on the machine: the
load average is printed, and what the machine itself can do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from lfm_runtime import Model
from measures import (
    PHOTO,
    bare_encode,
    batch_rate,
    copying_rate,
    decode_rate,
    documents,
    encode,
    first_token,
    paired,
    prefill_rate,
    process,
    python_ms,
    second_question,
    start_ms,
    timed_ms,
)
from PIL import Image

# ----------------------------------------------------------------------------------------------------------- machine


def machine(threads: int) -> dict:
    """What bounds everything: reading memory, and matrix products through onnxruntime (fp32 and per-token int8's)."""
    from concurrent.futures import ThreadPoolExecutor

    arrays = [np.ones(64 << 20, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        best = min(timed_ms(lambda: list(pool.map(np.max, arrays))) for _ in range(5))
    found = {"read_gb_s": sum(a.nbytes for a in arrays) / best / 1e6}
    a = np.ones((1024, 1024), np.float32)
    b = np.ones((1024, 4096), np.float32)
    best = min(timed_ms(lambda: a @ b) for _ in range(5))
    return {**found, "fp32_gflop_s": 2 * 1024 * 1024 * 4096 / best / 1e6}


class Table:
    """The rows measured so far; each is printed when it is there."""

    def __init__(self, repeat: int) -> None:
        self.repeat = repeat
        self.rows: dict[str, dict] = {}

    def row(self, name: str, unit: str, digits: int = 0, **measures: Callable[[], float]) -> None:
        """Measure in turns, and print medians with minimum and maximum."""
        found = self.rows[name] = {"unit": unit, **paired(self.repeat, **measures)}
        parts = [
            f"{who} {v['median']:,.{digits}f} ({v['min']:,.{digits}f}…{v['max']:,.{digits}f})"
            for who, v in found.items()
            if isinstance(v, dict)
        ]
        ratio = f"  ratio {found['ratio']:.3f}" if "ratio" in found else ""
        print(f"{name:34s} {unit:5s}  {'   '.join(parts)}{ratio}", flush=True)

    def memory(self, name: str, found: dict, plain: str) -> None:
        """The memory of a process, and whether it says what the plain path says."""
        self.rows[f"memory, {name}"] = found
        print(
            f"{f'peak of a whole answer, {name}':34s} MiB    {found['peak']:.0f}, at the end {found['rss_anon']:.0f} "
            f"anonymous and {found['rss_file']:.0f} mapped; "
            f"{'the same text' if found['text'] == plain else 'ANOTHER TEXT'}"
        )


@dataclass(frozen=True)
class Models:
    """A, A with the prompt read by another variant where that is asked for, and the baseline."""

    ours: Model
    split: Model | None
    base: Model

    @property
    def best(self) -> Model:
        """A as `run` uses it."""
        return self.split or self.ours


def measure_vision_and_prompt(table: Table, models: Models, square: Image.Image) -> None:
    """Encode and prefill."""
    ours, base, tile = models.ours, models.base, square.width
    small = square.resize((3 * tile // 4, tile // 2))
    both = {ours.setup.variant: encode(ours, square), base.setup.variant: encode(base, square)}
    table.row(f"vision encode, {tile}×{tile}", "ms", **both)
    table.row("  the runtime around the graph", "ms", runtime=encode(ours, square), bare=bare_encode(ours, square))
    table.row(f"  {small.width}×{small.height} against it", "ms", small=encode(ours, small), whole=encode(ours, square))
    rates = {ours.setup.variant: prefill_rate(ours, 275), base.setup.variant: prefill_rate(base, 275)}
    table.row("prefill, 275 tokens", "tok/s", **rates)
    if models.split:
        by = models.split.setup.prefill
        table.row(f"  through {by}", "tok/s", split=prefill_rate(models.split, 275), one=prefill_rate(ours, 275))


def measure_decode(table: Table, models: Models) -> None:
    """Decode: alone, several answers at once, with speculative tokens."""
    ours, base = models.ours, models.base
    for context in (0, 512, 1500):
        rates = {ours.setup.variant: decode_rate(ours, context, 32), base.setup.variant: decode_rate(base, context, 12)}
        table.row(f"decode after {context} tokens", "tok/s", 1, **rates)
    for at_once in (2, 4, 8):
        rates = {"together": batch_rate(ours, at_once, 32), "one": batch_rate(ours, 1, 32)}
        table.row(f"  {at_once} answers at once", "tok/s", 1, **rates)
    for guesses in (2, 4, 8):
        rates = {"guessing": copying_rate(ours, guesses), "without": copying_rate(ours, 0)}
        table.row(f"  {guesses} speculative tokens, all accepted", "tok/s", 1, **rates)
    for guesses in (2, 4, 8):
        guessing, without = documents(ours, guesses), documents(ours, 0)
        for name in guessing:
            if guesses == 4 or name == "all four":
                rates = {"guessing": guessing[name], "without": without[name]}
                table.row(f"  {guesses} speculative, {name}", "tok/s", 1, **rates)
    table.row("  Python of each token", "ms", 3, loop=python_ms(ours))


def measure_processes(table: Table, options: argparse.Namespace, settings: dict, image: Path) -> None:
    """Memory and start, each in a process of its own."""
    runs = {"unprepared": {"prepared": False}, "as it comes": {}, "low memory": {"low_memory": True}}
    if options.prefill:
        runs[f"prefill {options.prefill}"] = {"prefill": options.prefill}
    plain = ""
    for name, more in runs.items():
        found = process(options.bundle, image, 16, **{**settings, **more})
        plain = plain or found["text"]
        table.memory(name, found, plain)
    starts = {
        "prepared": start_ms(options.bundle, **settings),
        "unprepared": start_ms(options.bundle, prepared=False, **settings),
    }
    table.row("start to loaded and ended", "ms", **starts)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--variant")
    parser.add_argument("--prefill", help="variant whose decoder does the prefill")
    parser.add_argument("--baseline", help="variant to measure beside it; default: the bundle's first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    options = parse()
    # What is measured is what is said here.
    common = {"profile": "generic", "threads": options.threads, "prefill": "none"}
    asked = {**common, "variant": options.variant}
    ours = Model.load(options.bundle, **asked)
    split = Model.load(options.bundle, **{**asked, "prefill": options.prefill}) if options.prefill else None
    base = Model.load(options.bundle, **common, variant=options.baseline or next(iter(ours.bundle.variants)))
    models = Models(ours, split, base)
    tile = ours.setup.images.tile_size
    square = Image.open(PHOTO).convert("RGB").resize((tile, tile))
    about = {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "threads": options.threads,
        "load_average": os.getloadavg()[0],
        **machine(options.threads),
    }
    print(
        f"{options.bundle}: {ours.setup.variant}{f', prefill {options.prefill}' if split else ''} beside {base.setup.variant}"
    )
    print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in about.items()))
    table = Table(options.repeat)
    measure_vision_and_prompt(table, models, square)
    measure_decode(table, models)
    best = models.best
    firsts = {"ours": first_token(best, square), base.setup.variant: first_token(base, square)}
    table.row("first token, image and question", "ms", **firsts)
    seconds = {"cached": second_question(best, square), "anew": first_token(best, square)}
    table.row("  second question, same image", "ms", **seconds)
    del models, ours, split, base, best, firsts, seconds
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        square.save(image)
        measure_processes(table, options, asked, image)
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "rows": table.rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
