"""The way to a GPU, without one: what graphs hold and sessions are given, what is left to the CPU, and what is said
when it cannot be.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from lfm_profiles import detect, read
from lfm_runtime import Model
from lfm_runtime.batch import answer_all
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.decode.device_state import DeviceState, OrtMemory
from lfm_runtime.engine import failures, gpu, gpu_wheel, sessions
from lfm_runtime.engine.execution import RECORD_PLACEMENT, Execution
from lfm_runtime.engine.gpu import GpuError, check_placement, host_nodes, left_to_cpu, provider_options
from lfm_runtime.engine.gpu_wheel import CPU, CUDA, TENSORRT
from lfm_runtime.engine.loader import load_session
from lfm_runtime.engine.sessions import Sessions
from lfm_runtime.errors import BundleError, OutOfMemoryError, SettingError
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, TOP_TOKENS, VISION_ENCODER
from lfm_runtime.images.layout import views_of_one_size
from lfm_runtime.setup import machine as machines
from lfm_runtime.setup.profile import find_profile
from lfm_runtime.setup.resolve import resolve
from lfm_runtime.setup.setup import Ask, _engines, settle
from PIL import Image

QUESTION = "What is in this image?"
GPU_VARIANTS = ("fp16", "int4-fp16", "fp16-trt")


# ------------------------------------------------------------------------------------------------- graphs and placement

# Types of the first float input for which CUDA has kernels: docs/OperatorKernels.md of onnxruntime 1.31. Operators on
# whole numbers are listed with int64 or int32.
HALF, FULL, WHOLE = "float16", "float32", "int64"
ANY = {HALF, FULL, WHOLE, "int32", "bool"}
CUDA_KERNELS = {
    **dict.fromkeys(
        (
            "Add",
            "Sub",
            "Mul",
            "Div",
            "Concat",
            "Gather",
            "Slice",
            "Split",
            "Transpose",
            "Reshape",
            "Unsqueeze",
            "Squeeze",
            "Cast",
            "Max",
            "Min",
            "Mod",
            "Neg",
            "Less",
            "Equal",
            "ReduceSum",
            "ReduceMin",
            "Where",
            "Expand",
            "Shape",
        ),
        ANY,
    ),
    **{
        op: {HALF, FULL}
        for op in (
            "MatMul",
            "Gemm",
            "Gelu",
            "LayerNormalization",
            "SimplifiedLayerNormalization",
            "Sigmoid",
            "Softmax",
            "Relu",
            "TopK",
            "SkipSimplifiedLayerNormalization",
            "MultiHeadAttention",
            "MatMulNBits",
            "Cos",
            "Sin",
            "GatherBlockQuantized",
            "BranchwiseRMSNorm",
            "CausalConvWithState",
            "FastGelu",
            "SkipLayerNormalization",
        )
    },
    "Abs": ANY,
    "GroupQueryAttention": {HALF},
    "Range": {FULL, WHOLE},
    "Compress": ANY,
    "If": {"bool"},
}


def kinds_of(path: Path) -> dict[str, str]:
    """Return the type of each value by name, as onnxruntime's CPU computes it."""
    import onnx

    model = onnx.load(str(path))
    made = [name for node in model.graph.node for name in node.output if name]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    found = {i.name: i.type for i in session.get_inputs()} | {o.name: o.type for o in session.get_outputs()}
    names = {"tensor(float16)": HALF, "tensor(float)": FULL}
    kinds = {name: names.get(kind, kind.removeprefix("tensor(").removesuffix(")")) for name, kind in found.items()}
    return kinds | {t.name: onnx.helper.tensor_dtype_to_np_dtype(t.data_type).name for t in model.graph.initializer}


