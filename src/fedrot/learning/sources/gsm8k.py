"""GSM8K: school mathematics with worked answers that end in "#### number" (Cobbe et al., arXiv 2110.14168)."""

from pathlib import Path

from fedrot.core.errors import DataError
from fedrot.learning.data import ASSISTANT, Dataset, Rows, conversations, hold_out
from fedrot.learning.settings import DataSettings
from fedrot.learning.sources import hub
from fedrot.learning.sources.tables import Table, split_table, text_column

HUB = "openai/gsm8k"


def read(settings: DataSettings) -> Dataset:
    """train, and validation held out of it by `data.holdout`; test. `data.path` is a folder with train.jsonl and
    test.jsonl (or parquet files); null: the hub.
    """
    tables = _local(Path(settings.path)) if settings.path else _hub()
    splits = {split: _rows(table, path) for split, (table, path) in tables.items()}
    train, validation = hold_out(splits.pop("train"), settings.holdout)
    return Dataset({"train": train, "validation": validation, **splits})


def _local(folder: Path) -> dict[str, tuple[Table, Path]]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (data.path)")
    found = {}
    for split in ("train", "test"):
        table = split_table(folder, (split,))
        if table is None:
            raise DataError(f"{folder}: there is no {split}.jsonl of GSM8K (data.path)")
        found[split] = table
    return found


def _hub() -> dict[str, tuple[Table, Path]]:
    loaded = hub.load(HUB, "main", "a folder with train.jsonl and test.jsonl")
    return {s: ({c: list(loaded[s][c]) for c in loaded[s].column_names}, Path(HUB) / s) for s in ("train", "test")}


def _rows(table: Table, path: Path) -> Rows:
    questions = text_column(table, "question", path, "the question", empty=False)
    answers = text_column(table, "answer", path, "the answer", empty=False)
    pairs = zip(questions, answers, strict=True)
    return conversations([(("user", f"Question: {q}\nAnswer:"), (ASSISTANT, f" {a}")) for q, a in pairs])
