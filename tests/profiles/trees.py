"""The files of /proc, /sys and /etc that detection reads, as the devices of the field have them."""

from __future__ import annotations

from pathlib import Path

A53, A57, A72, A76, A78AE = "0xd03", "0xd07", "0xd08", "0xd0b", "0xd42"
V8 = "fp asimd evtstrm crc32 cpuid"
V8_CRYPTO = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
V82 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
X86 = "fpu sse sse2 ssse3 fma sse4_1 sse4_2 avx f16c avx2 bmi2"


def arm(
    model: str, compatible: str, part: str, count: int, mhz: int, features: str, ram_mib: int, **more: str
) -> dict[str, str]:
    """Return the files of a board that has a device tree and cores of one kind."""
    block = "processor\t: {}\nBogoMIPS\t: 108.00\nFeatures\t: {}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: {}\nCPU revision\t: 1\n"
    files = {
        "proc/device-tree/model": model + "\0",
        "proc/device-tree/compatible": compatible.replace(" ", "\0") + "\0",
        "proc/cpuinfo": "\n".join(block.format(i, features, part) for i in range(count))
        + f"\nRevision\t: c03115\nModel\t\t: {model}\n",
        "proc/meminfo": meminfo(ram_mib),
    }
    for i in range(count):
        files[f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list"] = f"{i}\n"
        files[f"sys/devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq"] = f"{mhz * 1000}\n"
        files[f"sys/devices/system/cpu/cpu{i}/cpufreq/scaling_governor"] = "ondemand\n"
    return {**files, **more}


def pi(
    model: str, compatible: str, part: str, mhz: int, features: str, ram_mib: int, throttled: str = "0"
) -> dict[str, str]:
    tree = arm(f"Raspberry Pi {model}", compatible, part, 4, mhz, features, ram_mib)
    return {**tree, "sys/devices/platform/soc/soc:firmware/get_throttled": throttled + "\n"}


def meminfo(ram_mib: int) -> str:
    return f"MemTotal:       {ram_mib * 1024} kB\nMemFree:        {ram_mib * 512} kB\nMemAvailable:   {ram_mib * 768} kB\nSwapTotal:      102396 kB\n"


def x86(flags: str, ram_mib: int, cores: int = 2, threads: int = 2) -> dict[str, str]:
    """Hyper-threads numbered as Linux does: core c has processors c and c + cores."""
    block = "processor\t: {}\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Processor @ 2.50GHz\nflags\t\t: {}\n"
    files = {
        "proc/cpuinfo": "\n".join(block.format(i, flags) for i in range(cores * threads)),
        "proc/meminfo": meminfo(ram_mib),
        "sys/class/dmi/id/sys_vendor": "QEMU\n",
        "sys/class/dmi/id/product_name": "Standard PC\n",
    }
    for i in range(cores * threads):
        siblings = ",".join(str(i % cores + t * cores) for t in range(threads))
        files[f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list"] = f"{siblings}\n"
    for index, (level, kind, size) in enumerate(
        [(1, "Data", "32K"), (1, "Instruction", "32K"), (2, "Unified", "1024K"), (3, "Unified", "33M")]
    ):
        for name, value in (("level", level), ("type", kind), ("size", size)):
            files[f"sys/devices/system/cpu/cpu0/cache/index{index}/{name}"] = f"{value}\n"
    return files


def jetson(
    model: str, compatible: str, part: str, count: int, mhz: int, features: str, ram_mib: int, l4t: str
) -> dict[str, str]:
    release, _, revision = l4t.partition(".")
    return {
        **arm(model, compatible, part, count, mhz, features, ram_mib),
        "etc/nv_tegra_release": f"# R{release} (release), REVISION: {revision}, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8\n",
        "dev/nvhost-gpu": "",
    }


# name → (files, the profile without a GPU build of onnxruntime, the one with)
DEVICES: dict[str, tuple[dict[str, str], str, str]] = {
    "pi-zero2w": (
        pi("Zero 2 W Rev 1.0", "raspberrypi,model-zero-2-w brcm,bcm2837", A53, 1000, V8, 416),
        "pi-zero2w",
        "pi-zero2w",
    ),
    "pi3a+": (
        pi("3 Model A Plus Rev 1.0", "raspberrypi,3-model-a-plus brcm,bcm2837", A53, 1400, V8, 416),
        "pi-zero2w",
        "pi-zero2w",
    ),
    "pi3b": (pi("3 Model B Rev 1.2", "raspberrypi,3-model-b brcm,bcm2837", A53, 1200, V8, 906), "pi3", "pi3"),
    "pi3b+": (
        pi("3 Model B Plus Rev 1.3", "raspberrypi,3-model-b-plus brcm,bcm2837", A53, 1400, V8, 906, "0x50005"),
        "pi3",
        "pi3",
    ),
    "pi4-1gb": (
        pi("4 Model B Rev 1.1", "raspberrypi,4-model-b brcm,bcm2711", A72, 1500, V8, 908),
        "pi4-1gb",
        "pi4-1gb",
    ),
    "pi4-2gb": (pi("4 Model B Rev 1.2", "raspberrypi,4-model-b brcm,bcm2711", A72, 1500, V8, 1850), "pi4", "pi4"),
    "pi4-8gb": (pi("4 Model B Rev 1.4", "raspberrypi,4-model-b brcm,bcm2711", A72, 1800, V8, 7811), "pi4", "pi4"),
    "pi400": (pi("400 Rev 1.0", "raspberrypi,400 brcm,bcm2711", A72, 1800, V8, 3791), "pi4", "pi4"),
    "pi5-2gb": (
        pi("5 Model B Rev 1.1", "raspberrypi,5-model-b brcm,bcm2712", A76, 2400, V82, 2010),
        "pi5-2gb",
        "pi5-2gb",
    ),
    "pi5-4gb": (pi("5 Model B Rev 1.0", "raspberrypi,5-model-b brcm,bcm2712", A76, 2400, V82, 4045), "pi5", "pi5"),
    "pi5-16gb": (pi("5 Model B Rev 1.1", "raspberrypi,5-model-b brcm,bcm2712", A76, 2400, V82, 16218), "pi5", "pi5"),
    "jetson-nano": (
        jetson(
            "NVIDIA Jetson Nano Developer Kit",
            "nvidia,p3450-0000 nvidia,jetson-nano nvidia,tegra210",
            A57,
            4,
            1479,
            V8_CRYPTO,
            3964,
            "32.7.4",
        ),
        "jetson-nano",
        "jetson-nano",
    ),
    "orin-nano": (
        jetson(
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            "nvidia,p3768-0000+p3767-0005-super nvidia,p3767-0005 nvidia,tegra234",
            A78AE,
            6,
            1728,
            V82,
            7620,
            "36.4.3",
        ),
        "jetson-orin-cpu",
        "jetson-orin-cuda",
    ),
    "agx-orin": (
        jetson(
            "NVIDIA Jetson AGX Orin Developer Kit",
            "nvidia,p3737-0000+p3701-0005 nvidia,p3701-0005 nvidia,tegra234",
            A78AE,
            12,
            2201,
            V82,
            62841,
            "36.4.3",
        ),
        "jetson-orin-cpu",
        "jetson-agx-orin-cuda",
    ),
    "rockpi": (
        arm("Radxa ROCK 5B", "radxa,rock-5b rockchip,rk3588", A76, 8, 2400, V82, 7700),
        "generic-arm64",
        "generic-arm64",
    ),
    "x86-vnni": (x86(f"{X86} avx512f avx512_vnni", 8000), "x86-avx512-vnni", "x86-avx512-vnni"),
    "x86-avx-vnni": (x86(f"{X86} avx_vnni", 16000), "x86-avx512-vnni", "x86-avx512-vnni"),
    "x86-avx2": (x86(X86, 8000), "x86-avx2", "x86-avx2"),
    "x86-old": (x86("fpu sse sse2 ssse3 sse4_1", 4000), "generic-x86", "generic-x86"),
    "x86-gpu": (
        {
            **x86(f"{X86} avx512_vnni", 64000),
            "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA L4\nIRQ: 64\n",
        },
        "x86-avx512-vnni",
        "x86-cuda",
    ),
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def machine_of(name: str) -> str:
    return "x86_64" if name.startswith("x86") else "aarch64"
