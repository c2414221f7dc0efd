"""`lfm-edge prepare`: on the device, write the graphs in the form its processor wants. Starts are faster, memory is mapped files."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from lfm_runtime.contract import DECODER, FOR_GPUS, VARIANT_SUFFIX


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description = (
        "Optimize a variant's graphs for this processor and keep their packed weights in BUNDLE.prepared; run and chat then use them."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--variant", choices=tuple(VARIANT_SUFFIX), help="default: the bundle's first")
    parser.add_argument("--prefill", choices=tuple(VARIANT_SUFFIX), metavar="VARIANT", help="also the decoder of this variant")


def run(options: argparse.Namespace) -> int:
    """Prepare each graph."""
    from lfm_runtime.bundle import Bundle
    from lfm_runtime.prepare import PREPARED, prepare
    from lfm_runtime.prepared import folder_of

    bundle = Bundle.open(options.bundle)
    variant, paths = bundle.graphs(options.variant)
    if variant in FOR_GPUS:
        print(f"{variant} is for GPUs, which load it as it is: there is nothing to prepare")
        return 0
    wanted = [(graph, paths[graph.stem]) for graph in PREPARED]
    if options.prefill:
        wanted.append((DECODER, bundle.graphs(options.prefill)[1][DECODER.stem]))
    for graph, path in wanted:
        started = time.perf_counter()
        place = prepare(bundle, graph, path)
        size = sum(file.stat().st_size for file in place.iterdir())
        print(f"{path.name}: {size / 1e6:.0f} MB in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    print(f"{variant} is prepared in {folder_of(options.bundle)}")
    return 0
