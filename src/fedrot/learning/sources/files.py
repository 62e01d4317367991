"""Local table files with named columns."""

import re
from pathlib import Path
from typing import Any

from fedrot.core.errors import DataError
from fedrot.learning.data import Dataset, Rows, hold_out
from fedrot.learning.settings import DataSettings
from fedrot.learning.sources.tables import column, read_table, text_column, text_of


def read(settings: DataSettings) -> Dataset:
    """The files `data.train`, `data.validation` and `data.test`; labels are those of `data.labels` or else of the
    training file.
    """
    if settings.train is None:
        raise DataError("data.train: give the file of training examples (source files)")
    names = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    base = Path(settings.path) if settings.path else Path()
    paths = {split: base / name for split, name in names.items() if name}
    raw = {split: _read_one(path, settings) for split, path in paths.items()}
    if not raw["train"][1]:
        raise DataError(f"{paths['train']}: holds no examples")
    labels = settings.labels or sorted(set(raw["train"][1]), key=_label_order)
    known = "data.labels does not name" if settings.labels else "the training examples do not have"
    splits = {split: _index(rows, found, labels, paths[split], known) for split, (rows, found) in raw.items()}
    if "validation" not in splits:
        splits["train"], splits["validation"] = hold_out(splits["train"], settings.holdout)
    return Dataset(splits, tuple(labels))


def _read_one(path: Path, settings: DataSettings) -> tuple[Rows, list[str]]:
    table = read_table(path, settings.columns)
    rows = Rows(
        text=text_column(table, settings.text, path, "data.text"),
        label=(),
        pair=text_column(table, settings.pair, path, "data.pair") if settings.pair else None,
        group=text_column(table, settings.group, path, "data.group", empty=False) if settings.group else None,
    )
    return rows, [
        _label_name(v, i, path, settings) for i, v in enumerate(column(table, settings.label, path, "data.label"))
    ]


def _label_name(value: Any, index: int, path: Path, settings: DataSettings) -> str:
    if value is None or value == "":
        raise DataError(f"{path}: row {index + 1} has no {settings.label!r} (data.label)")
    if isinstance(value, float) and not value.is_integer():
        raise DataError(f"{path}: row {index + 1} has label {value!r}; labels are whole numbers or names")
    if isinstance(value, (bool, float)):
        return str(int(value))
    return text_of(value, f"{path}: row {index + 1}: {settings.label!r} (data.label)")


def _label_order(name: str) -> tuple[int, int, str]:
    """Whole numbers by value, before names by alphabet."""
    return (0, int(name), name) if re.fullmatch(r"-?[0-9]+", name) else (1, 0, name)


def _index(rows: Rows, found: list[str], labels: list[str], path: Path, unknown: str) -> Rows:
    index = {name: i for i, name in enumerate(labels)}
    for row, name in enumerate(found, start=1):
        if name not in index:
            raise DataError(f"{path}: row {row} has label {name!r}, which {unknown}")
    return Rows(rows.text, [index[name] for name in found], rows.pair, rows.group)
