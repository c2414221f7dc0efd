"""Sensors of recorded trees: Raspberry Pi, Jetson, x86; missing ones and rubbish."""

from pathlib import Path

import pytest
from lfm_profiles.sensors import Sensors
from profiles.trees import write


def pi5(folder: Path, **more: str) -> Path:
    files = {
        "sys/class/thermal/thermal_zone0/temp": "48312\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "2400000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    }
    return write(folder, {**files, **more})


# As `vcgencmd pmic_read_adc` prints it on a Pi 5, shortened.
PMIC = """     3V7_WL_SW_A current(0)=0.07612990A
   3V3_SYS_A current(1)=0.05953870A
  VDD_CORE_A current(7)=1.51230000A
     3V7_WL_SW_V volt(8)=3.66886000V
   3V3_SYS_V volt(9)=3.33103000V
  VDD_CORE_V volt(15)=0.72075950V
     EXT5V_V volt(24)=5.14898000V"""


def test_pi5(tmp_path) -> None:
    answers = {"get_throttled": "throttled=0x50005", "pmic_read_adc": PMIC}
    sensors = Sensors(pi5(tmp_path), answers.get)
    found = sensors.read()
    assert found.temperature_c == {"cpu-thermal": 48.312}
    assert found.frequency_mhz == {"policy0": 2400.0}
    assert (found.governor, found.throttle_bits, found.throttled_now) == ("ondemand", 0x50005, True)
    assert found.power_w == pytest.approx(0.0761299 * 3.66886 + 0.0595387 * 3.33103 + 1.5123 * 0.7207595)
    assert sensors.missing == {}


def test_throttle_bits_of_the_kernel(tmp_path) -> None:
    sensors = Sensors(pi5(tmp_path, **{"sys/devices/platform/soc/soc:firmware/get_throttled": "50000\n"}))
    assert (sensors.read().throttle_bits, sensors.read().throttled_now) == (0x50000, False)


def test_jetson(tmp_path) -> None:
    hwmon = "sys/class/hwmon/hwmon3/"
    sensors = Sensors(
        pi5(
            tmp_path,
            **{
                f"{hwmon}name": "ina3221\n",
                f"{hwmon}in1_label": "VDD_IN\n",
                f"{hwmon}in1_input": "5048\n",
                f"{hwmon}curr1_input": "1320\n",
                f"{hwmon}in2_label": "VDD_CPU_GPU_CV\n",
                f"{hwmon}in2_input": "5040\n",
                f"{hwmon}curr2_input": "300\n",
                "sys/class/hwmon/hwmon0/name": "tmp451\n",
            },
        )
    )
    assert sensors.read().power_w == pytest.approx(5.048 * 1.320)
    assert sensors.power_from == "INA3221, VDD_IN"
    (tmp_path / hwmon / "curr1_input").write_text("garbage\n")
    assert sensors.read().power_w is None
    assert "garbage" not in sensors.missing["power"] and "None" in sensors.missing["power"]


def test_agx_orin(tmp_path) -> None:
    """Its rails are measured apart: one of them alone is not the board."""
    hwmon, files = "sys/class/hwmon/hwmon4/", {"sys/class/hwmon/hwmon4/name": "ina3221\n"}
    for n, (name, milliampere) in enumerate((("VDD_GPU_SOC", 400), ("VDD_CPU_CV", 300), ("VIN_SYS_5V0", 900)), 1):
        files |= {f"{hwmon}in{n}_label": name, f"{hwmon}in{n}_input": "5000", f"{hwmon}curr{n}_input": str(milliampere)}
    sensors = Sensors(write(tmp_path, files))
    assert sensors.read().power_w == pytest.approx(5 * (0.4 + 0.3 + 0.9))


def test_rapl(tmp_path) -> None:
    package = "sys/class/powercap/intel-rapl:0/"
    sensors = Sensors(
        write(
            tmp_path,
            {
                f"{package}name": "package-0\n",
                f"{package}energy_uj": "262143000000\n",
                f"{package}max_energy_range_uj": "262143328850\n",
            },
        )
    )
    assert (sensors.read().energy_uj, sensors.read().energy_range_uj) == (262143000000, 262143328850)


def test_nothing_there(tmp_path) -> None:
    sensors = Sensors(tmp_path)
    found = sensors.read()
    assert (
        found.temperature_c,
        found.frequency_mhz,
        found.governor,
        found.throttle_bits,
        found.power_w,
        found.energy_uj,
    ) == ({}, {}, None, None, None, None)
    assert set(sensors.missing) == {"temperature", "frequency", "throttle", "power"}
    assert all(len(reason) > 10 for reason in sensors.missing.values())


@pytest.mark.parametrize(
    ("file", "text", "sensor"),
    [
        ("sys/class/thermal/thermal_zone0/temp", "999000\n", "temperature"),
        ("sys/class/thermal/thermal_zone0/temp", "-127000\n", "temperature"),
        ("sys/class/thermal/thermal_zone0/temp", "warm\n", "temperature"),
        ("sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq", "0\n", "frequency"),
        ("sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq", "<unsupported>\n", "frequency"),
    ],
)
def test_rubbish_is_nothing(tmp_path, file, text, sensor) -> None:
    sensors = Sensors(pi5(tmp_path, **{file: text}))
    found = sensors.read()
    assert not (found.temperature_c if sensor == "temperature" else found.frequency_mhz)
    assert sensor in sensors.missing


def test_one_zone_of_two_is_broken(tmp_path) -> None:
    sensors = Sensors(
        pi5(
            tmp_path, **{"sys/class/thermal/thermal_zone1/temp": "x\n", "sys/class/thermal/thermal_zone1/type": "gpu\n"}
        )
    )
    assert sensors.read().temperature_c == {"cpu-thermal": 48.312}
    assert "temperature" not in sensors.missing


@pytest.mark.parametrize("text", ["VCHI initialization failed", "throttled=", "throttled=0xZZ"])
def test_firmware_that_does_not_answer(tmp_path, text) -> None:
    sensors = Sensors(pi5(tmp_path), lambda _: text)
    assert sensors.read().throttle_bits is None
    assert "throttle" in sensors.missing and "power" in sensors.missing
