"""Speed and memory as ratios measured in one run. Run: make bench. Writes build/bench.json.

Everything that is compared is run in turns in this one process (memory: in processes of its own), and medians are
taken: absolute times on a shared machine mean nothing. CPU time on one thread is what is compared; the wall time of
several workers stands beside it. docs/performance.md explains each line.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

import alignment
from aggregation import flexlora_against_dense
from fedrot.learning.capacity import even_width
from fedrot.running.prepare import Prepared, prepare
from fedrot.running.simulation import Simulation
from recipes import BUILD, language_recipe, make_recipe
from rounds import against_published, language_model, price_of_alignment, second_state, way
from scale import scale
from table import Result, machine, show
from throughput import throughput


def side_by_side(ready: Prepared, repeats: int) -> list[Result]:
    """Wall time of training on two cores: one worker of two threads against two workers of one."""
    state = second_state(ready)
    clients = len(ready.partition.clients)
    width = even_width(clients, ready.recipe.compute.stack or 1, workers=2)
    ways = {
        "one": (way(ready, workers=1), 1),
        "threads": (way(ready, workers=1), 2),
        "workers": (way(ready, workers=2, stack=width), 1),
    }
    engines = {name: (Simulation(made), threads) for name, (made, threads) in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(repeats + 1):
        for name, (engine, threads) in engines.items():
            torch.set_num_threads(threads)
            began = time.perf_counter()
            for _ in engine.train(state.broadcast, engine.clients):
                pass
            if turn:
                times[name].append(time.perf_counter() - began)
    torch.set_num_threads(1)
    both = {name: median(a / b for a, b in zip(times["one"], times[name], strict=True)) for name in times}
    return [
        Result("threads: one worker of 2 threads, times as fast as one of 1, wall time", both["threads"], "x"),
        Result("workers: two workers of 1 thread, times as fast as one of 1, wall time", both["workers"], "x"),
    ]


def aligned(repeats: int) -> list[Result]:
    """Alignment alone, at the sizes of real adapters."""
    results = []
    for size in alignment.SIZES:
        found = alignment.measured(size, repeats)
        about = f"4. {size.name}, r = {size.rank} ({size.pairs} pairs)"
        goal = 4.0 if size.rank <= 16 else None
        results.append(Result(f"{about}: layer by layer / ours", found["loop"] / found["align"], "x", goal, True))
        results.append(Result(f"{about}: ours / a copy", found["align"] / found["copy"], "x"))
        results.append(Result(f"{about}: ours", 1000 * found["align"], "ms"))
    return results


def flexlora(width: int) -> list[Result]:
    """FlexLoRA's server at d = `width`, r = 16, 10 clients, against the dense way."""
    share, distance = flexlora_against_dense(width=width)
    return [
        Result(f"flexlora's aggregation / dense product and SVD, d = {width}", 100 * share, "%", 2.0),
        Result("the same: distance of the results, relative", distance, "", 1e-4),
    ]


def import_time(repeats: int) -> Result:
    """`import fedrot` in a fresh interpreter, less the interpreter's own start."""
    times = {"pass": [], "import fedrot": []}  # type: dict[str, list[float]]
    for _ in range(repeats):
        for code, found in times.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            found.append(time.perf_counter() - began)
    return Result("import fedrot", median(times["import fedrot"]) - median(times["pass"]), "s", 1.0)


def within(folder: str | None, name: str) -> str | None:
    """A folder in the folder, if it is there."""
    there = Path(folder or "") / name
    return str(there) if folder and there.is_dir() else None


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Speed and memory as ratios measured in one run.")
    parser.add_argument(
        "--data",
        help="folder of SST-2's files, or with sst2/ and gsm8k/ in it (default: VADER's movies, HumanEval's problems)",
    )
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="local steps of a client")
    parser.add_argument("--limit", type=int, default=872, help="rows that are scored in a round")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", default="3,10,50,250,1000", help="numbers of clients")
    parser.add_argument("--total", type=int, default=1000, help="local steps of a round of all these clients together")
    parser.add_argument("--width", type=int, default=4096, help="d of FlexLoRA's line")
    parser.add_argument("--tokens", type=int, default=650, help="length to which the published way pads a problem")
    parser.add_argument("--parts", help="measure these alone, in a file that holds the others already")
    call = parser.parse_args()
    torch.set_num_threads(1)
    BUILD.mkdir(exist_ok=True)
    sst2, gsm8k = within(call.data, "sst2") or call.data, within(call.data, "gsm8k")
    # Problems are long: a few say enough, and a reduced run takes fewer.
    few = {"clients": min(3, call.clients), "steps": min(3, call.steps), "limit": min(8, max(2, call.limit // 100))}
    few["tokens"] = call.tokens
    recipe = make_recipe(sst2, call.clients, call.steps, limit=call.limit)
    ready = prepare(recipe)
    parts: dict[str, Callable[[], list[Result]]] = {
        "a round": lambda: against_published(ready, call.repeats),
        "a language model": lambda: language_model(prepare(language_recipe(gsm8k, **few)), call.repeats),
        "throughput": lambda: throughput(ready, call.repeats),
        "threads and workers": lambda: side_by_side(ready, call.repeats),
        "numbers of clients": lambda: scale(sst2, [int(n) for n in call.scale.split(",")], call.total),
        "alignment": lambda: aligned(call.repeats),
        "the price of alignment": lambda: price_of_alignment(ready, call.repeats),
        "aggregation": lambda: flexlora(call.width),
        "import": lambda: [import_time(call.repeats)],
    }
    results: list[Result] = []
    for name in call.parts.split(",") if call.parts else parts:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        results += parts[name]()
    about: dict[str, Any] = {
        **machine(),
        "data": "SST-2" if sst2 else "VADER movie reviews",
        "clients": call.clients,
        "steps": call.steps,
        "tokens an example": round(float(ready.encoded["train"].lengths.mean()), 1),
        "stack": ready.recipe.compute.stack,
    }
    show(results, about)
    written = BUILD / "bench.json"
    before = json.loads(written.read_text()) if call.parts else {"results": [], "figures": []}
    fresh = {
        "results": [asdict(r) | {"holds": r.holds} for r in results if r.goal is not None],
        "figures": [{"name": r.name, "figure": r.figure, "unit": r.unit} for r in results if r.goal is None],
    }
    found = {kind: merged(before[kind], lines) for kind, lines in fresh.items()}
    written.write_text(json.dumps({**found, "machine": about}, indent=1) + "\n")


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The old lines with those of the same name replaced, and the others behind them."""
    fresh = {line["name"]: line for line in new}
    kept = [fresh.pop(line["name"], line) for line in old]
    return [*kept, *fresh.values()]


if __name__ == "__main__":
    main()
