"""A GPU as the place to compute: what its sessions are given, whether its memory suffices, what is left to the CPU all
the same.
"""

from __future__ import annotations

import logging
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import psutil

from lfm_runtime.engine.execution import Execution
from lfm_runtime.engine.gpu_wheel import CPU, CUDA, TENSORRT, gpu_in_use
from lfm_runtime.engine.ort_release import PLACEMENT_SINCE, onnxruntime_is
from lfm_runtime.errors import BundleError, SettingError
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, VISION_ENCODER, GraphSpec
from lfm_runtime.formats.onnx_file import external_bytes, host_nodes, operators

_log = logging.getLogger(__name__)

MIB = 1 << 20
VIEWS_AT_ONCE = 8
"""Views of one size that are encoded together: enough to fill a GPU, and a bound on the memory they are worked on with.
"""
CUDA_GRAPHS_SINCE = "1.30"
"""Before it a captured Concat of unequal parts, of which a short convolution has one, reads sizes and addresses from
host memory at every replay, and a prompt in between overwrites them (onnxruntime pull request 32121).
"""
NORMS_SINCE = "1.27"
"""Before it SkipSimplifiedLayerNormalization sums squares in fp16: zeros where values are large, without a word, few
digits where all are small (onnxruntime issue 29034, mended by pull request 28682). Its strict mode sums in fp32.
"""

_ATTENTION = "19"
"""Kernels of attention: flash (1), memory efficient (2), plain (16). Not cuDNN's (8), which would come first on Hopper:
it makes a plan for every length of a prompt and every size of a view.
"""
_TAIL = "20"
"""Nodes of an engine, at least. TensorRT lacks Compress, which gathers the tokens at the encoder's end; the few nodes
after it would be an engine of their own, without ranges.
"""
_ADDED = re.compile(r"(Gather|Unsqueeze|Squeeze|Concat|Slice|Cast)_token_\d+")
"""What onnxruntime names so, it has added itself, to carry shapes through transposes."""
_OF_A_GPU = re.compile(r"CUDA|cuda[A-Z]|cuDNN|CUDNN|CUBLAS|libcu|TensorRT|TRT")
_FULL = re.compile(r"out of memory|Failed to allocate memory|ALLOC_FAILED|OUT_OF_MEMORY", re.IGNORECASE)


class GpuError(SettingError):
    """The GPU cannot be used as was asked; the CPU can."""


def provider_options(execution: Execution, graph: GraphSpec) -> list[tuple[str, dict[str, str]]]:
    """What a session of a graph is given, provider by provider, in order. TensorRT is for the encoder alone: the
    decoder has operators that it lacks.
    """
    found: list[tuple[str, dict[str, str]]] = []
    for name in execution.providers:
        if name == TENSORRT and graph is VISION_ENCODER:
            found.append((name, _tensorrt(execution.engines, execution.most_patches)))
        elif name == CUDA:
            # By default the arena doubles; what an image needs beyond the weights is little and always the same.
            options = {"arena_extend_strategy": "kSameAsRequested", "sdpa_kernel": _ATTENTION}
            if not onnxruntime_is(NORMS_SINCE):
                options["enable_skip_layer_norm_strict_mode"] = "1"
            if execution.cuda_graphs and graph in (EMBED_TOKENS, DECODER):
                options["enable_cuda_graph"] = "1"
            found.append((name, options))
        elif name != TENSORRT:
            found.append((name, {}))
    return found


def _tensorrt(engines: Path | None, most_patches: int) -> dict[str, str]:
    """One engine for all grids: without ranges it is made anew, for minutes, for each shape that comes along."""
    options = {"trt_min_subgraph_size": _TAIL}  # the graph's own types hold: fp16, and fp32 where that would overflow
    for name, views, patches in (("min", 1, 4), ("opt", 1, most_patches), ("max", VIEWS_AT_ONCE, most_patches)):
        shapes = f"pixel_values:{views}x{patches}x768,pixel_attention_mask:{views}x{patches},spatial_shapes:{views}x2"
        options[f"trt_profile_{name}_shapes"] = shapes
    if engines and _made(engines):
        for kind in ("engine", "timing"):
            options |= {f"trt_{kind}_cache_enable": "True", f"trt_{kind}_cache_path": str(engines)}
    return options


def _made(engines: Path) -> bool:
    try:
        engines.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        _log.warning(
            "lfm-edge: TensorRT builds its engine again at every start, which takes minutes, because %s cannot "
            "be made: %s",
            engines,
            e.strerror,
        )
        return False
    return True


