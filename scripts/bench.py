"""Time the runtime against the bare graphs, side by side: what does Python add to onnxruntime?

    python scripts/bench.py BUNDLE [--threads 2] [--repeat 7] [--json FILE]

Every pair is measured A B A B …; medians with minimum and maximum. BUNDLE is usually the random 450M checkpoint of
make_random_checkpoint.py. Nothing else should run on the machine: the load average is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
from lfm_runtime import Model
from lfm_runtime.images import cut_views
from lfm_runtime.report import Report, memory_mib
from PIL import Image


class TimedSession:
    """An InferenceSession that adds up the time spent inside it."""

    def __init__(self, session) -> None:
        self.session = session
        self.seconds: list[float] = []

    def __getattr__(self, name):
        return getattr(self.session, name)

    def run(self, *arguments):
        start = time.perf_counter()
        out = self.session.run(*arguments)
        self.seconds.append(time.perf_counter() - start)
        return out

    def run_with_iobinding(self, binding):
        start = time.perf_counter()
        self.session.run_with_iobinding(binding)
        self.seconds.append(time.perf_counter() - start)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def vision(model: Model, width: int, height: int, repeat: int) -> dict:
    """ms of the runtime's encode of one image, and of a bare session.run with the same patches."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    planned = model.open(image)
    (view,) = planned.plan.views
    (patches,) = cut_views(planned.image, planned.plan, model.images)
    feeds = {
        "pixel_values": patches[None], "pixel_attention_mask": np.ones((1, len(patches)), np.int64),
        "spatial_shapes": np.array([[view.rows, view.columns]], np.int64),
    }  # fmt: skip
    runtime, bare = [], []
    for i in range(repeat + 1):
        report = Report()
        model.encode([planned], report)
        start = time.perf_counter()
        model._vision.run(None, feeds)
        if i:  # the first is warm-up
            runtime.append(report.timing_ms["vision"])
            bare.append((time.perf_counter() - start) * 1e3)
    return {"patches": len(patches), "runtime_ms": spread(runtime), "bare_ms": spread(bare),
            "ratio": statistics.median(a / b for a, b in zip(runtime, bare, strict=True))}  # fmt: skip


def prefill(model: Model, tokens: int, repeat: int) -> dict:
    embeds = model.decoder.embed([10 + i % 300 for i in range(tokens)])
    rates = []
    for i in range(repeat + 1):
        state = model.decoder.start(tokens + 1)
        start = time.perf_counter()
        state.step(embeds)
        if i:
            rates.append(tokens / (time.perf_counter() - start))
    return {"tokens": tokens, "tok_s": spread(rates)}


def decode(model: Model, context: int, tokens: int, repeat: int) -> dict:
    """tok/s of a whole answer, and what of each token's time is spent outside onnxruntime."""
    sessions = model.decoder.session, model.decoder.embed_session
    timed = TimedSession(sessions[0]), TimedSession(sessions[1])
    model.decoder.session, model.decoder.embed_session = timed
    eos, model.bundle.__dict__["eos"] = model.bundle.eos, ()  # a fixed number of tokens
    rates, overheads = [], []
    try:
        question = "a" * max(1, context)  # one token each: no merge joins them
        for i in range(repeat + 1):
            for session in timed:
                session.seconds.clear()
            answer = model.answer([], question, temperature=0, repetition_penalty=1, max_new_tokens=tokens)
            answer.text()
            if i:
                per_token = answer.report.timing_ms["decode_per_token"]
                inside = sum(sum(session.seconds[1:]) for session in timed) * 1e3 / (tokens - 1)  # [0] is the prompt
                rates.append(1e3 / per_token)
                overheads.append(per_token - inside)
    finally:
        model.decoder.session, model.decoder.embed_session = sessions
        model.bundle.__dict__["eos"] = eos
    return {"context": answer.report.prompt_tokens, "tok_s": spread(rates), "python_ms_per_token": spread(overheads)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--variant")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    import onnxruntime

    model = Model.load(options.bundle, variant=options.variant, threads=options.threads)
    load = os.getloadavg()[0]
    tile = model.images.tile_size
    found = {
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version(),
                    "onnxruntime": onnxruntime.__version__, "threads": options.threads, "load_average": load},
        "variant": model.variant, "load_ms": model.load_ms,
        "vision": [vision(model, w, h, options.repeat) for w, h in ((tile, tile), (3 * tile // 4, tile // 2))],
        "prefill": [prefill(model, 275, options.repeat)],
        "decode": [decode(model, context, 48, options.repeat) for context in (0, 512)],
        "memory_mib": memory_mib(),
    }  # fmt: skip
    print(f"{options.bundle} {model.variant}, {options.threads} threads, onnxruntime {onnxruntime.__version__}, load average {load:.2f}")
    for row in found["vision"]:
        a, b = row["runtime_ms"], row["bare_ms"]
        print(f"vision  {row['patches']:5d} patches  runtime {a['median']:8.1f} ms ({a['min']:.1f}…{a['max']:.1f})  "
              f"bare {b['median']:8.1f} ms ({b['min']:.1f}…{b['max']:.1f})  ratio {row['ratio']:.3f}")  # fmt: skip
    for row in found["prefill"]:
        a = row["tok_s"]
        print(f"prefill {row['tokens']:5d} tokens   {a['median']:8.1f} tok/s ({a['min']:.1f}…{a['max']:.1f})")
    for row in found["decode"]:
        a, b = row["tok_s"], row["python_ms_per_token"]
        print(f"decode  at {row['context']:5d}      {a['median']:8.1f} tok/s ({a['min']:.1f}…{a['max']:.1f})  "
              f"Python {b['median']:.3f} ms a token ({b['min']:.3f}…{b['max']:.3f})")  # fmt: skip
    memory = found["memory_mib"]
    print(f"load {model.load_ms:.0f} ms, peak {memory['peak'] or memory['rss']:.0f} MiB")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
