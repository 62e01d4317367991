"""A client's half of a round: begin, train locally, turn, and upload. Alike in simulation and deployment."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.alignment import Rotations, rotate
from fedrot.core.compression import compress
from fedrot.core.diagnostics import measured
from fedrot.core.drift import client_drift
from fedrot.core.errors import AdapterError
from fedrot.core.methods.base import Broadcast, ClientState, Method, Seat, Upload
from fedrot.core.packed import Layout
from fedrot.core.ranks import Frames, cut
from fedrot.core.seeding import generator
from fedrot.learning.encoding import Encoded
from fedrot.learning.local import Job, LocalFailure, LocalResult, train_clients
from fedrot.learning.models import ResidentModel
from fedrot.running.privacy import guarded, of_examples, silent
from fedrot.running.recipe import Recipe

HEAD, METHOD, VARIATE, LOST = "head/", "method/", "variate/", "lost/"  # prefixes of what a client keeps


@dataclass(frozen=True)
class ClientData:
    """A client's name and its training examples."""

    name: str
    data: Encoded
    indices: NDArray[np.int64]


@dataclass(frozen=True)
class Round:
    """What a client made of a round."""

    upload: Upload
    kept: ClientState
    trained: Adapter  # its factors before the method made an upload of them, at the global rank
    payload: Tensor | None = None  # (bytes,) what travels for `upload.adapter`, where uploads are compressed


@dataclass(frozen=True)
class Begun:
    """A client's round up to its local steps, and what is needed to go on after them."""

    client: ClientData
    seat: Seat
    start: Adapter  # what it trains from, at the global rank
    frames: Frames | None  # of a client of a smaller rank
    variate: "_Variate | None"
    job: Job
    lost: ClientState = field(default_factory=dict)  # by flat name: what compression lost of earlier uploads


def begin_round(client: ClientData, broadcast: Broadcast, state: ClientState, recipe: Recipe) -> Begun:
    """What a client trains in this round, and from where."""
    method: Method = recipe.method
    seat = Seat(client.name, _below(METHOD, state))
    start = with_own_head(method.begin(broadcast, seat), state)
    rank = (recipe.lora.ranks or {}).get(client.name, recipe.lora.rank)
    frames = method.narrow(start, rank) if rank != recipe.lora.rank else None
    variate = _Variate.of(broadcast, state) if recipe.local.scaffold else None
    first = cut(start, frames, recipe.lora.scale(rank)) if frames else start
    key = (recipe.seed, broadcast.round, client.name)
    job = Job(first, client.indices, key, variate.correction() if variate else None)
    return Begun(client, seat, start, frames, variate, job, lost=_below(LOST, state))


def train_begun(
    begun: Sequence[Begun], broadcast: Broadcast, recipe: Recipe, model: ResidentModel
) -> list[LocalResult | LocalFailure]:
    """The local steps of these clients, which hold examples of one data set, in one stack."""
    parts = recipe.method.trainable(broadcast.round) - ({"head"} if recipe.lora.head == "frozen" else set())
    data, packing = begun[0].client.data, bool(recipe.compute.packing)
    jobs = [one.job for one in begun]
    return train_clients(model, data, jobs, recipe.local, parts, packing, of_examples(recipe))


