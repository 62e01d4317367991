"""What the documents keep of a comparison: its tables, and every run's losses and answers.

Run: .venv/bin/python benchmarks/gather.py runs/compare-gsm8k docs/results/gsm8k
"""

import csv
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedrot.running.folder import RunFolder

ROUNDS = ("method", "seed", "round", "train_loss", "validation_loss")
ANSWERS = ("method", "seed", "problems", "exact_match", "low", "high", "unparsed", "test_loss")


def gather(comparison: Path, out: Path) -> None:
    """Copy the tables and write rounds.csv and answers.csv."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("runs.csv", "table.csv", "table.md"):
        shutil.copyfile(comparison / name, out / name)
    runs = [RunFolder(path.parent) for path in sorted(comparison.glob("*/*/result.json"))]
    write(out / "rounds.csv", ROUNDS, (line for run in runs for line in losses(run)))
    write(out / "answers.csv", ANSWERS, (answers(run) for run in runs))


def losses(run: RunFolder) -> Iterable[list[Any]]:
    """A line a round; the validation loss where it was taken."""
    recipe = run.recipe()
    for record in run.metrics():
        scored = record.get("evaluation", {}).get("loss", "")
        yield [recipe.method.name, recipe.seed, record["round"], record["train"]["loss"], scored]


def answers(run: RunFolder) -> list[Any]:
    """What came of the problems."""
    recipe, result = run.recipe(), run.read_json("result.json")
    found = result["answers"]
    numbers = [found[key] for key in ("examples", "exact_match", "low", "high", "unparsed")]
    return [recipe.method.name, recipe.seed, *numbers, result["final"]["loss"]]


def write(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """A CSV file, numbers to six digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in line] for line in lines)


if __name__ == "__main__":
    gather(Path(sys.argv[1]), Path(sys.argv[2]))
