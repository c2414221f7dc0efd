"""Golden cases: what a bundle said where it was made, to be compared with what it says on a device.

Texts and their ids, an image and its patches, image features, the logits of a short answer. Texts must be the same
everywhere, patches nearly. Features and logits depend on the processor's kernels: products of float32 are summed in
another order, and int8 activations round the other way where two kernels differ in the last bit. So a few hundred
values are kept and compared by the variant's tolerance (lfm_profiles/variants.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from lfm_profiles import VARIANTS, cpu_features
from numpy.typing import NDArray
from PIL import Image

from lfm_runtime.bundle import Bundle
from lfm_runtime.decode.context import Context
from lfm_runtime.errors import BundleError, EdgeError, is_out_of_memory
from lfm_runtime.formats.files import damage_is, to_json
from lfm_runtime.formats.manifest import MANIFEST, Manifest
from lfm_runtime.formats.typed import as_json, read_as
from lfm_runtime.images.layout import lay_out
from lfm_runtime.images.opened import OpenedImage
from lfm_runtime.images.pixels import cut_views
from lfm_runtime.model import Model
from lfm_runtime.process import child_environment, module
from lfm_runtime.setup.profile import find_profile
from lfm_runtime.setup.setup import settle
from lfm_runtime.text.messages import Message

QUESTION = "What is in this image?"
SIZE = (256, 192)
STEPS = 8
_PIXELS = 2.5 / 255 * 2  # of patches, whose values lie in [-1, 1]: Pillow's versions differ by a step or two of 255
_TOP, _SPREAD, _SAMPLES = 16, 16, 64
_ADVICE = "export and quantize again"
_SMALL = 256 << 20  # bytes of weights that are run in this process
TEXTS = (
    "What is in this image?",
    "  two spaces,\ttab\nand lines\r\n",
    "naïve café – “quotes” … €5 ½",
    "Ünïcödé ÅÄÖ ß ﬁ",
    "日本語のテキスト、中文字符",
    "Привет, мир! Ελληνικά",
    "emoji 👩‍👩‍👧 🏳️‍🌈 👍🏽",
    "don't we'll I'm 12345 3.14159 1e-9",
    "def f(x):\n    return x**2  # comment",
    "\u0000\u200b\ufeff odd",
    "",
)


def golden_image() -> Image.Image:
    """Always the same: made of whole numbers, so that no processor's arithmetic matters."""
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    planes = [(x * 3 + y * 2) % 256, (x * y // 64 + 40) % 256, np.where((x // 24 + y // 24) % 2, 210, 35)]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


@dataclass(frozen=True)
class Step:
    """Logits of one step: of the likeliest tokens and of some spread over the vocabulary."""

    at: tuple[int, ...]  # token ids
    logits: tuple[float, ...]
    mean: float  # of all logits
    std: float
    ahead: float  # by how much the likeliest wins

    @staticmethod
    def of(logits: NDArray[np.float64]) -> Step:
        """Return what is kept of one row of logits [vocabulary]."""
        order = np.argsort(-logits, kind="stable")
        at = np.unique(np.concatenate([order[:_TOP], np.linspace(0, len(logits) - 1, _SPREAD).astype(np.int64)]))
        ahead = float(logits[order[0]] - logits[order[1]])
        return Step(tuple(at.tolist()), _short(logits[at]), float(logits.mean()), float(logits.std()), ahead)


@dataclass(frozen=True)
class Golden:
    """The golden values of one variant, and the onnxruntime and processor that gave them."""

    onnxruntime: str
    cpu_features: tuple[str, ...]
    prompt: tuple[int, ...]
    texts: tuple[tuple[int, ...], ...]
    patches: tuple[float, ...]
    features: tuple[float, ...]
    tokens: tuple[int, ...]  # of the greedy answer
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Deviation:
    """How far a bundle is here from what it was where it was made: roots of mean squares, relative to the values'."""

    texts: tuple[str, ...]  # that give other ids
    prompt: bool  # the golden prompt has other ids
    pixels: float  # largest difference of a patch's value
    features: float
    logits: float
    tokens: bool  # another token wins where the golden one was ahead by more than the tolerance

    def problems(self, variant: str) -> list[str]:
        """Return a message for each deviation beyond the variant's tolerance."""
        features, logits = VARIANTS[variant].tolerance
        found = [f"the tokenizer gives other ids for {text!r}" for text in self.texts]
        found += ["the golden prompt has other token ids"] if self.prompt else []
        if not self.pixels <= _PIXELS:
            found.append(
                f"the golden image's patches differ by up to {self.pixels:.3f} (allowed {_PIXELS:.3f}); perhaps "
                "another Pillow version"
            )
        if not self.features <= features:
            found.append(
                f"the relative error of the image features is {self.features:.4f} (allowed for {variant}: {features:g})"
            )
        if not self.logits <= logits:
            found.append(f"the relative error of the logits is {self.logits:.4f} (allowed for {variant}: {logits:g})")
        if self.tokens:
            found.append("another token is most likely where the golden token was clearly ahead")
        return found


def record(model: Model) -> Golden:
    """What is kept of one variant.

    Raises:
        BundleError: it gives values that are no numbers.
    """
    patches, features, ids = _seen(model)
    answer = _answer(model, features, None)
    for what, values in (("image features", features), ("logits", np.stack(answer))):
        if not np.isfinite(values).all():
            of = f"{model.bundle.folder}: the {what} of {model.setup.variant}"
            raise BundleError(f"{of} are NaN or infinite: check its weights")
    steps = tuple(Step.of(logits) for logits in answer)
    return Golden(
        ort.__version__,
        cpu_features(),
        tuple(ids),
        tuple(_ids(model, text) for text in TEXTS),
        _short(_spaced(patches)),
        _short(_spaced(features)),
        tuple(int(logits.argmax()) for logits in answer),
        steps,
    )


def compare(model: Model, golden: Golden) -> Deviation:
    """The model here against what was kept.

    Raises:
        BundleError: the golden values do not fit the model.
    """
    patches, features, ids = _seen(model)
    if max(golden.tokens, default=0) >= model.decoder.info.vocabulary:
        raise BundleError(f"{model.bundle.folder / MANIFEST} has golden tokens that the model does not know; {_ADVICE}")
    with damage_is(BundleError, model.bundle.folder / MANIFEST, _ADVICE), model.sessions.failures_are_ours():
        texts = tuple(text for text, wanted in zip(TEXTS, golden.texts, strict=True) if _ids(model, text) != wanted)
        pixels = float(np.max(np.abs(_spaced(patches) - np.array(golden.patches))))
        wanted = np.array(golden.features)
        off = _rms(_spaced(features) - wanted) / _rms(wanted)
        answer = _answer(model, features, golden.tokens)
        found, kept, lost = [], [], False
        _, limit = VARIANTS[model.setup.variant].tolerance
        for logits, step, token in zip(answer, golden.steps, golden.tokens, strict=True):
            found.append((logits[np.array(step.at)] - np.array(step.logits)) / step.std)
            kept.append((np.array(step.logits) - step.mean) / step.std)
            lost = lost or (int(logits.argmax()) != token and step.ahead > 4 * limit * step.std)
        logits_off = _rms(np.concatenate(found)) / _rms(np.concatenate(kept))
        return Deviation(texts, tuple(ids) != golden.prompt, pixels, off, logits_off, lost)


def golden_of(bundle: Bundle, variant: str) -> Golden | None:
    """What was kept of a variant; None for bundles that were made without."""
    found = bundle.manifest.golden.get(variant) if bundle.manifest else None
    return None if found is None else read_as(Golden, found, bundle.folder / MANIFEST, BundleError, _ADVICE)


def add_golden(folder: Path, variant: str) -> str | None:
    """Record a variant of a bundle's folder that nobody else writes, in its manifest. Weights stay mapped, and large
    ones are run in a process of their own, so that the caller's memory does not grow.

    Returns:
        Why this machine's memory did not suffice for it; None where it was recorded.

    Raises:
        BundleError: the variant cannot be run, or gives values that are no numbers.
    """
    weights = sum(path.stat().st_size for path in (folder / "onnx").glob("*_data"))
    try:
        if weights <= _SMALL:
            kept = as_json(record(_lean(folder, variant)))
        else:
            words = module("lfm_runtime.golden", str(folder), variant)
            kept = json.loads(
                subprocess.run(  # noqa: S603
                    words, env=child_environment(), capture_output=True, text=True, check=True
                ).stdout
            )
    except subprocess.CalledProcessError as e:
        said = (e.stderr.strip().splitlines() or [f"exit code {e.returncode}"])[-1]
        return _not_recorded(variant, said, e, out_of_memory=e.returncode < 0)  # killed
    except MemoryError as e:
        return _not_recorded(variant, "out of memory", e, out_of_memory=True)
    except EdgeError as e:
        return _not_recorded(variant, str(e), e, out_of_memory=False)
    manifest = Manifest.of(folder)
    replace(manifest, golden={**manifest.golden, variant: kept}).write(folder)
    return None


def _not_recorded(variant: str, said: str, cause: BaseException, *, out_of_memory: bool) -> str:
    """The reason, where it is memory; an error for any other."""
    message = f"golden answers of {variant} could not be recorded ({said})"
    if out_of_memory or is_out_of_memory(said):
        return f"{message}, so selftest cannot compare with them; make {variant} again where there is more memory"
    raise BundleError(message) from cause


def _lean(folder: Path, variant: str) -> Model:
    """One graph at a time, weights mapped, images as the checkpoint has them."""
    profile = find_profile("generic", variant=variant, low_memory=True, prepared=False)
    setup = settle(Bundle.open(folder), profile)
    return Model(replace(setup, execution=replace(setup.execution, packed=False), images=setup.bundle.images))


def _opened(model: Model) -> OpenedImage:
    """The golden image, cut by the checkpoint's own settings whatever the profile says."""
    settings, image = model.bundle.images, golden_image()
    return OpenedImage(image, lay_out(image.width, image.height, settings), settings)


def _seen(model: Model) -> tuple[NDArray[np.float32], NDArray[np.float32], list[int]]:
    """(patches of all views, image features, prompt ids) of the golden image and question."""
    opened = _opened(model)
    patches = np.concatenate([view.reshape(-1) for view in cut_views(opened.image, opened.layout, opened.settings)])
    prompt = model.prompts.render([Message.user(QUESTION, 1)], [opened.layout])
    return patches, model.encode([opened]), list(prompt.ids)


def _answer(model: Model, features: NDArray[np.float32], tokens: Sequence[int] | None) -> list[NDArray[np.float64]]:
    """Logits of each step of the greedy answer, or along `tokens`."""
    job = model.prepare_answer([Message.user(QUESTION, 1)], [_opened(model)], temperature=0)
    embeds = model.decoder.embed_prompt(job.prompt.ids, features, model.prompts.image_id)
    context = Context(model.decoder)
    keys = np.array(job.prompt.ids)
    context.resume(context.find(keys), keys, len(keys) + STEPS)
    found = [context.feed(embeds, keys).astype(np.float64)]
    for n in range(STEPS - 1):
        token = tokens[n] if tokens else int(found[-1].argmax())
        found.append(context.feed(model.decoder.embed([token]), np.array([token])).astype(np.float64))
    return found


def _ids(model: Model, text: str) -> tuple[int, ...]:
    return tuple(model.prompts.tokenizer.encode(text))


def _spaced(values: NDArray[np.float32]) -> NDArray[np.float64]:
    flat = values.reshape(-1)
    return flat[np.linspace(0, len(flat) - 1, _SAMPLES).astype(np.int64)].astype(np.float64)


def _short(values: NDArray[Any]) -> tuple[float, ...]:
    """Return the values rounded to six significant digits: kernels do not agree on more."""
    return tuple(float(f"{value:.6g}") for value in values)


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def main() -> int:
    """Print one variant's golden values as JSON, for add_golden; return the exit code."""
    try:
        print(to_json(as_json(record(_lean(Path(sys.argv[1]), sys.argv[2])))))
    except EdgeError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
