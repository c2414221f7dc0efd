"""Short audits of a bundle's fp32."""

from __future__ import annotations

import json
from pathlib import Path

from lfm_audit.audit import audit
from lfm_audit.workload import Subject, Workload
from lfm_profiles import detect, read, with_flags
from lfm_profiles.sensors import Sensors
from lfm_runtime.bundle import Bundle

TREE = {
    "sys/class/thermal/thermal_zone0/temp": "41000\n",
    "sys/class/thermal/thermal_zone0/type": "cpu\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "0\n",
}


def work(bundle: Path, images: dict[str, Path], **more) -> Workload:
    profile = with_flags(read("generic"), {"prepared": False, "threads": 1, **more.pop("flags", {})})
    return Workload(
        Bundle.open(bundle), profile, [Subject("fp32", profile)], images, **{"new_tokens": 8, "budget_s": 600.0, **more}
    )


def done(workload: Workload, sensors: Sensors, progress=lambda _: None) -> dict:
    return json.loads(audit(workload, detect(), sensors, progress).to_text())


def reasons(result: dict) -> str:
    assert result["verdict"]["valid"] == (not result["verdict"]["reasons"])
    return "; ".join(result["verdict"]["reasons"])
