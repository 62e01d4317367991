"""GLUE tasks by name, from the hub or from a local folder of the task's files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrot.core.errors import DataError, choices
from fedrot.learning.data import Dataset, Rows, hold_out
from fedrot.learning.settings import DataSettings
from fedrot.learning.sources import hub
from fedrot.learning.sources.tables import Table, split_table, text_column

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """A task's columns: the names that its published files use, the hub's first."""

    labels: tuple[str, ...]  # in the order of the hub's label numbers
    text: tuple[str, ...]
    pair: tuple[str, ...] = ()
    label: tuple[str, ...] = ("label",)
    broken_lines: bool = False  # the published file has lines that a line end within a text broke in two


_ENTAILED = ("entailment", "not_entailment")
TASKS = {
    "sst2": Task(labels=("negative", "positive"), text=("sentence",)),
    "qnli": Task(labels=_ENTAILED, text=("question",), pair=("sentence",)),
    "qqp": Task(
        labels=("not_duplicate", "duplicate"),
        text=("question1",),
        pair=("question2",),
        label=("label", "is_duplicate"),
        broken_lines=True,
    ),
    "rte": Task(labels=_ENTAILED, text=("sentence1",), pair=("sentence2",)),
    "mnli": Task(
        labels=("entailment", "neutral", "contradiction"),
        text=("premise", "sentence1"),
        pair=("hypothesis", "sentence2"),
        label=("label", "gold_label"),
    ),
}
# Our split -> the file or hub split names that hold it. GLUE's own test splits carry no labels, so its validation
# splits are what is reported; what settings are chosen by is held out from the training examples.
_SPLITS = {
    "train": ("train",),
    "test": ("validation", "validation_matched", "dev", "dev_matched"),
    "test_mismatched": ("validation_mismatched", "dev_mismatched"),
}


def labels(settings: DataSettings) -> tuple[str, ...]:
    """The task's labels; none where no task is named."""
    return TASKS[settings.name].labels if settings.name else ()


def read(settings: DataSettings) -> Dataset:
    """The task's splits: train, and validation held out of it by `data.holdout`; test, which is GLUE's validation split
    (MNLI: matched, and test_mismatched beside it).
    """
    if settings.name is None:
        raise DataError(f"data.name: give the GLUE task, {choices(TASKS)}")
    task = TASKS[settings.name]
    if settings.path:
        tables = _local(Path(settings.path), task)
    else:
        tables = hub_tables(HUB, settings.name)
    splits = {split: _rows(table, task, source) for split, (table, source) in tables.items()}
    for split in ("train", "test"):
        if split not in splits:
            raise DataError(f"{settings.path or HUB}: there is no {_SPLITS[split][0]} split of {settings.name}")
    train, validation = hold_out(splits.pop("train"), settings.holdout)
    return Dataset({"train": train, "validation": validation, **splits}, task.labels)


def _local(folder: Path, task: Task) -> dict[str, tuple[Table, Path]]:
    """The task's files: train.tsv, dev.parquet and the like, or the hub's train-00000-of-00001.parquet."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (data.path)")
    found = {split: split_table(folder, names, task.broken_lines) for split, names in _SPLITS.items()}
    return {split: table for split, table in found.items() if table is not None}


def hub_tables(repository: str, name: str) -> dict[str, tuple[Table, Path]]:
    """The task's splits through `datasets`; `repository` may be a local copy of the hub's repository."""
    loaded = hub.load(repository, name, "a folder with the task's files")
    where = Path(repository) / name
    tables: dict[str, tuple[Table, Path]] = {}
    for split, names in _SPLITS.items():
        present = next((n for n in names if n in loaded), None)
        if present:
            tables[split] = {c: list(loaded[present][c]) for c in loaded[present].column_names}, where / present
    return tables


def _rows(table: Table, task: Task, path: Path) -> Rows:
    def pick(names: tuple[str, ...]) -> str:
        return next((name for name in names if name in table), names[0])

    values = text_column(table, pick(task.label), path, "the label")
    keep = [i for i, value in enumerate(values) if value != "-"]  # MNLI: the annotators did not agree
    return Rows(
        text=text_column(table, pick(task.text), path, "the text"),
        label=[_label(value, row, task, path) for row, value in enumerate(values, start=1)],
        pair=text_column(table, pick(task.pair), path, "the second text") if task.pair else None,
    ).take(keep)


def _label(value: Any, row: int, task: Task, path: Path) -> int:
    if value in task.labels:
        return task.labels.index(value)
    if value.isdecimal() and int(value) < len(task.labels):
        return int(value)
    if value == "-":
        return 0
    raise DataError(f"{path}: row {row} has label {value!r}; expected {choices(task.labels)}")
