"""Our 4-bit rounding against onnxruntime's own quantizers, on the decoder of one bundle.

    python scripts/bench/compare_quantizers.py demo/bundle --questions 2000

Every method rounds the same products (the decoder's layers; head, embeddings and encoder stay fp32) and is judged on
the same fresh questions by the same code as `lfm-edge quality`. Bits a weight count scales and zero points as they are
stored. HQQ needs torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import onnx
from lfm_quantize.calibrate.samples import read_questions
from lfm_quantize.graph import open_graph
from lfm_quantize.judge.measure import measure
from lfm_quantize.quantize import quantize
from lfm_quantize.settings import Settings
from lfm_runtime.formats.manifest import MANIFEST, file_hash
from onnxruntime.quantization import matmul_nbits_quantizer as nbits

DECODER = "onnx/decoder_model_merged.onnx"
MADE = "onnx/decoder_model_merged_q4.onnx"
ROOT = Path(__file__).resolve().parents[2]
CALIBRATION = ROOT / "demo" / "calibration"
sys.path.insert(0, str(ROOT / "demo" / "make"))

import demo_data  # noqa: E402


def ours(bundle: Path, block: int, method: str, calibration: Path) -> None:
    recipe = bundle / ".." / "recipe.toml"
    recipe.write_text(f'[[layer]]\npattern = "text.*"\nbits = 4\nblock = {block}\nmethod = "{method}"\n')
    prompts = calibration / f"{calibration.name}.jsonl"
    quantize(
        bundle,
        Settings("int4", (calibration,), prompts if prompts.exists() else None, recipe=recipe, floor=100.0),
        warn=lambda _: None,
    )


def onnxruntimes(bundle: Path, config) -> None:
    """Put the decoder that onnxruntime's quantizer makes into the bundle as its int4 variant."""
    model = onnx.load(str(bundle / DECODER))
    quantizer = nbits.MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    for node in quantizer.model.model.graph.node:  # all methods with inputs rounded to 8 bits, as lfm-edge runs them
        if node.op_type == "MatMulNBits":
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", 4)])
    onnx.save(
        quantizer.model.model,
        str(bundle / MADE),
        save_as_external_data=True,
        location=f"{Path(MADE).name}_data",
        size_threshold=4096,
    )
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["variants"]["int4"] = {**manifest["variants"]["fp32"], "decoder_model_merged": MADE}
    for name in (MADE, f"{MADE}_data"):
        manifest["files"][name] = {"bytes": (bundle / name).stat().st_size, "sha256": file_hash(bundle / name)}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def bits_per_weight(bundle: Path) -> float:
    """Of the products that MatMulNBits computes: codes, scales and zero points, as stored."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    stored, weights = 0, 0
    for node in open_graph(bundle / manifest["variants"]["int4"]["decoder_model_merged"]).graph:
        if node.op_type == "MatMulNBits":
            for value in filter(None, node.inputs[1:]):
                cast = value.producer()  # of scales stored in fp16
                stored += (cast.inputs[0] if cast else value).const_value.nbytes
            weights += node.attributes["K"].as_int() * node.attributes["N"].as_int()
    return 8 * stored / weights


def methods_of(calibration: Path) -> dict[str, Callable[[Path], None]]:
    """What is compared: name → what makes int4 of a bundle so."""

    def rtn(block: int) -> Callable[[Path], None]:
        config = nbits.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True, accuracy_level=4)
        return lambda bundle: onnxruntimes(bundle, config)

    def of_ours(block: int, method: str) -> Callable[[Path], None]:
        return lambda bundle: ours(bundle, block, method, calibration)

    return {
        **{f"onnxruntime RTN, block {block}": rtn(block) for block in (32, 64, 128)},
        "onnxruntime k_quant, block 32": lambda b: onnxruntimes(b, nbits.KQuantWeightOnlyQuantConfig()),
        "onnxruntime HQQ, block 64": lambda b: onnxruntimes(b, nbits.HQQWeightOnlyQuantConfig(block_size=64, bits=4)),
        "lfm-edge rtn, block 64": of_ours(64, "rtn"),
        **{f"lfm-edge gptq, block {block}": of_ours(block, "gptq") for block in (32, 64, 128)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument(
        "--images", type=Path, help="JSONL of questions to judge with; default: fresh ones of the demo's kind"
    )
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.disable(logging.INFO)  # onnxruntime's quantizer tells of every node
    methods = methods_of(options.calibration)
    if find_spec("torch") is None:
        parser.error("HQQ needs torch: pip install torch")
    names = ("onnxruntime", "onnx", "numpy", "torch")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in names))
    print(f"{'method':32s} bits a weight   KL, nats   ± (s.e.)   same first choice   accuracy lost, points")
    with tempfile.TemporaryDirectory() as folder:
        if options.images is None:
            demo_data.write_evaluation(Path(folder) / "fresh", 4000, -(-options.questions // 4))
        questions, _ = read_questions(None, options.images or Path(folder) / "fresh" / "fresh.jsonl")
        questions = random.Random(0).sample(questions, min(len(questions), options.questions))
        results = []
        for name, make in methods.items():
            bundle = Path(folder) / "bundle"
            shutil.copytree(options.bundle, bundle)
            make(bundle)
            found = measure(bundle, "int4", "fp32", questions, options.threads)
            lost = found.accuracy_lost()
            print(
                f"{name:32s} {bits_per_weight(bundle):13.3f} {found.kl:10.5f} {found.kl_error:10.5f} {found.same_top1:19.2%}   "
                f"{lost if lost is None else f'{lost:+.2f}':>21}",
                flush=True,
            )
            results.append(
                {
                    "method": name,
                    "bits_per_weight": bits_per_weight(bundle),
                    "kl": found.kl,
                    "kl_error": found.kl_error,
                    "same_top1": found.same_top1,
                    "accuracy_lost": lost,
                }
            )
            shutil.rmtree(bundle)
    print(json.dumps({"questions": len(questions), "results": results}))


if __name__ == "__main__":
    main()
