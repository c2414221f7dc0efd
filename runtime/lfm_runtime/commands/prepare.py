"""`lfm-edge prepare`: optimize graphs for this device's processor: faster starts, weights mapped from disk."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from lfm_profiles import VARIANTS

from lfm_runtime.commands.console import print_json
from lfm_runtime.formats.contract import DECODER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Optimize a variant's graphs for this processor and keep their packed weights in BUNDLE.prepared; run "
        "and chat then use them."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--variant", choices=tuple(VARIANTS), help="default: the variant that lfm-edge run uses here")
    parser.add_argument(
        "--prefill",
        choices=tuple(VARIANTS),
        metavar="VARIANT",
        help="also prepare this variant's decoder (default: the one that lfm-edge run uses for prefill)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--quiet", action="store_true", help="no line for each graph")


def run(options: argparse.Namespace) -> int:
    """Prepare each graph of the variant, print the folder and return 0."""
    from lfm_runtime.engine.prepare import PREPARED, check_space, prepare
    from lfm_runtime.engine.prepared import folder_of
    from lfm_runtime.setup.resolve import resolve

    setup = resolve(options.bundle, force=True, variant=options.variant)
    bundle, variant = setup.bundle, setup.variant
    prefill = options.prefill or setup.prefill
    if VARIANTS[variant].for_gpu:
        if options.json:
            print_json({"folder": None, "variant": variant, "prefill": None, "graphs": []})
        else:
            print(f"{variant} is for GPUs and needs no preparing")
        return 0
    wanted = [(graph, setup.paths[graph.stem]) for graph in PREPARED]
    if prefill and prefill != variant:
        wanted.append((DECODER, bundle.graphs(prefill)[1][DECODER.stem]))
    check_space(bundle, [path for _, path in wanted])
    graphs = []
    for graph, path in wanted:
        started = time.perf_counter()
        place = prepare(bundle, graph, path)
        size = sum(file.stat().st_size for file in place.iterdir())
        graphs.append({"graph": path.name, "bytes": size, "seconds": round(time.perf_counter() - started, 3)})
        if not (options.quiet or options.json):
            print(f"{path.name}: {size / 1e6:.0f} MB in {graphs[-1]['seconds']:.1f} s", file=sys.stderr)
    if options.json:
        prefill = prefill if prefill != variant else None
        where = str(folder_of(options.bundle))
        print_json({"folder": where, "variant": variant, "prefill": prefill, "graphs": graphs})
        return 0
    reader = f", and {prefill} for prefill," if prefill and prefill != variant else ""
    print(f"{variant}{reader} is prepared in {folder_of(options.bundle)}")
    return 0
