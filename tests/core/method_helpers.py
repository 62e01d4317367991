"""Rounds of a method on plain adapters, as its contract says: no engine, no training, no recipe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from core_helpers import make_adapter, moved
from torch import Tensor

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.alignment import Rotations
from fedrot.core.methods import Method, get_method, methods
from fedrot.core.methods.base import Broadcast, ClientState, Seat, ServerState
from fedrot.core.ranks import cut
from fedrot.core.reduce import Reduction
from fedrot.core.seeding import generator, seed_of

# (d_in, d_out): two layers of one shape and one of another, none square, so that a transposed update cannot be added.
LAYERS = {"enc.0.query": (12, 9), "enc.0.value": (12, 9), "enc.1.out": (7, 16)}
NAMES = ("north", "south", "west")

every_method = pytest.mark.parametrize("name", list(methods()))
every_round = pytest.mark.parametrize("number", range(3))

Train = Callable[[Adapter, str], Adapter]  # (start, client's name) -> what local training makes of it
Weights = dict[str, Tensor]  # layer -> a dense matrix in float64


@dataclass(frozen=True)
class Client:
    """One of a round's clients; `rank` and `scale` are given where they are not the adapter's."""

    name: str
    weight: float = 1.0
    rank: int | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Played:
    """A round that was played; what belongs to a client is in the order of the clients."""

    before: ServerState
    after: ServerState
    clients: tuple[Client, ...]
    trained: tuple[Adapter, ...]  # at the adapter's rank
    sent: tuple[Adapter, ...]  # complete: the broadcast's own tensors where they did not travel
    rotations: tuple[Rotations, ...]
    kept: Mapping[str, ClientState] = field(default_factory=dict)

    @property
    def shares(self) -> list[float]:
        """The clients' weights, summing to one."""
        total = sum(client.weight for client in self.clients)
        return [client.weight / total for client in self.clients]


def clients(*weights: float) -> tuple[Client, ...]:
    """One client a weight."""
    return tuple(Client(name, weight) for name, weight in zip(NAMES, weights, strict=False))


def noise(size: float = 0.3, seed: int = 0) -> Train:
    """Local training that moves every tensor at random, each client in its own way."""
    return lambda start, client: moved(start, seed_of(seed, client), size)


def first_state(method: Method, adapter: Adapter, number: int = 0) -> ServerState:
    """The method's first state, its broadcast put at a later round."""
    state = method.start(adapter)
    return replace(state, broadcast=replace(state.broadcast, round=number))


def only(adapter: Adapter, base: Adapter, parts: frozenset[str]) -> Adapter:
    """`adapter` in `parts`, `base` in the others."""
    mine = dict(adapter.tensors())
    return base.with_tensors({n: mine[n] if part_of(n) in parts else t for n, t in base.tensors()})


def play(
    method: Method,
    state: ServerState,
    taking_part: Sequence[Client],
    train: Train,
    kept: Mapping[str, ClientState] | None = None,
) -> Played:
    """One round, as server and clients run it."""
    broadcast, known = state.broadcast, dict(kept or {})
    number, parts = broadcast.round, method.uploads(broadcast.round)
    reduction = Reduction(broadcast.adapter, parts, keep=method.capabilities.reduction == "factors")
    trained, sent, rotations = [], [], []
    for client in taking_part:
        seat = Seat(client.name, known.get(client.name, {}))
        start = method.begin(broadcast, seat)
        frames = method.narrow(start, client.rank) if client.rank else {}
        first = cut(start, frames, client.scale) if frames else start
        local = only(train(first, client.name), first, method.trainable(number))
        local = method.widen(local, frames, start) if frames else local
        result = method.client(local, broadcast, seat, generator("test", number, client.name))
        upload = only(result.adapter, broadcast.adapter, parts)
        reduction.add(upload, client.weight)
        trained.append(local)
        sent.append(upload)
        rotations.append(result.rotation)
        known[client.name] = result.state
    reduced = reduction.result()
    if method.capabilities.second_phase:
        question = method.ask(state, reduced)
        answers = Reduction(question, frozenset({"a"}))
        for client, local in zip(taking_part, trained, strict=True):
            answers.add(only(method.answer(local, question), question, frozenset({"a"})), client.weight)
        reduced = replace(reduced, answer=answers.result().mean)
    after = method.server(state, reduced, generator("test", number, "server"))
    return Played(state, after, tuple(taking_part), tuple(trained), tuple(sent), tuple(rotations), known)


