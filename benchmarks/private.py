"""What privacy of examples costs in accuracy: the vader recipe without it, and with it by SGD and by AdamW.

Run: python benchmarks/private.py (an hour or two of one core). Every optimizer's rate is searched alike, by validation
accuracy on seed 0, then come the other seeds, unless no rate learnt anything. Each run is a line of
docs/results/private.csv and is not run again; the table of docs/privacy.md is held to that file.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev

from fedrot.running.recipe_file import read_recipe
from fedrot.running.run import run
from table import Quiet, append_csv, markdown, read_csv

CSV = Path(__file__).parents[1] / "docs" / "results" / "private.csv"
COLUMNS = ("line", "lr", "seed", "validation", "test", "epsilon", "precision", "cpu_seconds")
SEEDS = 3
LEARNT = 0.6  # validation accuracy; the majority class has .543
PRIVATE = (
    "--local.batch 64 --local.clip=null --privacy.mode example --privacy.clip 1 --privacy.noise 1 --privacy.delta 1e-5"
)
# The flags of a line, and the rates that are searched.
LINES: dict[str, tuple[str, tuple[float, ...]]] = {
    "no privacy, AdamW, batch 16": ("", (2e-3,)),
    "SGD, batch 64": (f"--local.optimizer sgd {PRIVATE}", (0.2, 0.7, 2.0)),
    "AdamW, batch 64": (f"--local.optimizer adamw {PRIVATE}", (2e-4, 6e-4, 2e-3)),
}
Rows = Sequence[dict[str, str]]


def read() -> Rows:
    """The runs that have been made."""
    return read_csv(CSV) if CSV.exists() else []


def found(rows: Rows, line: str, lr: float, seed: int) -> dict[str, str] | None:
    """The run's row, if it has been made."""
    wanted = (line, f"{lr:g}", str(seed))
    return next((row for row in rows if (row["line"], row["lr"], row["seed"]) == wanted), None)


def chosen(rows: Rows, line: str) -> float | None:
    """The rate with the best validation accuracy on seed 0; None until all have run."""
    tried = {lr: found(rows, line, lr, 0) for lr in LINES[line][1]}
    scores = {lr: float(row["validation"]) for lr, row in tried.items() if row is not None}
    return max(scores, key=lambda lr: scores[lr]) if len(scores) == len(tried) else None


def learnt(rows: Rows, line: str) -> bool:
    """Whether any of its rates did better than a guess."""
    tried = [found(rows, line, lr, 0) for lr in LINES[line][1]]
    return any(row is not None and float(row["validation"]) > LEARNT for row in tried)


def plan(lines: Sequence[str]) -> Iterator[tuple[str, float, int]]:
    """The runs that are left, in order; what comes after a search depends on its runs."""
    for line in lines:
        for lr in LINES[line][1]:
            yield line, lr, 0
        rows = read()
        best = chosen(rows, line)
        assert best is not None
        for seed in range(1, SEEDS if learnt(rows, line) else 1):
            yield line, best, seed


def play(line: str, lr: float, seed: int) -> dict[str, str]:
    """Run it; the row."""
    flags = f"--federation.weighting uniform --seed {seed} {LINES[line][0]} --local.lr {lr:g}"
    once = "--compute.workers 1 --compute.threads 1 --diagnostics.every 0 --diagnostics.rho false --evaluation.every 8"
    recipe = read_recipe(Path("vader"), [*flags.split(), *once.split(), "--local.precision", "auto"])
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        made = run(recipe, Path(folder) / "run", Quiet())
        result, precision = made.read_json("result.json"), made.recipe().local.precision
    spent = result.get("privacy", {}).get("epsilon")
    numbers = (result["evaluation"]["accuracy"], result["final"]["accuracy"])
    cells = (f"{lr:g}", str(seed), *(f"{n:.4f}" for n in numbers), "" if spent is None else f"{spent:.2f}", precision)
    return dict(zip(COLUMNS, (line, *cells, f"{time.process_time() - began:.0f}"), strict=True))


def table(rows: Rows) -> str:
    """The table of docs/privacy.md."""
    lines = [["", "epsilon", "rates: validation accuracy on seed 0", "test accuracy", "seeds"]]
    for line, (_, rates) in LINES.items():
        best = chosen(rows, line)
        assert best is not None
        searched = []
        for lr in rates:
            row = found(rows, line, lr, 0)
            assert row is not None
            score = f"{float(row['validation']):.3f}"
            searched.append(f"{lr:g}: **{score}**" if lr == best and learnt(rows, line) else f"{lr:g}: {score}")
        mine = [row for row in rows if (row["line"], row["lr"]) == (line, f"{best:g}")]
        scores = [float(row["test"]) for row in mine]
        test = f"{mean(scores):.3f}" + (f" ± {stdev(scores):.3f}" if len(scores) > 1 else "")
        lines.append([line, mine[0]["epsilon"] or "none", ", ".join(searched), test, str(len(scores))])
    return markdown(lines)


def main() -> None:
    """Run what is left, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", default=";".join(LINES), help="run these alone, split by ;")
    call = parser.parse_args()
    for line, lr, seed in plan(call.lines.split(";")):
        if found(read(), line, lr, seed) is None:
            row = play(line, lr, seed)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            append_csv(CSV, COLUMNS, row)
    if all(chosen(read(), line) is not None for line in LINES):
        print(table(read()))


if __name__ == "__main__":
    main()