def check_tensorrt(vision: Path) -> None:
    """Raise SettingError for an encoder that TensorRT could only take in pieces."""
    if "MultiHeadAttention" in operators(vision, nested=True):
        raise SettingError(
            f"TensorRT does not support the attention in {vision}; run lfm-edge quantize BUNDLE --variant "
            "fp16-trt and use --variant fp16-trt, or use a profile without TensorrtExecutionProvider"
        )


# ------------------------------------------------------------------------------------------------------------- memory


def gpu_memory() -> tuple[int, int] | None:
    """(MiB free, MiB in all) of the GPU that is used: the first that CUDA_VISIBLE_DEVICES names. A Jetson's is the
    machine's. None where nothing tells.
    """
    if Path("/etc/nv_tegra_release").exists():
        memory = psutil.virtual_memory()
        return memory.available // MIB, memory.total // MIB
    rows = _nvidia_smi("--query-gpu=memory.free,memory.total", "-i", gpu_in_use())
    return (int(rows[0][0]), int(rows[0][1])) if rows else None


def gpu_memory_used(process: int) -> int | None:
    """MiB that a process has on GPUs now; None where nothing tells."""
    rows = [row for row in _nvidia_smi("--query-compute-apps=pid,used_memory") if row[0] == str(process)]
    return sum(int(row[1]) for row in rows) if rows else None


def _nvidia_smi(*words: str) -> list[list[str]]:
    """Rows of numbers; none where it is not there or has none."""
    command = ["nvidia-smi", *words, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) > 1 and all(cell.isdigit() for cell in row)]


def is_full(message: str) -> bool:
    """Whether a message of onnxruntime says that memory ran out."""
    return bool(_FULL.search(message))


def is_of_a_gpu(message: str) -> bool:
    """Whether a message of onnxruntime is about the GPU, its driver or libraries; else it is about the graph."""
    return is_full(message) or bool(_OF_A_GPU.search(message))


def full(graphs: Iterable[Path], message: str) -> GpuError:
    """Return the error for a full GPU, with what was wanted, what is free and what weights take."""
    memory, wanted = gpu_memory(), re.search(r"requested buffer of size (\d+)", message)
    more = f" when {int(wanted[1]) // MIB + 1} MiB more were wanted" if wanted else ""
    free = f"{memory[0]} of {memory[1]} MiB are free now, " if memory else ""
    return GpuError(
        f"out of GPU memory{more}: {free}the graphs' weights take {_weights_mib(graphs)} MiB; end other programs "
        "on it, or take a smaller "
        "variant (int4-fp16), fewer --max-tiles, or a profile with a smaller context"
    )


def _weights_mib(graphs: Iterable[Path]) -> int:
    return sum(external_bytes(path) for path in graphs) // MIB


# ---------------------------------------------------------------------------------------------------------- placement


def left_to_cpu(session: Any, path: Path) -> list[str] | None:
    """Operators of a graph that were given to the CPU though their inputs lie on the device: each is a copy to the host
    and back at every step. Those that compute with shapes alone belong there. None where this onnxruntime cannot tell.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    belong = host_nodes(path)
    left = [n for part in session.get_provider_graph_assignment_info() if part.ep_name == CPU for n in part.get_nodes()]
    return [f"{n.name} ({n.op_type})" for n in left if n.name not in belong and not _ADDED.fullmatch(n.name)]


def check_placement(left: list[str] | None, path: Path, *, strict: bool) -> str | None:
    """What the user should know of operators left to the CPU; None where there is nothing.

    Raises:
        SettingError: with `strict`, when there are any or nothing tells.
    """
    if left is None:
        if strict:
            raise SettingError(
                f"strict_placement needs onnxruntime {PLACEMENT_SINCE}, this is {ort.__version__}; leave it out"
            )
        return None
    if not left:
        return None
    shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
    said = f"{path}: these operators run on the CPU, which costs copies at every token: {shown}"
    if strict:
        raise SettingError(f"{said}; take a variant for GPUs (fp16, int4-fp16), or leave strict_placement out")
    return said


def unusable(path: Path, provider: str, reason: str = "") -> GpuError:
    """For a session that onnxruntime could not make with the provider it was to have, or made without it."""
    how = (
        "its driver and libraries (CUDA, cuDNN) must be of the version that onnxruntime was built for: see "
        "lfm-edge doctor"
    )
    wanted = provider.removesuffix("ExecutionProvider")
    why = f" ({' '.join(reason.split())[:300]})" if reason else ""
    return GpuError(f"{path}: {wanted} could not be started{why}; {how}; to run on the CPU, use --profile generic")


def cannot_be_captured(error: BundleError) -> bool:
    """Whether a session was refused because its graph cannot be made a CUDA graph; it can be run without."""
    return "graph capture" in str(error).lower() or "cuda graph" in str(error).lower()
