"""`optimum-cli export lfm2-vl`: found by Optimum because it lies in its namespace (PEP 420), as its own subpackages' commands do.

Not `optimum-cli export onnx`: for a model of several graphs that command asks a fixed list in Optimum itself; only `main_export` takes
submodels from outside.
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
        """Declare the flags."""
        parser.add_argument("-m", "--model", required=True, help="checkpoint folder, or a model of the hub")
        parser.add_argument("output", help="folder to write into")

    def run(self) -> None:
        """Through Optimum's main_export, its own check of the graphs included."""
        from lfm_export.portable import onnx_configs, submodels
        from optimum.exporters.onnx import main_export
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.args.model)
        main_export(
            self.args.model, self.args.output, task="image-text-to-text", dtype="fp32",
            custom_onnx_configs=onnx_configs(config), fn_get_submodels=submodels,
        )  # fmt: skip


REGISTER_COMMANDS = [(LFM2VLExportCommand, ExportCommand)]
