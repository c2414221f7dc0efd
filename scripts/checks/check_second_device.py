"""The decode loop for GPUs on a device that really has memory of its own, where there is no GPU: onnxruntime's WebGPU
provider on SwiftShader, a Vulkan driver that computes on the CPU and comes with Chromium.

    sudo apt install chromium                              # with libvulkan python scripts/checks/check_second_device.py
    BUNDLE            # with fp32 weights; makes an environment in build/webgpu

It says nothing about speed, nor about CUDA's kernels. What it shows: nothing of the loop relies on memory that both
sides can reach, and what is copied, bound and swapped comes out as on the CPU, in steps that are not captured. Two
things differ from CUDA and are made up for: this driver has no fp16, so the graph is fp32; and its attention is wrong
for steps of several tokens after others (0.6 off in a graph of that one node), so a prompt goes in token by token. On
WebGPU whole numbers of 64 bits are left to the CPU, which is what finds inputs that are bound once and read again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from lfm_runtime.errors import EdgeError

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "build" / "webgpu"
PACKAGES = ("onnxruntime-webgpu==1.27.0", "numpy", "pillow", "psutil")
DRIVERS = ("/usr/lib/chromium/vk_swiftshader_icd.json", "/opt/google/chrome/vk_swiftshader_icd.json")
WEBGPU, CPU = "WebGpuExecutionProvider", "CPUExecutionProvider"
TOKENS = 24


def main() -> int:
    """Prepare graphs here, then run `inside` in an environment of its own: two onnxruntimes do not go together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return inside(options.bundle)
    driver = os.environ.get("VK_DRIVER_FILES") or next((d for d in DRIVERS if Path(d).exists()), None)
    if driver is None:
        print("no Vulkan driver: apt install chromium (its SwiftShader), or set VK_DRIVER_FILES", file=sys.stderr)
        return 2
    python = HOME / "bin" / "python"
    try:
        if not python.exists():
            venv.create(HOME, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        prepare(options.bundle)
    except (EdgeError, subprocess.CalledProcessError) as e:
        print(f"check_second_device: {e}", file=sys.stderr)
        return 2
    environment = {
        **os.environ,
        "VK_DRIVER_FILES": driver,
        "VK_ICD_FILENAMES": driver,
        "XDG_RUNTIME_DIR": str(HOME),
        "LFM_EDGE_PROFILE": "generic",
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(Path(driver).parent), os.environ.get("LD_LIBRARY_PATH")])),
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("runtime", "profiles")),
    }
    return subprocess.run(
        [str(python), __file__, str(options.bundle), "--inside"], env=environment, check=False
    ).returncode


def prepare(bundle: Path) -> None:
    """Graphs for `inside`, which has no onnx: the decoder as quantize makes it for GPUs, in fp32, and Identity, which
    copies.
    """
    import onnx
    from lfm_quantize.graph import open_graph, save
    from lfm_quantize.make.floats import FOR_GPUS
    from lfm_quantize.passes.nodes import rewritten
    from lfm_runtime.bundle import Bundle
    from lfm_runtime.formats.contract import DECODER
    from onnx import helper

    decoder = open_graph(Bundle.open(bundle).graphs("fp32")[1][DECODER.stem])
    save(rewritten(decoder, *FOR_GPUS), HOME / "decoder.onnx")
    for name, kind in (("float32", onnx.TensorProto.FLOAT), ("int64", onnx.TensorProto.INT64)):
        edges = [helper.make_tensor_value_info(edge, kind, None) for edge in "xy"]
        copy = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "copy", edges[:1], edges[1:])
        onnx.save(
            helper.make_model(copy, opset_imports=[helper.make_opsetid("", 19)], ir_version=9),
            HOME / f"copy_{name}.onnx",
        )


