"""`lfm-edge report`: one page from one or several audits, or from a tuning."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Make a page of audits (several are shown side by side, the first is what the others are compared with), "
        "or of what lfm-edge tune "
        "measured."
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE.json", help="written by lfm-edge audit or lfm-edge tune"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=".html (opens offline) or .md; default: beside the first, .html",
    )


def run(options: argparse.Namespace) -> int:
    """Write a page of the audits, or of the tuning, as .html or .md; return 0."""
    from lfm_runtime.errors import SettingError
    from lfm_runtime.formats.files import write_whole

    from lfm_audit.report.markdown import audit_markdown, tuning_markdown
    from lfm_audit.report.page import audit_page, tuning_page
    from lfm_audit.report.source import named_audits, read_tuning

    output = options.output or options.files[0].with_suffix(".html")
    if output.suffix not in (".html", ".md"):
        raise SettingError(f"{output}: a report is .html or .md")
    if not output.absolute().parent.is_dir():
        raise SettingError(f"{output.absolute().parent} is not a folder; make it, or write elsewhere")
    as_page = output.suffix == ".html"
    tuning = read_tuning(options.files[0])
    if tuning is not None:
        if len(options.files) > 1:
            raise SettingError(f"{options.files[0]} is a tuning: it has a page of its own; name it alone")
        text = tuning_page(tuning) if as_page else tuning_markdown(tuning)
    else:
        audits = named_audits(options.files)
        text = audit_page(audits) if as_page else audit_markdown(audits)
    write_whole(output, text)
    print(f"written: {output} ({len(text.encode()) / 1e3:,.0f} kB)")
    return 0
