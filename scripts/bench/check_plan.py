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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--variants", help="comma-separated; default: all of the bundle but fp16")
    parser.add_argument("--sizes", type=int, nargs="*", help="which of the image sizes, by number")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, off = [], 0
    print(
        f"{'bundle':12s} {'variant':9s} {'how':22s} {'image':10s} {'tokens':>6s} {'predicted':>9s} "
        f"{'measured':>8s}  ratio   anonymous at the end: predicted, measured"
    )
    with tempfile.TemporaryDirectory() as folder:
        images = {}
        for size in SIZES:
            if size:
                images[size] = Path(folder) / f"{size[0]}x{size[1]}.jpg"
                Image.open(PHOTO).convert("RGB").resize(size).save(images[size])
        for bundle in options.bundles:
            variants = (
                options.variants.split(",")
                if options.variants
                else [v for v in Bundle.open(Path(bundle)).variants if v in ("fp32", "int8", "int4", "int4-kv8")]
            )
            for variant, low, prepared, size in itertools.product(
                variants, (False, True), (True, False), [SIZES[i] for i in options.sizes] if options.sizes else SIZES
            ):
                settings = {"variant": variant, "low_memory": low, "prepared": prepared, "threads": 2}
                words = [
                    sys.executable,
                    "-c",
                    PLAN,
                    bundle,
                    json.dumps(settings),
                    json.dumps([size] if size else []),
                    QUESTION,
                ]
                anonymous, mapped, tokens = json.loads(
                    subprocess.run(words, check=True, capture_output=True, text=True).stdout
                )
                (Path(folder) / "p.toml").write_text(
                    f"extends = 'generic'\nprepared = {str(prepared).lower()}\nlow_memory = "
                    f"{str(low).lower()}\nthreads = 2\n"
                )
                words = [
                    sys.executable,
                    "-c",
                    "import sys; from lfm_runtime.commands.cli import main; sys.exit(main())",
                    "run",
                    bundle,
                    *([str(images[size])] if size else []),
                    "-p",
                    QUESTION,
                    "--json",
                    "--profile",
                    str(Path(folder) / "p.toml"),
                    "--variant",
                    variant,
                    "--max-new-tokens",
                    "32",
                    "--temperature",
                    "0",
                    "--force",
                ]
                memory = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)[
                    "memory_mib"
                ]
                ratio = (anonymous + mapped) / memory["peak"]
                off += not 0.95 <= ratio <= 1.10
                how = ", ".join(name for name, on in (("low memory", low), ("prepared", prepared)) if on) or "–"
                name = f"{size[0]}×{size[1]}" if size else "–"
                print(
                    f"{Path(bundle).name:12s} {variant:9s} {how:22s} {name:10s} {tokens:6d} "
                    f"{anonymous + mapped:9.0f} {memory['peak']:8.0f}  "
                    f"{ratio:.3f}{'' if 0.95 <= ratio <= 1.1 else ' OFF'}"
                    f"   {anonymous:.0f}, {memory['rss_anon']:.0f}",
                    flush=True,
                )
                rows.append(
                    {
                        "bundle": Path(bundle).name,
                        **settings,
                        "size": size,
                        "anonymous": anonymous,
                        "mapped": mapped,
                        "measured": memory,
                    }
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"{len(rows)} runs, {off} off")
    return int(off > 0)


if __name__ == "__main__":
    sys.exit(main())
