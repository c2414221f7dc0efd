"""The real CUDA provider on a CUDA that computes nothing and remembers everything: see scripts/checks/check_cuda.py."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="onnxruntime-gpu's wheel is for x86-64 Linux"
    ),
    pytest.mark.skipif(not shutil.which("g++"), reason="no g++"),
]
TOP = [64 * 4, 64 * 8]  # bytes of logits and ids


def check(bundle: Path, variant: str, *words: str) -> tuple[dict[str, Any], str, int]:
    """Run check_cuda.py; return (its JSON, stderr, exit code)."""
    command = [sys.executable, str(ROOT / "scripts/checks/check_cuda.py"), str(bundle), "--variant", variant, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "a package index" in done.stderr and not os.environ.get("LFM_EDGE_TEST_ALL"):
        pytest.skip("onnxruntime-gpu could not be installed")
    assert done.stdout.startswith("{"), done.stderr
    return json.loads(done.stdout.splitlines()[0]), done.stderr, done.returncode


@pytest.fixture(scope="module", params=["fp16", "int4-fp16"])
def found(request, gpu_bundle) -> dict[str, Any]:
    found, _, code = check(gpu_bundle, request.param, "--strict-placement")
    assert code == 0, found
    return found


def test_nothing_is_left_to_the_cpu(found) -> None:
    """As the provider assigns operators, the encoder's included; shapes are the CPU's business."""
    assert found["left_to_cpu"] == {"decoder_model_merged": [], "embed_tokens": [], "vision_encoder": []}


def test_steps_are_captured_at_load(found) -> None:
    """Both turns and the look-up of embeddings: no answer waits for it. Nothing CUDA prohibits happens meanwhile, and
    no graph reads memory of the host that others write to, or the exit code would be 1.
    """
    look_up, *steps = found["load"]["captured"]
    assert len(steps) == 2
    assert steps[0] == steps[1] > 50
    assert look_up < 5
    for i in range(1, 5):
        step = found[f"step {i}"]
        assert (step["replayed"], step["launched"], step["captured"]) == ([look_up, steps[0]], 0, [])


def test_a_token_in_and_the_top_out(found) -> None:
    """Nothing else crosses, nothing is allocated; after going back the mask and the convolutions' states cross once."""
    assert found["step 1"]["to_device"] == [1024 * 8, 8]
    for i in range(2, 5):
        step = found[f"step {i}"]
        assert (step["to_device"], step["to_host"], step["mallocs"]) == ([8], TOP, 0)
    assert found["step after going back"]["to_device"][-2:] == [1024 * 8, 8]
    assert len(found["step after going back"]["to_device"]) == 5


def test_larger_buffers_are_captured_once(found) -> None:
    wanted = [1, 1, 0, 0]
    assert [len(found[f"step {i} in larger buffers"]["captured"]) for i in range(1, 5)] == wanted


def test_prompts_and_views_cross_once(found) -> None:
    """Embeddings [275, 256] and the mask in, one row of logits out; pixels in, features out, and what sizes the host
    must know.
    """
    assert found["prompt"]["to_device"] == [275 * 256 * 4, 275 * 8]
    assert len(found["prompt"]["to_host"]) == 1
    for count in (1, 8):
        views = found[f"{count} view{'s' * (count > 1)}"]
        assert max(views["to_device"]) == count * 256 * 768 * 4
        assert views["to_host"] == [4, 1, count * 64 * 256 * 4]


def test_a_whole_answer(found) -> None:
    assert found["answer_tokens"] == 4
    assert found["answer"]["captured"] == []


def test_graphs_for_the_cpu(gpu_bundle) -> None:
    """Attention in fp32 is left to the CPU, by name, and nothing is captured; strictly it is an error."""
    found, said, code = check(gpu_bundle, "fp32")
    assert code == 0
    assert found["left_to_cpu"]["decoder_model_merged"] == [
        f"text.layers.{i}.self_attn (GroupQueryAttention)" for i in (1, 3, 5)
    ]
    assert (
        "these operators run on the CPU, which costs copies at every token: text.layers.1.self_attn (GroupQueryAttention)"
        in said
    )
    assert found["load"]["captured"] == []
    assert len(found["step 2"]["to_host"]) > 10
    found, said, code = check(gpu_bundle, "fp32", "--strict-placement")
    assert code == 2
    assert "take a variant for GPUs (fp16, int4-fp16)" in found["error"]


@pytest.mark.parametrize(("memory", "where"), [(6, "load"), (24, "views")])
def test_out_of_memory(gpu_bundle, memory, where) -> None:
    """While loading, and while encoding: one line with the sizes, and nothing of onnxruntime's beside it."""
    found, said, code = check(gpu_bundle, "fp16", "--memory", str(memory), "--reported", "8000")
    assert code == 2
    assert found["error"].startswith("out of GPU memory when ")
    assert "the graphs' weights take 11 MiB" in found["error"]
    assert ("prompt" in found) is (where == "views")
    assert found["device_mib"] <= memory
    assert "onnxruntime" not in said
    found, _, _ = check(gpu_bundle, "fp16", "--memory", "500")
    assert found["error"].startswith(
        "the GPU has 500 of 500 MiB free, but 11 MiB for weights and about 600 MiB of working memory are needed"
    )


@pytest.mark.slow  # 250 MB each
@pytest.mark.parametrize(("release", "goes_wrong"), [("1.29.0", True), ("1.30.0", False)])
def test_captured_steps_since_when(gpu_bundle, release, goes_wrong) -> None:
    """Until 1.29 a captured step reads memory of the host that others have written to by the time of its replay; see
    CUDA_GRAPHS_SINCE.
    """
    found, _, code = check(gpu_bundle, "fp16", "--onnxruntime", release, "--capture")
    assert len(found["load"]["captured"]) == 3
    assert bool(found["answer"]["stale"]) is goes_wrong
    assert code == goes_wrong
    if goes_wrong:
        found, _, code = check(gpu_bundle, "fp16", "--onnxruntime", release)
        assert code == 0
        assert found["load"]["captured"] == []


@pytest.mark.slow  # another 250 MB
def test_the_onnxruntime_of_jetpack_6(gpu_bundle) -> None:
    """1.23, on CUDA 12: nothing is captured, a mask crosses with the token, and what convolutions' Concat goes by."""
    asked = ["bash", "-c", ". scripts/environment.sh && find_python 3.10"]
    python = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()
    if not python:
        pytest.skip("no Python 3.10 with venv")
    found, _, code = check(gpu_bundle, "fp16", "--onnxruntime", "1.23.2", "--python", python)
    assert code == 0
    assert found["onnxruntime"] == "1.23.2"
    assert found["load"]["captured"] == []
    assert found["step 2"]["replayed"] == []
    assert found["step 2"]["to_host"] == TOP
    assert sum(found["step 2"]["to_device"]) < 5000
