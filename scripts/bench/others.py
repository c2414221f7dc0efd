"""OpenVINO or onnxruntime-genai as a process that measures on request: a line of JSON in, one out.

    python others.py openvino PORTABLE_BUNDLE THREADS VIEWS.npz
    python others.py genai FOLDER THREADS

{"vision": "512x512"} → ms for all views of that image; {"prefill": 275} → tokens a second; {"decode": 512} → tokens a second of
32 after so many. OpenVINO runs the portable graphs as they are (fp32 weights; its own choice of arithmetic, bf16 where the
processor has it), fed their states by hand. genai runs our int4 decoder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np

TOKENS = 32


class OpenVino:
    """The portable graphs."""

    def __init__(self, folder: str, threads: str, views: str) -> None:
        import openvino

        self.about = openvino.__version__
        core, config = openvino.Core(), {"INFERENCE_NUM_THREADS": int(threads), "PERFORMANCE_HINT": "LATENCY"}
        self.encoder, self.decoder = (
            core.compile_model(f"{folder}/onnx/{name}.onnx", "CPU", config)
            for name in ("vision_encoder", "decoder_model_merged")
        )
        self.inputs = {name: value.partial_shape for value in self.decoder.inputs for name in value.get_names()}
        self.views = np.load(views)

    def vision(self, image: str) -> float:
        start = time.perf_counter()
        for name in sorted(n for n in self.views if n.startswith(f"{image}/")):
            patches, shape = self.views[name], [int(x) for x in name.rsplit("/", 1)[1].split("x")]
            mask = np.ones((1, len(patches)), np.int64)
            feeds = {
                "pixel_values": patches[None],
                "pixel_attention_mask": mask,
                "spatial_shapes": np.array([shape], np.int64),
            }
            self.encoder(feeds)
        return 1e3 * (time.perf_counter() - start)

    def _start(self, past: int) -> dict[str, np.ndarray]:
        found = {}
        for name, shape in self.inputs.items():
            if name.startswith("past"):
                sizes = [d.get_length() if d.is_static else past for d in shape][1:]
                found[name] = np.zeros((1, *sizes), np.float32)
        return found

    def _step(self, states: dict[str, np.ndarray], tokens: int, past: int) -> dict[str, np.ndarray]:
        feeds = {
            **states,
            "inputs_embeds": np.full((1, tokens, self.inputs["inputs_embeds"][2].get_length()), 0.01, np.float32),
            "attention_mask": np.ones((1, past + tokens), np.int64),
        }
        found = self.decoder(feeds)
        return {
            name: found[name.replace("past_key_values", "present").replace("past_conv", "present_conv")]
            for name in states
        }

    def prefill(self, tokens: int) -> float:
        states, start = self._start(0), time.perf_counter()
        self._step(states, tokens, 0)
        return tokens / (time.perf_counter() - start)

    def decode(self, past: int) -> float:
        states, start = self._start(past), time.perf_counter()
        for n in range(TOKENS):
            states = self._step(states, 1, past + n)
        return TOKENS / (time.perf_counter() - start)


class GenAI:
    """Its loop over a folder that `lfm-edge export --genai` wrote."""

    def __init__(self, folder: str, threads: str) -> None:
        import onnxruntime_genai as og

        self.og, self.about = og, og.__version__
        config = og.Config(folder)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": int(threads)}}}}))
        self.model = og.Model(config)

    def _generator(self, length: int):
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        return self.og.Generator(self.model, params)

    def prefill(self, tokens: int) -> float:
        generator, start = self._generator(tokens + 1), time.perf_counter()
        generator.append_tokens([[10 + n % 300 for n in range(tokens)]])
        return tokens / (time.perf_counter() - start)

    def decode(self, past: int) -> float:
        generator = self._generator(past + TOKENS + 2)
        generator.append_tokens([[10 + n % 300 for n in range(past)]])
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(TOKENS):
            generator.generate_next_token()
        return TOKENS / (time.perf_counter() - start)


def main() -> None:
    kind, *arguments = sys.argv[1:]
    peer = {"openvino": OpenVino, "genai": GenAI}[kind](*arguments)
    print(json.dumps({"version": peer.about}), flush=True)
    for line in sys.stdin:
        (name, value), *_ = json.loads(line).items()
        measure: Callable | None = getattr(peer, name, None)
        print(json.dumps({"value": measure(value) if measure else None}), flush=True)


if __name__ == "__main__":
    main()
