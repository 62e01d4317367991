"""Rounds of tiny clients in this process, played one by one, and runs that are cut off and resumed."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fakes import Silent, go, outcome
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.methods.base import Broadcast, ServerState, Upload
from fedrot.running.client import ClientData, Round, client_round
from fedrot.running.engine import Failure
from fedrot.running.prepare import Prepared, prepare
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.rounds import play_round
from fedrot.running.simulation import Simulation

Fault = Callable[[Upload], Upload | Failure]


class Tampered(Simulation):
    """The embedded engine, with uploads that are spoiled on their way and a note of what was uploaded."""

    def __init__(self, ready: Prepared) -> None:
        super().__init__(ready)
        self.faults: dict[str, Fault] = {}
        self.uploads: list[Upload] = []

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Upload | Failure]:
        for result in super().train(broadcast, clients):
            spoiled = self.faults[result.client](result) if result.client in self.faults else result
            self.uploads += [spoiled] if isinstance(spoiled, Upload) else []
            yield spoiled


@dataclass
class Tiny:
    """A recipe's rounds, played when the test says so."""

    recipe: Recipe
    ready: Prepared
    engine: Tampered
    state: ServerState
    seen: Silent = field(default_factory=Silent)
    records: list[Mapping[str, Any]] = field(default_factory=list)

    def play(self, rounds: int = 1) -> "Tiny":
        """Play rounds; the state and the records go on."""
        for _ in range(rounds):
            self.state, record = play_round(self.recipe, self.engine, self.state, self.seen)
            self.records.append(record)
        return self

    @property
    def adapter(self) -> Adapter:
        """The global one."""
        return self.state.broadcast.adapter

    def data(self, client: str) -> ClientData:
        """A client's name and examples."""
        return ClientData(client, self.ready.encoded["train"], self.ready.partition.indices["train"][client])

    def client(self, name: str, recipe: Recipe | None = None) -> Round:
        """What a client would make of the next round, of this recipe or another one."""
        self.ready.model.change_base(self.state.broadcast.base_delta)
        state = self.engine.states().get(name, {})
        return client_round(self.data(name), self.state.broadcast, state, recipe or self.recipe, self.ready.model)


def begin(values: Mapping[str, Any], *flags: str) -> Tiny:
    """The state before round 0."""
    ready = prepare(parse_recipe(values, flags))
    return Tiny(ready.recipe, ready, Tampered(ready), ready.recipe.method.start(ready.model.read()))


def flat(adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor by its flat name, in float64."""
    return {name: tensor.double() for name, tensor in adapter.tensors()}


def assert_near(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], rel: float = 1e-3) -> None:
    """The same names, and each tensor to `rel` of its norm; a tensor of zeros is one."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        off = float((found[name].double() - tensor.double()).norm())
        assert off <= rel * float(tensor.double().norm()) + 1e-9, f"{name} is off by {off}"


def assert_equal(found: Adapter, wanted: Adapter) -> None:
    """Bit for bit the same tensors."""
    mine, theirs = dict(found.tensors()), dict(wanted.tensors())
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def cut_and_resumed(values: Mapping[str, Any], tmp_path: Path, *flags: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run of four rounds leaves, and what the same run leaves that was killed after its second one."""
    values = {**values, "checkpoint": {"keep": 9}}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    go(values, whole, "--rounds", "4", *flags)
    shutil.copytree(whole, cut)
    for name in ("round-000003", "round-000004"):
        shutil.rmtree(cut / "checkpoints" / name)
    for name in ("adapter", "clients"):
        shutil.rmtree(cut / name, ignore_errors=True)
    (cut / "result.json").unlink()
    go(values, cut, "--rounds", "4", *flags, resume=True)
    return outcome(whole), outcome(cut)
