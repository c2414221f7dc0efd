"""Detection on trees of files as devices have them, and on this machine."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import psutil
import pytest
from lfm_profiles import choose, default_threads, detect, physical_cores
from lfm_profiles.cgroup import cpu_quota
from lfm_profiles.device import CoreType
from lfm_runtime.commands.cli import main
from lfm_runtime.commands.profile import device_lines
from trees import A53, DEVICES, V8, machine_of, meminfo, pi, write, x86

CPU = ["CPUExecutionProvider"]
CUDA = ["CUDAExecutionProvider", *CPU]


def device(folder: Path, name: str):
    return detect(
        write(folder, DEVICES[name][0]), system="Linux", machine=machine_of(name), pointer_bits=64, page_size=4096
    )


@pytest.mark.parametrize("name", DEVICES)
def test_profile_of_each_device(name, tmp_path) -> None:
    found = device(tmp_path, name)
    assert choose(found, CPU).profile.name == DEVICES[name][1]
    assert choose(found, CUDA).profile.name == DEVICES[name][2]
    assert choose(found, CPU).reasons


def test_facts_of_a_pi(tmp_path) -> None:
    found = device(tmp_path, "pi3b+")
    assert found.board == "Raspberry Pi 3 Model B Plus Rev 1.3"
    assert found.compatible == ("raspberrypi,3-model-b-plus", "brcm,bcm2837")
    assert found.soc == "BCM2837"
    assert found.cores == (CoreType(4, "Cortex-A53", 1400),)
    assert {"asimd", "CPU part 0xd03", "aarch64"} <= set(found.features)
    assert not {"asimddp", "fphp"} & set(found.features)
    assert (found.ram_total_mib, found.ram_available_mib) == (906, 679)
    assert found.throttled == ("under-voltage", "throttled", "under-voltage before", "throttled before")
    assert found.governor == "ondemand"
    assert not found.cuda


def test_facts_of_a_jetson(tmp_path) -> None:
    found = device(tmp_path, "agx-orin")
    assert found.jetpack == "6 (L4T 36.4.3)"
    assert found.cores == (CoreType(12, "Cortex-A78AE", 2201),)
    assert (found.gpu, found.cuda, found.throttled) == ("integrated", True, None)
    assert device(tmp_path / "nano", "jetson-nano").jetpack == "4 (L4T 32.7.4)"


def test_facts_of_a_pc(tmp_path) -> None:
    found = device(tmp_path, "x86-gpu")
    assert found.board == "QEMU Standard PC"
    assert found.cores == (CoreType(2, "", None),)  # four processors, two cores
    assert found.cpu == "Intel(R) Xeon(R) Processor @ 2.50GHz"
    assert found.caches == {"L1d": 32, "L2": 1024, "L3": 33792}
    assert found.gpu == "NVIDIA L4"


def test_cores_of_two_kinds(tmp_path) -> None:
    """Fast cores come first, with one processor of each core."""
    files = pi("4", "x", A53, 1000, V8, 900)
    for i in (2, 3):
        files[f"sys/devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq"] = "2000000\n"
    assert physical_cores(write(tmp_path / "arm", files), {0, 1, 2, 3}) == [2, 3, 0, 1]
    assert [c.count for c in detect(tmp_path / "arm", machine="aarch64").cores] == [2, 2]
    assert physical_cores(write(tmp_path / "x86", x86("", 100, cores=2)), {0, 1, 2, 3}) == [0, 1]
    assert physical_cores(tmp_path / "x86", {1, 2, 3}) == [1, 2]
    assert physical_cores(tmp_path / "nothing", {0, 1}) == [0, 1]


V2 = {"proc/self/cgroup": "0::/user.slice/a.service\n", "proc/meminfo": meminfo(8000)}
V1 = {"proc/self/cgroup": "9:name=systemd:/\n4:memory:/docker/abc\n0::/\n", "proc/meminfo": meminfo(8000)}


@pytest.mark.parametrize(
    ("files", "limit", "free"),
    [
        ({**V2, "sys/fs/cgroup/user.slice/a.service/memory.max": "536870912\n"}, 512, None),
        (
            {
                **V2,
                "sys/fs/cgroup/user.slice/a.service/memory.max": "max\n",
                "sys/fs/cgroup/user.slice/memory.max": "1073741824\n",
                "sys/fs/cgroup/user.slice/memory.current": "322122547\n",
                "sys/fs/cgroup/user.slice/memory.stat": "anon 5\ninactive_file 104857600\n",
            },
            1024,
            816,
        ),
        # a parent of 400 MiB with 250 taken around a limit of 350 with 10 taken: nearer to its end than the group
        # itself
        (
            {
                **V2,
                "sys/fs/cgroup/user.slice/a.service/memory.max": str(350 << 20),
                "sys/fs/cgroup/user.slice/a.service/memory.current": str(10 << 20),
                "sys/fs/cgroup/user.slice/memory.max": str(400 << 20),
                "sys/fs/cgroup/user.slice/memory.current": str(254 << 20),
            },
            350,
            146,
        ),
        (
            {**V2, "sys/fs/cgroup/memory.max": "268435456\n"},
            256,
            None,
        ),  # in a container the group is mounted at the top
        (
            {
                **V1,
                "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "536870912\n",
                "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": "134217728\n",
            },
            512,
            384,
        ),
        ({**V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, None, None),
        ({**V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "rubbish\n"}, None, None),
        ({**V2, "sys/fs/cgroup/memory.max": "17179869184\n"}, 16384, None),  # above what the machine has
    ],
)
def test_control_groups(files, limit, free, tmp_path) -> None:
    found = detect(write(tmp_path, files), system="Linux", machine="x86_64")
    assert (found.limit_mib, found.limit_free_mib) == (limit, free)
    assert found.usable_mib == min(8000, limit or 8000)


@pytest.mark.parametrize(
    ("files", "quota", "threads"),
    [
        ({"sys/fs/cgroup/user.slice/a.service/cpu.max": "50000 100000\n"}, 0.5, 1),
        ({"sys/fs/cgroup/user.slice/a.service/cpu.max": "max 100000\n"}, None, None),
        (
            {
                "sys/fs/cgroup/user.slice/a.service/cpu.max": "max 100000\n",
                "sys/fs/cgroup/user.slice/cpu.max": "150000 100000\n",
            },
            1.5,
            2,
        ),
        (
            {
                "sys/fs/cgroup/user.slice/a.service/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/cpu.max": "200000 100000\n",
            },
            2.0,
            2,
        ),
        ({"sys/fs/cgroup/cpu.max": "rubbish\n"}, None, None),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            1.0,
            1,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/a/b\n",
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "25000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "50000\n",
            },
            0.5,
            1,
        ),
    ],
)
def test_cpu_quotas_limit_threads(files, quota, threads, tmp_path) -> None:
    """Of the group and of every group around it, versions 2 and 1."""
    tree = write(tmp_path, {**V2, **files})
    assert cpu_quota(tree) == quota
    unlimited = default_threads(tmp_path / "nothing")
    assert default_threads(tree) == min(unlimited, threads or unlimited)


def test_a_small_container_on_a_pi_gets_the_small_profile(tmp_path) -> None:
    tree = {**DEVICES["pi4-8gb"][0], "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": str(800 << 20)}
    assert choose(detect(write(tmp_path, tree), system="Linux", machine="aarch64")).profile.name == "pi4-1gb"


def test_nothing_can_be_read(tmp_path) -> None:
    """An empty tree, one of empty files, one of rubbish, one of folders in the files' places."""
    names = sorted(
        {name for files, _, _ in DEVICES.values() for name in files} | V2.keys() | {"sys/fs/cgroup/memory.max"}
    )
    trees = [tmp_path / str(i) for i in range(4)]
    write(trees[1], dict.fromkeys(names, ""))
    write(trees[2], dict.fromkeys(names, "\0\xff:::\n: : :\n-1 kB\n"))
    for name in names:
        (trees[3] / name).mkdir(parents=True)
    for tree in trees:
        found = detect(tree, system="Linux", machine="riscv64", pointer_bits=64, page_size=4096)
        assert choose(found).profile.name == "generic"
        assert choose(found).reasons == ("no other profile fits",)
        assert len(device_lines(found)) == 12
        json.dumps(found.as_dict())