class WebGpuMemory:
    """See lfm_runtime.decode.device_state.Memory. This onnxruntime's Python cannot allocate there; a session's outputs
    can lie there.
    """

    def __init__(self) -> None:
        import onnxruntime as ort

        self._ort = ort
        self._copy = {name: session(HOME / f"copy_{name}.onnx") for name in ("float32", "int64")}

    def place(self, array: Any) -> Any:
        import numpy as np

        binding = self._copy[array.dtype.name].io_binding()
        binding.bind_cpu_input("x", np.ascontiguousarray(array))
        binding.bind_output("y", "webgpu", 0)
        self._copy[array.dtype.name].run_with_iobinding(binding)
        value = binding.get_outputs()[0]
        value.kind = array.dtype.name
        return value

    def write(self, value: Any, array: Any) -> None:
        import numpy as np

        self._ort.copy_tensors([self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))], [value])

    def read(self, value: Any) -> Any:
        binding = self._copy[value.kind].io_binding()
        binding.bind_ortvalue_input("x", value)
        binding.bind_output("y", "cpu")
        self._copy[value.kind].run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]


def session(path: Path) -> Any:
    """Return a session on WebGPU; raises RuntimeError where the provider cannot be started."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    found = ort.InferenceSession(str(path), options, providers=[WEBGPU, CPU])
    if WEBGPU not in found.get_providers():
        raise RuntimeError("the WebGPU provider could not be started with this driver")
    return found


class Difference:
    """The largest difference seen, and the largest value."""

    worst = 0.0
    size = 0.0

    def add(self, wanted: Any, got: Any) -> None:
        """Compare two rows of logits."""
        self.worst = max(self.worst, float(abs(wanted - got).max()))
        self.size = max(self.size, float(abs(wanted).max()))


def inside(bundle: Path) -> int:
    """Compare an answer about a photo on WebGPU with the CPU's and print it; return 0 where they agree."""
    import numpy as np
    import onnxruntime as ort
    from lfm_runtime import Model
    from lfm_runtime.decode.decoder import Decoder
    from lfm_runtime.decode.graphs import DecoderSessions
    from lfm_runtime.decode.sampling import Top
    from lfm_runtime.engine.gpu import left_to_cpu
    from lfm_runtime.formats.contract import EMBED_TOKENS
    from lfm_runtime.text.messages import Message

    model = Model.load(bundle, variant="fp32", max_image_tokens=64, do_image_splitting=False)
    job = model.prepare_answer(
        [Message.user("What is in this image?", 1)],
        [ROOT / "demo/photos/coffee.jpg"],
        max_new_tokens=TOKENS,
        temperature=0,
    )
    embeds = model.decoder.embed_prompt(job.prompt.ids, model.encode(job.images), model.prompts.image_id)
    sessions = DecoderSessions(session(HOME / "decoder.onnx"), session(model.sessions.paths[EMBED_TOKENS.stem]))
    other = Decoder(lambda: sessions, HOME / "decoder.onnx", memory=WebGpuMemory())
    here, there = model.decoder.start(512), other.start(512)
    difference = Difference()
    for at in range(embeds.shape[1]):
        wanted = here.step(embeds[:, at : at + 1]).copy()
        difference.add(wanted, there.step(np.ascontiguousarray(embeds[:, at : at + 1])))
    marks, texts = (here.mark(), there.mark()), []
    for _ in range(2):  # the second time from the mark
        tokens = [[int(wanted.argmax())], [int(wanted.argmax())]]
        for _ in range(TOKENS):
            row, top = here.step_token(tokens[0][-1]).copy(), there.step_token(tokens[1][-1])
            assert isinstance(top, Top)
            difference.add(row, top.whole())
            tokens[0].append(int(row.argmax()))
            tokens[1].append(int(top.ids[0]))
        texts.append([model.prompts.tokenizer.decode(ids) for ids in tokens])
        here.rewind(marks[0])
        there.rewind(marks[1])
    larger = model.decoder.start(1024, here.snapshot()), other.start(1024, there.snapshot())
    difference.add(larger[0].step_token(7), larger[1].step_token(7).whole())
    same = all(a == b for a, b in texts) and texts[0] == texts[1]
    found = {
        "onnxruntime": ort.__version__,
        "prompt_tokens": embeds.shape[1],
        "tokens": 2 * TOKENS,
        "text": texts[0][1],
        "same_text": same,
        "largest_difference": round(difference.worst, 7),
        "largest_logit": round(difference.size, 3),
        "left_to_cpu": left_to_cpu(sessions.decoder, HOME / "decoder.onnx"),
    }
    print(json.dumps(found, indent=2))
    return 0 if same and difference.worst < 1e-4 * difference.size else 1


if __name__ == "__main__":
    sys.exit(main())
