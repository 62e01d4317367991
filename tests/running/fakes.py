"""An engine without a model: clients that answer with prepared factors. For tests of the round loop."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.drift import client_drift
from fedrot.core.methods.base import Broadcast, ClientState, Method, Seat, Upload
from fedrot.core.seeding import generator
from fedrot.learning.evaluation import Evaluation
from fedrot.running.engine import Failure
from fedrot.running.folder import RunFolder
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.run import run


def first_adapter(rank: int = 2, seed: int = 0) -> Adapter:
    """Two layers of different shapes, B = 0, and a head."""
    rng = generator("fake", seed)
    layers = {
        name: LoraPair(torch.randn(rank, d_in, generator=rng), torch.zeros(d_out, rank), scale=2.0)
        for name, d_out, d_in in (("x", 5, 7), ("y", 6, 4))
    }
    return Adapter(layers, {"classifier.weight": torch.randn(3, 5, generator=rng)})


class FakeEngine:
    """`sizes` gives each client's examples. A client moves the broadcast by its own seeded noise."""

    def __init__(self, method: Method, sizes: Mapping[str, int], order: Sequence[str] | None = None) -> None:
        self.method, self.sizes, self.order = method, dict(sizes), order
        self.faults: dict[str, Any] = {}  # client -> what to do to its upload; None: no answer; str: a failure
        self.trained: list[list[str]] = []
        self.locals: dict[tuple[int, str], Adapter] = {}

    @property
    def clients(self) -> Sequence[str]:
        return sorted(self.sizes)

    @property
    def held(self) -> Mapping[str, int]:
        return self.sizes

    def local(self, broadcast: Broadcast, client: str) -> Adapter:
        rng = generator("local", broadcast.round, client)

        def moved(tensor: Tensor) -> Tensor:
            return tensor + 0.3 * torch.randn(tensor.shape, generator=rng)

        return broadcast.adapter.map(moved)

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Upload | Failure]:
        self.trained.append(list(clients))
        for name in self.order or clients:
            if name not in clients:
                continue
            fault = self.faults.get(name, lambda upload: upload)
            if fault is None:
                continue
            if isinstance(fault, str):
                yield Failure(name, fault)
                continue
            local = self.local(broadcast, name)
            self.locals[broadcast.round, name] = local
            result = self.method.client(local, broadcast, Seat(name), generator(name))
            yield fault(
                Upload(
                    client=name,
                    adapter=result.adapter,
                    held=self.sizes[name],
                    used=2 * self.sizes[name] + 1,
                    rotation=result.rotation,
                    metrics={"loss": 1.0, "steps": 1, "tokens": 10},
                    layers=client_drift(local, broadcast.adapter, result.rotation),
                    seconds={"train": 0.1},
                )
            )

    def settle(self, accepted: Collection[str]) -> None:
        self.accepted = sorted(accepted)

    def answer(self, question: Adapter, clients: Sequence[str]) -> Iterator[Upload | Failure]:
        raise NotImplementedError

    def evaluate(self, broadcast: Broadcast, split: str, limit: int | None = None) -> Evaluation:
        return Evaluation(
            split, 1, "accuracy", {"accuracy": 0.5, "macro_f1": 0.5, "loss": 1.0}, clients={"c": {"accuracy": 0.5}}
        )

    def states(self) -> Mapping[str, ClientState]:
        return {}

    def restore(self, states: Mapping[str, ClientState]) -> None:
        return None


def poisoned(value: float) -> Any:
    """A fault that puts `value` into one entry of one factor."""

    def fault(upload: Upload) -> Upload:
        pair = upload.adapter.layers["x"]
        a = pair.a.clone()
        a[0, 0] = value
        layers = {**upload.adapter.layers, "x": replace(pair, a=a)}
        return replace(upload, adapter=replace(upload.adapter, layers=layers))

    return fault


def cut(upload: Upload) -> Upload:
    """A fault that sends one row where the broadcast has r: numpy rules would spread it silently."""
    pair = upload.adapter.layers["x"]
    layers = {**upload.adapter.layers, "x": LoraPair(pair.a[:1], pair.b[:, :1], pair.scale)}
    return replace(upload, adapter=replace(upload.adapter, layers=layers))


class Silent:
    """A watcher and a store that remember and show nothing."""

    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.dropped: dict[str, str] = {}
        self.how = ""

    def prepared(self, how: str) -> None:
        self.how = how

    def round_started(self, round: int, rounds: int, clients: Sequence[str]) -> None:
        return None

    def client_done(self, client: str, reason: str | None) -> None:
        if reason is not None:
            self.dropped[client] = reason

    def evaluating(self, split: str) -> None:
        return None

    def round_finished(self, record: Mapping[str, Any]) -> None:
        return None

    def save(self, record: Mapping[str, Any], checkpoint: Any) -> None:
        self.records.append(record)


def go(values: dict[str, Any], out: Path, *flags: str, resume: bool = False) -> RunFolder:
    return run(parse_recipe(values, flags), out, Silent(), resume=resume)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves that must not depend on when or how often it was interrupted."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    tensors = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return {"metrics": records, "adapter": tensors, "result": json.loads((folder / "result.json").read_text())}
