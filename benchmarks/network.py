"""What a round between sites costs beside training: bytes, the server's time and memory, and waiting.

Run: make bench-network. Writes docs/results/network.json. Each number of clients is measured in a process of its own,
whose sites answer with prepared uploads (wire.py); what a round waits for is measured between real processes
(deployment.py).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from deployment import phases
from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.methods.base import ServerState
from fedrot.core.seeding import generator
from fedrot.running.flower.post import GridPost
from fedrot.running.network.engine import Expected, Network
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.rounds import play_round
from scale import memory
from table import Quiet, Result, machine, show
from wire import HELD, LABELS, MODEL, Wire

WRITTEN = Path(__file__).parents[1] / "docs" / "results" / "network.json"
LAYERS, WIDTH, RANK = 24, 384, 4  # MiniLM's queries and values
FEW, USUAL, BACKWARDS = 3, 30, 300
MEASURED = {"not measured": 0, "measured": 1}  # diagnostics.every
SKETCHED = 33  # clients from which on errors are sketched


def recipe_of(method: str, every: int) -> Recipe:
    """A recipe whose rounds are played here; nothing of it is loaded."""
    return parse_recipe(
        {
            "rounds": 1000,
            "model": {"path": "fetch:minilm"},
            "lora": {"rank": RANK},
            "data": {"source": "vader"},
            "partition": {"kind": "column"},
            "local": {"steps": 1, "batch": HELD},
            "method": {"name": method},
            "diagnostics": {"every": every},
            "evaluation": {"every": 1000},
        }
    )


def form() -> Adapter:
    """Factors as they are after a round, and a head."""
    rng = generator("form")

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng) / WIDTH**0.5

    layers = {f"layer.{i:02d}": LoraPair(drawn(RANK, WIDTH), drawn(WIDTH, RANK), 2.0) for i in range(LAYERS)}
    return Adapter(layers, {"classifier.weight": drawn(2, WIDTH), "classifier.bias": drawn(2)})


class Load:
    """A server with so many sites behind the wire, which have joined."""

    def __init__(self, recipe: Recipe, clients: int, backwards: bool) -> None:
        adapter = form()
        self._recipe, self.wire = recipe, Wire(recipe, adapter, clients, backwards)
        self._engine = Network(recipe, Expected(adapter, MODEL, LABELS), GridPost(self.wire, None, pause=0.0))
        self._engine.join()
        if self._engine.refused:
            raise ValueError(f"sites were refused: {self._engine.refused}")
        state = recipe.method.start(adapter)
        # FedRot turns from the second round on.
        self._state = ServerState(replace(state.broadcast, round=1), state.memory)

    def round(self) -> float:
        """Play one; the server's CPU seconds."""
        began, theirs = time.process_time(), self.wire.site_seconds
        self._state, record = play_round(self._recipe, self._engine, self._state, Quiet())
        if record["clients"]["dropped"]:
            raise ValueError(f"uploads were dropped: {record['clients']['dropped']}")
        return time.process_time() - began - (self.wire.site_seconds - theirs)


