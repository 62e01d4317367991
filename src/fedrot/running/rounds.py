"""The round: draw clients, broadcast, collect, check, reduce, serve, evaluate, checkpoint. Knows no transport."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from fedrot.core.adapter import Adapter
from fedrot.core.checks import RejectedUpload, check_upload
from fedrot.core.diagnostics import Observer, observer
from fedrot.core.drift import summarise_drift
from fedrot.core.errors import RunError
from fedrot.core.methods.base import ALL_PARTS, Broadcast, ServerState, Upload
from fedrot.core.reduce import Reduction
from fedrot.core.seeding import generator, seed_of
from fedrot.running.checkpoint import Checkpoint
from fedrot.running.engine import Engine, Failure
from fedrot.running.recipe import Recipe


class Watcher(Protocol):
    """Is told how a run goes; shows progress or does nothing."""

    def round_started(self, round: int, rounds: int, clients: Sequence[str]) -> None:
        """A round begins with these clients."""

    def client_done(self, client: str, reason: str | None) -> None:
        """A client is through; `reason` says why its upload was dropped, if it was."""

    def evaluating(self, split: str) -> None:
        """A split is about to be scored."""

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """The round's record, as metrics.jsonl holds it."""


class Store(Protocol):
    """Where rounds are kept."""

    def save(self, record: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Keep a finished round; durable when this returns."""


@dataclass(frozen=True)
class Seen:
    """What is kept of an upload once its tensors are in the sum: memory does not grow with the clients' adapters."""

    weight: float
    used: int
    metrics: Mapping[str, float]
    layers: Mapping[str, Mapping[str, float]]


@dataclass
class Collected:
    """A round's uploads after checks, reduced, with what was seen on the way."""

    reduction: Reduction
    observer: Observer | None
    uploads: dict[str, Seen] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def spend(self, phase: str, since: float) -> None:
        """Add the time since `since` to a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - since


def play(recipe: Recipe, engine: Engine, state: ServerState, store: Store, watcher: Watcher) -> ServerState:
    """Run the rounds that are left and give the last state.

    Raises `RunError` when a round leaves fewer usable uploads than the quorum; every finished round is in the store.
    """
    while state.broadcast.round < recipe.rounds:
        state, record = play_round(recipe, engine, state, watcher)
        store.save(record, Checkpoint(state, engine.states()))
        watcher.round_finished(record)
    return state


def play_round(
    recipe: Recipe, engine: Engine, state: ServerState, watcher: Watcher
) -> tuple[ServerState, dict[str, Any]]:
    """One round: the next state and the round's record."""
    began = time.perf_counter()
    broadcast = state.broadcast
    number = broadcast.round
    drawn = draw_clients(engine.clients, recipe.federation.participation, recipe.seed, number)
    watcher.round_started(number, recipe.rounds, drawn)
    collected = collect(recipe, broadcast, in_order(engine.train(broadcast, drawn), drawn), len(drawn), watcher)
    needed = max(1, math.ceil(recipe.federation.quorum * len(drawn) - 1e-9))
    if len(collected.uploads) < needed:
        dropped = "; ".join(f"{client}: {reason}" for client, reason in collected.dropped.items())
        raise RunError(
            f"round {number}: {len(collected.uploads)} of {len(drawn)} uploads were usable, the quorum is {needed} "
            f"(federation.quorum); the last good state is kept; dropped: {dropped}"
        )
    engine.settle(collected.uploads.keys())
    since = time.perf_counter()
    state = recipe.method.server(state, collected.reduction.result())
    collected.spend("aggregate", since)
    record = _record(recipe, broadcast, drawn, collected)
    if (number + 1) % recipe.evaluation.every == 0 or number + 1 == recipe.rounds:
        since = time.perf_counter()
        watcher.evaluating(recipe.evaluation.split)
        scores = engine.evaluate(state.broadcast.adapter, recipe.evaluation.split, recipe.evaluation.limit)
        record["evaluation"] = scores.record()
        collected.spend("evaluate", since)
    record["seconds"] = {**collected.seconds, "round": time.perf_counter() - began}
    return state, record


def draw_clients(clients: Sequence[str], participation: float, seed: int, round: int) -> list[str]:
    """The clients of a round, sorted; at least one. Depends on seed, round and the clients' names alone."""
    count = max(1, round_half_up(participation * len(clients)))
    if count == len(clients):
        return sorted(clients)
    order = torch.randperm(len(clients), generator=generator(seed, round, "draw")).tolist()
    return sorted(sorted(clients)[i] for i in order[:count])


def round_half_up(value: float) -> int:
    """2.5 -> 3, unlike Python's round."""
    return math.floor(value + 0.5)


def in_order(results: Iterable[Upload | Failure], expected: Sequence[str]) -> Iterator[Upload | Failure]:
    """The results in the order of `expected`, whatever order they came in: sums then have one order of terms.

    A second result of a client, or one of a client that was not asked, is passed over. A client that never answered
    becomes a failure.
    """
    waiting: dict[str, Upload | Failure] = {}
    place = 0
    for result in results:
        if result.client in expected and result.client not in waiting and result.client not in expected[:place]:
            waiting[result.client] = result
        while place < len(expected) and expected[place] in waiting:
            yield waiting.pop(expected[place])
            place += 1
    for client in expected[place:]:
        yield waiting.get(client) or Failure(client, "gave no answer")


def collect(
    recipe: Recipe, broadcast: Broadcast, results: Iterable[Upload | Failure], asked: int, watcher: Watcher
) -> Collected:
    """Check every result and fold the good ones in, one at a time; what is dropped is noted with its reason."""
    parts = travelling_parts(recipe, broadcast.round)
    collected = Collected(
        Reduction(broadcast.adapter, parts, keep=recipe.method.capabilities.reduction == "factors"),
        observer(recipe.diagnostics, broadcast.round, asked, seed_of(recipe.seed, broadcast.round)),
    )
    for result in results:
        reason = _take_in(recipe, broadcast.adapter, result, collected)
        if reason is None and isinstance(result, Upload):
            rotation = sum(r.numel() * r.element_size() for r in result.rotation.values())
            collected.bytes_up += result.adapter.bytes(parts) + rotation
        watcher.client_done(result.client, reason)
    return collected


def _take_in(recipe: Recipe, form: Adapter, result: Upload | Failure, collected: Collected) -> str | None:
    """Fold one result in; the reason if it was dropped."""
    if isinstance(result, Failure):
        collected.dropped[result.client] = result.reason
        return result.reason
    since = time.perf_counter()
    try:
        check_upload(result, form, recipe.checks)
    except RejectedUpload as problem:
        collected.dropped[result.client] = str(problem)
        return str(problem)
    collected.spend("check", since)
    since = time.perf_counter()
    weight = weight_of(result, recipe)
    collected.reduction.add(result.adapter, weight)
    collected.spend("aggregate", since)
    since = time.perf_counter()
    if collected.observer is not None:
        collected.observer.add(result, weight)
    collected.spend("diagnose", since)
    for phase, seconds in result.seconds.items():
        collected.seconds[phase] = collected.seconds.get(phase, 0.0) + seconds
    collected.uploads[result.client] = Seen(weight, result.used, result.metrics, result.layers)
    return None


def travelling_parts(recipe: Recipe, round: int) -> frozenset[str]:
    """The parts of the adapter that clients upload in this round."""
    return recipe.method.uploads(round) - (frozenset() if recipe.lora.head == "shared" else {"head"})


def weight_of(upload: Upload, recipe: Recipe) -> float:
    """An upload's weight by the recipe's rule; positive for every upload that passed the checks."""
    return {"held": float(upload.held), "used": float(upload.used), "uniform": 1.0}[recipe.federation.weighting]


def _record(recipe: Recipe, broadcast: Broadcast, drawn: Sequence[str], collected: Collected) -> dict[str, Any]:
    """A round's line of metrics.jsonl, but for evaluation and seconds."""
    uploads = collected.uploads
    total = sum(u.weight for u in uploads.values())
    down_parts = ALL_PARTS - (set() if recipe.lora.head == "shared" else {"head"})
    down = broadcast.adapter.bytes(down_parts)
    down += sum(extra.bytes(down_parts) for extra in (broadcast.reference, broadcast.base_delta) if extra is not None)
    record: dict[str, Any] = {
        "round": broadcast.round,
        "clients": {"drawn": len(drawn), "used": sorted(uploads), "dropped": collected.dropped},
        "train": {
            "loss": sum(u.weight * u.metrics["loss"] for u in uploads.values()) / total,
            "rows": sum(u.used for u in uploads.values()),
            "tokens": sum(u.metrics["tokens"] for u in uploads.values()),
            "loss_by_client": {name: u.metrics["loss"] for name, u in uploads.items()},
        },
        "bytes": {"down": down * len(drawn), "up": collected.bytes_up},
    }
    if collected.observer is not None:
        since = time.perf_counter()
        errors = collected.observer.result()
        record["aggregation"] = {**errors.totals(), "layers": errors.layers}
        record["drift"] = summarise_drift({name: u.layers for name, u in uploads.items()})
        record["drift"]["layers"] = _drift_by_layer(uploads)
        collected.spend("diagnose", since)
    return record


def _drift_by_layer(uploads: Mapping[str, Seen]) -> dict[str, dict[str, float]]:
    """The mean over clients of every layer's drift numbers."""
    reports = [upload.layers for upload in uploads.values() if upload.layers]
    if not reports:
        return {}
    return {
        layer: {key: sum(report[layer][key] for report in reports) / len(reports) for key in values}
        for layer, values in reports[0].items()
    }
