"""Two audits side by side: what changed beyond noise, and whether it became worse by more than allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lfm_audit.figures import Figure, separable
from lfm_audit.result import Audit, VariantResult

_MORE_IS_BETTER = ("decode_tok_s",)


@dataclass(frozen=True)
class Change:
    """A headline figure that both audits have."""

    variant: str
    image: str  # "" where it is not about one
    name: str
    before: Figure
    after: Figure
    same_work: bool = True  # False: of other images, or other answers, than the audit before

    @property
    def ratio(self) -> float | None:
        """The median after divided by the median before; None where the latter is 0."""
        return self.after.median / self.before.median if self.before.median else None

    @property
    def beyond_noise(self) -> bool:
        """Whether the medians' confidence intervals do not overlap."""
        return self.same_work and separable(self.before, self.after)

    @property
    def too_few(self) -> bool:
        """Whether one has too few samples for an interval: then nothing can be said."""
        return self.same_work and None in (self.before.low, self.after.low)

    def word(self) -> str:
        """Return "worse", "better", "within noise", "too few samples" or "other work"."""
        if not self.same_work:
            return "other work"
        if self.too_few:
            return "too few samples"
        return ("worse" if self.worse_by() > 0 else "better") if self.beyond_noise else "within noise"

    def worse_by(self) -> float:
        """Return by how much the figure got worse, as a share: 0.1 is 10 % worse, negative is better."""
        ratio = self.ratio
        if ratio is None or ratio <= 0:
            return 0.0
        return 1 / ratio - 1 if self.name in _MORE_IS_BETTER else ratio - 1


def changes(before: Audit, after: Audit) -> list[Change]:
    """Of every headline that both have. Two single variants are compared whatever their names."""
    theirs = {(h.variant, h.image, h.name): h.figure for h in after.headlines()}
    old, new = list(before.variants), list(after.variants)
    renamed = {old[0]: new[0]} if len(old) == len(new) == 1 else {}
    found, same = [], _work(before) == _work(after)
    for h in before.headlines():
        now = renamed.get(h.variant, h.variant)
        other = theirs.get((now, h.image, h.name))
        if other:
            name = h.variant if now == h.variant else f"{h.variant} → {now}"
            found.append(Change(name, h.image, h.name, h.figure, other, same_work=bool(h.image) or same))
    return found


def _work(audit: Audit) -> tuple[Any, ...]:
    """What starts and memory depend on, beside the device: all images of a run."""
    return audit.workload.images, audit.workload.new_tokens, audit.workload.question


def differences(before: Audit, after: Audit) -> list[str]:
    """What else is not the same: it may be why the figures are not."""
    found = []
    for (what, a), (_, b) in zip(_circumstances(before), _circumstances(after), strict=True):
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found.append(f"{what}: {', '.join(key for key in {**a, **b} if a.get(key) != b.get(key))}")
        else:
            found.append(f"{what}: {a} → {b}")
    for variant in sorted(before.variants.keys() & after.variants.keys()):
        old, new = before.variants[variant], after.variants[variant]
        for (what, a), (_, b) in zip(_how(old), _how(new), strict=True):
            if a != b:
                found.append(f"{variant}, {what}: {a} → {b}")
        for image, answers in before.variants[variant].images.items():
            other = after.variants[variant].images.get(image)
            if other and other.text_sha256 != answers.text_sha256:
                found.append(f"what {variant} says about {image}")
    return found


def _how(found: VariantResult) -> list[tuple[str, str]]:
    """How a variant was run, after stepping down."""
    return [
        ("prefill", found.prefill or "none"),
        ("prepared graphs", "yes" if found.prepared else "no"),
        ("threads", str(found.threads)),
        ("to fit the memory", "; ".join(found.steps_down) or "nothing"),
    ]


def _circumstances(audit: Audit) -> list[tuple[str, Any]]:
    return [
        ("bundle", audit.bundle.name),
        ("weights", audit.bundle.fingerprint),
        ("board", audit.device.get("board")),
        ("processor", audit.device.get("cpu")),
        ("profile", audit.profile.name),
        ("settings", audit.profile.settings),
        ("onnxruntime", audit.software.get("onnxruntime")),
        ("Python", audit.software.get("python")),
        ("kernel", audit.software.get("kernel")),
        ("images", audit.workload.images),
        ("answer length", audit.workload.new_tokens),
        ("question", audit.workload.question),
    ]
