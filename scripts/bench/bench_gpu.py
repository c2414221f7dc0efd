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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "demo" / "make"))  # torchvision_shim
sys.path.insert(0, str(ROOT / "scripts"))
SIDE = 32  # patches a side: one 512×512 view
PROMPT, IMAGE_TOKENS = 275, 256
CONTEXTS = (0, 512)
ENCODER = "encoder alone"
"""With inputs and features on the device; "vision" takes in pixels from the host and gives features back to it."""
Measure = Callable[[], float]


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
            facts, measures = (ours if options.side == "ours" else theirs)(options)
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


def views(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pixels [n, 1024, 768], mask and grids of 512×512 views."""
    pixels = np.random.default_rng(0).uniform(-1, 1, (count, SIDE * SIDE, 768)).astype(np.float32)
    return pixels, np.ones(pixels.shape[:2], np.int64), np.full((count, 2), SIDE, np.int64)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ours(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Measure]]:
    """The runtime's own steps, as an answer makes them: inputs come from the host and features go back there."""
    import onnxruntime as ort
    from lfm_runtime import Model
    from lfm_runtime.decode.sampling import GenerationSettings, Sampler
    from lfm_runtime.engine.gpu import VIEWS_AT_ONCE

    profile = (
        ("x86-cuda-tensorrt" if options.variant[0] == "fp16-trt" else "x86-cuda")
        if options.device == "cuda"
        else "generic"
    )
    model = Model.load(options.bundle, profile=profile, variant=options.variant[0])
    vision, decoder = model.graphs.vision(), model.decoder
    batches = [
        b for b in options.batch if options.variant[0] != "fp16-trt" or b <= VIEWS_AT_ONCE
    ]  # beyond, TensorRT makes another engine
    ids = [10 + i % 300 for i in range(PROMPT)]
    prompt, greedy = decoder.embed(ids), GenerationSettings(temperature=0, repetition_penalty=1.0)

    def encode(count: int) -> Measure:
        pixels, mask, grids = views(count)
        feeds = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grids}
        return lambda: count / seconds(lambda: vision.run(["image_features"], feeds))

    def encode_there(count: int) -> Measure:
        binding = vision.io_binding()
        held = [ort.OrtValue.ortvalue_from_numpy(array, options.device, 0) for array in views(count)]
        for name, value in zip(("pixel_values", "pixel_attention_mask", "spatial_shapes"), held, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("image_features", options.device)
        return lambda held=held: count / seconds(lambda: vision.run_with_iobinding(binding))  # noqa: ARG005  (a binding holds nothing)

    def prefill() -> float:
        state = decoder.start(512)
        return PROMPT / seconds(lambda: state.step(prompt))

    def decode(context: int) -> Measure:
        embeds = decoder.embed([10 + i % 300 for i in range(max(1, context))])

        def measure() -> float:
            state = decoder.start(1024)
            sampler = Sampler(greedy, decoder.info.vocabulary, [])
            token = sampler.next(state.step(embeds))
            start = time.perf_counter()
            for _ in range(options.tokens):
                token = sampler.next(state.step_token(token))
            return options.tokens / (time.perf_counter() - start)

        return measure

    pixels, mask, grids = views(1)

    def ttft() -> float:
        def first() -> int:
            (features,) = vision.run(
                ["image_features"], {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grids}
            )
            embeds = prompt.copy()
            embeds[0, 8 : 8 + IMAGE_TOKENS] = features
            return int(decoder.start(512).step(embeds).argmax())

        return seconds(first) * 1e3

    measures: dict[str, Measure] = {f"vision, {b} at once, 1/s": encode(b) for b in batches}
    measures |= {f"{ENCODER}, {b} at once, 1/s": encode_there(b) for b in batches}
    measures |= (
        {"prefill, tok/s": prefill} | {f"decode at {c}, tok/s": decode(c) for c in CONTEXTS} | {"first token, ms": ttft}
    )
    return {"onnxruntime": ort.__version__, "providers": model.graphs.execution.providers}, measures


def theirs(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Measure]]:
    """transformers as its users run it, inputs on the device."""
    import torch
    import torchvision_shim  # noqa: F401  (its image processor is imported with the model)
    import transformers
    from transformers import Lfm2VlForConditionalGeneration

    on_gpu = options.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = Lfm2VlForConditionalGeneration.from_pretrained(options.checkpoint, dtype=dtype, attn_implementation="sdpa")
    model = model.to(options.device).eval()
    ids = torch.tensor([[10 + i % 300 for i in range(PROMPT)]], device=options.device)
    facts: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": str(dtype)}

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def timed(work: Callable[[], object]) -> float:
        wait()
        with torch.inference_mode():
            return seconds(lambda: (work(), wait()))

    def features(pixels: Any, mask: Any, grids: Any) -> Any:
        found = model.model.get_image_features(pixel_values=pixels, spatial_shapes=grids, pixel_attention_mask=mask)
        found = getattr(found, "pooler_output", found)
        return torch.cat(list(found)) if isinstance(found, (list, tuple)) else found

    def on_device(arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[Any, Any, Any]:
        pixels, mask, grids = (torch.from_numpy(a).to(options.device) for a in arrays)
        return pixels.to(dtype), mask, grids

    def encode(count: int) -> Measure:
        arrays = views(count)
        return lambda: count / timed(lambda: features(*on_device(arrays)).float().cpu())

    def encode_there(count: int) -> Measure:
        inputs = on_device(views(count))
        return lambda: count / timed(lambda: features(*inputs))

    def decode(context: int, step: Any) -> Measure:
        def measure() -> float:
            with torch.inference_mode():
                out = model(input_ids=ids[:, :1].repeat(1, max(1, context)), use_cache=True, logits_to_keep=1)
            token, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

            def run() -> None:
                nonlocal token
                for _ in range(options.tokens):
                    out = step(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    token = out.logits[:, -1].argmax(-1, keepdim=True)
                    token.item()  # a user reads it

            return options.tokens / timed(run)

        return measure

    inputs = on_device(views(1))

    def first() -> int:
        embeds = model.get_input_embeddings()(ids)
        embeds[0, 8 : 8 + IMAGE_TOKENS] = features(*inputs)
        return int(model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

    measures: dict[str, Measure] = {f"vision, {b} at once, 1/s": encode(b) for b in options.batch}
    measures |= {f"{ENCODER}, {b} at once, 1/s": encode_there(b) for b in options.batch}
    measures["prefill, tok/s"] = lambda: PROMPT / timed(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))
    step = model
    if on_gpu:
        compiled = torch.compile(model.forward, dynamic=True)
        try:
            eager, fast = decode(0, model)(), (decode(0, compiled)(), decode(0, compiled)())[1]
            facts |= {"eager_tok_s": round(eager, 1), "compiled_tok_s": round(fast, 1)}
            step = compiled if fast > eager else model
        except Exception as e:  # noqa: BLE001  (whatever a compiler raises: the eager model is measured then)
            facts["not_compiled"] = " ".join(str(e).split())[:200]
        facts["matmul_tflops"] = round(achievable(torch), 1)
        facts["vision_tflop"] = vision_flop(model) / 1e12
    measures |= {f"decode at {c}, tok/s": decode(c, step) for c in CONTEXTS} | {
        "first token, ms": lambda: timed(first) * 1e3
    }
    return facts, measures


def achievable(torch: Any) -> float:
    """TFLOP/s of this card's fp16 products of 8192×8192 matrices."""
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    taken = seconds(lambda: ([a @ b for _ in range(10)], torch.cuda.synchronize()))
    return float(10 * 2 * 8192**3 / taken / 1e12)


def vision_flop(model: Any) -> float:
    """Of one 512×512 view: two for each weight and patch (a quarter of them reach the projector), and attention's
    products.
    """
    config, patches = model.config.vision_config, SIDE * SIDE
    weights = sum(
        p.numel() for n, p in model.model.vision_tower.named_parameters() if p.ndim == 2 and "position" not in n
    )
    projector = sum(p.numel() for p in model.model.multi_modal_projector.parameters() if p.ndim == 2)
    attention = 2 * 2 * patches**2 * config.hidden_size * config.num_hidden_layers
    return float(2 * weights * patches + 2 * projector * patches / 4 + attention)


if __name__ == "__main__":
    sys.exit(main())
