"""What peers.sh compares, made of one random checkpoint: our bundle, llama.cpp's GGUF files, portable graphs for OpenVINO
and a folder for onnxruntime-genai. What is there is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from lfm_quantize.recipe import Recipe

BENCH = Path(__file__).resolve().parent


def run(*words: object, **environment: str) -> None:
    """Run a program; its output is shown only when it fails."""
    print("==", *(Path(str(w)).name if n == 0 else w for n, w in enumerate(words)), flush=True)
    done = subprocess.run(
        [str(w) for w in words],
        env={**os.environ, **environment},
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}\n{words} ended with {done.returncode}")


def rounded(bundle: Path) -> Path:
    """The recipe of `quantize --variant int4 --calibration`, but rounding to nearest: random weights have nothing to
    calibrate, and the kernels are the same.
    """
    recipe = Recipe.default("int4", "gptq")
    plain = [replace(rule, precision=replace(rule.precision, method="rtn")) for rule in recipe.rules]
    path = bundle.parent / "int4.toml"
    path.write_text(Recipe(tuple(plain)).to_toml())
    return path


def for_llama(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint under the tokenizer class that llama.cpp's converter loads."""
    folder.mkdir(exist_ok=True)
    for file in checkpoint.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).hardlink_to(file)
        else:
            shutil.copy(file, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("extra_special_tokens", None)
    path.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--size", default="450m")
    options = parser.parse_args()
    folder, llama = options.folder, options.llama
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    edge = (sys.executable, "-m", "lfm_runtime")
    if not (checkpoint / "config.json").exists():
        run(sys.executable, BENCH / "make_random_checkpoint.py", "--size", options.size, checkpoint)
    if not (bundle / "manifest.json").exists():
        run(*edge, "export", checkpoint, "-o", bundle)
    variants = json.loads((bundle / "manifest.json").read_text())["variants"]
    if "int8" not in variants:
        run(*edge, "quantize", bundle, "--variant", "int8")
    if "int4" not in variants:
        run(*edge, "quantize", bundle, "--variant", "int4", "--recipe", rounded(bundle))
    run(*edge, "prepare", bundle, "--variant", "int4", "--prefill", "int8")
    if not (folder / "portable" / "manifest.json").exists():
        run(*edge, "export", checkpoint, "-o", folder / "portable", "--portable")
    if not (folder / "genai" / "genai_config.json").exists():
        run(*edge, "export", bundle, "--genai", "--variant", "int4", "-o", folder / "genai")
    if not (folder / "text-q4_0.gguf").exists():
        source, library = for_llama(checkpoint, folder / "for-llama"), str(llama / "gguf-py")
        convert = (sys.executable, llama / "convert_hf_to_gguf.py", source, "--outtype", "f16", "--outfile")
        run(*convert, folder / "text-f16.gguf", PYTHONPATH=library)
        run(*convert, folder / "mmproj-f16.gguf", "--mmproj", PYTHONPATH=library)
        run(llama / "build" / "bin" / "llama-quantize", folder / "text-f16.gguf", folder / "text-q4_0.gguf", "Q4_0")
        (folder / "text-f16.gguf").unlink()
        shutil.rmtree(source)


if __name__ == "__main__":
    main()
