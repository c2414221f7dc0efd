"""The quality gate: what a variant costs in cosines, distributions and answers, against another one."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import onnxruntime as ort
from lfm_profiles import VARIANTS
from lfm_runtime.errors import EdgeError, counted

COSINE_FLOOR = 0.99
"""Lowest allowed 1st percentile of the image features' cosines."""


class GateError(EdgeError, ValueError):
    """A variant was made and is not good enough; the bundle is as before."""

    exit_code = 3


@dataclass(frozen=True)
class LayerError:
    """How far the hidden state after a layer is from the other variant's: |difference| / |state|, and what this layer
    added to it.
    """

    name: str
    image: float | None  # over image tokens (patches, in the encoder)
    text: float | None
    added: float  # root of the difference of squares with the layer before, the larger of both kinds


@dataclass
class Quality:
    """A variant against another on the same questions."""

    variant: str
    against: str
    questions: int
    images: int
    answer_tokens: int
    cosine_min: float
    cosine_p1: float
    cosine_mean: float
    kl: float  # nats, mean over the answer tokens of `against`, which both are led through
    kl_error: float  # its standard error: how much other questions of the same kind would change it
    same_top1: float  # share of those tokens
    same_answers: float  # share of questions whose greedy answers are identical
    accuracy: dict[
        str, dict[str, float]
    ]  # task → {"questions", variant names: share of exact answers}; where answers are known
    bytes: int
    against_bytes: int
    bits_per_weight: float | None  # None: the bundle has no float variant to count them in
    layers: list[LayerError]
    seconds: float
    board: dict[str, Any] | None = None  # the profile whose image settings and prefill decoder were used: see Board
    onnxruntime: str = field(default_factory=lambda: str(ort.__version__))

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers in five digits."""
        return {k: _five_digits(v) for k, v in asdict(self).items()}

    def accuracy_lost(self) -> float | None:
        """Points of exact answers lost, mean over all questions with a known answer."""
        whole = self._all_tasks()
        return 100 * (whole[self.against] - whole[self.variant]) if whole["questions"] else None

    def _all_tasks(self) -> dict[str, float]:
        """As one of `accuracy`."""
        tasks = self.accuracy.values()
        total = sum(task["questions"] for task in tasks)
        shares = {
            name: sum(task[name] * task["questions"] for task in tasks) / total if total else 0.0
            for name in (self.against, self.variant)
        }
        return {"questions": total, **shares}

    def layer_table(self) -> str:
        """Where the error comes from."""
        lines = ["layer                         error: image      text     added here"]
        for layer in self.layers:
            image, text = (f"{v:10.5f}" if v is not None else " " * 9 + "–" for v in (layer.image, layer.text))
            lines.append(f"{layer.name:30s}      {image}{text}     {layer.added:10.5f}")
        return "\n".join(lines)

    def table(self) -> str:
        """For people."""
        lines = [
            f"{self.variant} against {self.against}: {counted(self.questions, 'question')} about "
            f"{counted(self.images, 'image')}, {counted(self.answer_tokens, 'answer token')}",
            *self._board_lines(),
            f"  image features   cosine min {self.cosine_min:.5f}  1st percentile {self.cosine_p1:.5f}  mean "
            f"{self.cosine_mean:.5f}"
            if not math.isnan(self.cosine_min)
            else "  image features   not comparable: every image is cut in another way",
            f"  next token       KL {with_error(self.kl, self.kl_error)} nats  same first choice {self.same_top1:.2%}",
            f"  greedy answers   {self.same_answers:.1%} identical",
        ]
        tasks = sorted(self.accuracy.items())
        for task, found in [*tasks, *([("all", self._all_tasks())] if len(tasks) > 1 else [])]:
            of, by = found[self.against], found[self.variant]
            change, asked = 100 * (of - by), counted(round(found["questions"]), "question")
            what = _points(change)
            lines.append(f"  exact, {task:9s} {by:.2%}, {self.against} {of:.2%}, {what} ({asked})")
        reads = f", {self.board['prefill']}'s decoder included" if self.board and self.board["prefill"] else ""
        bits = self.bits_per_weight
        lines.append(
            f"  size             {self.bytes / 1e6:.1f} MB, {self.bytes / self.against_bytes:.3f} of {self.against}"
            f"{reads}{'' if bits is None else f'; {self.variant} has {bits:.2f} bits a weight, all files'}"
        )
        if self.variant == self.against:
            lines.append(
                "  against itself   what reading an answer in one step differs: smaller losses are not told apart"
            )
        return "\n".join(lines)

    def _board_lines(self) -> list[str]:
        if self.board is None:
            return []
        prefill = f", {self.board['prefill']} for the prefill" if self.board["prefill"] else ""
        lines = [f"  as profile       {self.board['profile']}: {self.variant}{prefill}"]
        if self.board["changes"]:
            lines.append(f"  it changes       {', '.join(self.board['changes'])}")
        before, after = self.board["other_image_tokens"], self.board["image_tokens"]
        other = "for both" if self.board["alike"] else f"{before:.0f} with the checkpoint's settings"
        lines.append(f"  image tokens     {after:.0f} a question, {other}")
        return lines


def _points(lost: float) -> str:
    """As words."""
    size = f"{abs(lost):.2f}" if abs(lost) >= 0.005 else "0"
    return f"{'gained' if lost <= -0.005 else 'lost'} {size} points"


def with_error(value: float, error: float) -> str:
    """Both with as many decimals as two digits of the error take; five at least. NaN: the error is not known."""
    if math.isnan(error):
        return f"{value:.5f} ± ? (one question)"
    decimals = min(9, max(5, 1 - math.floor(math.log10(error)))) if error > 0 else 5
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def check_floor(quality: Quality, floor: float, *, quick: bool = False, kept: Sequence[str] = ()) -> str:
    """One line: it is good enough, or so few questions do not tell. Raises GateError when the cosines are too low, or
    KL is above the floor by more than its standard error, or above twice the floor; that says what to try: layers to
    keep beside the patterns of those that were `kept`, or not --quick.
    """
    reasons = []
    error = 0.0 if math.isnan(quality.kl_error) else quality.kl_error
    measured = f"KL {with_error(quality.kl, quality.kl_error)}"
    if not quality.kl - error <= floor:
        more = "" if math.isnan(quality.kl_error) else " by more than its standard error"
        reasons.append(f"{measured} is above {floor:g}{more}")
    elif not quality.kl <= 2 * floor:
        reasons.append(f"{measured} is above twice {floor:g}")
    if not quality.cosine_p1 >= COSINE_FLOOR:
        reasons.append(f"the image features' cosine (1st percentile) {quality.cosine_p1:.4f} is below {COSINE_FLOOR}")
    if reasons:
        parts = (
            ("vision.", "projector") if VARIANTS[quality.variant].static else ("vision.", "projector", "text.layers.")
        )
        rounded = [
            layer
            for layer in quality.layers
            if layer.name.startswith(parts) and not any(fnmatch.fnmatch(f"{layer.name}.", p) for p in kept)
        ]
        worst = sorted(rounded, key=lambda layer: -layer.added)[:3]
        patterns = (*kept, *(f"{layer.name}.*" for layer in worst))
        keep = " ".join(f"--keep '{pattern}'" for pattern in patterns) if worst else "more calibration images"
        keep = "without --quick, which judges with few images" if quick else keep
        raise GateError(
            f"{quality.variant} is not good enough: {' and '.join(reasons)}; the bundle is as before. Try {keep}"
        )
    allowed = f"at most {floor:g} is allowed"
    if quality.kl + error > floor or quality.questions == 1:
        few = f"{quality.questions} questions do" if quality.questions > 1 else "one question does"
        return f"{quality.variant} may be good enough, {few} not tell: {allowed}; judge it with more images"
    return f"{quality.variant} is good enough: KL {quality.kl:.2g}, {allowed}"


def _five_digits(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):  # NaN: could not be compared
        return None
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < 0.9 else round(value, 6)
    if isinstance(value, dict):
        return {k: _five_digits(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_five_digits(v) for v in value]
    return value
