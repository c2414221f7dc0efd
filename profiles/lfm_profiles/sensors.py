"""What the machine feels while it works: temperature, frequency, throttle bits, power. A sensor that is not there, or
says rubbish, is None with the reason in `missing`; no value is ever made up.

Sources: /sys/class/thermal, cpufreq, a Raspberry Pi's firmware (`vcgencmd`, PMIC of a Pi 5), INA3221 on a Jetson
(hwmon), RAPL on x86.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lfm_profiles.device import listed, number, read

Command = Callable[[str], "str | None"]
"""Runs vcgencmd with one word; None where that is not possible."""
_COLDEST_C, _HOTTEST_C = -55.0, 150.0
_MOST_W = 2000.0
# Whole boards: Orin Nano and NX, Nano and TX2; on AGX the module's rails, which are measured apart.
_JETSON_RAILS = (("VDD_IN",), ("POM_5V_IN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))
_NOW_BITS = 0xF  # of a Raspberry Pi's throttle bits; 16 to 19 are the same since it started


@dataclass(frozen=True)
class Reading:
    """Values of all sensors, read at one moment."""

    temperature_c: Mapping[str, float]  # thermal zone → °C
    frequency_mhz: Mapping[str, float]  # cpufreq policy → MHz now
    governor: str | None
    throttle_bits: int | None  # as vcgencmd get_throttled
    power_w: float | None  # of the whole board, or of the processor's package where only that is measured
    energy_uj: int | None  # a counter, where the sensor is one; wraps at energy_range_uj
    energy_range_uj: int | None = None

    @property
    def throttled_now(self) -> bool:
        """Whether the board is under-voltage, capped or throttled at this moment."""
        return bool((self.throttle_bits or 0) & _NOW_BITS)


@dataclass
class Sensors:
    """The sensors of the machine whose files lie under `root`."""

    root: Path = Path("/")
    command: Command | None = None
    missing: dict[str, str] = field(default_factory=dict)  # temperature, frequency, throttle, power → why there is none
    power_from: str | None = None

    def __post_init__(self) -> None:
        self.command = self.command or (_vcgencmd if self.root == Path("/") else lambda _: None)
        self._zones = listed(self.root / "sys/class/thermal", "thermal_zone*")
        self._policies = listed(self.root / "sys/devices/system/cpu/cpufreq", "policy*") or listed(
            self.root / "sys/devices/system/cpu", "cpu[0-9]*/cpufreq"
        )
        self._firmware = next(
            iter(listed(self.root / "sys/devices/platform", "soc*/soc*:firmware/get_throttled")), None
        )
        self._power = self._find_power()
        self.read()

    def read(self) -> Reading:
        """Return what the sensors read now; `missing` is updated."""
        self.missing = {key: reason for key, reason in self.missing.items() if key == "power"}
        temperature = self._temperatures()
        frequency = {
            p.name if p.name != "cpufreq" else p.parent.name: khz / 1000
            for p in self._policies
            if (khz := _frequency(p))
        }
        if not frequency:
            self.missing["frequency"] = "the kernel has no cpufreq here (virtual machines and some boards)"
        governor, bits = read(self.root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"), self._throttle_bits()
        watts, energy, wraps_at = self._power() if self._power else (None, None, None)
        return Reading(
            temperature_c=temperature,
            frequency_mhz=frequency,
            governor=governor,
            throttle_bits=bits,
            power_w=watts,
            energy_uj=energy,
            energy_range_uj=wraps_at,
        )

    def _temperatures(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for zone in self._zones:
            milli = number(zone / "temp")
            name = read(zone / "type") or zone.name
            if milli is not None and _COLDEST_C <= milli / 1000 <= _HOTTEST_C:
                found[name if name not in found else f"{name} {zone.name.removeprefix('thermal_zone')}"] = milli / 1000
            else:
                said = "cannot be read" if milli is None else f"reads {milli / 1000:g} °C, which is impossible"
                self.missing["temperature"] = f"{zone / 'temp'} {said}"
        if not found and "temperature" not in self.missing:
            self.missing["temperature"] = "the kernel has no thermal zones here (virtual machines)"
        elif found:
            self.missing.pop("temperature", None)
        return found

    def _throttle_bits(self) -> int | None:
        text = read(self._firmware) if self._firmware else self.command("get_throttled") if self.command else None
        found = re.fullmatch(r"(?:throttled=)?(?:0x)?([0-9a-fA-F]+)", (text or "").strip())
        if not found:
            self.missing["throttle"] = (
                f"throttle bits read {text!r}" if text else "only a Raspberry Pi's firmware reports throttling"
            )
        return int(found[1], 16) if found else None

    def _find_power(self) -> Callable[[], tuple[float | None, int | None, int | None]] | None:
        """How to read the power here: (W, counter µJ, its range)."""
        for folder in listed(self.root / "sys/class/hwmon", "hwmon*"):
            if read(folder / "name") != "ina3221":
                continue
            rails = {read(label): label.name.split("_")[0].removeprefix("in") for label in listed(folder, "in*_label")}
            names = next((names for names in _JETSON_RAILS if set(names) <= rails.keys()), ())
            if names:
                self.power_from = f"INA3221, {' + '.join(names)}"
                pairs = [(folder / f"in{rails[name]}_input", folder / f"curr{rails[name]}_input") for name in names]
                return lambda: (self._sum(pairs), None, None)
        domains = listed(self.root / "sys/class/powercap", "intel-rapl:*")
        if package := next((p for p in domains if (read(p / "name") or "").startswith("package")), None):
            if number(package / "energy_uj") is not None:
                packages = sum((read(p / "name") or "").startswith("package") for p in domains)
                self.power_from = "RAPL, processor package" + (f" 0 of {packages}" if packages > 1 else "")
                return lambda: (None, number(package / "energy_uj"), number(package / "max_energy_range_uj"))
            self.missing["power"] = f"{package / 'energy_uj'} cannot be read; it takes root"
            return None
        if self.command and (text := self.command("pmic_read_adc")):
            if _pmic_watts(text) is not None:
                self.power_from = "PMIC, the Pi's rails"
                return lambda: (_pmic_watts((self.command("pmic_read_adc") if self.command else "") or ""), None, None)
            self.missing["power"] = "the PMIC's answer has no pairs of current and voltage"
            return None
        self.missing["power"] = (
            "no sensor: INA3221 (Jetson), PMIC (Pi 5) and RAPL (x86) are known; a meter's CSV can be given"
        )
        return None

    def _sum(self, pairs: list[tuple[Path, Path]]) -> float | None:
        watts = [self._product(*pair) for pair in pairs]
        return None if None in watts else sum(watt for watt in watts if watt is not None)

    def _product(self, millivolt: Path, milliampere: Path) -> float | None:
        values = number(millivolt), number(milliampere)
        watts = None if None in values else values[0] * values[1] / 1e6  # type: ignore[operator]
        if watts is None or not 0 <= watts <= _MOST_W:
            self.missing["power"] = f"{millivolt} and {milliampere.name} read {values[0]} and {values[1]}"
            return None
        return watts


def _frequency(policy: Path) -> int | None:
    khz = number(policy / "scaling_cur_freq") or number(policy / "cpuinfo_cur_freq")
    return khz if khz and 1_000 <= khz <= 20_000_000 else None


def _pmic_watts(text: str) -> float | None:
    """The sum over rails of `vcgencmd pmic_read_adc`: NAME_A current(0)=1.0A, NAME_V volt(1)=5.0V."""
    amperes = {name: float(value) for name, value in re.findall(r"(\w+)_A current\(\d+\)=([\d.]+)A", text)}
    volts = {name: float(value) for name, value in re.findall(r"(\w+)_V volt\(\d+\)=([\d.]+)V", text)}
    rails = amperes.keys() & volts.keys()
    watts = sum(amperes[rail] * volts[rail] for rail in rails)
    return watts if rails and watts <= _MOST_W else None


def _vcgencmd(word: str) -> str | None:
    program = shutil.which("vcgencmd")
    if not program:
        return None
    try:
        done = subprocess.run([program, word], capture_output=True, text=True, timeout=2, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
