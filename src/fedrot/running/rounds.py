"""The round: draw clients, broadcast, collect, check, reduce, serve, evaluate, checkpoint. Knows no transport."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch

from fedrot.core.adapter import Adapter
from fedrot.core.checks import TOO_LARGE, RejectedUpload, check_upload
from fedrot.core.diagnostics import Watch, measured, observer
from fedrot.core.errors import FedrotError, RunError
from fedrot.core.methods.base import Broadcast, Reduced, ServerState, Upload
from fedrot.core.reduce import Reduction
from fedrot.core.robust import accept, check_count, in_frame
from fedrot.core.seeding import generator, seed_of
from fedrot.core.server_opt import PREFIX, server_step
from fedrot.running.accounting import Accountant
from fedrot.running.buffered import Heard, fill_buffer
from fedrot.running.checkpoint import Checkpoint
from fedrot.running.client import travelling_parts
from fedrot.running.clock import Clock, seconds_by_client
from fedrot.running.draws import drawn_for
from fedrot.running.engine import Engine, Failure, Summed, in_order
from fedrot.running.privacy import reduction_of, told
from fedrot.running.recipe import Recipe
from fedrot.running.records import (
    Seen,
    add_diagnostics,
    add_kept,
    add_summed,
    broadcast_bytes,
    outcome_of,
    round_record,
    upload_bytes,
)
from fedrot.running.settings import least_uploads


class Watcher(Protocol):
    """Is told how a run goes; shows progress or does nothing."""

    def prepared(self, how: str) -> None:
        """Everything is loaded; `how` says in a line how the arithmetic will be done."""

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


@dataclass
class Collected:
    """A round's uploads after checks, reduced, with what was seen on the way."""

    reduction: Reduction
    watch: Watch | None
    variates: Reduction | None = None
    held: list[Upload] = field(default_factory=list)  # until a rule against hostile clients has seen all
    kept: Mapping[str, float] = field(default_factory=dict)  # client -> what the rule let through of its upload
    uploads: dict[str, Seen] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0  # of a second phase, and of secure sums
    summed: Summed | None = None  # with secure.aggregation: all that is known of the uploads
    seconds: dict[str, float] = field(default_factory=dict)

    def spend(self, phase: str, since: float) -> None:
        """Add the time since `since` to a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - since


def play(recipe: Recipe, engine: Engine, state: ServerState, store: Store, watcher: Watcher) -> ServerState:
    """Run the rounds that are left, as many as privacy.budget allows, and give the last state.

    Raises `RunError` when a round leaves fewer usable uploads than the quorum; every finished round is in the store.
    """
    spent: list[dict[str, Any]] | None = None
    if recipe.privacy.mode != "none":
        spent = Accountant(recipe).records(engine.clients, engine.held)
        recipe = replace(recipe, rounds=len(spent))
    while state.broadcast.round < recipe.rounds:
        state, record = play_round(recipe, engine, state, watcher)
        if spent is not None:
            record["privacy"] = spent[record["round"]]
        store.save(record, Checkpoint(state, engine.states()))
        watcher.round_finished(record)
    return state


def play_round(
    recipe: Recipe, engine: Engine, state: ServerState, watcher: Watcher
) -> tuple[ServerState, dict[str, Any]]:
    """One round: the next state and the round's record."""
    began = time.perf_counter()
    simulated = seconds_by_client(recipe, engine)
    state, clock = Clock.taken_from(state)
    broadcast = state.broadcast
    number = broadcast.round
    heard = _heard(recipe, engine, broadcast, clock, simulated, watcher)
    drawn = heard.clients
    collected = collect(recipe, broadcast, heard.results, len(drawn), len(engine.clients), watcher)
    _check_quorum(recipe, number, collected, recipe.federation.buffer or len(drawn))
    reduced = _reduce(recipe, broadcast, collected, len(drawn))
    since = time.perf_counter()
    if recipe.method.capabilities.second_phase:
        reduced = replace(reduced, answer=_second_phase(recipe, engine, state, reduced, collected, watcher))
        _check_quorum(recipe, number, collected, len(drawn))
    engine.settle(collected.uploads.keys())
    state = serve(recipe, state, reduced)
    if collected.variates is not None:
        share = collected.variates.count / len(engine.clients)
        variate = next_variate(broadcast, collected.variates.result().mean, share)
        state = replace(state, broadcast=replace(state.broadcast, variate=variate))
    _check_usable(state)
    collected.spend("aggregate", since)
    shared_head = recipe.lora.head == "shared"
    down = broadcast_bytes(broadcast, shared_head) * len(drawn) + collected.bytes_down
    record = round_record(broadcast, drawn, collected.uploads, collected.dropped, down, collected.bytes_up)
    add_kept(record, collected.kept)
    add_summed(record, collected.summed)
    if heard.late:
        record["clients"]["late"] = {client: heard.late[client] for client in collected.uploads}
    if measured(recipe.diagnostics, number):
        since = time.perf_counter()
        # A server optimizer goes elsewhere on purpose: there is no error in that.
        sent = outcome_of(state.broadcast) if recipe.server.optimizer == "none" else ()
        add_diagnostics(record, collected.watch if collected.uploads else None, sent, collected.uploads)
        collected.spend("diagnose", since)
    every = recipe.evaluation.every
    if every and ((number + 1) % every == 0 or number + 1 == recipe.rounds):
        since = time.perf_counter()
        watcher.evaluating(recipe.evaluation.split)
        scores = engine.evaluate(state.broadcast, recipe.evaluation.split, recipe.evaluation.limit)
        record["evaluation"] = scores.record()
        collected.spend("evaluate", since)
    if simulated:
        record["clock"] = heard.clock.now
    if simulated or recipe.federation.buffer is not None:
        state = heard.clock.put_in(state)
    record["seconds"] = {**collected.seconds, "round": time.perf_counter() - began}
    return state, record


