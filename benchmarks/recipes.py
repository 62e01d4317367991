"""What is measured: MiniLM on SST-2, or on the movie reviews of the VADER corpus where SST-2's folder is not given."""

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

from fedrot.learning.fetch import fetched
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
            "evaluation": {"split": "test" if data else "validation", "every": 1000, "limit": limit},
        }
    )


def language_recipe(data: str | None, clients: int = 3, steps: int = 3, limit: int = 8, tokens: int = 650) -> Recipe:
    """SmolLM2 on GSM8K in the folder `data`, a problem a step; HumanEval's problems with their solutions without it."""
    source: dict[str, Any] = {"source": "gsm8k", "path": data} if data else problems()
    return parse_recipe(
        {
            "compute": {"threads": 1, "workers": 1},
            "model": {"path": "fetch:smollm2"},
            "lora": {"rank": 8, "alpha": 16},
            "data": {**source, "max_length": tokens},
            "partition": {"kind": "iid", "clients": clients},
            "local": {"steps": steps, "batch": 1, "lr": 1e-3},
            "evaluation": {"every": 1000, "limit": limit, "batch": 8},
        }
    )


def problems() -> dict[str, Any]:
    """Settings of a file source that holds HumanEval's prompts and solutions, written below build/."""
    path = BUILD / "problems" / "train.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(fetched("humaneval") / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        rows = [{"text": one["prompt"], "response": one["canonical_solution"]} for one in lines]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"source": "files", "path": str(path.parent), "train": path.name, "response": "response"}


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
