"""What a report is made from: audits with names that tell them apart, and what of them is quoted."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lfm_audit.reading import AuditError, read_audit
from lfm_audit.result import Audit, VariantResult
from lfm_audit.tune.result import TuningResult


@dataclass(frozen=True)
class Named:
    """An audit with a name that tells it from others."""

    name: str
    audit: Audit

    @property
    def when(self) -> str:
        """Date and time of the audit in UTC, to the minute."""
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.audit.created_unix_s))

    @property
    def where(self) -> str:
        """Name of the machine: of its board, else its CPU, else its architecture."""
        device = self.audit.device
        return str(device.get("board") or device.get("cpu") or device.get("machine"))

    @property
    def model(self) -> str:
        """Name of the checkpoint, and of its adapter."""
        source = self.audit.bundle.source
        if source is None:
            return self.audit.bundle.name
        return f"{source.name} with {source.adapter}" if source.adapter else source.name


@dataclass(frozen=True)
class Series:
    """One variant of one audit: a bar, a line or a row."""

    label: str
    named: Named
    variant: str

    @property
    def result(self) -> VariantResult:
        """What the audit measured of this variant."""
        return self.named.audit.variants[self.variant]


def named_audits(paths: Sequence[Path]) -> list[Named]:
    """Named by their files; by their folders as well where the files' names are the same.

    Raises:
        AuditError: one is not an audit that can be read.
    """
    stems = [path.stem for path in paths]
    names = [
        path.stem if stems.count(path.stem) == 1 else f"{path.absolute().parent.name}/{path.stem}" for path in paths
    ]
    names = [name if names.count(name) == 1 else f"{name} ({n + 1})" for n, name in enumerate(names)]
    return [Named(name, read_audit(path)) for name, path in zip(names, paths, strict=True)]


def all_series(audits: Sequence[Named]) -> list[Series]:
    """Every variant of every audit, labelled as shortly as tells them apart."""
    found = []
    for named in audits:
        for variant in named.audit.variants:
            both = named.name if len(named.audit.variants) == 1 else f"{named.name}, {variant}"
            found.append(Series(variant if len(audits) == 1 else both, named, variant))
    return found


def images_of(series: Sequence[Series]) -> list[str]:
    """Return the names of all images, each once, in order of first appearance."""
    return list(dict.fromkeys(name for one in series for name in one.result.images))


def changes_title(audits: Sequence[Named]) -> str:
    """What a table of changes between audits, or of one audit's variants, is called."""
    return "What changed" if len(audits) > 1 else "Variants compared"


def read_tuning(path: Path) -> TuningResult | None:
    """What lfm-edge tune measured; None where the file is something else.

    Raises:
        AuditError: it is not JSON, or a damaged tuning.
    """
    return TuningResult.read(path, AuditError, "name a file written by lfm-edge audit, tune or caption")


MARK = "<!-- lfm-edge report -->"
"""In every report, HTML and Markdown; see `sealed`."""
_SEAL = "<!-- lfm-edge report; sha256 of the rest: {}; edited, it is not replaced -->"
_SEALED = re.compile(re.escape(_SEAL).replace(r"\{\}", "(?P<digest>[0-9a-f]{64})"))


def sealed(text: str) -> str:
    """A report that can tell later whether somebody edited it: see `is_report`."""
    return text.replace(MARK, _SEAL.format(hashlib.sha256(text.encode()).hexdigest()), 1)


def is_report(path: Path) -> bool:
    """Whether lfm-edge report wrote this file, and nobody edited it since."""
    text = path.read_text(encoding="utf-8")
    found = _SEALED.search(text)
    if found is None:
        return MARK in text  # of a release that sealed none
    rest = f"{text[: found.start()]}{MARK}{text[found.end() :]}"
    return hashlib.sha256(rest.encode()).hexdigest() == found["digest"]
