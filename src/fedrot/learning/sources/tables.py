"""CSV, TSV, JSONL and parquet files as columns of values."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedrot.core.errors import DataError, choices

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
Table = dict[str, list[Any]]


def read_table(path: Path, columns: Sequence[str] | None = None) -> Table:
    """The columns of a table file by name. `columns` names those of a CSV or TSV file without a header line.

    TSV is read without quoting, as GLUE's files are written. Raises `DataError` naming the file and line.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {choices(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            return _parquet(path)
        with path.open(encoding="utf-8", newline="") as file:
            return _jsonl(path, file) if path.suffix == ".jsonl" else _separated(path, file, columns)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: cannot be read ({problem})") from None


def column(table: Table, name: str, path: Path, key: str) -> list[Any]:
    """One column; `DataError` naming the file, the recipe key and the columns there are."""
    if name not in table:
        raise DataError(f"{path}: there is no column {name!r} ({key}); it has {choices(table)}")
    return table[name]


def text_column(table: Table, name: str, path: Path, key: str) -> list[str]:
    """One column of texts; a missing value is an error that names its row."""
    values = column(table, name, path, key)
    for row, value in enumerate(values, start=1):
        if value is None:
            raise DataError(f"{path}: row {row} has no {name!r} ({key})")
    return [str(value) for value in values]


def _parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table: Table = pyarrow.parquet.read_table(path).to_pydict()
    except pyarrow.ArrowException as problem:
        raise DataError(f"{path}: not a readable parquet file ({' '.join(str(problem).split())})") from None
    return table


def _jsonl(path: Path, file: Any) -> Table:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as problem:
            raise DataError(f"{path}: line {number} is not valid JSON ({problem.msg})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} holds a {type(row).__name__}, not an object")
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _separated(path: Path, file: Any, columns: Sequence[str] | None) -> Table:
    if path.suffix == ".tsv":
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(file, strict=True)
    try:
        names = list(columns) if columns else next(reader, [])
        values: list[list[str]] = []
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise DataError(f"{path}: line {reader.line_num} has {len(row)} fields, expected {len(names)}")
            values.append(row)
    except csv.Error as problem:
        raise DataError(f"{path}: line {reader.line_num}: {problem}") from None
    if not names:
        raise DataError(f"{path}: the file is empty")
    return {name: [row[i] for row in values] for i, name in enumerate(names)}
