"""Every aggregation rule on the same recorded uploads: error after / error before / rank-r floor, by round.

Run: make replay TREC=folder (without TREC the VADER task alone). Writes docs/results/replay.csv.
"""

import argparse
import csv
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedrot.core.adapter import stacks
from fedrot.core.aggregate import combine
from fedrot.core.best_rotation import best_rotation_error2
from fedrot.core.methods import get_method
from fedrot.core.methods.base import Broadcast, ServerState
from fedrot.core.reduce import Reduction
from fedrot.core.seeding import generator
from recorded import Recorded, Setting, record, trec_tables

CSV = Path(__file__).parents[1] / "docs" / "results" / "replay.csv"
COLUMNS = ("task", "optimizer", "rank", "start", "seed", "round", "variant", "before", "ratio")

# Variant -> (method, settings). Numeric strengths are the paper's own alignment, unguarded, unless they say otherwise.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "A .4": ("fedrot", {"factor": "A", "strength": 0.4}),
    "A 1": ("fedrot", {"factor": "A", "strength": 1.0}),
    "B .4": ("fedrot", {"factor": "B", "strength": 0.4}),
    "B 1": ("fedrot", {"factor": "B", "strength": 1.0}),
    "joint .4": ("fedrot", {"factor": "joint", "strength": 0.4}),
    "joint 1": ("fedrot", {"factor": "joint", "strength": 1.0}),
    "A .4 regularised": ("fedrot", {"factor": "A", "strength": 0.4, "softening": "regularised"}),
    "joint .4 regularised": ("fedrot", {"factor": "joint", "strength": 0.4, "softening": "regularised"}),
    "A 1 guarded": ("fedrot", {"factor": "A", "strength": 1.0, "guard": True}),
    "B 1 guarded": ("fedrot", {"factor": "B", "strength": 1.0, "guard": True}),
    "joint 1 guarded": ("fedrot", {"factor": "joint", "strength": 1.0, "guard": True}),
    "A auto": ("fedrot", {"factor": "A", "strength": "auto"}),
    "B auto": ("fedrot", {"factor": "B", "strength": "auto"}),
    "joint auto": ("fedrot", {"factor": "joint", "strength": "auto"}),
    "random rotation": ("random_rotation", {}),
    "rescale": ("rescale", {}),
    "consensus": ("fedrot_consensus", {}),
    "lora_fair": ("lora_fair", {}),
    "hetlora": ("hetlora", {}),
    "fedask": ("fedask", {}),
    "flexlora": ("flexlora", {}),
    "flexlora_regauge": ("flexlora_regauge", {}),
    "fedrot_svd": ("fedrot_svd", {}),
    "fedex": ("fedex", {}),
}


MEMORY: dict[str, tuple[str, dict[str, Any]]] = {
    "sum: fedit": ("fedit", {}),
    "sum: fedrot_svd": ("fedrot_svd", {}),
    "sum: fedrot_svd feedback": ("fedrot_svd", {"feedback": True}),
}


def replay(one: Recorded) -> Iterator[tuple[str, float, float]]:
    """(variant, error before, error / error before); before is relative to the ideal update."""
    for variant, (method, settings) in VARIANTS.items():
        found = combine(one.adapters, one.weights, method, one.reference, **settings).errors.totals()
        yield variant, float(found["before_relative"]), float(found["sent"]) / float(found["before"])
    yield "floor", float(found["before_relative"]), float(found["floor"]) / float(found["before"])
    yield "best rotation", float(found["before_relative"]), _best(one) / float(found["before"])


def _best(one: Recorded) -> float:
    """The error of the best rotation of all clients that a long numerical search from four starts finds."""
    p = torch.tensor(one.weights, dtype=torch.float64)
    total = 0.0
    for stack in stacks(one.adapters, torch.float64):
        total += float(best_rotation_error2(stack.a, stack.b * stack.scale[..., None, None], p / p.sum()).sum())
    return total**0.5


def kept_errors(rounds: Sequence[Recorded]) -> Iterator[tuple[str, float, float]]:
    """(variant, 1, ratio): what a method has lost of all rounds together, ||sum_t (sent_t - ideal_t)||, over FedIT's.

    This is what error feedback is for: it sends later what it could not send at once.
    """
    lost = {name: _lost(rounds, *made) for name, made in MEMORY.items()}
    for name, value in lost.items():
        yield name, 1.0, value / lost["sum: fedit"]


def _lost(rounds: Sequence[Recorded], name: str, settings: dict[str, Any]) -> float:
    method = get_method(name)(**settings)
    memory: Mapping[str, torch.Tensor] = {}
    lost: dict[str, torch.Tensor] = {}
    for one in rounds:
        mean = Reduction(one.adapters[0], frozenset({"a", "b"}), keep=True)
        for adapter, weight in zip(one.adapters, one.weights, strict=True):
            mean.add(adapter, weight)
        reduced = mean.result()
        state = ServerState(Broadcast(one.round, one.reference), memory)
        state = method.server(state, reduced, generator("replay", one.round))
        memory = state.memory
        for layer, pair in state.broadcast.adapter.layers.items():
            ideal = sum((p * a.layers[layer].delta().double() for p, a in reduced.factors), torch.zeros(()))
            lost[layer] = lost.get(layer, torch.zeros(())) + pair.delta().double() - ideal
    return float(sum(total.square().sum() for total in lost.values())) ** 0.5


def measure(settings: Sequence[Setting], trec: Path | None, steps: int) -> Iterator[tuple[Any, ...]]:
    """Rows of the file."""
    for setting in settings:
        began = time.perf_counter()
        rounds = list(record(setting, trec, steps))
        # Round 0 of a common start is not aligned by anybody: B_ref is zero.
        for one in rounds if setting.start == "own" else rounds[1:]:
            for variant, before, ratio in replay(one):
                yield (*vars(setting).values(), one.round, variant, f"{before:.6g}", f"{ratio:.6g}")
        if len(rounds) > 1:
            for variant, before, ratio in kept_errors(rounds):
                yield (*vars(setting).values(), "all", variant, f"{before:.6g}", f"{ratio:.6g}")
        print(f"{setting}: {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trec", type=Path, help="folder with TREC.train.all and TREC.test.all")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", default="4,64")
    parser.add_argument("--out", type=Path, default=CSV)
    parser.add_argument("--threads", type=int, default=2)
    call = parser.parse_args()
    torch.set_num_threads(call.threads)
    tasks = ["vader"] if call.trec is None else ["vader", "trec"]
    ranks, seeds = ([int(word) for word in text.split(",")] for text in (call.ranks, call.seeds))
    with tempfile.TemporaryDirectory() as folder:
        trec = None if call.trec is None else trec_tables(call.trec, Path(folder))
        settings = [
            Setting(task, optimizer, rank, start, seed)
            for seed, task, rank, optimizer, start in itertools.product(
                seeds, tasks, ranks, ("adamw", "sgd"), ("common", "own")
            )
        ]
        call.out.parent.mkdir(parents=True, exist_ok=True)
        with call.out.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for row in measure(settings, trec, call.steps):
                writer.writerow(row)
                file.flush()
    print(call.out)


if __name__ == "__main__":
    main()
