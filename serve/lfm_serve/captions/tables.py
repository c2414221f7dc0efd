"""The records as a table: CSV, or Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lfm_runtime.errors import SettingError
from lfm_runtime.formats.files import check_writable, write_whole

_ALL = ("path", "text", "finish_reason", "error", "new_tokens", "sha256", "size")


def check_table(path: Path) -> None:
    """Raise SettingError for a table of another kind, EdgeError for a place that cannot be written."""
    if path.suffix not in (".csv", ".parquet"):
        raise SettingError(f"--table {path}: name a .csv or a .parquet")
    if path.suffix == ".parquet":
        try:
            import pyarrow as pa  # noqa: F401
        except ModuleNotFoundError as e:
            raise SettingError(f"--table {path} needs the Python package pyarrow; install it, or name a .csv") from e
    check_writable(path)


def write_table(path: Path, records: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> None:
    """Write a row for each record, in order of their paths: what it is about, its fields or its text, its error."""
    columns = [*(name for name in _ALL if name != "text" or not fields), *(f"fields.{name}" for name in fields)]
    rows = [
        {name: printable(value) for name, value in record.items()}
        | {f"fields.{name}": printable(value) for name, value in (record.get("fields") or {}).items()}
        for record in sorted(records, key=lambda record: str(record["path"]))
    ]
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(path, text.getvalue())
        return
    import pyarrow as pa
    from pyarrow import parquet

    whole = io.BytesIO()
    found = {name: pa.array([row.get(name) for row in rows]) for name in columns}
    # A column of nulls alone would be of no type, and tables of two runs could not be read as one.
    table = pa.table({name: a.cast(pa.string()) if pa.types.is_null(a.type) else a for name, a in found.items()})
    parquet.write_table(table, whole)
    write_whole(path, whole.getvalue())


def printable(value: Any) -> Any:
    """Texts without halves of characters, which names that are not UTF-8 and JSON's escapes have."""
    return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace") if isinstance(value, str) else value