def finish_round(begun: Begun, local: LocalResult, broadcast: Broadcast, recipe: Recipe, seconds: float) -> Round:
    """What a client makes of its trained adapter; `seconds` are what training it took. Raises `LocalFailure` where it
    cannot be compressed.
    """
    name, start, frames, variate = begun.client.name, begun.start, begun.frames, begun.variate
    trained = recipe.method.widen(local.adapter, frames, start) if frames else local.adapter
    ended = time.perf_counter()
    result = recipe.method.client(trained, broadcast, begun.seat, generator(*begun.job.key, "method"))
    aligned = time.perf_counter()
    hidden = recipe.privacy.mode == "local" or recipe.secure.aggregation
    wanted = measured(recipe.diagnostics, broadcast.round) and not hidden
    drift = client_drift(trained, _began_with(begun, recipe), result.rotation) if wanted else {}
    done = time.perf_counter()

    kept = {METHOD + name: tensor for name, tensor in result.state.items()}
    if recipe.lora.head == "personal":
        kept |= {HEAD + name: tensor for name, tensor in trained.head.items()}
    change, parts = None, travelling_parts(recipe, broadcast.round)
    if variate:
        own, change = variate.after(local.gradient, result.rotation, parts)
        kept |= {VARIATE + name: tensor for name, tensor in own.items()}
    spent = {"train": seconds, "align": aligned - ended, "diagnose": done - aligned}
    since = time.perf_counter()
    sent, payload, lost = _sent(begun, only_travelling(result.adapter, broadcast.adapter, parts), broadcast, recipe)
    if payload is not None:
        spent["compress"] = time.perf_counter() - since
        if recipe.federation.feedback:
            # Parts that did not travel in this round keep what they lost in an earlier one.
            kept |= {LOST + name: tensor for name, tensor in {**begun.lost, **lost}.items()}
    upload = Upload(
        client=name,
        adapter=sent,
        held=len(begun.client.indices),
        used=local.used,
        rotation=result.rotation if turns_travel(recipe, broadcast.round) else {},
        metrics={"loss": local.loss, "steps": local.steps, "tokens": local.tokens},
        layers=drift,
        seconds=spent,
        variate=change,
    )
    return Round(silent(upload, recipe), kept, trained, payload)


def _began_with(begun: Begun, recipe: Recipe) -> Adapter:
    """What local training began with, at the global rank: what a narrow client was not sent is no move of its own."""
    if not begun.frames:
        return begun.start
    return recipe.method.widen(begun.job.adapter, begun.frames, begun.start)


def _noise_alone(begun: Begun, broadcast: Broadcast, recipe: Recipe) -> Round:
    """What a client sends in local mode that has nothing usable: that it failed would say something of its data."""
    sent, payload, _ = _sent(begun, broadcast.adapter, broadcast, recipe)
    return Round(Upload(begun.client.name, sent, held=0, used=0), {}, begun.start, payload)


def _sent(
    begun: Begun, adapter: Adapter, broadcast: Broadcast, recipe: Recipe
) -> tuple[Adapter, Tensor | None, ClientState]:
    """(what the server makes of an adapter that is sent to it, the bytes that travel where uploads are compressed, what
    that lost). Raises `LocalFailure` where it cannot be compressed.
    """
    parts, codec = travelling_parts(recipe, broadcast.round), recipe.federation.compression
    sent = guarded(adapter, broadcast.adapter, parts, recipe, *begun.job.key)
    if codec == "none":
        return sent, None, {}
    lost = begun.lost if recipe.federation.feedback else None
    rng = generator(*begun.job.key, "compress")
    try:
        made = compress(sent, broadcast.adapter, Layout.of(broadcast.adapter, parts), codec, rng, lost)
    except AdapterError as problem:
        raise LocalFailure(str(problem)) from None
    return made.adapter, made.payload, made.lost


def play_clients(
    clients: Sequence[tuple[ClientData, ClientState]], broadcast: Broadcast, recipe: Recipe, model: ResidentModel
) -> Iterator[tuple[str, Round | LocalFailure]]:
    """One round of these clients' work, their local steps in one stack; by client, in their order.

    A client whose local training gives nothing usable has a `LocalFailure`; its state is then as it was. With
    privacy.mode local it sends noise instead, and the reason stays in its own log.
    """
    began = time.perf_counter()
    begun = [begin_round(client, broadcast, state, recipe) for client, state in clients]
    results = train_begun(begun, broadcast, recipe, model)
    share = (time.perf_counter() - began) / len(begun)
    for one, local in zip(begun, results, strict=True):
        made = local if isinstance(local, LocalFailure) else _finished(one, local, broadcast, recipe, share)
        if isinstance(made, LocalFailure) and recipe.privacy.mode == "local":
            logging.getLogger("fedrot").warning("%s: %s; it sends noise alone", one.client.name, made)
            made = _noise_alone(one, broadcast, recipe)
        yield one.client.name, made


