"""Methods on TREC-6, SST-2 and RTE: rates searched alike on one seed, then more seeds with what was chosen.

Run: make study DATA=folder (with sst2/, rte/ and trec/ in it). The settings are the recipes study/NAME; a run by itself
is e.g. fedrot run study/trec --data.path TREC --method.name fedit --local.lr 6e-3 --seed 1. Every run that has finished
is a line of docs/results/study.csv and is not run again, so that the study can be stopped and goes on where it was.
"""

import argparse
import fcntl
import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from fedrot.core.errors import RunError
from fedrot.running.folder import RunFolder
from fedrot.running.recipe_file import read_recipe
from fedrot.running.run import run
from table import Quiet, append_csv, read_csv

CSV = Path(__file__).parents[1] / "docs" / "results" / "study.csv"
KEYS = ("setting", "method", "strength", "lr", "seed")
COLUMNS = (*KEYS, "validation", "test", "worst", "before", "sent", "floor", "precision", "cpu_seconds")

# Every method's grid; FedRot's strength is searched too, at the rate that was best with the first one.
RATES = (2e-3, 6e-3, 1.8e-2)
WIDER = 2  # rates by which the grid grows while its best is at an edge
STRENGTHS = (0.4, 0.2, 0.7, 1.0)
METHODS = ("fedit", "ffa", "rolora", "flexlora", "flexlora_regauge", "fedrot_svd", "fedrot", "fedrot auto")

# Seeds of each setting, the data below the folder that is given; settings are finished one after the other.
SEEDS = {"trec": 5, "sst2": 3, "trec-drift": 5, "rte": 3}


@dataclass(frozen=True)
class Task:
    """One run of the study."""

    setting: str
    method: str
    strength: str  # '' for methods without one
    lr: float
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """What its line in the file begins with."""
        return (self.setting, self.method, self.strength, f"{self.lr:g}", str(self.seed))


def recipe_flags(task: Task, data: Path) -> list[str]:
    """What the run's recipe is told; `data` holds sst2/, rte/ and trec/."""
    method = ["--method.name", task.method.split()[0]]
    if task.strength:
        method += ["--method.strength", task.strength]
    folder = data / task.setting.removesuffix("-drift")
    return [*method, "--local.lr", f"{task.lr:g}", "--seed", str(task.seed), "--data.path", str(folder)]


def done_before() -> dict[tuple[str, ...], dict[str, str]]:
    """The lines of the file, by key."""
    return {tuple(row[key] for key in KEYS): row for row in (read_csv(CSV) if CSV.exists() else ())}


def play(task: Task, data: Path) -> dict[str, str]:
    """Run it; the line of the file."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            recipe = read_recipe(Path("study") / task.setting, recipe_flags(task, data))
            made = run(recipe, Path(folder) / "run", Quiet())
            found = _numbers(made)
        except RunError:  # diverged: no usable uploads
            found = dict.fromkeys(COLUMNS[5:-1], "nan")
    return dict(zip(KEYS, task.key, strict=True)) | found | {"cpu_seconds": f"{time.process_time() - began:.1f}"}


def _numbers(folder: RunFolder) -> dict[str, str]:
    result, metrics = folder.read_json("result.json"), folder.metrics()

    def late(key: str) -> str:
        values = [record["aggregation"][key] for record in metrics if key in record.get("aggregation", {})]
        return f"{mean(values[len(values) // 2 :]):.6g}" if values else "nan"

    scores = {"validation": result["evaluation"]["accuracy"], "test": result["final"]["accuracy"]}
    errors = {key: late(f"{key}_relative") for key in ("before", "sent", "floor")}
    numbers = {k: f"{v:.6g}" for k, v in (scores | {"worst": result["final"]["worst"]}).items()}
    return numbers | errors | {"precision": folder.recipe().local.precision}


def best(rows: Mapping[tuple[str, ...], Mapping[str, str]], tasks: Sequence[Task]) -> Task | None:
    """The task with the best validation accuracy, the smaller rate where equal; None until all have run."""
    if not all(task.key in rows for task in tasks):
        return None
    return max(tasks, key=lambda task: (_score(rows[task.key]), -task.lr))


def _score(row: Mapping[str, str]) -> float:
    value = float(row["validation"])
    return value if value == value else -1.0


def search(setting: str, method: str, rows: Mapping[tuple[str, ...], Mapping[str, str]]) -> list[Task]:
    """The runs of the search that are known so far: the grid of rates, wider by a step where the best is at its edge,
    then, for fedrot, of strengths.
    """
    first = {"fedrot": f"{STRENGTHS[0]:g}", "fedrot auto": "auto"}.get(method, "")
    tasks = [Task(setting, method, first, lr, 0) for lr in RATES]
    chosen = best(rows, tasks)
    while chosen is not None and len(tasks) < len(RATES) + WIDER:
        rates = [task.lr for task in tasks]
        if chosen.lr not in (min(rates), max(rates)):
            break
        further = float(f"{3 * chosen.lr if chosen.lr == max(rates) else chosen.lr / 3:.2g}")
        tasks.append(Task(setting, method, first, further, 0))
        chosen = best(rows, tasks)
    if method == "fedrot" and chosen is not None:
        tasks += [Task(setting, method, f"{strength:g}", chosen.lr, 0) for strength in STRENGTHS[1:]]
    return tasks


def plan(rows: Mapping[tuple[str, ...], Mapping[str, str]]) -> Iterator[Task]:
    """All runs that are known so far, setting after setting: every search, then the other seeds of what was chosen."""
    for setting, seeds in SEEDS.items():
        for method in METHODS:
            yield from search(setting, method, rows)
        for seed, method in itertools.product(range(1, seeds), METHODS):
            chosen = best(rows, search(setting, method, rows))
            if chosen is not None:
                yield Task(setting, method, chosen.strength, chosen.lr, seed)


def main() -> None:
    """Run what is left; several processes may share the work."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/, rte/ and trec/")
    parser.add_argument("--minutes", type=float, default=720.0, help="begin no run after this long")
    call = parser.parse_args()
    until = time.monotonic() + 60 * call.minutes
    while time.monotonic() < until:
        task = _take()
        if task is None:
            return
        line = play(task, call.data)
        print(", ".join(f"{k} {v}" for k, v in line.items()), flush=True)
        append_csv(CSV, COLUMNS, line)


# Runs that a process of this study is working on, beside the file, so that no two do the same.
_CLAIMS: dict[tuple[str, ...], int] = {}


def _take() -> Task | None:
    """The next run that nobody works on, claimed for this process; None when all are done or taken."""
    claims = Path(tempfile.gettempdir()) / f"fedrot-study-{os.getuid()}"
    claims.mkdir(exist_ok=True)
    rows = done_before()
    for task in plan(rows):
        name = claims / "_".join(task.key)
        if task.key in rows:
            continue
        handle = os.open(name, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            continue
        if task.key in done_before():
            os.close(handle)
            continue
        _CLAIMS[task.key] = handle  # held until this process ends
        return task
    return None


if __name__ == "__main__":
    main()
