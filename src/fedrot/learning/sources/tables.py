"""CSV, TSV, JSONL and parquet files as columns of values."""

import csv
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedrot.core.errors import DataError, choices

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
Table = dict[str, list[Any]]


def read_table(path: Path, columns: Sequence[str] | None = None, skip_broken: bool = False) -> Table:
    """The columns of a table file by name. `columns` names those of a CSV or TSV file without a header line.

    TSV is read without quoting, as GLUE's files are written. With `skip_broken`, lines of CSV and TSV files that have
    too many or too few fields are left out and counted in the log. Raises `DataError` naming the file and line.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {choices(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            return _parquet(path)
        with path.open(encoding="utf-8-sig", newline="") as file:  # a byte order mark is no part of a name
            if path.suffix == ".jsonl":
                return _jsonl(path, file)
            return _separated(path, file, columns, skip_broken)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: cannot be read ({problem})") from None


def column(table: Table, name: str, path: Path, key: str) -> list[Any]:
    """One column; `DataError` naming the file, the recipe key and the columns there are."""
    if name not in table:
        raise DataError(f"{path}: there is no column {name!r} ({key}); it has {choices(table)}")
    return table[name]


def text_column(table: Table, name: str, path: Path, key: str, empty: bool = True) -> list[str]:
    """One column of texts; a missing value, or an empty one unless it may be, is an error that names its row."""
    values = column(table, name, path, key)
    for row, value in enumerate(values, start=1):
        if value is None or (value == "" and not empty):
            raise DataError(f"{path}: row {row} has no {name!r} ({key})")
    return [text_of(value, f"{path}: row {row}: {name!r} ({key})") for row, value in enumerate(values, start=1)]


def text_of(value: Any, where: str) -> str:
    """A value as it would stand in a text file. Raises `DataError` that begins with `where` for a list, an object,
    bytes or NaN, and for half of a surrogate pair ("\\ud83d" alone in a JSONL file), which no text in UTF-8 holds.
    """
    if isinstance(value, (list, dict, bytes)):
        raise DataError(f"{where} is of type {type(value).__name__}, not a text")
    if isinstance(value, float) and math.isnan(value):
        raise DataError(f"{where} is NaN, not a text")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise DataError(f"{where} holds {text[problem.start]!a}, half of a character; mend the text") from None
    return text


def split_table(folder: Path, names: Sequence[str], skip_broken: bool = False) -> tuple[Table, Path] | None:
    """The table of a split and its (first) file, the first that is there of these names: train.tsv and the like, or the
    hub's train-00000-of-00002.parquet with all that belong to it.

    Raises `DataError` where one of those is missing.
    """
    single = (folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES)
    if path := next((path for path in single if path.is_file()), None):
        return read_table(path, skip_broken=skip_broken), path
    digits = "[0-9]" * 5
    found = (sorted(folder.glob(f"{name}-{digits}-of-{digits}.parquet")) for name in names)
    if not (shards := next(filter(None, found), [])):
        return None
    first, count = shards[0], int(shards[0].stem[-5:])
    if len(shards) != count:
        raise DataError(f"{folder}: there are {len(shards)} files like {first.name}, it is one of {count}")
    tables = [(read_table(shard), shard) for shard in shards]
    joined = {c: [v for table, shard in tables for v in column(table, c, shard, first.name)] for c in tables[0][0]}
    return joined, first


def _parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table: Table = pyarrow.parquet.read_table(path).to_pydict()
    except pyarrow.ArrowException as problem:
        raise DataError(f"{path}: not a readable parquet file ({' '.join(str(problem).split())})") from None
    return table


def json_objects(path: Path, file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The object of every line of a JSONL file but the empty ones, with its number; `DataError` naming the line."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as problem:
            raise DataError(f"{path}: line {number} is not valid JSON ({problem.msg})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} holds a {type(row).__name__}, not an object")
        yield number, row


def _jsonl(path: Path, file: Iterable[str]) -> Table:
    rows = [row for _, row in json_objects(path, file)]
    if not rows:
        raise DataError(f"{path}: the file is empty")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _separated(path: Path, file: Any, columns: Sequence[str] | None, skip_broken: bool) -> Table:
    if path.suffix == ".tsv":
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(file, strict=True)
    try:
        names = list(columns) if columns else next(reader, [])
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"{path}: the column {twice[0]!r} is there twice")
        values: list[list[str]] = []
        skipped = 0
        for row in reader:
            if not row:
                continue
            if len(row) != len(names) and skip_broken:
                skipped += 1
                continue
            if len(row) != len(names):
                raise DataError(f"{path}: line {reader.line_num} has {len(row)} fields, expected {len(names)}")
            values.append(row)
    except csv.Error as problem:
        raise DataError(f"{path}: line {reader.line_num}: {problem}") from None
    if not names:
        raise DataError(f"{path}: the file is empty")
    if skipped:
        logging.getLogger("fedrot").warning("%s: left out %d lines with too many or too few fields", path, skipped)
    return {name: [row[i] for row in values] for i, name in enumerate(names)}