def _finished(
    begun: Begun, local: LocalResult, broadcast: Broadcast, recipe: Recipe, seconds: float
) -> Round | LocalFailure:
    try:
        return finish_round(begun, local, broadcast, recipe, seconds)
    except LocalFailure as problem:
        return problem


def client_round(
    client: ClientData, broadcast: Broadcast, state: ClientState, recipe: Recipe, model: ResidentModel
) -> Round:
    """One client's work in one round, alone. Raises `LocalFailure` where `play_clients` gives one."""
    ((_, made),) = play_clients([(client, state)], broadcast, recipe, model)
    if isinstance(made, LocalFailure):
        raise made
    return made


def travelling_parts(recipe: Recipe, round: int) -> frozenset[str]:
    """The parts of the adapter that clients upload in this round."""
    return recipe.method.uploads(round) - (frozenset() if recipe.lora.head == "shared" else {"head"})


def turns_travel(recipe: Recipe, round: int) -> bool:
    """Whether clients report the rotations of their factors: they do where the server measures what averaging loses. An
    upload to a buffer may come in any later round.
    """
    late = recipe.federation.buffer is not None and recipe.diagnostics.every > 0
    return late or measured(recipe.diagnostics, round)


def keeps_state(recipe: Recipe) -> bool:
    """Whether a client keeps anything between rounds."""
    feedback = recipe.federation.compression != "none" and recipe.federation.feedback
    own_head, variates = recipe.lora.head == "personal", recipe.local.scaffold
    return recipe.method.capabilities.client_state or own_head or variates or feedback


def only_travelling(adapter: Adapter, broadcast: Adapter, parts: frozenset[str]) -> Adapter:
    """`adapter` with the broadcast's own tensors where they do not travel."""
    sent = {name: tensor for name, tensor in adapter.tensors() if part_of(name) in parts}
    return broadcast.with_tensors(dict(broadcast.tensors()) | sent)


def with_own_head(adapter: Adapter, state: ClientState) -> Adapter:
    """The adapter with the client's own head, where it keeps one."""
    own = _below(HEAD, state)
    return replace(adapter, head=own) if own else adapter


def own_model(recipe: Recipe, broadcast: Broadcast, client: str, state: ClientState) -> Adapter:
    """The adapter that a client would use itself: the broadcast's, with what it keeps put in."""
    return with_own_head(recipe.method.begin(broadcast, Seat(client, _below(METHOD, state))), state)


def _below(prefix: str, state: ClientState) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class _Variate:
    """SCAFFOLD's control variates, by flat tensor name, in the frame of the broadcast."""

    server: Mapping[str, Tensor]  # c
    own: Mapping[str, Tensor]  # c_i
    form: Adapter

    @classmethod
    def of(cls, broadcast: Broadcast, state: ClientState) -> "_Variate":
        """Zero before anything is known."""
        zero = broadcast.adapter.map(torch.zeros_like)
        own = dict(zero.tensors()) | _below(VARIATE, state)
        return cls(dict((broadcast.variate or zero).tensors()), own, broadcast.adapter)

    def correction(self) -> dict[str, Tensor]:
        """What is added to every gradient: c - c_i."""
        return {name: c - self.own[name] for name, c in self.server.items()}

    def after(
        self, gradient: Mapping[str, Tensor], rotation: Rotations, parts: frozenset[str]
    ) -> tuple[dict[str, Tensor], Adapter]:
        """(c_i+, c_i+ - c_i): the mean gradient of the steps, turned as the factors were; others stay."""
        filled = self.form.with_tensors(dict(self.own) | dict(gradient))
        turned = dict((rotate(filled, rotation) if rotation else filled).tensors())
        fresh = {n: turned[n] if n in gradient and part_of(n) in parts else c for n, c in self.own.items()}
        return fresh, self.form.with_tensors({n: t - self.own[n] for n, t in fresh.items()})