@pytest.mark.parametrize("variant", GPU_VARIANTS)
def test_cuda_has_a_kernel_for_every_operator(bundle, variant) -> None:
    import onnx

    for stem, path in Bundle.open(bundle).graphs(variant)[1].items():
        kinds = kinds_of(path)
        graph = onnx.load(str(path), load_external_data=False).graph
        inner = [
            n for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH for n in a.g.node
        ]
        assert not [(n.name, n.op_type) for n in [*graph.node, *inner] if n.op_type not in CUDA_KERNELS], stem
        for node in graph.node:
            values = [kinds[name] for name in node.input if name in kinds]
            floats = [kind for kind in values if kind in (HALF, FULL)]
            kind = (floats or values)[0]
            assert kind in CUDA_KERNELS[node.op_type] or node.name in host_nodes(path), (
                stem,
                node.name,
                node.op_type,
                kind,
            )


def test_fp32_attention_and_int8_products_have_none(bundle) -> None:
    """The table can fail: it does for what is known to fall back."""
    import onnx

    path = Bundle.open(bundle).graphs("fp32")[1][DECODER.stem]
    kinds = kinds_of(path)
    attention = next(
        n for n in onnx.load(str(path), load_external_data=False).graph.node if n.op_type == "GroupQueryAttention"
    )
    assert kinds[attention.input[0]] not in CUDA_KERNELS["GroupQueryAttention"]
    assert "DynamicQuantizeMatMul" not in CUDA_KERNELS


@pytest.mark.parametrize("variant", ["fp16", "int4-fp16"])
def test_graphs_can_be_captured(bundle, variant) -> None:
    """No branches, and nothing whose size depends on values: both are refused, or wait for the device."""
    import onnx

    for graph in (DECODER, EMBED_TOKENS):
        nodes = onnx.load(str(Bundle.open(bundle).graphs(variant)[1][graph.stem]), load_external_data=False).graph.node
        assert not [n.name for n in nodes if n.op_type in ("If", "Loop", "Scan", "Compress", "NonZero")]


