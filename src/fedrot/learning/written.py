"""Examples as files that data.source files reads back: what a client has, in a folder of its own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedrot.core.errors import DataError
from fedrot.core.files import write_atomic
from fedrot.learning.data import Dataset, Rows
from fedrot.learning.partition import Partition


def write_clients(dataset: Dataset, partition: Partition, folder: Path) -> list[Path]:
    """A folder for each client with SPLIT.jsonl, its examples of each split in their order; the folders.

    Raises `DataError` where a client has none of a split, or its name is none for a folder.
    """
    made = []
    for client in partition.clients:
        if "/" in client or client.startswith("."):
            raise DataError(f"the client {client!r} cannot be the name of a folder")
        for split, rows in dataset.splits.items():
            indices = partition.indices[split][client]
            if not len(indices):
                raise DataError(f"the client {client!r} has no examples of {split!r}; ask for fewer clients")
            lines = (
                json.dumps(row, ensure_ascii=False) for row in _objects(rows.take(indices.tolist()), dataset.labels)
            )
            write_atomic(folder / client / f"{split}.jsonl", ("\n".join(lines) + "\n").encode())
        made.append(folder / client)
    return made


def columns(dataset: Dataset) -> dict[str, Any]:
    """The keys of data by which such files are read."""
    files: dict[str, Any] = {
        split: f"{split}.jsonl" for split in ("train", "validation", "test") if split in dataset.splits
    }
    train = dataset.split("train")
    if train.turns is not None:
        return {"source": "files", **files, "messages": "messages"}
    pair = {"pair": "pair"} if train.pair is not None else {}
    return {"source": "files", **files, **pair, "labels": list(dataset.labels)}


def _objects(rows: Rows, labels: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for place, text in enumerate(rows.text):
        if rows.turns is not None:
            yield {"messages": [{"role": role, "content": content} for role, content in rows.turns[place]]}
            continue
        pair = {} if rows.pair is None else {"pair": rows.pair[place]}
        yield {"text": text, **pair, "label": labels[rows.label[place]]}