def test_unreadable_files(tmp_path, monkeypatch) -> None:
    """No file can be read, as under seccomp or in a locked-down container."""
    write(tmp_path, DEVICES["pi5-4gb"][0])

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    found = detect(tmp_path, system="Linux", machine="aarch64")
    assert found.board is None
    monkeypatch.undo()
    assert choose(found).profile.name == "generic-arm64"


def test_32_bit_userland(tmp_path) -> None:
    found = detect(write(tmp_path, DEVICES["pi4-2gb"][0]), system="Linux", machine="armv7l", pointer_bits=32)
    assert "64-bit system" in dict(device_lines(found))["system"]


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_what_is_detected_agrees_with_psutil(capsys) -> None:
    """What is detected agrees with psutil and the operating system."""
    found = detect()
    assert abs(found.ram_total_mib - psutil.virtual_memory().total / 2**20) < 2
    assert found.machine == platform.machine()
    assert found.page_size == os.sysconf("SC_PAGE_SIZE")
    assert sum(core.count for core in found.cores) == psutil.cpu_count(logical=False)
    assert found.pointer_bits == 64
    assert main(["profile", "detect"]) == 0
    assert choose(found).profile.name in capsys.readouterr().out
    assert main(["profile", "detect", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"]["ram_total_mib"] == found.ram_total_mib


@pytest.mark.skipif(platform.system() != "Linux", reason="ulimit")
def test_address_space_limit() -> None:
    import resource
    import subprocess
    import sys

    code = (
        "from lfm_profiles import detect; d = detect(); print(d.limit_mib, d.limit_by, d.limit_free_mib < d.limit_mib)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )
    assert done.stdout.split() == ["2048", "ulimit", "-v", "True"]
