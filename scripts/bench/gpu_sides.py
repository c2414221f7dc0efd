"""The two sides that bench_gpu.py measures: the runtime, and transformers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SIDE = 32  # patches a side: one 512×512 view
PROMPT, IMAGE_TOKENS = 275, 256
CONTEXTS = (0, 512)
ENCODER_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
ENCODER = "encoder alone"
"""With inputs and features on the device; "vision" takes in pixels from the host and gives features back to it."""
Measure = Callable[[], float]


def views(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pixels [n, 1024, 768], mask and grids of 512×512 views."""
    pixels = np.random.default_rng(0).uniform(-1, 1, (count, SIDE * SIDE, 768)).astype(np.float32)
    return pixels, np.ones(pixels.shape[:2], np.int64), np.full((count, 2), SIDE, np.int64)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Ours:
    """The runtime's own steps, as an answer makes them: inputs come from the host and features go back there."""

    def __init__(self, options: argparse.Namespace) -> None:
        from lfm_runtime import Model
        from lfm_runtime.engine.gpu import VIEWS_AT_ONCE

        variant = options.variant[0]
        cuda = "x86-cuda-tensorrt" if variant == "fp16-trt" else "x86-cuda"
        self.options = options
        self.model = Model.load(
            options.bundle, profile=cuda if options.device == "cuda" else "generic", variant=variant
        )
        self.vision, self.decoder = self.model.sessions.vision(), self.model.decoder
        # Beyond so many views, TensorRT makes another engine.
        self.batches = [b for b in options.batch if variant != "fp16-trt" or b <= VIEWS_AT_ONCE]
        self.prompt = self.decoder.embed([10 + i % 300 for i in range(PROMPT)])

    def facts(self) -> dict[str, Any]:
        """What measured."""
        import onnxruntime as ort

        return {"onnxruntime": ort.__version__, "providers": self.model.sessions.execution.providers}

    def measures(self) -> dict[str, Measure]:
        """By name, with the unit."""
        found: dict[str, Measure] = {f"vision, {b} at once, 1/s": self.encode(b) for b in self.batches}
        found |= {f"{ENCODER}, {b} at once, 1/s": self.encode_there(b) for b in self.batches}
        found |= {"prefill, tok/s": self.prefill} | {f"decode at {c}, tok/s": self.decode(c) for c in CONTEXTS}
        return found | {"first token, ms": self.first_token()}

    def encode(self, count: int) -> Measure:
        """Views a second, from the host and back."""
        feeds = dict(zip(ENCODER_INPUTS, views(count), strict=True))
        return lambda: count / seconds(lambda: self.vision.run(["image_features"], feeds))

    def encode_there(self, count: int) -> Measure:
        """Views a second, inputs and features on the device."""
        import onnxruntime as ort

        binding = self.vision.io_binding()
        held = [ort.OrtValue.ortvalue_from_numpy(array, self.options.device, 0) for array in views(count)]
        for name, value in zip(ENCODER_INPUTS, held, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("image_features", self.options.device)

        def measure(held: Any = held) -> float:  # noqa: ARG001  (a binding holds nothing)
            return count / seconds(lambda: self.vision.run_with_iobinding(binding))

        return measure

    def prefill(self) -> float:
        """Tokens a second."""
        state = self.decoder.start(512)
        return PROMPT / seconds(lambda: state.step(self.prompt))

    def decode(self, context: int) -> Measure:
        """Tokens a second behind `context` tokens."""
        from lfm_runtime.decode.sampling import GenerationSettings, Sampler

        greedy = GenerationSettings(temperature=0, repetition_penalty=1.0)
        embeds = self.decoder.embed([10 + i % 300 for i in range(max(1, context))])

        def measure() -> float:
            state = self.decoder.start(1024)
            sampler = Sampler(greedy, self.decoder.info.vocabulary, [])
            token = sampler.next(state.step(embeds))
            start = time.perf_counter()
            for _ in range(self.options.tokens):
                token = sampler.next(state.step_token(token))
            return self.options.tokens / (time.perf_counter() - start)

        return measure

    def first_token(self) -> Measure:
        """ms from pixels to the first token."""
        feeds = dict(zip(ENCODER_INPUTS, views(1), strict=True))

        def first() -> int:
            (features,) = self.vision.run(["image_features"], feeds)
            embeds = self.prompt.copy()
            embeds[0, 8 : 8 + IMAGE_TOKENS] = features
            return int(self.decoder.start(512).step(embeds).argmax())

        return lambda: seconds(first) * 1e3


class Theirs:
    """transformers as its users run it, inputs on the device."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        import torchvision_shim  # noqa: F401  (its image processor is imported with the model)
        from transformers import Lfm2VlForConditionalGeneration

        self.options, self.torch = options, torch
        self.on_gpu = options.device == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        model = Lfm2VlForConditionalGeneration.from_pretrained(
            options.checkpoint, dtype=self.dtype, attn_implementation="sdpa"
        )
        self.model = model.to(options.device).eval()
        self.ids = torch.tensor([[10 + i % 300 for i in range(PROMPT)]], device=options.device)
        self.step: Any = self.model
        self._compiled = self._try_compiling() if self.on_gpu else {}

    def facts(self) -> dict[str, Any]:
        """What measured."""
        import transformers

        versions = {"torch": self.torch.__version__, "transformers": transformers.__version__}
        found: dict[str, Any] = {**versions, "dtype": str(self.dtype), **self._compiled}
        if self.on_gpu:
            found["matmul_tflops"] = round(achievable(self.torch), 1)
            found["vision_tflop"] = vision_flop(self.model) / 1e12
        return found

    def measures(self) -> dict[str, Measure]:
        """By the names of ours."""
        found: dict[str, Measure] = {f"vision, {b} at once, 1/s": self.encode(b) for b in self.options.batch}
        found |= {f"{ENCODER}, {b} at once, 1/s": self.encode_there(b) for b in self.options.batch}
        found["prefill, tok/s"] = lambda: (
            PROMPT / self.timed(lambda: self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1))
        )
        found |= {f"decode at {c}, tok/s": self.decode(c, self.step) for c in CONTEXTS}
        return found | {"first token, ms": self.first_token()}

    def _wait(self) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds until the device has done it."""
        self._wait()
        with self.torch.inference_mode():
            return seconds(lambda: (work(), self._wait()))

    def _features(self, pixels: Any, mask: Any, grids: Any) -> Any:
        found = self.model.model.get_image_features(
            pixel_values=pixels, spatial_shapes=grids, pixel_attention_mask=mask
        )
        found = getattr(found, "pooler_output", found)
        return self.torch.cat(list(found)) if isinstance(found, (list, tuple)) else found

    def _on_device(self, arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[Any, Any, Any]:
        pixels, mask, grids = (self.torch.from_numpy(a).to(self.options.device) for a in arrays)
        return pixels.to(self.dtype), mask, grids

    def encode(self, count: int) -> Measure:
        """Views a second, from the host and back."""
        arrays = views(count)
        return lambda: count / self.timed(lambda: self._features(*self._on_device(arrays)).float().cpu())

    def encode_there(self, count: int) -> Measure:
        """Views a second, inputs and features on the device."""
        inputs = self._on_device(views(count))
        return lambda: count / self.timed(lambda: self._features(*inputs))

    def decode(self, context: int, step: Any) -> Measure:
        """Tokens a second behind `context` tokens."""
        ids = self.ids[:, :1].repeat(1, max(1, context))

        def measure() -> float:
            with self.torch.inference_mode():
                out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            token, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

            def run() -> None:
                nonlocal token
                for _ in range(self.options.tokens):
                    out = step(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    token = out.logits[:, -1].argmax(-1, keepdim=True)
                    token.item()  # a user reads it

            return self.options.tokens / self.timed(run)

        return measure

    def first_token(self) -> Measure:
        """ms from pixels to the first token."""
        inputs = self._on_device(views(1))

        def first() -> int:
            embeds = self.model.get_input_embeddings()(self.ids)
            embeds[0, 8 : 8 + IMAGE_TOKENS] = self._features(*inputs)
            return int(self.model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

        return lambda: self.timed(first) * 1e3

    def _try_compiling(self) -> dict[str, Any]:
        """Decode with the compiled model where it is faster; returns both rates, or why it could not be compiled."""
        compiled = self.torch.compile(self.model.forward, dynamic=True)
        try:
            eager = self.decode(0, self.model)()
            fast = (self.decode(0, compiled)(), self.decode(0, compiled)())[1]
        except Exception as e:  # noqa: BLE001  (whatever a compiler raises: the eager model is measured then)
            return {"not_compiled": " ".join(str(e).split())[:200]}
        self.step = compiled if fast > eager else self.model
        return {"eager_tok_s": round(eager, 1), "compiled_tok_s": round(fast, 1)}


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