def test_trt_takes_the_encoder_whole(bundle, photo) -> None:
    """fp16-trt's encoder has standard operators, no branches, fp16's file of weights and fp16's features."""
    import onnx

    paths = [Bundle.open(bundle).graphs(v)[1][VISION_ENCODER.stem] for v in ("fp16", "fp16-trt")]
    model = onnx.load(str(paths[1]), load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert "If" not in {node.op_type for node in model.graph.node}
    assert not paths[1].with_name(f"{paths[1].name}_data").exists()
    a, b = (Model.load(bundle, variant=v, threads=2) for v in ("fp16", "fp16-trt"))
    features = [m.encode([m.open(photo)]) for m in (a, b)]
    np.testing.assert_allclose(*features, atol=0.02 * np.abs(features[0]).max())
    gpu.check_tensorrt(paths[1])
    with pytest.raises(SettingError, match=r"TensorRT does not support the attention.*--variant fp16-trt"):
        gpu.check_tensorrt(paths[0])


def test_what_is_left_to_the_cpu(bundle, monkeypatch) -> None:
    """On the CPU everything is; shapes and constants do not count, the rest has its names."""
    path = Bundle.open(bundle).graphs("fp16")[1][DECODER.stem]
    options = ort.SessionOptions()
    options.add_session_config_entry(RECORD_PLACEMENT, "1")
    session = ort.InferenceSession(str(path), options)
    if not hasattr(session, "get_provider_graph_assignment_info"):
        pytest.skip("this onnxruntime cannot tell")
    left = left_to_cpu(session, path)
    assert {
        "head (Gemm)",
        "gpu.likeliest (TopK)",
        "text.layers.1.self_attn (GroupQueryAttention)",
        "ReduceSum (ReduceSum)",
    } <= set(left)
    assert not {"Shape (Shape)", "Squeeze (Squeeze)", "Less (Less)", "Where (Where)", "Neg (Neg)"} & set(left)
    assert not [name for name in left if "(Shape)" in name]
    with pytest.raises(
        SettingError,
        match=r"these operators run on the CPU, which costs copies at every token: .* and \d+ more; take a variant for GPUs",
    ):
        check_placement(left, path, strict=True)
    assert "these operators run on the CPU" in check_placement(left[:2], path, strict=False)
    assert check_placement([], path, strict=True) is None
    assert left_to_cpu(SimpleNamespace(), path) is None
    nodes = [
        SimpleNamespace(name=name, op_type=name.split("_")[0]) for name in ("Gather_token_12", "MatMul_token_3", "head")
    ]
    part = SimpleNamespace(ep_name=CPU, get_nodes=lambda: nodes)
    assert left_to_cpu(SimpleNamespace(get_provider_graph_assignment_info=lambda: [part]), path) == [
        "MatMul_token_3 (MatMul)",
        "head (head)",
    ]
    assert check_placement(None, path, strict=False) is None
    with pytest.raises(SettingError, match=r"strict_placement needs onnxruntime 1\.24"):
        check_placement(None, path, strict=True)


def test_what_sessions_are_given(tmp_path, caplog) -> None:
    providers = (TENSORRT, CUDA, CPU)
    execution = Execution(1, providers=providers, cuda_graphs=True, engines=tmp_path / "e", most_patches=1024)
    vision, embed, decoder = (dict(provider_options(execution, g)) for g in (VISION_ENCODER, EMBED_TOKENS, DECODER))
    assert list(vision) == [TENSORRT, CUDA, CPU]
    assert list(embed) == list(decoder) == [CUDA, CPU]
    assert "enable_cuda_graph" not in vision[CUDA]  # its branches and its gathering of tokens cannot be captured
    assert embed[CUDA]["enable_cuda_graph"] == decoder[CUDA]["enable_cuda_graph"] == "1"
    assert "enable_cuda_graph" not in dict(provider_options(Execution(1, providers=providers), DECODER))[CUDA]
    assert vision[TENSORRT]["trt_engine_cache_path"] == str(tmp_path / "e")
    assert (
        vision[TENSORRT]["trt_engine_cache_enable"] == vision[TENSORRT]["trt_timing_cache_enable"] == "True"
    )  # "1" is refused
    assert (tmp_path / "e").is_dir()
    assert (
        vision[TENSORRT]["trt_profile_max_shapes"]
        == "pixel_values:8x1024x768,pixel_attention_mask:8x1024,spatial_shapes:8x2"
    )
    assert dict(provider_options(Execution(1), DECODER)) == {CPU: {}}
    (tmp_path / "file").touch()
    unkept = dict(
        provider_options(
            Execution(1, providers=providers, engines=tmp_path / "file" / "e", most_patches=4), VISION_ENCODER
        )
    )
    assert not [name for name in unkept[TENSORRT] if "cache" in name]
    assert "TensorRT builds its engine again at every start" in caplog.text


def test_norms_are_summed_in_fp32(monkeypatch) -> None:
    """By releases that would sum in fp16, too; see scripts/checks/check_cuda.py for the kernels that come of it."""
    for version, strict in (("1.23.2", True), ("1.26.0", True), ("1.27.0", False), ("1.31.1", False)):
        monkeypatch.setattr("lfm_runtime.engine.ort_release.ort.__version__", version)
        (_, options), _ = provider_options(Execution(1, providers=(CUDA, CPU)), DECODER)
        assert (options.get("enable_skip_layer_norm_strict_mode") == "1") is strict


def test_views_of_one_size_go_together(bundle, photo, monkeypatch) -> None:
    """On a GPU: tiles in eights, then the thumbnail; the same features as one by one."""
    grid, thumbnail = SimpleNamespace(rows=32, columns=32), SimpleNamespace(rows=20, columns=30)
    assert [len(v) for v in views_of_one_size([*[grid] * 10, thumbnail], 8)] == [8, 2, 1]
    assert [len(v) for v in views_of_one_size([grid] * 3, 1)] == [1, 1, 1]
    model = Model.load(bundle, variant="fp32", threads=2)
    image = model.open(Image.open(photo).resize((1400, 1000)))
    alone = model.encode([image])
    monkeypatch.setattr(Execution, "on_gpu", property(lambda _: True))
    np.testing.assert_allclose(model.encode([image]), alone, atol=2e-3)


# ---------------------------------------------------------------------------------------------------- what can go wrong


@pytest.fixture(scope="module")
def bundle(gpu_bundle) -> Path:
    return gpu_bundle


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function: pretend a machine with this GPU, wheel (what it was built for) and GPU memory (MiB free and in all)."""

    def make(
        name: str | None = "L4",
        built: tuple[str, ...] | None = ("sm_89",),
        memory: tuple[int, int] | None = (20_000, 24_000),
    ) -> None:
        here = replace(detect(), gpu=name, cuda=bool(name))
        monkeypatch.setattr(machines, "this_device", lambda: here)
        machines.this_machine.cache_clear()
        (tmp_path / "library").write_bytes(b"")
        monkeypatch.setattr(gpu_wheel, "cuda_library", lambda: tmp_path / "library" if built else None)
        monkeypatch.setattr(gpu_wheel, "_names", lambda _: iter(built or ()))
        monkeypatch.setattr(gpu_wheel, "compute_capability", lambda _: 89)
        monkeypatch.setattr(gpu, "gpu_memory", lambda: memory)
        monkeypatch.setattr("lfm_runtime.setup.memory.gpu_memory", lambda: memory)
        monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])

    yield make
    machines.this_machine.cache_clear()


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"name": None}, "there is no NVIDIA GPU"),
        ({"built": None}, "is only for the CPU"),
        ({"built": ("sm_120",)}, "has kernels for sm_120, this chip is sm_89"),
        (
            {"memory": (300, 4096)},
            "the GPU has 300 of 4096 MiB free, but 11 MiB for weights and about 600 MiB of working memory are needed",
        ),
        ({}, "CUDA could not be started"),  # it was tried, and onnxruntime quietly took the CPU instead
    ],
)
def test_a_gpu_that_cannot_be_used(there, said, bundle, capsys, caplog, machine) -> None:
    """Named: an error that says which; chosen by the machine: one line, and the CPU's answer."""
    machine(**there)
    assert main(["run", str(bundle), "-p", "x", "--profile", "x86-cuda"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert (
        main(["run", str(bundle), "-p", "x", "--profile", "auto", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    )
    assert said in caplog.text
    assert caplog.text.count("computing on the CPU") == 1
    assert (
        Model.load(bundle, profile="auto", threads=1).setup.execution.threads == 1
    )  # the user's settings hold on the CPU as well


def test_a_bundle_without_a_variant_for_gpus(demo_bundle, machine, caplog) -> None:
    machine()
    with pytest.raises(
        GpuError, match=r"no variant that runs completely on a GPU, only .*; make one: lfm-edge quantize"
    ):
        Model.load(demo_bundle, profile="x86-cuda")
    assert Model.load(demo_bundle, profile="auto").setup.profile.providers == (CPU,)
    assert "no variant that runs completely on a GPU" in caplog.text


@pytest.mark.parametrize(
    ("needs", "here", "said"),
    [
        ("libcublasLt.so.13", (), "libcublasLt.so.13 (no other version is here either)"),
        ("libcublasLt.so.13", ("libcublasLt.so.12",), "libcublasLt.so.13 (version 12 is here)"),
        ("libcudart.so.12", ("libcudart.so.13",), "libcudart.so.12 (version 13 is here)"),
        ("libcublasLt.so.13", ("libcublasLt.so.13", "libcudnn.so.9"), None),
        ("libcublasLt.so.13", ("libcublasLt.so.13", "libcudnn.so.8"), "libcudnn.so.9 (version 8 is here)"),
    ],
)
def test_cuda_of_another_version(needs, here, said, tmp_path, monkeypatch) -> None:
    """What the library names, and cuDNN, which it loads by itself."""
    library = tmp_path / "libonnxruntime_providers_cuda.so"
    library.write_bytes(b"\x7fELF" + bytes(2000) + b"\0libc.so.6\0" + needs.encode() + b"\0libcuda.so.1\0")
    monkeypatch.setattr(gpu_wheel, "_loads", lambda name: name in here)
    found = gpu_wheel.library_problem(library)
    assert found is None if said is None else said in found


def test_a_named_library_is_looked_for() -> None:
    assert gpu_wheel._loads("libc.so.6")
    assert not gpu_wheel._loads("libcublasLt.so.999")


MESSAGES = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : onnxruntime::BFCArena::AllocateRawInternal(...) Failed to allocate memory for requested buffer of size 402653184",
    "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0 ; hostname=x ; expr=cudaMalloc((void**)&p, size);",
    "[ONNXRuntimeError] : 1 : FAIL : CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
)


@pytest.mark.parametrize("message", MESSAGES)
def test_memory_runs_out_while_answering(message, bundle, machine, monkeypatch, photo) -> None:
    """The sizes, in one line; not for the CPU, where it is another story."""
    model = Model.load(bundle, variant="fp16", threads=1)
    failure = next(c for c in failures._FAILURES if c.__name__ == "RuntimeException")

    def fail(*_: object, **__: object) -> None:
        raise failure(message)

    monkeypatch.setattr(model.decoder, "start", fail)
    machine(memory=(120, 8192))
    told = "not enough memory for" if "Failed to allocate" in message else "does not work with onnxruntime"
    with pytest.raises((BundleError, OutOfMemoryError), match=told):
        model.answer([photo], QUESTION).text()
    failure, message = RuntimeError, f"Error in execution: {message}"  # as a run with bindings raises it
    with pytest.raises((BundleError, OutOfMemoryError), match=told):
        model.answer([photo], QUESTION).text()
    model.sessions.execution = replace(model.sessions.execution, providers=(CUDA, CPU))
    with pytest.raises(GpuError) as error:
        model.answer([photo], QUESTION).text()
    assert "120 of 8192 MiB are free now, the graphs' weights take 11 MiB" in str(error.value)
    assert ("when 385 MiB more were wanted" in str(error.value)) == ("402653184" in message)


def test_settings_that_do_not_go_together(bundle, demo_model, machine, monkeypatch) -> None:
    with pytest.raises(SettingError, match="strict_placement has no effect: profile generic computes on the CPU"):
        Model.load(bundle, strict_placement=True)
    machine()
    with pytest.raises(SettingError, match="low_memory is for the CPU"):
        Model.load(bundle, profile="x86-cuda", low_memory=True)
    monkeypatch.setattr(Execution, "on_gpu", property(lambda _: True))
    with pytest.raises(SettingError, match="made on the CPU alone"):
        list(answer_all(demo_model, []))


def test_a_graph_that_cannot_be_captured(bundle, monkeypatch, caplog) -> None:
    """The graph is run without CUDA graphs, and the log says so."""
    path = Bundle.open(bundle).graphs("fp16")[1][DECODER.stem]
    asked = []

    class Session(ort.InferenceSession):
        def __init__(self, path, options, providers, **_) -> None:
            asked.append(dict(providers)[CUDA].get("enable_cuda_graph") == "1")
            if asked[-1]:
                raise RuntimeError("onnxruntime: This session cannot use the graph capture feature")
            super().__init__(path)

        def get_providers(self):
            return [CUDA, CPU]

    monkeypatch.setattr(ort, "InferenceSession", Session)
    execution = Execution(1, providers=(CUDA, CPU), cuda_graphs=True)
    load_session(path, DECODER, execution)
    assert asked == [True, False]
    assert "is run without CUDA graphs: onnxruntime: This session cannot use" in caplog.text


def on_cuda(bundle: Path) -> Sessions:
    setup = settle(Bundle.open(bundle), find_profile("x86-cuda"))
    return Sessions(setup.bundle, setup.variant, setup.prefill, setup.execution)


class Broken(DeviceState):
    """A state whose step fails while it is captured."""

    def step_token(self, token: int):
        if self._loop.is_fixed:
            raise RuntimeError("Error in execution: CUDA failure 900: operation not permitted when stream is capturing")
        return super().step_token(token)


def test_a_step_that_cannot_be_captured(bundle, machine, monkeypatch, caplog) -> None:
    """The first step is tried when the model is loaded; without CUDA graphs it goes on."""
    machine()
    decoder = Model.load(bundle, variant="fp16", threads=1).decoder
    monkeypatch.setattr("lfm_runtime.decode.decoder.DeviceState", Broken)
    monkeypatch.setattr(sessions, "OrtMemory", lambda _: OrtMemory("cpu"))
    loaded = []

    def load(self: Sessions):
        loaded.append(self.execution.cuda_graphs)
        return replace(decoder.load(), all_on_device=self.execution.cuda_graphs)

    monkeypatch.setattr(Sessions, "_load_decoder", load)
    monkeypatch.setattr("lfm_runtime.engine.loader.Loader.load", lambda *_: None)
    monkeypatch.setattr("lfm_runtime.setup.setup.onnxruntime_is", lambda _: True)
    monkeypatch.setattr(gpu_wheel, "library_problem", lambda _: None)
    found = on_cuda(bundle)
    found.load()
    assert loaded == [True, False]
    assert "steps are run without CUDA graphs: Error in execution: CUDA failure 900" in caplog.text
    assert len(found.decoder.start(512).step_token(5).ids) == TOP_TOKENS
    monkeypatch.setattr(
        Broken,
        "step_token",
        lambda *_: (_ for _ in ()).throw(RuntimeError("Error in execution: CUDNN_STATUS_NOT_SUPPORTED")),
    )
    with pytest.raises(GpuError, match=r"CUDA could not be started \(Error in execution: CUDNN_STATUS_NOT_SUPPORTED\)"):
        on_cuda(bundle).load()


def test_captured_steps_since_when(bundle, machine, monkeypatch) -> None:
    """Steps are captured from onnxruntime 1.30 on; before, a captured Concat goes wrong at replays."""
    machine()
    for version, wanted in (("1.23.2", False), ("1.29.0", False), ("1.30.0", True), ("1.31.1", True)):
        monkeypatch.setattr("lfm_runtime.engine.ort_release.ort.__version__", version)
        assert on_cuda(bundle).execution.cuda_graphs is wanted


def test_memory_of_the_gpu(monkeypatch) -> None:
    """Memory is read from nvidia-smi's rows; what nvidia-smi cannot say is None."""
    said = {
        "--query-gpu=memory.free,memory.total": "7000, 8192\n",
        "--query-compute-apps=pid,used_memory": "11, 300\n12, 40\n11, 5\n13, [N/A]\n",
    }
    monkeypatch.setattr(gpu.subprocess, "run", lambda words, **_: SimpleNamespace(stdout=said[words[1]]))
    assert gpu.gpu_memory() == (7000, 8192)
    assert (gpu.gpu_memory_used(11), gpu.gpu_memory_used(13), gpu.gpu_memory_used(99)) == (305, None, None)

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(gpu.subprocess, "run", missing)
    assert gpu.gpu_memory() is None
    assert gpu.gpu_memory_used(11) is None


def test_profiles_for_gpus_say_what_they_do() -> None:
    assert read("x86-cuda").variant == read("jetson-orin-cuda").variant == ("fp16", "int4-fp16")
    for name in ("x86-cuda-tensorrt", "jetson-orin-cuda-tensorrt"):
        assert read(name).providers == (TENSORRT, CUDA, CPU)
        assert read(name).variant == ("fp16-trt",)
        assert read(name).match == read("balanced").match  # never taken by itself


# -------------------------------------------------------------------------------------- the same everywhere it is asked


def test_one_judgement_for_all_commands(demo_bundle, bundle, machine, capsys, caplog, monkeypatch, photo) -> None:
    """A bundle that this GPU cannot compute: run plans its memory for the CPU, audit, selftest and plan take the CPU's
    profile as well.
    """
    from lfm_audit.selftest import Installed

    machine()
    settled = []
    was = settle

    def spy(opened, profile, *a, **k):
        settled.append(profile.providers)
        return was(opened, profile, *a, **k)

    monkeypatch.setattr("lfm_runtime.setup.resolve.settle", spy)
    assert main(["run", str(demo_bundle), "-p", "x", "--profile", "auto", "--max-new-tokens", "2"]) == 0
    assert Installed(demo_bundle, "auto").profile.providers == (CPU,)
    assert main(["plan", str(demo_bundle), "--profile", "auto"]) == 0
    assert settled == [(CPU,)] * 3
    assert resolve(bundle, "auto").profile.providers == (CUDA, CPU)
    capsys.readouterr()
    assert main(["tune", str(bundle), str(photo), "--profile", "x86-cuda"]) == 2
    assert "tune works only for CPUs, but profile x86-cuda uses a GPU" in capsys.readouterr().err


def test_little_memory_of_the_machine_is_not_the_gpus(bundle, machine) -> None:
    machine()
    small = replace(detect(), ram_available_mib=50, ram_total_mib=60, limit_mib=None, limit_free_mib=None)
    setup = resolve(bundle, "x86-cuda", Ask((), "x"), device=small)
    assert (setup.steps, setup.execution.on_gpu) == ((), True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"prefill": "fp16", "variant": "int4-fp16"}, "prefill fp16 has no effect on a GPU"),
        ({"low_memory": True}, "low_memory is for the CPU"),
        ({"min_tiles": 5, "max_tiles": 2}, "min_tiles"),
    ],
)
def test_wrong_settings_before_anything_is_loaded(flags, said, bundle, machine, monkeypatch) -> None:
    machine()
    monkeypatch.setattr(Sessions, "load", lambda _: pytest.fail("it was loaded"))
    with pytest.raises(SettingError, match=said):
        Model.load(bundle, profile="x86-cuda", **flags)


def test_speculation_is_for_the_cpu(bundle, machine) -> None:
    machine()
    model = Model(resolve(bundle, "x86-cuda"))
    with pytest.raises(SettingError, match="speculate needs a decoder on the CPU that can undo rejected tokens"):
        model.answer([], "x", speculate=4)


def test_what_the_named_variant_is(bundle, machine, tmp_path) -> None:
    """The profile's own first is what to make, and a graph's damage is not the GPU's."""
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    machine()
    opened = Bundle.open(copy)
    without = replace(opened, variants={v: f for v, f in opened.variants.items() if "fp16" not in v})
    with pytest.raises(GpuError, match=r"lfm-edge quantize .* --variant fp16-trt"):
        resolve(without, "x86-cuda-tensorrt")
    assert gpu.is_of_a_gpu("CUDA failure 35: CUDA driver version is insufficient")
    assert not gpu.is_of_a_gpu("GetExtDataFromTensorProto External data type file_length: 100 are out of bounds")


def test_a_callers_own_error_stays_his(bundle, photo) -> None:
    model = Model.load(bundle, variant="fp32", threads=1)

    def gone(*_: object) -> None:
        raise RuntimeError("my window is closed")

    with pytest.raises(RuntimeError, match="my window is closed"):
        model.answer([photo], QUESTION, progress=gone).text()


def test_engines_are_of_their_weights(bundle, tmp_path) -> None:
    """TensorRT tells engines apart by names and shapes: other weights get another folder."""
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    opened = Bundle.open(copy)
    vision = opened.graphs("fp16-trt")[1][VISION_ENCODER.stem]
    before = _engines(opened, vision)
    assert before == _engines(Bundle.open(copy), vision)
    name = "onnx/vision_encoder_fp16.onnx_data"
    manifest = opened.manifest.with_files({name: replace(opened.files[name], sha256="0" * 64)})
    changed = replace(opened, manifest=manifest)
    assert _engines(changed, vision) != before


def test_nothing_is_prepared_for_gpus(bundle, capsys) -> None:
    for variant in ("int4-fp16", "fp16-trt"):
        assert main(["prepare", str(bundle), "--variant", variant]) == 0
        assert "needs no preparing" in capsys.readouterr().out
