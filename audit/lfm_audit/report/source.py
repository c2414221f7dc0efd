"""What a report is made from: audits with names that tell them apart, and what of them is quoted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm_runtime.formats.files import damage_is, read_json_object

from lfm_audit.compare import AuditError, read_audit


@dataclass(frozen=True)
class Audit:
    """One file."""

    name: str
    result: Mapping[str, Any]

    @property
    def when(self) -> str:
        """Day and time, UTC."""
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.result["created_unix_s"]))

    @property
    def where(self) -> str:
        """The machine."""
        device = self.result["device"]
        return str(device["board"] or device["cpu"] or device["machine"])


@dataclass(frozen=True)
class Series:
    """One variant of one audit: a bar, a line or a row."""

    label: str
    audit: Audit
    variant: str

    @property
    def result(self) -> Mapping[str, Any]:
        """All about it."""
        found: Mapping[str, Any] = self.audit.result["variants"][self.variant]
        return found


def named_audits(paths: Sequence[Path]) -> list[Audit]:
    """Named by their files; by their folders as well where the files' names are the same.

    Raises:
        AuditError: one is not an audit that can be read.
    """
    stems = [path.stem for path in paths]
    names = [
        path.stem if stems.count(path.stem) == 1 else f"{path.absolute().parent.name}/{path.stem}" for path in paths
    ]
    names = [name if names.count(name) == 1 else f"{name} ({n + 1})" for n, name in enumerate(names)]
    audits = [Audit(name, read_audit(path)) for name, path in zip(names, paths, strict=True)]
    for audit, path in zip(audits, paths, strict=True):
        with damage_is(AuditError, path, "make the audit again"):
            _look_through(audit)
    return audits


def _look_through(audit: Audit) -> None:
    """Raise what is raised where something that a page shows is not there."""
    result = audit.result
    _ = (
        audit.when,
        audit.where,
        result["machine"]["samples"],
        result["machine"]["missing"],
        result["limits"],
        result["soak"],
    )
    for series in all_series([audit]):
        _ = series.result["memory"]["timeline"], series.result["quality"], series.result["threads"]
        for image in series.result["images"].values():
            _ = image["over_time"], image["stages"]["decode_ms"]["median"]


def all_series(audits: Sequence[Audit]) -> list[Series]:
    """Every variant of every audit, labelled as shortly as tells them apart."""
    found = []
    for audit in audits:
        for variant in audit.result["variants"]:
            label = (
                variant
                if len(audits) == 1
                else audit.name
                if len(audit.result["variants"]) == 1
                else f"{audit.name}, {variant}"
            )
            found.append(Series(label, audit, variant))
    return found


def images_of(series: Sequence[Series]) -> list[str]:
    """Names of all images, in their order."""
    return list(dict.fromkeys(name for one in series for name in one.result["images"]))


def read_tuning(path: Path) -> dict[str, Any] | None:
    """What profile tune measured; None where the file is something else.

    Raises:
        AuditError: it is not JSON, or a damaged tuning.
    """
    found = read_json_object(path, AuditError, advice="name a file written by lfm-edge audit or lfm-edge tune")
    if found.get("tool") != "lfm-edge tune":
        return None
    with damage_is(AuditError, path, "tune again"):
        for point in found["points"]:
            if point["latency_ms"]:
                point["ms"] = statistics.median(point["latency_ms"].values())
                _ = point["peak_mib"] + (point["kl"] or 0.0), point["settings"]["variant"]
        _ = found["objective"], found["floor_kl"], found["reference"], found["rounds"]
        settings = [point["settings"] for point in found["points"] if point["latency_ms"]]
        if found["chosen"] not in settings or not all(point in settings for point in found["front"]):
            raise AuditError(f"{path} was edited: a point of the front is not among those measured; tune again")
    return found
