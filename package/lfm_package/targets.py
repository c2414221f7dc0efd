"""What a board's system has: processor, Python, C library. A wheelhouse is made for one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lfm_runtime.errors import SettingError
from packaging import tags

_LEGACY = {
    17: "manylinux2014",
    12: "manylinux2010",
    5: "manylinux1",
}  # PEP 600: names from before glibc's version was written out
_OLDEST_GLIBC = {"x86_64": 5, "aarch64": 17}


@dataclass(frozen=True)
class System:
    """One release of an operating system."""

    name: str
    python: str  # "3.13"
    glibc: int  # the minor of 2.x


@dataclass(frozen=True)
class Target:
    """A kind of board, and what may run on it; the first system is taken unless a Python is named."""

    name: str
    machine: str  # as uname -m
    profile: str  # that the device will choose, for its CPU: the stick's onnxruntime has no GPU
    systems: tuple[System, ...]
    others: tuple[str, ...] = ()  # profiles that some of these devices choose instead, and that use more variants


_RASPBERRY_PI_OS = (System("Raspberry Pi OS trixie", "3.13", 41), System("Raspberry Pi OS bookworm", "3.11", 36))
_ANY_LINUX = tuple(System("Linux with glibc 2.28", python, 28) for python in ("3.13", "3.12", "3.11", "3.10", "3.14"))
TARGETS = {
    target.name: target
    for target in (
        *(Target(name, "aarch64", name, _RASPBERRY_PI_OS) for name in ("pi5", "pi4", "pi3", "pi-zero2w")),
        Target("jetson-jp6", "aarch64", "jetson-orin-cpu", (System("JetPack 6", "3.10", 35),)),
        Target("jetson-jp7", "aarch64", "jetson-orin-cpu", (System("JetPack 7", "3.12", 39),)),
        Target("aarch64", "aarch64", "generic-arm64", _ANY_LINUX, ("pi5", "jetson-orin-cpu")),
        Target("x86_64", "x86_64", "x86-avx2", _ANY_LINUX),
    )
}


@dataclass(frozen=True)
class Platform:
    """A target with its system chosen: what pip and PEP 425 call it."""

    target: Target
    system: System

    @staticmethod
    def of(name: str, python: str = "") -> Platform:
        """Raises SettingError for an unknown target, or a Python that its systems lack; both name what there is."""
        if name not in TARGETS:
            raise SettingError(f"unknown target {name!r}; targets are {', '.join(TARGETS)}")
        target = TARGETS[name]
        for system in target.systems:
            if python in ("", system.python):
                return Platform(target, system)
        known = ", ".join(f"{system.python} ({system.name})" for system in target.systems)
        raise SettingError(f"{name} has no Python {python}; it has {known}")

    def __str__(self) -> str:
        return (
            f"{self.target.name}: {self.target.machine}, Python {self.system.python}, glibc "
            f"2.{self.system.glibc} ({self.system.name})"
        )

    @property
    def version(self) -> tuple[int, int]:
        """Version of Python, as (major, minor)."""
        major, minor = self.system.python.split(".")
        return int(major), int(minor)

    @property
    def platforms(self) -> Sequence[str]:
        """Every platform tag that its C library can load, the newest first. pip takes silently an old release when one
        is missing.
        """
        found = []
        for minor in range(self.system.glibc, _OLDEST_GLIBC[self.target.machine] - 1, -1):
            names = [f"manylinux_2_{minor}", *([_LEGACY[minor]] if minor in _LEGACY else [])]
            found += [f"{name}_{self.target.machine}" for name in names]
        return found

    @property
    def tags(self) -> Iterator[tags.Tag]:
        """PEP 425 tags of the wheels that the platform can load."""
        yield from tags.cpython_tags(self.version, platforms=self.platforms)
        yield from tags.compatible_tags(self.version, f"cp{self.version[0]}{self.version[1]}", self.platforms)

    @property
    def markers(self) -> dict[str, str]:
        """What PEP 508's environment markers are there. pip takes the running Python's own."""
        return {
            "os_name": "posix",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": self.target.machine,
            "platform_release": "",
            "platform_version": "",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "python_version": self.system.python,
            "python_full_version": f"{self.system.python}.0",
            "implementation_version": f"{self.system.python}.0",
            "extra": "",
        }