def measure(method: str, clients: int, every: int, backwards: bool) -> dict[str, float]:
    """Bytes a client and round, and in it the server's CPU time and memory."""
    recipe = recipe_of(method, every)
    warm = Load(recipe, FEW, backwards=False)
    warm.round()
    load = Load(recipe, clients, backwards)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    first = load.round()
    peak = memory("VmHWM")
    more = [load.round() for _ in range(max(0, 90 // clients - 1))]
    tensors = form().bytes()
    found = {
        f"{way} {what}": mean(getattr(one, what) for one in sizes) / tensors
        for way, sizes in (("down", load.wire.down), ("up", load.wire.up))
        for what in ("payload", "header", "flower")
    }
    return found | {
        "tensors": tensors,
        "seconds": median([first, *more]) / clients,
        "peak": peak,
        "held": (peak - before) * 2**20 / tensors,
    }


def in_process(
    method: str, clients: int, every: int = 1, backwards: bool = False, **environment: str
) -> dict[str, float]:
    """`measure` in a process of its own."""
    words = [sys.executable, str(Path(__file__)), "--one", json.dumps([method, clients, every, backwards])]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def load(counts: list[int]) -> list[Result]:
    """Bytes, time and memory of the server by the number of clients."""
    ways = {
        f"{name}, {what}": (method, every)
        for what, every in MEASURED.items()
        for name, method in (("FedIT", "fedit"), ("FedRot", "fedrot"))
    }
    usual = {name: in_process(method, USUAL, every) for name, (method, every) in ways.items()}
    found = {
        what: {n: usual[f"FedRot, {what}"] if n == USUAL else in_process("fedrot", n, every) for n in counts}
        for what, every in MEASURED.items()
    }
    results = []
    for name, one in usual.items():
        for way, words in (("down", "a broadcast"), ("up", "an upload")):
            results.append(Result(f"bytes: payload of {words} / its tensors, {name}", one[f"{way} payload"], "x", 1.02))
    for name, one in usual.items():
        results.append(Result(f"bytes: header of an upload, of its tensors, {name}", 100 * one["up header"], "%"))
    any_of_them = next(iter(usual.values()))
    for way, words in (("down", "a broadcast"), ("up", "an upload")):
        share = 100 * any_of_them[f"{way} flower"]
        results.append(Result(f"bytes: Flower's objects around {words}, of its tensors", share, "%"))
    results.append(Result("bytes: the adapter's tensors", any_of_them["tensors"] / 1e3, "kB"))
    for what, by_count in found.items():
        # Up to diagnostics.exact_clients errors are measured in another way.
        alike = [n for n in counts if n >= (USUAL if what == "not measured" else SKETCHED)]
        for n in alike[1:]:
            one, other = by_count[n], by_count[alike[0]]
            about = f"{n} clients / {alike[0]}, {what}"
            results.append(Result(f"server: CPU time a client, {about}", one["seconds"] / other["seconds"], "x", 1.1))
            results.append(Result(f"memory: peak of the server, {about}", one["peak"] / other["peak"], "x", 1.1))
    for what in MEASURED:
        both = usual[f"FedRot, {what}"]["seconds"] / usual[f"FedIT, {what}"]["seconds"]
        results.append(Result(f"server: CPU time, FedRot / FedIT, {USUAL} clients, {what}", both, "x"))
    for what, by_count in found.items():
        for n, one in by_count.items():
            results.append(Result(f"server: CPU time a client, {n} clients, {what}", 1e3 * one["seconds"], "ms"))
    for what, by_count in found.items():
        for n, one in by_count.items():
            about = f"memory: beyond that before the round, {n} clients, {what}"
            results.append(Result(about, one["held"], "uploads"))
    about = f"memory: the same, {BACKWARDS} clients, the last of them answers first"
    for setting in ({}, {"MALLOC_MMAP_THRESHOLD_": "131072"}):
        held = in_process("fedrot", BACKWARDS, 0, backwards=True, **setting)["held"]
        words = "".join(f", {name}={value}" for name, value in setting.items())
        results.append(Result(about + words, held, "uploads"))
    return results


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="What a round between sites costs beside training.")
    parser.add_argument("--counts", default="3,30,300,1000", help="numbers of clients; 30 among them")
    parser.add_argument("--out", type=Path, default=WRITTEN)
    parser.add_argument(
        "--rounds",
        type=int,
        default=6,
        help="of the run between real processes; 0: none, what is written of it is kept",
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    call = parser.parse_args()
    torch.set_num_threads(1)
    if call.one:
        print(json.dumps(measure(*json.loads(call.one))))
        return
    results = load([int(n) for n in call.counts.split(",")])
    results += phases(call.rounds) if call.rounds else kept(call.out)
    about: dict[str, Any] = machine()
    show(results, about)
    lines = {
        "results": [asdict(r) | {"holds": r.holds} for r in results if r.goal is not None],
        "figures": [{"name": r.name, "figure": r.figure, "unit": r.unit} for r in results if r.goal is None],
    }
    call.out.write_text(json.dumps({**lines, "machine": about}, indent=1) + "\n")


def kept(path: Path) -> list[Result]:
    """What was measured between real processes, as it is written."""
    if not path.exists():
        return []
    written = json.loads(path.read_text())
    lines = [
        {key: value for key, value in one.items() if key != "holds"} for one in written["figures"] + written["results"]
    ]
    return [Result(**one) for one in lines if one["name"].startswith("phases: ")]


if __name__ == "__main__":
    main()
