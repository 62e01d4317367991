"""Real uploads to replay aggregation on: FedIT's, for two tasks, optimizers and ranks, common and own starts."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedrot.core.adapter import Adapter
from fedrot.core.methods.base import Broadcast, Seat, Upload
from fedrot.core.methods.factorwise import FedIT
from fedrot.core.reduce import Reduction
from fedrot.core.seeding import generator
from fedrot.running.prepare import first_adapter, prepare
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.rounds import serve
from fedrot.running.simulation import Simulation

ROUNDS = 3
# Rates at which both tasks' losses fall. They are nobody's advantage: every variant sees the same uploads.
RATES = {("adamw", 4): 2e-3, ("adamw", 64): 1e-3, ("sgd", 4): 0.2, ("sgd", 64): 0.2}
# Every fourth layer is kept: the numerical search of the best rotation at rank 64 takes minutes for all of them.
_EVERY = 4


@dataclass(frozen=True)
class Setting:
    """Where uploads come from."""

    task: str  # vader or trec
    optimizer: str
    rank: int
    start: str  # common, or own: each client draws its own A
    seed: int


@dataclass(frozen=True)
class Recorded:
    """A round: what all clients were sent, and what they sent back, on a part of the layers."""

    round: int
    reference: Adapter
    adapters: list[Adapter]
    weights: list[float]


@dataclass(frozen=True)
class OwnStarts(FedIT):
    """FedIT, but each client starts from an A that it drew itself, as where sites initialise by their own seeds."""

    def begin(self, broadcast: Broadcast, seat: Seat) -> Adapter:
        """Uniform in (-1, 1) / sqrt(d_in), as PEFT draws it."""
        layers = {}
        for name, pair in broadcast.adapter.layers.items():
            rng = generator("own start", broadcast.round, seat.name, name)
            a = (2 * torch.rand(pair.a.shape, generator=rng) - 1) / pair.a.shape[1] ** 0.5
            layers[name] = replace(pair, a=a)
        return replace(broadcast.adapter, layers=layers)


def record(setting: Setting, trec: Path | None, steps: int = 20) -> Iterator[Recorded]:
    """The rounds of a setting; with own starts the first one alone, since all clients share a start after it."""
    recipe = _recipe(setting, trec, steps)
    ready = prepare(recipe)
    recipe = ready.recipe
    if setting.start == "own":
        recipe = replace(recipe, method=OwnStarts())
    engine = Simulation(replace(ready, recipe=recipe))
    state = recipe.method.start(first_adapter(recipe, ready.model))
    for number in range(1 if setting.start == "own" else ROUNDS):
        uploads = [one for one in engine.train(state.broadcast, engine.clients) if isinstance(one, Upload)]
        adapters = [_part(one.adapter) for one in uploads]
        yield Recorded(number, _part(state.broadcast.adapter), adapters, [float(one.held) for one in uploads])
        mean = Reduction(state.broadcast.adapter, frozenset({"a", "b", "head"}))
        for one in uploads:
            mean.add(one.adapter, float(one.held))
        state = serve(recipe, state, mean.result())


def _part(adapter: Adapter) -> Adapter:
    return Adapter({name: adapter.layers[name] for name in sorted(adapter.layers)[::_EVERY]})


def _recipe(setting: Setting, trec: Path | None, steps: int) -> Recipe:
    rate = RATES[setting.optimizer, setting.rank]
    values: dict[str, Any] = {
        "seed": setting.seed,
        "model": {"path": "fetch:minilm"},
        "lora": {"rank": setting.rank},
        "local": {"optimizer": setting.optimizer, "lr": rate, "batch": 8, "steps": steps},
        "method": {"name": "fedit"},
        "diagnostics": {"every": 0},
    }
    if setting.task == "vader":
        return parse_recipe({**values, "data": {"source": "vader"}, "partition": {"kind": "column"}})
    if trec is None:
        raise ValueError("the folder of TREC's files is needed")
    data = {"source": "files", "path": str(trec), "train": "train.csv", "validation": "test.csv"}
    return parse_recipe(
        {**values, "data": data, "partition": {"kind": "dirichlet", "clients": 8, "concentration": 0.3}}
    )


def trec_tables(source: Path, out: Path) -> Path:
    """TREC's files, a line 'label question' in latin-1, as train.csv and test.csv below `out`."""
    for split in ("train", "test"):
        (path,) = source.glob(f"*{split}*")
        lines = [line.split(" ", 1) for line in path.read_text(encoding="latin-1").splitlines() if line.strip()]
        with (out / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([text, label.split(":")[0]] for label, text in lines)
    return out
