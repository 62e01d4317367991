"""Cost and memory by the number of clients, with equal work in all: each number in a process of its own."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fedrot.running.prepare import prepare
from fedrot.running.rounds import play_round
from fedrot.running.simulation import Simulation
from recipes import make_recipe
from table import Quiet, Result

BATCH = 16


def measure(data: str | None, clients: int, steps: int, rank: int) -> dict[str, Any]:
    """CPU seconds of a round and of its training, and the process's memory in MB before it and at its peak."""
    # Many steps of one client would diverge at the usual rate; time and memory do not depend on it.
    ready = prepare(make_recipe(data, clients, steps, rank=rank, batch=BATCH, lr=1e-4))
    engine, state = Simulation(ready), ready.recipe.method.start(ready.model.read())
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: loading took more
    began = time.process_time()
    _, record = play_round(ready.recipe, engine, state, Quiet())
    return {
        "seconds": time.process_time() - began,
        "train": record["seconds"]["train"],
        "tokens": record["train"]["tokens"],
        "before": before,
        "memory": memory("VmHWM"),
        "stack": ready.recipe.compute.stack,
    }


def memory(what: str) -> float:
    """VmRSS, what is resident now, or VmHWM, its peak, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def in_process(data: str | None, clients: int, steps: int, rank: int = 4) -> dict[str, Any]:
    """`measure` in a process of its own."""
    words = [sys.executable, str(Path(__file__)), json.dumps([data, clients, steps, rank])]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def scale(data: str | None, counts: list[int], total: int) -> list[Result]:
    """Rounds of `total` local steps in all, by these numbers of clients, against the first of them."""
    found = {count: in_process(data, count, max(1, round(total / count))) for count in counts}
    # Which examples a client draws differs, so seconds are compared by token.
    cost = {count: one["seconds"] / one["tokens"] for count, one in found.items()}
    first = counts[0]
    results = []
    for count in counts[1:]:
        results.append(Result(f"3. time a token, {count} clients / {first}", cost[count] / cost[first], "x", 1.1))
    for count in counts[1:]:
        figure = found[count]["memory"] / found[first]["memory"]
        results.append(Result(f"3. peak memory, {count} clients / {first}", figure, "x", 1.1))
    results.append(Result(f"3. peak memory, {first} clients", found[first]["memory"], "MB"))
    results.append(Result("3. of it before the round: libraries, model, data", found[first]["before"], "MB"))
    # At rank 64 forty uploads that were held would be a tenth of the whole.
    few, many = (4, 40) if total >= 80 else (1, total)
    wide = [in_process(data, count, min(80, total) // count, rank=64)["memory"] for count in (few, many)]
    return [*results, Result(f"3. peak memory at rank 64, {many} clients / {few}", wide[1] / wide[0], "x", 1.05)]


if __name__ == "__main__":
    print(json.dumps(measure(*json.loads(sys.argv[1]))))
