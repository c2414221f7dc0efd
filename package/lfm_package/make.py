"""From a checkpoint to a stick in one go: the steps, what each is made of, and which of them were done before.

Each step is a command of its own in a process of its own; this file only decides which, and remembers what a finished
step was made of.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lfm_profiles import FINEST, SMALLER, Profile
from lfm_runtime import __version__
from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import EdgeError
from lfm_runtime.formats.files import read_json_object, to_json, write_whole
from lfm_runtime.images.layout import image_settings
from lfm_runtime.process import child_environment, module
from lfm_runtime.setup.costs import fingerprint
from lfm_runtime.setup.profile import find_profile, image_changes

EXPORT, STICK = "export", "stick"


@dataclass(frozen=True)
class Order:
    """What is to be made, from what."""

    checkpoint: Path
    bundle: Path  # stays, with every variant
    output: Path
    profile: str  # of the board: a name or a file
    adapter: Path | None = None
    calibration: tuple[Path, ...] = ()
    prompts: Path | None = None
    quick: bool = False
    quiet: bool = False
    force: bool = False  # variants too that were made with more care, and sticks of others
    stick: tuple[str, ...] = ()  # further words for `lfm-edge stick`

    @cached_property
    def board(self) -> Profile:
        """The profile's settings."""
        return find_profile(self.profile)

    def variants(self) -> list[str]:
        """Variants that the board's profile would use, and quantize makes; the prefill decoder's first, as the other is
        judged with it.
        """
        wanted = [*self.board.variant[:1]]
        if self.board.prefill not in (None, "none") and not self.board.low_memory:
            wanted.insert(0, str(self.board.prefill))
        return [name for name in dict.fromkeys(wanted) if name in SMALLER]

    def changes_images(self) -> bool:
        """Whether the board looks at images otherwise than the checkpoint asks for; the bundle is there."""
        images = Bundle.open(self.bundle).images
        return image_settings(images, image_changes(self.board, images)) != images


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str  # "export", a variant, "stick"
    words: list[str]
    made_of: str = field(repr=False)  # a digest of everything that goes in; "" is always done
    better: str = field(default="", repr=False)  # that of a step that would do as well

    def run(self) -> int:
        """Run the command, its streams being ours; returns its exit code."""
        process = subprocess.Popen(module("lfm_runtime", *self.words), env=child_environment())  # noqa: S603
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()  # on a terminal it was interrupted as well, and says how it goes on
            process.wait()
            raise


def steps_of(order: Order) -> list[Step]:
    """Every step, in order."""
    quiet = ["--quiet"] if order.quiet else []
    adapter = ["--adapter", str(order.adapter)] if order.adapter else []
    made_of = _digest("", [EXPORT], [order.checkpoint, *([order.adapter] if order.adapter else [])])
    steps = [Step(EXPORT, [EXPORT, str(order.checkpoint), *adapter, "-o", str(order.bundle), *quiet], made_of)]
    images = ["--calibration", *map(str, order.calibration), "--profile", order.profile] if order.calibration else []
    prompts = ["--prompts", str(order.prompts)] if order.prompts else []
    quick, force = ["--quick"] * order.quick, ["--force"] * order.force
    inputs = [*order.calibration, *([order.prompts] if order.prompts else [])]
    for variant in order.variants():
        words = ["quantize", str(order.bundle), "--variant", variant, *images, *prompts, *quick, *quiet, *force]
        judged = str(order.board)  # as it runs the variant
        full = _digest(made_of, [variant, judged], inputs)
        now = _digest(made_of, [variant, judged, *quick], inputs)
        steps.append(Step(variant, words, now, full if order.quick else ""))
    return [*steps, Step(STICK, [STICK, str(order.bundle), "-o", str(order.output), *order.stick, *force], "")]


def _digest(before: str, words: Sequence[str], inputs: Iterable[Path]) -> str:
    """Tells these words and these versions of the input files from others."""
    found = []
    for place in inputs:
        files = sorted(p for p in (place, *place.rglob("*")) if p.is_file())
        stats = [(str(file.resolve()), file.stat()) for file in files]
        found += [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps([__version__, before, *words, found]).encode()).hexdigest()


class Done:
    """What finished steps were made of, in a file beside the bundle."""

    def __init__(self, bundle: Path) -> None:
        self.bundle, self.damage = bundle, ""
        self.path = bundle.with_name(f".{bundle.name}.make.json")
        try:
            self._known = read_json_object(self.path, EdgeError, required=False)
        except EdgeError:
            self._known = {}
            self.damage = f"{self.path} cannot be read, which says what was done before; all is done again"

    def has(self, step: Step) -> bool:
        """Whether a step was done with the same inputs, and what it made is still there."""
        known = self._known.get(step.name)
        if not step.made_of or not isinstance(known, dict) or known.get("made_of") not in (step.made_of, step.better):
            return False
        made = self._made(step)
        return made is not None and made == known.get("made")

    def add(self, step: Step) -> None:
        """Remember that a step is done, and what it made."""
        if step.made_of:
            self._known[step.name] = {"made_of": step.made_of, "made": self._made(step)}
            write_whole(self.path, to_json(self._known, indent=1))

    def _made(self, step: Step) -> str | None:
        """Tells what the bundle has of a step from what another command puts there; None where it has nothing."""
        variant = FINEST[0] if step.name == EXPORT else step.name
        try:
            bundle = Bundle.open(self.bundle)
            weights, manifest = fingerprint(bundle, variant), bundle.manifest
        except EdgeError:
            return None
        if manifest is None:
            return None
        names = (name for name in manifest.files if "/" not in name and name != "config.json")  # which quantize changes
        beside = {name: manifest.files[name].sha256 for name in names}
        how = beside if step.name == EXPORT else manifest.quantization.get(variant)
        return hashlib.sha256(f"{weights}{json.dumps(how, sort_keys=True)}".encode()).hexdigest()
