"""A client's half of a round: begin, train locally, turn, and upload. Alike in simulation and deployment."""

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedrot.core.adapter import Adapter
from fedrot.core.diagnostics import measured
from fedrot.core.drift import client_drift
from fedrot.core.methods.base import Broadcast, ClientState, Method, Seat, Upload
from fedrot.core.seeding import generator
from fedrot.learning.encoding import Encoded
from fedrot.learning.local import train_local
from fedrot.learning.models import ResidentModel
from fedrot.running.recipe import Recipe

HEAD, METHOD = "head/", "method/"  # prefixes of what a client keeps


@dataclass(frozen=True)
class ClientData:
    """A client's name and its training examples."""

    name: str
    data: Encoded
    indices: NDArray[np.int64]


def client_round(
    client: ClientData,
    broadcast: Broadcast,
    state: ClientState,
    recipe: Recipe,
    model: ResidentModel,
) -> tuple[Upload, ClientState]:
    """One client's work in one round, and what it keeps for the next.

    Raises `LocalFailure` when local training gives nothing usable; the client's state is then as it was.
    """
    method: Method = recipe.method
    key = (recipe.seed, broadcast.round, client.name)
    seat = Seat(client.name, {n.removeprefix(METHOD): t for n, t in state.items() if n.startswith(METHOD)})
    start = with_own_head(method.begin(broadcast, seat), state)
    parts = method.trainable(broadcast.round) - ({"head"} if recipe.lora.head == "frozen" else set())

    began = time.perf_counter()
    local = train_local(model, start, client.data, client.indices, recipe.local, parts, key)
    trained = time.perf_counter()
    result = method.client(local.adapter, broadcast, seat, generator(*key, "method"))
    aligned = time.perf_counter()
    wanted = measured(recipe.diagnostics, broadcast.round)
    drift = client_drift(local.adapter, broadcast.adapter, result.rotation) if wanted else {}
    done = time.perf_counter()

    kept = {METHOD + name: tensor for name, tensor in result.state.items()}
    adapter = result.adapter
    if recipe.lora.head == "personal":
        kept |= {HEAD + name: tensor for name, tensor in local.adapter.head.items()}
    if recipe.lora.head != "shared":
        adapter = replace(adapter, head=broadcast.adapter.head)
    upload = Upload(
        client=client.name,
        adapter=adapter,
        held=len(client.indices),
        used=local.used,
        rotation=result.rotation,
        metrics={"loss": local.loss, "steps": local.steps, "tokens": local.tokens},
        layers=drift,
        seconds={"train": trained - began, "align": aligned - trained, "diagnose": done - aligned},
    )
    return upload, kept


def with_own_head(adapter: Adapter, state: ClientState) -> Adapter:
    """The adapter with the client's own head, where it keeps one."""
    own = {name.removeprefix(HEAD): tensor for name, tensor in state.items() if name.startswith(HEAD)}
    return replace(adapter, head=own) if own else adapter
