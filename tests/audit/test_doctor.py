"""What doctor says of recorded machines, and of wheels built for other chips."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "profiles"))
from lfm_audit.doctor import bundle as check_bundle
from lfm_audit.doctor import examine as examining
from lfm_audit.doctor import hardware, software
from lfm_audit.doctor.examine import examine
from lfm_audit.doctor.finding import Finding, Machine
from lfm_profiles import detect
from lfm_profiles.sensors import Sensors
from lfm_runtime.commands.cli import main
from lfm_runtime.engine import gpu_wheel
from lfm_runtime.engine.gpu_wheel import has_kernels, kernel_architectures
from lfm_runtime.engine.ort_release import onnxruntime_is
from lfm_runtime.formats.manifest import file_hash
from trees import DEVICES, machine_of, write


def of(name: str, folder: Path, *, bits: int = 64, **files: str) -> Machine:
    root = write(folder, {**DEVICES[name][0], **files})
    device = detect(root, system="Linux", machine=machine_of(name), pointer_bits=bits, page_size=4096)
    return Machine(device, Sensors(root), root)


def found(machine: Machine, check) -> dict[str, Finding]:
    return {finding.name: finding for finding in check(machine)}


def test_doctor_finds_no_problem_where_all_tests_run(demo_bundle, capsys) -> None:
    """No problem where all tests run; JSON says the same as the page."""
    assert main(["doctor", str(demo_bundle), "--profile", "generic"]) == 0
    page = capsys.readouterr().out
    assert "problems: 0" in page
    assert main(["doctor", str(demo_bundle), "--profile", "generic", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {f["name"] for f in said["findings"]} >= {
        "python",
        "packages",
        "onnxruntime",
        "gpu",
        "telemetry",
        "processor",
        "memory",
        "swap",
        "disk",
        "governor",
        "temperature",
        "power",
        "profile",
        "bundle",
        "prepared",
    }
    assert said["problem"] == 0
    assert all(f["fix"] for f in said["findings"] if f["state"] != "ok")
    assert all(not f["fix"] for f in said["findings"] if f["state"] == "ok")
    assert len(said["findings"]) == len(
        [line for line in page.splitlines() if line[:1] not in (" ", "") and not line.startswith("problems")]
    )


@pytest.mark.parametrize(
    ("name", "check", "finding", "state", "said", "files"),
    [
        ("pi5-4gb", hardware.processor, "processor", "ok", "4 Cortex-A76; asimddp asimdhp", {}),
        ("pi4-2gb", hardware.processor, "processor", "warning", "no dot products", {}),
        ("x86-old", hardware.processor, "processor", "warning", "no AVX2", {}),
        ("pi-zero2w", hardware.memory, "memory", "warning", "416 MiB, 312 free now", {}),
        ("pi5-4gb", hardware.memory, "memory", "ok", "4045 MiB", {}),
        ("pi4-1gb", hardware.swap, "swap", "warning", "none", {}),
        ("pi5-4gb", hardware.swap, "swap", "ok", "none", {}),
        (
            "pi4-1gb",
            hardware.swap,
            "swap",
            "warning",
            "/var/swap, 50 MiB used",
            {"proc/swaps": "Filename Type Size Used Priority\n/var/swap file 102396 51200 -2\n"},
        ),
        (
            "pi4-1gb",
            hardware.swap,
            "swap",
            "ok",
            "/dev/zram0, 50 MiB used",
            {"proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 102396 51200 100\n"},
        ),
        ("pi5-4gb", hardware.clocks, "governor", "ok", "ondemand", {}),
        (
            "pi5-4gb",
            hardware.clocks,
            "governor",
            "warning",
            "powersave",
            {"sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n"},
        ),
        ("pi5-4gb", hardware.throttling, "throttling", "ok", "now: no; since boot: no", {}),
        (
            "pi5-4gb",
            hardware.throttling,
            "throttling",
            "problem",
            "now: under-voltage, throttled; since boot: under-voltage, throttled",
            {"sys/devices/platform/soc/soc:firmware/get_throttled": "0x50005\n"},
        ),
        (
            "pi5-4gb",
            hardware.throttling,
            "throttling",
            "warning",
            "now: no; since boot: soft temperature limit",
            {"sys/devices/platform/soc/soc:firmware/get_throttled": "0x80000\n"},
        ),
        (
            "pi5-4gb",
            hardware.sensors,
            "temperature",
            "warning",
            "84 °C",
            {
                "sys/class/thermal/thermal_zone0/temp": "84000\n",
                "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            },
        ),
        ("pi5-4gb", hardware.profile, "profile", "ok", "pi5 fits this machine", {}),
    ],
)
def test_machines(name, check, finding, state, said, files, tmp_path) -> None:
    there = found(of(name, tmp_path, **files), check)[finding]
    assert (there.state, said in there.said) == (state, True), there
    assert bool(there.fix) == (state != "ok")


def test_throttling_is_a_matter_of_boards_whose_firmware_tells(tmp_path) -> None:
    assert not found(of("x86-avx2", tmp_path), hardware.throttling)


def test_fixes_tell_heat_from_power(tmp_path) -> None:
    bits = "sys/devices/platform/soc/soc:firmware/get_throttled"
    assert (
        "power supply"
        in found(of("pi5-4gb", tmp_path / "a", **{bits: "0x10000"}), hardware.throttling)["throttling"].fix
    )
    assert "fan" in found(of("pi5-4gb", tmp_path / "b", **{bits: "0x80000"}), hardware.throttling)["throttling"].fix


def test_a_32_bit_system(tmp_path) -> None:
    there = found(of("pi4-2gb", tmp_path, bits=32), software.python)["python"]
    assert there.state == "problem"
    assert "64-bit system" in there.fix


@pytest.mark.parametrize(
    ("code", "said", "fix"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
            "crashes when imported (SIGILL)",
            "onnxruntime!=1.21.0",
        ),
        ('raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.29\' not found")', "GLIBCXX_3.4.29", "JetPack 6"),
        ("raise ImportError('libcublasLt.so.12: cannot open shared object file')", "libcublasLt", "CUDA's or cuDNN's"),
        ("raise ImportError('numpy.core.multiarray failed to import')", "multiarray", "pip install --upgrade numpy"),
        ("raise RuntimeError('odd')", "odd", "--force-reinstall"),
    ],
)
def test_an_onnxruntime_that_cannot_be_imported(code, said, fix, tmp_path, monkeypatch, demo_bundle) -> None:
    """Looked at from another process, so that doctor lives; and nothing that needs it is tried after."""
    (tmp_path / "onnxruntime.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    findings = list(examine(replace(Machine.here(demo_bundle, "generic"))))
    there = next(f for f in findings if f.name == "onnxruntime")
    assert (there.state, said in there.said, fix in there.fix) == ("problem", True, True), there
    assert not [f for f in findings if f.name in ("bundle", "prepared")]


def test_a_limit_is_raised_and_not_waited_for(tmp_path) -> None:
    """Where a limit leaves less than the machine has, ending other programs does not help."""
    machine = of("pi5-4gb", tmp_path)
    limited = replace(machine.device, limit_mib=300, limit_free_mib=200, limit_by="ulimit -v")
    there = found(replace(machine, device=limited), hardware.memory)["memory"]
    assert there.fix == "raise the limit (ulimit -v), or see what fits: lfm-edge plan BUNDLE IMAGE"
    busy = replace(limited, ram_available_mib=100)
    assert "close other programs" in found(replace(machine, device=busy), hardware.memory)["memory"].fix


def test_what_a_stick_has_installed_is_installed_from_it(tmp_path, monkeypatch) -> None:
    """It has no pip."""
    monkeypatch.setattr(software, "_version", lambda _: None)
    assert "pip install" in found(of("pi5-4gb", tmp_path), software.packages)["packages"].fix
    monkeypatch.setattr(software, "from_stick", lambda: True)
    fix = found(of("pi5-4gb", tmp_path / "b"), software.packages)["packages"].fix
    assert fix == "install again from the stick: sh STICK/install.sh"


def test_two_wheels_at_once_and_one_that_kills(tmp_path, monkeypatch) -> None:
    here = software._version
    monkeypatch.setattr(software, "_version", lambda name: "1.31.1" if name.startswith("onnxruntime") else here(name))
    assert "pip uninstall" in found(of("pi5-4gb", tmp_path / "a"), software.onnxruntime)["onnxruntime"].fix
    monkeypatch.setattr(software, "_version", {"onnxruntime": "1.21.0"}.get)
    assert [f.state for f in software.onnxruntime(of("pi4-2gb", tmp_path / "b"))][-1] == "problem"
    assert {f.state for f in software.packages(of("pi4-2gb", tmp_path / "b"))} == {"problem"}


def test_bundles(bundle_copy, tmp_path, monkeypatch) -> None:
    machine = replace(Machine.here(bundle_copy, "generic"))
    assert found(machine, check_bundle.bundle)["bundle"].state == "ok"
    assert found(machine, check_bundle.prepared)["prepared"].state == "warning"
    if not onnxruntime_is("1.23"):
        return  # that cannot keep packed weights
    assert main(["prepare", str(bundle_copy)]) == 0
    assert found(machine, check_bundle.prepared)["prepared"].state == "ok"
    data = next(
        p
        for p in bundle_copy.with_name("bundle.prepared").rglob("*")
        if p.suffix not in (".json", ".onnx") and p.is_file()
    )
    data.write_bytes(data.read_bytes()[:-1])
    assert "is cut off" in found(machine, check_bundle.prepared)["prepared"].said
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    (bundle_copy / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    findings = [f for f in examine(machine) if f.name in ("bundle", "prepared")]
    assert [(f.name, f.state) for f in findings] == [("bundle", "problem")]
    assert "schema 99" in findings[0].said
    assert main(["doctor", str(bundle_copy)]) == 1
    assert [f.state for f in examine(replace(machine, bundle=tmp_path / "nowhere")) if f.name == "bundle"] == [
        "problem"
    ]


def test_weights_behind_a_link_are_judged_as_onnxruntime_takes_them(bundle_copy, photo) -> None:
    """A link to another folder is refused; one to a file beside it is not."""
    machine = replace(Machine.here(bundle_copy, "generic"))
    weights = bundle_copy / "onnx" / "decoder_model_merged.onnx_data"
    refused = "problem" if onnxruntime_is("1.24") else "ok"
    for place, state in (("elsewhere", refused), ("bundle/onnx", "ok")):
        away = bundle_copy.parent / place / "weights"
        away.parent.mkdir(exist_ok=True)
        shutil.copy(weights, away)
        weights.unlink()
        weights.symlink_to(away)
        assert found(machine, check_bundle.bundle)["bundle"].state == state
        asked = ["run", str(bundle_copy), str(photo), "-p", "Hi", "--max-new-tokens", "1", "--variant", "fp32"]
        assert main([*asked, "--profile", "generic"]) == (2 if state == "problem" else 0)


def test_a_profile_that_the_manifest_does_not_name_is_not_selected(bundle_copy, monkeypatch) -> None:
    monkeypatch.delenv("LFM_EDGE_PROFILE", raising=False)
    (bundle_copy / "profile.toml").write_text('name = "stray"\n')
    machine = Machine.here(bundle_copy, "")
    assert "selected" not in found(machine, hardware.profile)["profile"].said
    assert found(replace(machine, profile="pi5"), hardware.profile)["profile"].said.endswith("; pi5 is selected")


def test_a_profile_that_is_not_there(bundle_copy, capsys, monkeypatch) -> None:
    monkeypatch.delenv("LFM_EDGE_PROFILE", raising=False)
    for words in ([], [str(bundle_copy)]):
        assert main(["doctor", *words, "--profile", "nix", "--json"]) == 1
        said = {one["name"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
        assert said["profile"]["state"] == "problem"
        assert "there is no profile 'nix'" in said["profile"]["said"]
        assert "bundle" not in said, "it would say the same again"


def test_telemetry(monkeypatch, tmp_path) -> None:
    machine = of("pi5-4gb", tmp_path)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    assert found(machine, software.telemetry)["telemetry"].state == "warning"
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")
    assert found(machine, software.telemetry)["telemetry"].state == "ok"


def test_a_check_that_breaks_hides_no_other(monkeypatch, tmp_path) -> None:
    def breaks(_):
        raise RuntimeError("odd")

    monkeypatch.setattr(examining, "CHECKS", (breaks, software.python))
    findings = list(examine(of("pi5-4gb", tmp_path)))
    assert [f.name for f in findings] == ["breaks", "python"]
    assert "RuntimeError: odd" in findings[0].said


# ------------------------------------------------------------------------------------------------ kernels of GPU wheels


def fat_binary(*architectures: str) -> bytes:
    """As the CUDA tools lay it out: one entry each, of 64 bytes of header and some code."""
    entries = b""
    for name in architectures:
        kind, number = name.split("_")
        head = struct.pack("<HHIQIIHHI", 1 if kind == "compute" else 2, 0x101, 64, 40, 0, 0, 0, 1, int(number))
        entries += head.ljust(64, b"\0") + b"\x90" * 40
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def test_kernels_are_read(tmp_path) -> None:
    library = tmp_path / "lib.so"
    by_chance = struct.pack("<I", 0xBA55ED50) + b"\xff" * 60
    library.write_bytes(
        b"\x7fELF" + by_chance + fat_binary("sm_87", "compute_90") + b"\0" * 99 + fat_binary("sm_87") + by_chance[:6]
    )
    assert kernel_architectures(library) == {"sm_87": 2, "compute_90": 1}
    library.write_bytes(b"\0")
    assert kernel_architectures(library) == {}


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc to build a library with")
def test_kernels_of_a_real_library(tmp_path) -> None:
    (tmp_path / "k.cu").write_text("__global__ void f(float* x) { x[threadIdx.x] *= 2; }\n")
    codes = ["arch=compute_87,code=sm_87", "arch=compute_90,code=[sm_90,compute_90]"]
    words = [
        "nvcc",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        *[w for code in codes for w in ("-gencode", code)],
        str(tmp_path / "k.cu"),
        "-o",
        str(tmp_path / "k.so"),
    ]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("this nvcc cannot build for these chips")
    assert kernel_architectures(tmp_path / "k.so").keys() == {"sm_87", "sm_90", "compute_90"}


@pytest.mark.parametrize(
    ("built", "chip", "integrated", "runs"),
    [
        ({"sm_89", "sm_90", "sm_120", "sm_121"}, 87, True, False),  # PyPI's aarch64 wheel on an Orin
        ({"sm_80", "sm_86"}, 87, True, False),  # a Jetson runs no code of desktop chips
        ({"sm_80"}, 86, False, True),
        ({"sm_86"}, 80, False, False),
        ({"sm_87"}, 87, True, True),
        ({"compute_80"}, 87, True, True),
        ({"compute_90"}, 87, True, False),
        ({"sm_80"}, 90, False, False),
        (set(), 90, False, False),
    ],
)
def test_which_chips_run_them(built, chip, integrated, runs) -> None:
    assert has_kernels(built, chip, integrated=integrated) is runs


@pytest.mark.parametrize(("built", "state"), [(("sm_89", "sm_90"), "problem"), (("sm_87",), "ok")])
def test_a_gpu_wheel_on_an_orin(built, state, tmp_path, monkeypatch) -> None:
    library = tmp_path / "libonnxruntime_providers_cuda.so"
    library.write_bytes(fat_binary(*built))
    monkeypatch.setattr(gpu_wheel, "cuda_library", lambda: library)
    there = found(of("orin-nano", tmp_path / "root"), software.gpu)["gpu"]
    assert there.state == state, there
    assert ("this chip is sm_87" in there.said) == (state == "problem")
    assert ("NVIDIA's wheel for this JetPack" in there.fix) == (state == "problem")
    assert found(of("pi5-4gb", tmp_path / "pi"), software.gpu)["gpu"].state == "warning", "a GPU wheel without a GPU"


def test_the_chip_of_a_pc(monkeypatch, tmp_path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 8.9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    machine = of("x86-gpu", tmp_path / "root")
    gpu_wheel._asked_capability.cache_clear()
    assert gpu_wheel.compute_capability(machine.device) == 89
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    gpu_wheel._asked_capability.cache_clear()
    assert gpu_wheel.compute_capability(machine.device) is None


def test_what_a_packed_bundle_lacks_is_made_elsewhere(bundle_copy, tmp_path, capsys) -> None:
    """On a board nothing can be quantized, and what was verified would be changed."""
    (board := tmp_path / "board.toml").write_text('extends = "pi4"\n[budget]\npeak_rss_mib = 100000\n')  # pytest's own
    words = ["doctor", str(bundle_copy), "--profile", str(board)]
    main(words)
    assert f"lfm-edge quantize {bundle_copy} --variant int4" in capsys.readouterr().out
    files = [path for path in bundle_copy.rglob("*") if path.is_file()]
    sums = [f"{file_hash(path)}  {path.relative_to(bundle_copy).as_posix()}\n" for path in sorted(files)]
    (bundle_copy / "SHA256SUMS").write_text("".join(sums))
    main(words)
    assert "where the bundle was made: lfm-edge quantize BUNDLE --variant int4" in capsys.readouterr().out
