"""`optimum-cli export lfm2-vl`: found by Optimum because it lies in its namespace (PEP 420), as its own subpackages'
commands do.

Not `optimum-cli export onnx`: for a model of several graphs that command asks a fixed list in Optimum itself; submodels
from outside are taken by Optimum's functions alone.
"""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class LFM2VLExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """Vision encoder with projector, token embedding, decoder with caches: the names of the hub's ONNX repositories."""

    COMMAND = CommandInfo(name="lfm2-vl", help="Export LFM2-VL to three ONNX graphs of standard operators (lfm-edge).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the command's arguments to `parser`; nothing is parsed here."""
        parser.add_argument("-m", "--model", required=True, help="checkpoint folder, or a model of the hub")
        parser.add_argument("output", help="folder to write into")

    def run(self) -> None:
        """Through Optimum's own export; an error that we can explain is one line, exit code 2."""
        import sys
        from pathlib import Path

        from lfm_export.portable.portable import export_with_optimum
        from lfm_runtime.errors import EdgeError

        try:
            export_with_optimum(self.args.model, Path(self.args.output))
        except EdgeError as e:
            print(f"lfm-edge: {e}", file=sys.stderr)
            sys.exit(2)
        print(f"{self.args.output}: three graphs of standard operators, as lfm-edge export --portable writes them")


REGISTER_COMMANDS = [(LFM2VLExportCommand, ExportCommand)]
