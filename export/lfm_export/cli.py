"""`lfm-edge export`: export a Hugging Face checkpoint as a bundle of ONNX graphs."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from lfm_runtime.errors import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = "Convert a Hugging Face LFM2-VL checkpoint folder to a bundle of ONNX graphs."
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="folder with config.json, safetensors and tokenizer files, or an id of the hub: owner/name[@revision]; "
        "with --static, a bundle made with --portable; with --web and --genai, a bundle",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="BUNDLE", help="folder to make, or a bundle to add to"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16"), default="fp32", help="weights: fp32 for CPUs, fp16 for GPUs"
    )
    parser.add_argument(
        "--adapter", type=Path, metavar="LORA_DIR", help="PEFT LoRA adapter to merge into the weights, or its id"
    )
    parser.add_argument(
        "--graphs", metavar="A,B", default="", help="write only these graphs (vision_encoder, embed_tokens, …)"
    )
    parser.add_argument(
        "--portable",
        action="store_true",
        help="use only standard ONNX operators, for other engines (needs the extra optimum)",
    )
    parser.add_argument(
        "--static", action="store_true", help="write a portable bundle's graphs with every shape fixed (NPU compilers)"
    )
    parser.add_argument(
        "--web",
        action="store_true",
        help="write a bundle again for browsers: transformers.js with WebAssembly or WebGPU",
    )
    parser.add_argument("--genai", action="store_true", help="write a folder for onnxruntime-genai from a bundle")
    parser.add_argument(
        "--variant", metavar="NAME", help="with --genai: int4, int8 or fp32 (default: the first there is)"
    )
    parser.add_argument(
        "--grid", metavar="RxC", help="with --static: patches of a view, rows x columns (default 32x32: 512×512 pixels)"
    )
    parser.add_argument("--prefill", type=int, metavar="N", help="with --static: tokens of a prompt step (default 128)")
    parser.add_argument("--context", type=int, metavar="N", help="with --static: tokens in all (default 512)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: bundle, bytes, seconds, warning")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(options: argparse.Namespace) -> int:
    """Export the checkpoint, print what was written, its size and the time taken, and return 0."""
    from lfm_runtime.commands.console import print_json

    from lfm_export.checkpoint.config import CheckpointError

    if options.static or options.web or options.genai:
        _check_reads_a_bundle(options)
    for flag in ("grid", "prefill", "context"):
        if getattr(options, flag) is not None and not options.static:
            raise CheckpointError(f"--{flag} has no effect without --static; leave it out")
    if options.variant is not None and not options.genai:
        raise CheckpointError("--variant has no effect without --genai; leave it out")
    started = time.perf_counter()
    if options.static or options.web or options.genai:
        made, warning = _from_bundle(options), None
    else:
        made, warning = "", _from_checkpoint(options)
    size = sum(p.stat().st_size for p in options.output.rglob("*") if p.is_file())
    seconds = time.perf_counter() - started
    if options.json:
        print_json({"bundle": str(options.output), "bytes": size, "seconds": round(seconds, 3), "warning": warning})
    elif not options.quiet:
        figures = (made, f"{size / 1e6:,.1f} MB", f"{seconds:.1f} s")
        print("  ".join(filter(None, (str(options.output), *figures))), file=sys.stderr)
    return 0


def _from_checkpoint(options: argparse.Namespace) -> str | None:
    """Export; returns the warning, if there is one."""
    from lfm_runtime.setup.hub import adapter_folder, checkpoint_folder

    from lfm_export.export import export

    checkpoint = checkpoint_folder(options.checkpoint, quiet=options.quiet)
    adapter = adapter_folder(options.adapter, quiet=options.quiet) if options.adapter else None
    progress = Printer(not options.quiet)
    warning = export(
        checkpoint,
        options.output,
        dtype=options.dtype,
        adapter=adapter,
        graphs=[g for g in options.graphs.split(",") if g],
        portable=options.portable,
        progress=progress,
    )
    progress.clear()
    if warning:
        print(f"lfm-edge: warning: {warning}", file=sys.stderr)
    if options.adapter:
        print(f"merged the adapter {options.adapter} into the weights", file=sys.stderr)
    return warning


def _from_bundle(options: argparse.Namespace) -> str:
    """Write the folder that --genai, --web or --static asks for; returns in words what is in it."""
    if options.genai:
        from lfm_export.genai import write_genai

        return write_genai(options.checkpoint, options.output, options.variant)
    if options.web:
        from lfm_runtime.bundle import Bundle

        from lfm_export.web import VARIANTS as WEB_VARIANTS
        from lfm_export.web import write_web

        written = write_web(options.checkpoint, options.output)
        if left := [name for name in Bundle.open(options.checkpoint).variants if name not in written]:
            print(f"left out: {', '.join(left)}; browsers take {', '.join(WEB_VARIANTS)}", file=sys.stderr)
        return ", ".join(written)
    from lfm_export.portable.static import StaticShape, write_static

    default = StaticShape()
    shape = StaticShape.parse(
        options.grid or f"{default.rows}x{default.columns}",
        default.prefill if options.prefill is None else options.prefill,
        default.context if options.context is None else options.context,
    )
    return ", ".join(path.name for path in write_static(options.checkpoint, options.output, shape))


def _check_reads_a_bundle(options: argparse.Namespace) -> None:
    """Raise CheckpointError for flags that are about a checkpoint, or about another of --genai, --static and --web."""
    from lfm_export.checkpoint.config import CheckpointError

    what = "--genai" if options.genai else "--web" if options.web else "--static"
    for flag, given in (
        ("portable", options.portable),
        ("dtype", options.dtype != "fp32"),
        ("adapter", options.adapter),
        ("graphs", options.graphs),
    ):
        if given:
            raise CheckpointError(f"--{flag} has no effect beside {what}, which reads a bundle; leave it out")
    for other, given in (("--static", options.static), ("--web", options.web)):
        if given and other != what:
            raise CheckpointError(f"{other} and {what} exclude each other: each writes a folder of its own; give one")


class Printer:
    """Progress per tensor: one line overwritten on a terminal, a line every 200 MB in a log."""

    def __init__(self, enabled: bool) -> None:
        self.live = enabled and sys.stderr.isatty()
        self.enabled = enabled
        self.tensors, self.bytes, self._next = 0, 0, 0

    def __call__(self, name: str, size: int) -> None:
        """Count a tensor of `size` bytes that was written, and show the progress."""
        self.tensors += 1
        self.bytes += size
        line = f"{counted(self.tensors, 'tensor'):>12s}  {self.bytes / 1e6:8,.1f} MB  {name}"
        if self.live:
            print(f"\r\x1b[K{line[:100]}", end="", file=sys.stderr, flush=True)
        elif self.enabled and self.bytes >= self._next:
            print(line, file=sys.stderr)
            self._next = self.bytes + 200_000_000

    def clear(self) -> None:
        """Erase the progress line, where one is shown."""
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
