"""`lfm-edge report`: write a report from audits, or from the results of lfm-edge tune."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from lfm_runtime.commands.cli import add_force_argument
from lfm_runtime.errors import command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Make a report from audits (several are shown side by side, compared with the first), from the results of "
        "lfm-edge tune, or from the records of lfm-edge caption."
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE.json", help="of lfm-edge audit or tune; or the .jsonl of caption"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="output, .html (opens offline) or .md; default: the first FILE's name with .html",
    )
    add_force_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Write a page of the audits, or of the tuning, as .html or .md; return 0."""
    from lfm_runtime.errors import SettingError
    from lfm_runtime.formats.files import check_output

    output = options.output or options.files[0].with_suffix(".html")
    if options.files[0].suffix == ".jsonl":
        return _records(options, output)
    if captions := next((file for file in options.files if file.suffix == ".jsonl"), None):
        raise SettingError(f"{captions} is of lfm-edge caption, and reported alone: {command('report', captions)}")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a HOME that cannot be written
    from lfm_audit.report.markdown import audit_markdown, tuning_markdown
    from lfm_audit.report.page import audit_page, tuning_page
    from lfm_audit.report.source import is_report, named_audits, read_tuning

    if output.suffix not in (".html", ".md"):
        raise SettingError(f"{output}: a report is .html or .md")
    as_page = output.suffix == ".html"
    tuning = read_tuning(options.files[0])
    audits = [] if tuning else named_audits(options.files)  # what a file is, before where its report would lie
    check_output(output, "lfm-edge report", is_report, force=options.force)
    if tuning is not None:
        if len(options.files) > 1:
            raise SettingError(f"{options.files[0]} is a result of lfm-edge tune; give no other file with it")
        text = tuning_page(tuning) if as_page else tuning_markdown(tuning)
    else:
        text = audit_page(audits) if as_page else audit_markdown(audits)
    return _written(output, text)


def _records(options: argparse.Namespace, output: Path) -> int:
    """The page of a run over many images, which the package that writes its records makes."""
    from importlib.metadata import entry_points

    from lfm_runtime.errors import SettingError
    from lfm_runtime.formats.files import check_output

    from lfm_audit.report.source import is_report

    if len(options.files) > 1:
        raise SettingError(f"{options.files[0]} is of lfm-edge caption; give no other file with it")
    if output.suffix != ".html":
        raise SettingError(f"{output}: a page of images is .html")
    check_output(output, "lfm-edge report", is_report, force=options.force)
    (page,) = entry_points(group="lfm_edge.reports", name="jsonl")
    return _written(output, page.load()(options.files[0]))


def _written(output: Path, text: str) -> int:
    from lfm_runtime.formats.files import write_whole

    from lfm_audit.report.source import sealed

    whole = sealed(text)
    write_whole(output, whole)
    print(f"written: {output} ({len(whole.encode()) / 1e3:,.0f} kB)")
    return 0
