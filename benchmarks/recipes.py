"""What is measured: MiniLM on SST-2, or on the movie reviews of the VADER corpus where SST-2's folder is not given."""

import csv
import os
from pathlib import Path
from typing import Any

from fedrot.learning.settings import DataSettings
from fedrot.learning.sources.read import read_dataset
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe

BUILD = Path(__file__).parents[1] / "build"


def make_recipe(
    data: str | None,
    clients: int,
    steps: int,
    rank: int = 4,
    batch: int = 16,
    lr: float = 2e-3,
    limit: int = 872,
    compute: dict[str, Any] | None = None,
) -> Recipe:
    """A recipe of this size on one thread, unless `compute` says otherwise."""
    return parse_recipe(
        {
            "compute": {"threads": 1, "workers": 1, **(compute or {})},
            "model": {"path": "fetch:minilm"},
            "lora": {"rank": rank},
            "data": {"source": "glue", "name": "sst2", "path": data} if data else movies(),
            "partition": {"kind": "iid", "clients": clients},
            "local": {"steps": steps, "batch": batch, "lr": lr},
            "diagnostics": {"every": 1},
            "evaluation": {"every": 1000, "limit": limit},
        }
    )


def movies() -> dict[str, Any]:
    """Settings of a file source that holds the corpus's movie reviews, written below build/ when first asked for."""
    folder = BUILD / "movies"
    if not (folder / "validation.csv").exists():
        folder.mkdir(parents=True, exist_ok=True)
        dataset = read_dataset(DataSettings(source="vader"), seed=0)
        for split in ("train", "validation"):
            rows = dataset.split(split)
            partial = folder / f".{split}.{os.getpid()}.csv"
            with partial.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["text", "label"])
                labelled = zip(rows.text, rows.label, rows.group or (), strict=True)
                writer.writerows([text, dataset.labels[label]] for text, label, group in labelled if group == "movies")
            partial.replace(folder / f"{split}.csv")
    return {"source": "files", "path": str(folder), "train": "train.csv", "validation": "validation.csv"}
