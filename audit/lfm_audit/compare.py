"""Two audits side by side: what changed beyond noise, and whether it became worse by more than allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm_runtime.errors import EdgeError
from lfm_runtime.formats.files import damage_is, read_json_object

from lfm_audit.audit import SCHEMA
from lfm_audit.figures import figure, separable
from lfm_audit.verdict import headlines

_MORE_IS_BETTER = ("decode_tok_s",)
_ROUNDING = 1.1e-3


class AuditError(EdgeError, ValueError):
    """A file is not an audit that can be read here."""


@dataclass(frozen=True)
class Change:
    """One headline in both audits."""

    variant: str
    image: str  # "" where it is not about one
    name: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @property
    def ratio(self) -> float | None:
        """After against before; None where nothing was there before."""
        return self.after["median"] / self.before["median"] if self.before["median"] else None

    @property
    def beyond_noise(self) -> bool:
        """Whether the medians' confidence intervals are apart."""
        return separable(dict(self.before), dict(self.after))

    @property
    def too_few(self) -> bool:
        """Whether one has too few samples for an interval: then nothing can be said."""
        return None in (self.before["low"], self.after["low"])

    def word(self) -> str:
        """What became of it."""
        if self.too_few:
            return "too few samples"
        return ("worse" if self.worse_by() > 0 else "better") if self.beyond_noise else "within noise"

    def worse_by(self) -> float:
        """0.1 is 10 % worse; negative is better."""
        ratio = self.ratio
        if ratio is None or ratio <= 0:
            return 0.0
        return 1 / ratio - 1 if self.name in _MORE_IS_BETTER else ratio - 1


def read_audit(path: Path) -> dict[str, Any]:
    """An audit's JSON, as far as its parts are used here.

    Raises:
        AuditError: missing, cut off, edited, or of another schema.
    """
    found = read_json_object(path, AuditError, advice="name a file written by lfm-edge audit")
    with damage_is(AuditError, path, "make the audit again"):
        if not str((found.get("tool") or {"name": ""})["name"]).startswith("lfm-edge audit"):
            raise AuditError(f"{path} is not an audit; name a file written by lfm-edge audit -o")
        if found["schema"] != SCHEMA:
            raise AuditError(
                f"{path} is an audit of schema {found['schema']}, this lfm-edge reads {SCHEMA}; make the audit again"
            )
        for *_, given in headlines(found):
            if any(
                not _same(value, given[name]) for name, value in figure(given["samples"]).items() if name != "samples"
            ):
                raise AuditError(f"{path} was edited: a figure does not agree with its samples; make the audit again")
        bool(found["verdict"]["valid"])
    return found


def _same(computed: Any, given: Any) -> bool:
    """Up to the rounding of what audits write."""
    if computed is None or given is None:
        return computed is given
    return bool(abs(computed - given) <= _ROUNDING + _ROUNDING * abs(computed))


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Of every headline that both have. Two single variants are compared whatever their names."""
    theirs = {(variant, image, name): of for variant, image, name, of in headlines(after)}
    old, new = list(before["variants"]), list(after["variants"])
    renamed = {old[0]: new[0]} if len(old) == len(new) == 1 else {}
    found = []
    for variant, image, name, of in headlines(before):
        now = renamed.get(variant, variant)
        other = theirs.get((now, image, name))
        if other:
            found.append(Change(variant if now == variant else f"{variant} → {now}", image, name, of, other))
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What else is not the same: it may be why the figures are not."""
    found = []
    for what, path in (
        ("bundle", "bundle.name"),
        ("weights", "bundle.fingerprint"),
        ("board", "device.board"),
        ("processor", "device.cpu"),
        ("profile", "profile.name"),
        ("settings", "profile.settings"),
        ("onnxruntime", "software.onnxruntime"),
        ("Python", "software.python"),
        ("kernel", "software.kernel"),
        ("images", "workload.images"),
        ("answer length", "workload.new_tokens"),
        ("question", "workload.question"),
    ):
        section, key = path.split(".")
        a, b = before[section][key], after[section][key]
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
            found.append(f"{what}: {', '.join(keys)}")
        else:
            found.append(f"{what}: {a} → {b}")
    for variant in before["variants"].keys() & after["variants"].keys():
        for image, answers in before["variants"][variant]["images"].items():
            other = after["variants"][variant]["images"].get(image)
            if other and other["text_sha256"] != answers["text_sha256"]:
                found.append(f"what {variant} says about {image}")
    return found
