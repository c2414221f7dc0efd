"""What the processor can do, as far as kernels choose by it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

_ISA = re.compile(
    r"(avx\w*|amx_\w*|fma|f16c|sse4_\d|asimd\w*|sve\w*|i8mm|bf16|fphp|sme(2\w*|_\w+)?|neon|CPU part \w+)$"
)


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Instruction set extensions of the first core, sorted, with Arm's core type; elsewhere the processor's name."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return (platform.machine(), platform.processor())
    return features_of(text, platform.machine())


def features_of(cpuinfo: str, machine: str) -> tuple[str, ...]:
    """Return what cpu_features does, from the text of /proc/cpuinfo."""
    found = {machine}
    for line in cpuinfo.split("\n\n", 1)[0].splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name in ("flags", "Features"):
            found.update(flag for flag in value.split() if _ISA.match(flag))
        elif name == "CPU part":
            found.add(f"{name} {value}")
    return tuple(sorted(found))


def adds_int8_in_16_bits() -> bool:
    """x86 without VNNI: products of bytes are added in pairs as 16-bit numbers, which overflow where weights and inputs
    are large.
    """
    features = cpu_features()
    return bool({"x86_64", "AMD64"}.intersection(features)) and not any(
        feature.endswith("_vnni") for feature in features
    )