def rounds(
    method: Method, adapter: Adapter, taking_part: Sequence[Client], count: int, size: float = 0.3
) -> list[Played]:
    """So many rounds from the first one on, each with noise of its own."""
    state, kept, played = method.start(adapter), {}, []
    for number in range(count):
        played.append(play(method, state, taking_part, noise(size, number), kept))
        state, kept = played[-1].after, played[-1].kept
    return played


def one_round(
    name: str, number: int = 1, taking_part: Sequence[Client] = (), train: Train | None = None, **form: object
) -> Played:
    """A round of the method with its default settings, from a random adapter in double precision."""
    method = get_method(name)()
    adapter = make_adapter(0, **{"shapes": LAYERS, "dtype": torch.float64, **form})
    return play(method, first_state(method, adapter, number), taking_part or clients(1, 5, 2), train or noise())


def updates(*adapters: Adapter | None) -> Weights:
    """The dense change of each base weight, in that weight's own orientation: the sum over what is given."""
    found: Weights = {}
    for adapter in adapters:
        for name, pair in (adapter.layers if adapter else {}).items():
            change = pair.scale * (pair.b.double() @ pair.a.double())
            change = change.T if pair.fan_in_fan_out else change
            found[name] = found[name] + change if name in found else change
    return found


def global_change(broadcast: Broadcast) -> Weights:
    """What this broadcast changes of a client's base weights: by the adapter, and what was added to the base."""
    return updates(broadcast.adapter, broadcast.base_delta)


def models(method: Method, played: Played) -> list[Weights]:
    """The dense changes that come out of a round: the global one, or where models are personal each client's."""
    if not method.capabilities.personal:
        return [global_change(played.after.broadcast)]
    seats = [Seat(client.name, played.kept[client.name]) for client in played.clients]
    return [updates(method.begin(played.after.broadcast, seat), played.after.broadcast.base_delta) for seat in seats]


def ideal_change(played: Played) -> Weights:
    """The weighted mean of the clients' own models, dense."""
    base = updates(played.before.broadcast.base_delta)
    own = [updates(local) for local in played.trained]
    return {n: base.get(n, 0) + sum(p * u[n] for p, u in zip(played.shares, own, strict=True)) for n in own[0]}


def base_weight(name: str, change: Tensor) -> Tensor:
    """A base weight W0 for this layer, of the shape that the change must have."""
    return torch.randn(change.shape, generator=generator("base", name), dtype=torch.float64)


def sizes(played: Played) -> dict[str, float]:
    """How large a layer's update may be, for tolerances: the clients' factors' norms multiplied."""
    return {
        name: 1e-30
        + max(pair.scale * float(local.layers[name].b.norm() * local.layers[name].a.norm()) for local in played.trained)
        for name, pair in played.before.broadcast.adapter.layers.items()
    }


def assert_changes(found: Weights, expected: Weights, size: Mapping[str, float], rel: float) -> None:
    """W0 + found is W0 + expected to `rel` of the layer's size, in the base weight's own orientation."""
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert found[name].shape == change.shape, name
        weight = base_weight(name, change)
        off = float(((weight + found[name]) - (weight + change)).norm())
        assert off <= rel * (size[name] + float(weight.norm()) * 1e-3), (name, off, size[name])


def apart(one: Weights, other: Weights) -> float:
    """The largest relative distance of two changes, over layers."""
    return max(float((one[n] - other[n]).norm() / (other[n].norm() + 1e-30)) for n in other)
