"""lfm-edge beside llama.cpp (and OpenVINO, onnxruntime-genai) in turns; peers.sh builds what this compares and calls it.

Rules, made before anything was measured:

- A figure is measured by all sides in turns, A B A B …, once before that does not count, then `--rounds` times. What is said is
  the median, and for ratios the median of the rounds' ratios.
- A round is dropped, and another measured (at most as many again), where on one of its sides programs other than ours took more
  than 5 % of the processors' time, or where a fixed piece of work before it, in fp32 or in 8 bits, took more than 1.15 times what it
  took in the fastest tenth of the run (a neighbour on a shared machine, or a lower clock). How many were dropped is in the JSON;
  a row in which no round was undisturbed has the disturbed ones, and says so.
- llama.cpp's programs run once for warmth before they measure; so does, in each turn, what stays loaded between them.
- All sides have the same threads, the same image files and the same number of tokens. Sampling is greedy, an answer's end is
  ignored. llama.cpp: Q4_0 and the f16 projector. lfm-edge: int4 with the int8 decoder for prompts, prepared.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from lfm_runtime import Model
from lfm_runtime.images.pixels import cut_views
from measures import PHOTO, encode
from PIL import Image
from sides import Llama, Process, decode, first_token, images_a_minute, others_of, prefill, second_question, warmed
from turns import GENAI, LLAMA, OPENVINO, OURS, Machine, Row, in_turns

from serve import QUESTION, images, started

ROOT = Path(__file__).resolve().parents[2]
SIZES = ((384, 256), (512, 512), (1280, 960))
HEADS = {
    OURS: "lfm-edge int4",
    LLAMA: "llama.cpp Q4_0",
    OPENVINO: "OpenVINO, fp32 weights",
    GENAI: "onnxruntime-genai, our int4",
}
WIDEST = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}
PROMPTS, PASTS, ROWS = (275, 1500), (10, 512, 1500), (1, 4, 8)


def in_one_process(
    folder: Path, llama: Llama, threads: int, measured: Callable[[Row], None], about: dict[str, Any]
) -> None:
    """Vision, prompts and tokens with models that are loaded; notes the others' versions."""
    settings = {"profile": "generic", "threads": threads, "variant": "int4", "prefill": "int8"}
    model = Model.load(str(folder / "bundle"), **settings)
    pictures, views = {}, {}
    for width, height in SIZES:
        path = folder / f"{width}x{height}.png"
        Image.open(PHOTO).convert("RGB").resize((width, height)).save(path)
        pictures[width, height] = path
        opened = model.open(path)
        cut = cut_views(opened.image, opened.layout, model.setup.images)
        for n, (view, patches) in enumerate(zip(opened.layout.views, cut, strict=True)):
            views[f"{width}x{height}/{n}/{view.rows}x{view.columns}"] = patches
    np.savez(folder / "views.npz", **views)
    others = others_of(folder, threads, folder / "views.npz")
    about |= {name: other.version.split("-")[0] for name, other in others.items()}
    for (width, height), path in pictures.items():
        sides = {OURS: warmed(encode(model, Image.open(path))), LLAMA: llama.vision(path)}
        if OPENVINO in others:
            sides[OPENVINO] = warmed(others[OPENVINO].measure("vision", f"{width}x{height}"))
        count = sum(name.startswith(f"{width}x{height}/") for name in views)
        measured(Row(f"vision, {width}×{height}" + (f" ({count} views)" if count > 1 else ""), "ms", sides))
    for tokens in PROMPTS:
        sides = {OURS: warmed(prefill(model, tokens)), LLAMA: llama.bench("-p", tokens, "-n", 0)}
        sides |= {name: warmed(other.measure("prefill", tokens)) for name, other in others.items()}
        measured(Row(f"prompt of {tokens:,} tokens", "tok/s", sides))
    for past in PASTS:
        sides = {OURS: warmed(decode(model, past)), LLAMA: llama.bench("-p", 0, "-n", 32, "-d", past)}
        sides |= {name: warmed(other.measure("decode", past)) for name, other in others.items()}
        measured(Row(f"tokens after {past:,}", "tok/s", sides, 1))
    for other in others.values():
        other.process.kill()


def in_own_processes(folder: Path, llama: Llama, threads: int, measured: Callable[[Row], None]) -> None:
    """One question by a program that starts for it: time and memory."""
    image = folder / "512x512.png"
    ours = [sys.executable, "-m", "lfm_runtime", "run", str(folder / "bundle"), str(image), "-p", QUESTION, "--quiet"]
    ours += ["--variant", "int4", "--threads", str(threads), "--temperature", "0"]
    fast = [*ours, "--prefill", "int8"]
    one = {OURS: Process([*fast, "--max-new-tokens", "1"]), LLAMA: Process(llama.one_shot(image, 1))}
    measured(Row("start, image, first token, end", "ms", {name: p.run for name, p in one.items()}))
    small = Process([*ours, "--prefill", "none", "--low-memory", "--max-new-tokens", "32"])
    for kind, process in {"": Process([*fast, "--max-new-tokens", "32"]), " (low memory)": small}.items():
        pair = {OURS: process, LLAMA: Process(llama.one_shot(image, 32))}

        def peak(p: Process) -> float:
            p.run()
            return p.peaks[-1]

        row = Row(f"largest memory{kind}", "MiB", {name: lambda p=p: peak(p) for name, p in pair.items()})
        measured(row)
        beside = Row(f"largest memory not mapped from files{kind}", "MiB", {})
        beside.values = {name: p.anonymous[-len(row.values[name]) :] for name, p in pair.items() if row.values}
        measured(beside)