def _heard(
    recipe: Recipe,
    engine: Engine,
    broadcast: Broadcast,
    clock: Clock,
    seconds: Mapping[str, float],
    watcher: Watcher,
) -> Heard:
    """The round's uploads: of the clients that are drawn for it, or of those that come first (`federation.buffer`)."""
    started = partial(watcher.round_started, broadcast.round, recipe.rounds)
    if recipe.federation.buffer is not None:
        return fill_buffer(recipe, engine, broadcast, clock, seconds, started)
    drawn = drawn_for(recipe, engine.clients, broadcast.round)
    if drawn:
        _check_rule(recipe, broadcast.round, len(drawn), len(drawn))
    started(drawn)
    uploads: Iterable[Upload | Failure | Summed]
    if recipe.secure.aggregation:  # the sum of whole numbers is the same in any order
        uploads = engine.train_summed(broadcast, drawn)
    else:
        uploads = in_order(engine.train(broadcast, drawn) if drawn else (), drawn)
    slowest = max((seconds.get(client, 0.0) for client in drawn), default=0.0)
    return Heard(drawn, uploads, replace(clock, now=clock.now + slowest))


def _check_quorum(recipe: Recipe, round: int, collected: Collected, drawn: int) -> None:
    needed = least_uploads(recipe.federation.quorum, drawn)
    if len(collected.uploads) < needed:
        raise RunError(
            f"round {round}: {len(collected.uploads)} of {drawn} uploads were usable, the quorum is {needed} "
            f"(federation.quorum); the last good state is kept; dropped: {_reasons(collected)}"
        )


def _check_rule(recipe: Recipe, round: int, uploads: int, drawn: int) -> None:
    try:
        check_count(recipe.robust, uploads, drawn)
    except FedrotError as problem:
        raise RunError(f"round {round}: {problem}; the last good state is kept") from None


def _reduce(recipe: Recipe, broadcast: Broadcast, collected: Collected, drawn: int) -> Reduced:
    """The mean of the round's uploads; with a rule, of what it lets through of those that were held."""
    mean = None
    if recipe.robust.rule != "none":
        _check_rule(recipe, broadcast.round, len(collected.held), drawn)
        since = time.perf_counter()
        parts = travelling_parts(recipe, broadcast.round)
        accepted = accept(recipe.robust, collected.held, broadcast.adapter, parts, drawn)
        collected.held, collected.kept, mean = [], accepted.kept, accepted.mean
        collected.spend("aggregate", since)
        for upload in accepted.uploads:
            _fold_in(upload, collected.uploads[upload.client].weight, collected)
    since = time.perf_counter()
    reduced = collected.reduction.result()
    collected.spend("aggregate", since)
    return reduced if mean is None else replace(reduced, mean=mean)


