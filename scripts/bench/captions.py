"""How `lfm-edge caption` holds out over many images: rate and anonymous memory, tenth by tenth.

    python scripts/bench/captions.py BUNDLE --images 10000 [--rows 4] [WORDS of lfm-edge caption …]

The images are links to the demo's evaluation set, in folders of a thousand. Prints a row for each tenth of the run:
images a minute, and the anonymous memory at its end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

IMAGES = sorted((Path(__file__).resolve().parents[2] / "demo" / "eval" / "images").glob("*.png"))
QUESTION = "What is in this image?"


def links(folder: Path, count: int, sources: list[Path]) -> None:
    """So many links to images."""
    for n in range(count):
        place = folder / f"{n // 1000:04d}"
        place.mkdir(exist_ok=True)
        (place / f"{n:06d}{sources[n % len(sources)].suffix}").symlink_to(sources[n % len(sources)].resolve())


def main() -> int:
    """Run it; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--of", type=Path, help="a folder of images, instead of the demo's")
    options, words = parser.parse_known_args()
    sources = sorted(options.of.iterdir()) if options.of else IMAGES
    place = Path(tempfile.mkdtemp())
    links(place, options.images, sources)
    out = place / "out.jsonl"
    command = [sys.executable, "-m", "lfm_runtime", "caption", str(options.bundle), str(place), "-r", "-p", QUESTION]
    process = subprocess.Popen([*command, "-o", str(out), "--quiet", *words])
    watched, tenth, done, since = psutil.Process(process.pid), options.images // 10, 0, time.monotonic()
    print("images  a minute  anonymous MiB")
    with out.open("ab+") as f:
        while done < options.images and process.poll() is None:
            found = f.read().count(b"\n")
            if (done + found) // tenth > done // tenth:
                now = time.monotonic()
                memory = int(next(line for line in _status(watched) if line.startswith("RssAnon")).split()[1]) / 1024
                print(f"{done + found:6,}  {60 * tenth / (now - since):8,.0f}  {memory:13,.1f}", flush=True)
                since = now
            done += found
            time.sleep(0.05)
    code = process.wait()
    lines = out.read_text().splitlines()
    paths = {json.loads(line)["path"] for line in lines}
    print(f"exit code {code}, {len(lines):,} records of {len(paths):,} images")
    shutil.rmtree(place)
    return 0


def _status(process: psutil.Process) -> list[str]:
    return Path(f"/proc/{process.pid}/status").read_text().splitlines() if os.path.exists("/proc") else []  # noqa: PTH110


if __name__ == "__main__":
    sys.exit(main())
