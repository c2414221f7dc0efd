"""Predicted peak memory beside measured, for runs of many kinds: every prediction within 10 % and not below 95 %.

    python scripts/bench/check_plan.py BUNDLE [BUNDLE …] [--json FILE]

Each row is a process of its own, `lfm-edge run --json`, and the plan it would have made. Exit code 1 when one is off.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lfm_runtime.bundle import Bundle
from PIL import Image

PHOTO = Path(__file__).resolve().parents[2] / "demo" / "photos" / "coffee.jpg"
QUESTION = "What is in this image, and where is the cup?"
SIZES = (None, (384, 256), (512, 512), (1400, 1000), (3000, 2000))
PLAN = """if True:
    import sys, json
    from pathlib import Path
    import lfm_runtime.model
    from lfm_runtime.bundle import Bundle
    from lfm_runtime.images.pixels import open_image
    from lfm_runtime.setup.profile import find_profile
    from lfm_runtime.setup.resolve import resolve
    from lfm_runtime.setup.setup import Ask
    profile = find_profile("generic", max_new_tokens=32, **json.loads(sys.argv[2]))
    ask = Ask(tuple(map(tuple, json.loads(sys.argv[3]))), sys.argv[4])
    found = resolve(Bundle.open(Path(sys.argv[1])), profile, ask, force=True).forecast
    print(json.dumps([found.memory.anonymous, found.memory.mapped, found.prompt_tokens]))
"""


@dataclass(frozen=True)
class Case:
    """One run: a bundle's variant, how, with an image of which size."""

    bundle: Path
    variant: str
    low_memory: bool
    prepared: bool
    size: tuple[int, int] | None

    @property
    def settings(self) -> dict:
        """What both sides are told."""
        return {"variant": self.variant, "low_memory": self.low_memory, "prepared": self.prepared, "threads": 2}


def foreseen(case: Case) -> tuple[float, float, int]:
    """(anonymous, mapped, prompt tokens) as the plan has it, MiB."""
    images = [case.size] if case.size else []
    words = [sys.executable, "-c", PLAN, str(case.bundle), json.dumps(case.settings), json.dumps(images), QUESTION]
    return tuple(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))


def measured(case: Case, folder: Path) -> dict:
    """The memory of a whole `run` in a process of its own, MiB."""
    profile, image = folder / "p.toml", folder / "image.jpg"
    profile.write_text(
        f"extends = 'generic'\nprepared = {str(case.prepared).lower()}\nlow_memory = "
        f"{str(case.low_memory).lower()}\nthreads = 2\n"
    )
    if case.size:
        Image.open(PHOTO).convert("RGB").resize(case.size).save(image)
    command = "import sys; from lfm_runtime.commands.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", command, "run", str(case.bundle), *([str(image)] if case.size else [])]
    words += ["-p", QUESTION, "--json", "--profile", str(profile), "--variant", case.variant]
    words += ["--max-new-tokens", "32", "--temperature", "0", "--force"]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)["memory_mib"]


def row_of(case: Case, folder: Path) -> dict:
    """Run a case both ways and print its line."""
    anonymous, mapped, tokens = foreseen(case)
    memory = measured(case, folder)
    ratio = (anonymous + mapped) / memory["peak"]
    off = not 0.95 <= ratio <= 1.10
    how = ", ".join(n for n, on in (("low memory", case.low_memory), ("prepared", case.prepared)) if on) or "–"
    name = f"{case.size[0]}×{case.size[1]}" if case.size else "–"
    print(
        f"{case.bundle.name:12s} {case.variant:9s} {how:22s} {name:10s} {tokens:6d} {anonymous + mapped:9.0f} "
        f"{memory['peak']:8.0f}  {ratio:.3f}{' OFF' if off else ''}   {anonymous:.0f}, {memory['rss_anon']:.0f}",
        flush=True,
    )
    foreseen_mib = {"anonymous": anonymous, "mapped": mapped}
    return {
        "bundle": case.bundle.name,
        **case.settings,
        "size": case.size,
        **foreseen_mib,
        "measured": memory,
        "off": off,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--variants", help="comma-separated; default: all of the bundle but fp16")
    parser.add_argument("--sizes", type=int, nargs="*", help="which of the image sizes, by number")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = [SIZES[i] for i in options.sizes] if options.sizes else SIZES
    rows = []
    print(
        f"{'bundle':12s} {'variant':9s} {'how':22s} {'image':10s} {'tokens':>6s} {'predicted':>9s} "
        f"{'measured':>8s}  ratio   anonymous at the end: predicted, measured"
    )
    with tempfile.TemporaryDirectory() as folder:
        for bundle in options.bundles:
            known = [v for v in Bundle.open(bundle).variants if v in ("fp32", "int8", "int4", "int4-kv8")]
            variants = options.variants.split(",") if options.variants else known
            for variant, low, prepared, size in itertools.product(variants, (False, True), (True, False), sizes):
                rows.append(row_of(Case(bundle, variant, low, prepared, size), Path(folder)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    off = sum(row["off"] for row in rows)
    print(f"{len(rows)} runs, {off} off")
    return int(off > 0)


if __name__ == "__main__":
    sys.exit(main())