def in_servers(folder: Path, llama: Llama, threads: int, measured: Callable[[Row], None]) -> None:
    """Requests over HTTP, the same to both."""
    for rows in ROWS:
        ours = [sys.executable, "-m", "lfm_runtime", "serve", str(folder / "bundle"), "--port", "8191", "--quiet"]
        ours += ["--threads", str(threads), "--variant", "int4", "--prefill", "int8"]
        ours += ["--rows", str(rows), "--context", "2048"]
        with ExitStack() as stack:
            peers = [
                stack.enter_context(started(OURS, ours, 8191)),
                stack.enter_context(started(LLAMA, llama.server(rows, 8192), 8192)),
            ]
            if rows == 1:
                firsts = {p.name: first_token(p, images(1)) for p in peers}
                measured(Row("first token, new image of 512×512, HTTP", "ms", firsts))
                image = next(images(2))
                measured(
                    Row("second question, same image, HTTP", "ms", {p.name: second_question(p, image) for p in peers})
                )
            rates = {p.name: images_a_minute(p, rows) for p in peers}
            measured(Row(f"images a minute, 64 tokens each, {rows} at a time", "1/min", rates, 1))


def table(found: dict[str, Any]) -> str:
    """Markdown: on what and with what it was measured, and the figures."""
    machine, rows = found["machine"], [Row.from_json(raw) for raw in found["rows"]]
    names = [name for name in HEADS if any(name in row.values for row in rows)]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("onnxruntime", LLAMA, OPENVINO, GENAI) if name in machine
    )
    said = (
        f"Random weights in the shapes of LFM2.5-VL-450M, {machine['threads']} threads of an {machine['processor']}, "
        f"medians of interleaved rounds, {machine['date']}: {versions}"
    )
    lines = [f"{said} ([method](docs/performance.md)).\n"]
    lines += [
        f"| | {' | '.join(HEADS[name] for name in names)} | better than llama.cpp |",
        "| --- |" + " --- |" * (len(names) + 1),
    ]
    for row in rows:
        cells = [
            f"{statistics.median(row.values[name]):,.{row.digits}f} {row.unit}" if name in row.values else ""
            for name in names
        ]
        ratio = row.ratio(LLAMA)
        name = f"{row.name} (disturbed)" if row.disturbed else row.name
        lines.append(f"| {name} | {' | '.join(cells)} | {f'{ratio:.2f} ×' if ratio else ''} |")
    return "\n".join(lines) + "\n"


def into_pages(made: str) -> None:
    """Between the two marks of README.md and docs/performance.md."""
    for name, text in (
        ("README.md", made),
        ("docs/performance.md", made.replace(" ([method](docs/performance.md))", "")),
    ):
        before, _, rest = (ROOT / name).read_text(encoding="utf-8").partition("<!-- peers -->\n")
        _, _, after = rest.partition("<!-- /peers -->\n")
        marked = f"{before}<!-- peers -->\n{text}<!-- /peers -->\n{after}"
        (ROOT / name).write_text(marked, encoding="utf-8")


def machine_of(programs: Path, threads: int) -> dict[str, Any]:
    """What everything was measured with."""
    about = Path("/proc/cpuinfo").read_text()
    cpu = re.search(r"^model name\s*: (.*)$", about, re.MULTILINE)
    widest = next((f" with {name}" for flag, name in WIDEST.items() if re.search(rf"\b{flag}\b", about)), "")
    server = [programs / "llama-server", "--version"]
    build = subprocess.run(server, capture_output=True, text=True, errors="replace", check=True)
    commit = re.search(r"commit (\w+)|\((\w+)\)", build.stdout + build.stderr)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": (cpu[1] if cpu else platform.machine()) + widest,
        "threads": threads,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        LLAMA: next(filter(None, commit.groups())) if commit else "of an unknown build",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama", type=Path, required=True, help="folder of its programs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", metavar="TEXT", help="measure anew only figures with this in their names")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md and docs/performance.md")
    options = parser.parse_args()
    about, rows, fastest = machine_of(options.llama, options.threads), list[Row](), {}
    output = options.folder / "peers.json"

    if options.only and output.exists():
        known = json.loads(output.read_text())
        rows += map(Row.from_json, known["rows"])
        fastest = known["machine"].get("fastest pulse ms", {})
    machine = Machine(fastest)

    def measured(row: Row) -> None:
        """A row is measured, and all that there is so far is written."""
        if options.only not in row.name:
            return
        at = next((n for n, known in enumerate(rows) if known.name == row.name), len(rows))
        rows[at : at + 1] = [row]
        if row.sides:
            in_turns(row, options.rounds, machine)
        about["load average"] = {"median": statistics.median(machine.loads), "largest": max(machine.loads)}
        about["pulse ms"] = {n: {"median": statistics.median(v), "largest": max(v)} for n, v in machine.pulses.items()}
        about["fastest pulse ms"] = machine.fastest()
        output.write_text(json.dumps({"machine": about, "rows": [row.to_json() for row in rows]}, indent=1) + "\n")

    llama = Llama(options.llama, options.folder, options.threads)
    arguments = (options.folder, llama, options.threads, measured)
    in_one_process(*arguments, about)
    in_own_processes(*arguments)
    in_servers(*arguments)
    made = table(json.loads(output.read_text()))
    output.with_suffix(".md").write_text(made)
    print(f"\n{made}")
    if options.readme:
        into_pages(made)


if __name__ == "__main__":
    main()