def _reasons(collected: Collected) -> str:
    return "; ".join(f"{client}: {reason}" for client, reason in collected.dropped.items())


def serve(recipe: Recipe, state: ServerState, reduced: Reduced) -> ServerState:
    """The server's half of a round: the optimizer on the average's change, then the method."""
    number, old = state.broadcast.round, state.broadcast.adapter
    moments = {name: t for name, t in state.memory.items() if name.startswith(PREFIX)}
    own = {name: t for name, t in state.memory.items() if name not in moments}
    parts = recipe.method.trainable(number) & travelling_parts(recipe, number)
    mean, moments = server_step(recipe.server, old, reduced.mean, parts, moments)
    rng = generator(recipe.seed, number, "server")
    state = recipe.method.server(ServerState(state.broadcast, own), replace(reduced, mean=mean), rng)
    return ServerState(state.broadcast, {**state.memory, **moments})


def _check_usable(state: ServerState) -> None:
    """Raise `RunError` unless all of a round's new state is finite, and the adapter such that uploads near it pass."""
    sent = state.broadcast
    parts = {"adapter": sent.adapter, "reference": sent.reference, "variate": sent.variate}
    parts |= {"base_delta": sent.base_delta, "base_step": sent.base_step}
    tensors = [(f"{what}/{n}", t) for what, found in parts.items() if found is not None for n, t in found.tensors()]
    for name, tensor in chain(tensors, state.memory.items()):
        most = float(tensor.abs().max()) if tensor.numel() else 0.0
        limit = TOO_LARGE if name.startswith("adapter/") else math.inf
        if not most < limit:
            what = f"holds a value of size {most:.3g}" if most < math.inf else "is not finite (NaN or infinite)"
            raise RunError(
                f"round {sent.round - 1}: {name} {what} after the server's step; the last good state is kept; lower "
                "the learning rates, or bound uploads by checks.max_norm"
            )


def next_variate(broadcast: Broadcast, change: Adapter, share: float) -> Adapter:
    """SCAFFOLD's c + |S| / N mean(c_i+ - c_i), over the |S| clients of the round, of N."""
    zero = broadcast.adapter.map(torch.zeros_like)
    old = dict((broadcast.variate or zero).tensors())
    return zero.with_tensors({name: old[name] + share * t for name, t in change.tensors()})


def _second_phase(
    recipe: Recipe, engine: Engine, state: ServerState, reduced: Reduced, collected: Collected, watcher: Watcher
) -> Adapter:
    """The mean of the answers, with the weights of the first phase. A client without one is dropped from the round."""
    question = recipe.method.ask(state, reduced)
    clients = sorted(collected.uploads)
    answers = Reduction(question, frozenset({"a"}))
    results: Iterable[Upload | Failure | Summed]
    if recipe.secure.aggregation:
        results = engine.answer_summed(question, clients)
    else:
        results = in_order(engine.answer(question, clients), clients)
    for result in results:
        if isinstance(result, Summed):
            answers.add_mean(result.mean, result.weight, len(result.clients))
            collected.bytes_up += result.up
            collected.bytes_down += result.down
            continue
        try:
            if isinstance(result, Failure):
                raise RejectedUpload(result.reason)
            # Counts, losses and times were checked in the first phase.
            bare = replace(result, held=0, used=0, metrics={}, seconds={})
            check_upload(bare, question, recipe.checks, reports=False)
        except RejectedUpload as problem:
            reason = collected.dropped[result.client] = f"second phase: {problem}"
            del collected.uploads[result.client]
            watcher.client_done(result.client, reason)
            continue
        answers.add(result.adapter, collected.uploads[result.client].weight)
        collected.bytes_up += result.adapter.bytes(frozenset({"a"}))
    if not answers.count:
        raise RunError(
            f"round {state.broadcast.round}: no answer of the second phase was usable; dropped: {_reasons(collected)}"
        )
    collected.bytes_down += question.bytes(frozenset({"b"})) * len(clients)
    return answers.result().mean


