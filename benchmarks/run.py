"""Speed and memory as ratios measured in one run. Run: make bench. Writes build/bench.json.

Everything that is compared is run in turns in this one process (memory: in processes of its own), and medians are
taken: absolute times on a shared machine mean nothing. CPU time on one thread is what is compared.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from aggregation import flexlora_against_dense
from bare_loop import BareLoop
from fedrot.core.methods.base import ServerState
from fedrot.running.checkpoint import Checkpoint, save_checkpoint
from fedrot.running.prepare import Prepared, prepare
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.rounds import play_round
from fedrot.running.simulation import Simulation

BUILD = Path(__file__).parents[1] / "build"
PHASES = ("train", "align", "check", "aggregate", "diagnose")


@dataclass(frozen=True)
class Result:
    """A line of the table. Without a goal it is a figure for information."""

    name: str
    figure: float
    unit: str = ""
    goal: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the figure is at most the goal."""
        return self.goal is None or self.figure <= self.goal


class Quiet:
    """A watcher that shows nothing."""

    def round_started(self, *_: object) -> None:
        """Nothing."""

    client_done = evaluating = round_finished = round_started


def make_recipe(data: str | None, clients: int, steps: int, rank: int = 4) -> Recipe:
    """MiniLM on SST-2, or on the VADER corpus where SST-2's folder is not given."""
    source: dict[str, Any] = {"source": "glue", "name": "sst2", "path": data} if data else {"source": "vader"}
    return parse_recipe(
        {
            "compute": {"threads": 1},
            "model": {"path": "fetch:minilm"},
            "lora": {"rank": rank},
            "data": source,
            "partition": {"kind": "iid", "clients": clients},
            "local": {"steps": steps, "batch": 16},
            "diagnostics": {"every": 1},
            "evaluation": {"every": 1000, "limit": 872},
        }
    )


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def round_against_bare_loop(recipe: Recipe, ready: Prepared, repeats: int) -> tuple[list[Result], dict[str, float]]:
    """A simulated round with its checkpoint against a bare loop over the same batches."""
    engine = Simulation(ready)
    start = recipe.method.start(ready.model.read())
    # Round 1, the first that rotates, from factors that a round has moved.
    state, _ = play_round(recipe, engine, start, Quiet())
    bare = BareLoop(recipe, ready, state.broadcast)
    records: list[dict[str, Any]] = []
    where = BUILD / "bench-checkpoints"

    def ours() -> None:
        new, record = play_round(recipe, engine, state, Quiet())
        began = time.perf_counter()
        save_checkpoint(where, Checkpoint(new), keep=1)
        record["seconds"]["checkpoint"] = time.perf_counter() - began
        records.append(record)

    def evaluation() -> None:
        engine.evaluate(state.broadcast, "validation", recipe.evaluation.limit)

    ours()
    bare.round()
    pairs = [(cpu(ours), cpu(bare.round)) for _ in range(repeats)]
    scoring = median(cpu(evaluation) for _ in range(max(2, repeats // 2)))
    mine = median(p[0] for p in pairs)
    seconds = {phase: median(r["seconds"].get(phase, 0.0) for r in records) for phase in (*PHASES, "checkpoint")}
    seconds["evaluate"] = scoring
    overhead = sum(v for k, v in seconds.items() if k not in ("train", "evaluate")) / len(engine.clients)
    results = [
        Result("round / bare PyTorch + PEFT loop, CPU time", median(a / b for a, b in pairs), "x", 1.1),
        Result("beyond training and evaluation, a client", 1000 * overhead, "ms", 20.0),
    ]
    whole = sum(seconds.values())
    results += [Result(f"share of a round with evaluation: {k}", 100 * v / whole, "%") for k, v in seconds.items()]
    return results, {"cpu_seconds_round": mine, **seconds}


def memory(data: str | None) -> list[Result]:
    """Peak memory of a round with 40 clients against one with 4: the uploads are folded as they come."""
    peaks = [_peak(data, clients) for clients in (4, 40)]
    return [
        Result("peak memory, 40 clients / 4 clients", peaks[1] / peaks[0], "x", 1.05),
        Result("peak memory, 4 clients", peaks[0] / 1024, "MB"),
    ]


def _peak(data: str | None, clients: int) -> int:
    words = [sys.executable, __file__, "--peak", str(clients), *(["--data", data] if data else [])]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak(data: str | None, clients: int) -> None:
    """Run one round in this process and print its peak memory in KiB."""
    # At rank 64 forty uploads that were held would be a tenth of the whole.
    recipe = make_recipe(data, clients, steps=2, rank=64)
    ready = prepare(recipe)
    engine = Simulation(ready)
    state: ServerState = recipe.method.start(ready.model.read())
    play_round(recipe, engine, state, Quiet())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def import_time(repeats: int) -> Result:
    """`import fedrot` in a fresh interpreter, less the interpreter's own start."""
    times = {"pass": [], "import fedrot": []}  # type: dict[str, list[float]]
    for _ in range(repeats):
        for code, found in times.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            found.append(time.perf_counter() - began)
    return Result("import fedrot", median(times["import fedrot"]) - median(times["pass"]), "s", 1.0)


def flexlora(width: int) -> list[Result]:
    """FlexLoRA's server at d = `width`, r = 16, 10 clients, against the dense way."""
    share, distance = flexlora_against_dense(width=width)
    return [
        Result(f"flexlora's aggregation / dense product and SVD, d = {width}", 100 * share, "%", 2.0),
        Result("the same: distance of the results, relative", distance, "", 1e-4),
    ]


def machine() -> dict[str, Any]:
    """What this was measured on."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "compute": {"threads": 1},
    }


def show(results: list[Result], about: dict[str, Any]) -> None:
    """The table."""
    print("  ".join(f"{key}: {value}" for key, value in about.items()))
    width = max(len(r.name) for r in results)
    print(f"{'name':<{width}}  {'figure':>12}  {'goal':>12}  holds")
    for r in results:
        goal = "" if r.goal is None else f"<= {r.goal:g} {r.unit}"
        print(f"{r.name:<{width}}  {r.figure:>9.3f} {r.unit:<2}  {goal:>12}  {'' if r.goal is None else r.holds}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Speed and memory as ratios measured in one run.")
    parser.add_argument("--data", help="a folder with SST-2's train.tsv and dev.tsv (default: the VADER corpus)")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=4096, help="d of FlexLoRA's line")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    call = parser.parse_args()
    torch.set_num_threads(1)
    if call.peak:
        return peak(call.data, call.peak)
    BUILD.mkdir(exist_ok=True)
    recipe = make_recipe(call.data, call.clients, call.steps)
    ready = prepare(recipe)
    rounds, seconds = round_against_bare_loop(recipe, ready, call.repeats)
    results = [*rounds, *flexlora(call.width), *memory(call.data), import_time(call.repeats)]
    about = {**machine(), "data": call.data or "VADER corpus", "clients": call.clients, "steps": call.steps}
    show(results, about)
    written = {
        "results": [
            {"name": r.name, "figure": r.figure, "goal": r.goal, "holds": r.holds}
            for r in results
            if r.goal is not None
        ],
        "figures": [{"name": r.name, "figure": r.figure, "unit": r.unit} for r in results if r.goal is None],
        "seconds": seconds,
        "machine": about,
    }
    (BUILD / "bench.json").write_text(json.dumps(written, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