def collect(
    recipe: Recipe,
    broadcast: Broadcast,
    results: Iterable[Upload | Failure | Summed],
    asked: int,
    clients: int,
    watcher: Watcher,
) -> Collected:
    """Check every result and fold the good ones in, one at a time; what is dropped is noted with its reason. `asked` of
    all `clients` were drawn.
    """
    parts = travelling_parts(recipe, broadcast.round)
    needs = recipe.method.capabilities
    # Only uploads that are the clients' factors say what averaging them loses.
    hidden = recipe.privacy.mode == "local" or recipe.secure.aggregation
    watched = not (needs.personal or needs.second_phase or hidden)
    collected = Collected(
        reduction_of(recipe, broadcast.adapter, parts, broadcast.round, clients),
        observer(recipe.diagnostics, broadcast.round, asked, seed_of(recipe.seed, broadcast.round))
        if watched
        else None,
        # Parts that do not travel have no change of their control variates.
        Reduction(broadcast.adapter.map(torch.zeros_like), parts) if recipe.local.scaffold else None,
    )
    for result in results:
        if isinstance(result, Summed):
            _take_sum(result, collected, watcher)
            continue
        reason = _take_in(recipe, broadcast.adapter, parts, result, collected)
        if reason is None and isinstance(result, Upload):
            collected.bytes_up += upload_bytes(result, parts, recipe.federation.compression)
        watcher.client_done(result.client, reason)
    return collected


def _take_sum(summed: Summed, collected: Collected, watcher: Watcher) -> None:
    """Fold in what is known of several clients together; of one of them nothing is."""
    since = time.perf_counter()
    collected.reduction.add_mean(summed.mean, summed.weight, len(summed.clients))
    collected.spend("aggregate", since)
    collected.summed = summed
    collected.bytes_up += summed.up
    collected.bytes_down += summed.down
    for client in summed.clients:
        collected.uploads[client] = Seen(summed.weight / len(summed.clients), 0, {}, {})
        watcher.client_done(client, None)


def _take_in(
    recipe: Recipe, form: Adapter, parts: frozenset[str], result: Upload | Failure, collected: Collected
) -> str | None:
    """Fold one result in, or hold it for the rule; the reason if it was dropped."""
    if isinstance(result, Failure):
        collected.dropped[result.client] = result.reason
        return result.reason
    since = time.perf_counter()
    try:
        check_upload(result, form, recipe.checks, collected.variates is not None, *told(recipe))
    except RejectedUpload as problem:
        collected.dropped[result.client] = str(problem)
        return str(problem)
    collected.spend("check", since)
    weight = weight_of(result, recipe)
    if recipe.robust.rule == "none":
        _fold_in(result, weight, collected)
    else:
        since = time.perf_counter()
        collected.held.append(in_frame(result, form, parts))
        collected.spend("aggregate", since)
    for phase, seconds in result.seconds.items():
        collected.seconds[phase] = collected.seconds.get(phase, 0.0) + seconds
    collected.uploads[result.client] = Seen(weight, result.used, result.metrics, result.layers)
    return None


def _fold_in(upload: Upload, weight: float, collected: Collected) -> None:
    """Add an upload to the sums and show it to the observer."""
    since = time.perf_counter()
    collected.reduction.add(upload.adapter, weight)
    if collected.variates is not None and upload.variate is not None:
        collected.variates.add(upload.variate, 1.0)
    collected.spend("aggregate", since)
    since = time.perf_counter()
    if collected.watch is not None:
        collected.watch.add(upload, weight)
    collected.spend("diagnose", since)


def weight_of(upload: Upload, recipe: Recipe) -> float:
    """An upload's weight by the method's rule or the recipe's; positive for every upload that passed the checks."""
    if recipe.robust.rule not in ("none", "norm"):
        return 1.0
    rule = recipe.method.weighting or recipe.federation.weighting
    return {"held": float(upload.held), "used": float(upload.used), "uniform": 1.0}[rule]
