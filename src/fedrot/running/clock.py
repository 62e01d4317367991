"""Simulated time: when clients of different speeds are done, in a process where they train one after the other; and who
trains between two rounds, on simulated time or between sites.

A client's round takes its local steps over its speed; what travels takes no time. It is known before the client trains
and depends on nothing but the recipe and the client's number of examples.
"""

import math
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.errors import RecipeError, choices
from fedrot.core.methods.base import Broadcast, ServerState, Upload
from fedrot.core.seeding import generator
from fedrot.running.engine import Engine, Failure
from fedrot.running.recipe import Recipe

PREFIX = "clock/"  # of its names in the server's memory


@runtime_checkable
class Timed(Protocol):
    """What an engine must have beside `engine.Engine` for simulated time: the real clients of others take their own."""

    def steps(self, client: str) -> int:
        """The local steps that a client takes in a round."""


@runtime_checkable
class Arriving(Protocol):
    """What an engine must have beside `engine.Engine` for buffered rounds on real time."""

    @property
    def clients(self) -> Collection[str]:
        """Every client's name."""

    def arrivals(self, flying: Callable[[], Mapping[str, Broadcast]]) -> Generator[Upload | Failure, None, None]:
        """What clients make of the broadcast that each was sent, as it comes, until none of `flying()` is left or
        federation.deadline has passed. Who is given flies no more before the next one is asked for, and others may.
        Closed early, it leaves the clients training, and another round's call hears them.
        """


@dataclass(frozen=True)
class Flight:
    """A client that trains."""

    round: int  # of the broadcast that it was sent
    number: int  # how many were sent one before it, in all rounds
    ends: float = 0.0  # when it uploads, in simulated seconds; between sites nobody knows


@dataclass(frozen=True)
class Clock:
    """The simulated time, and who trains meanwhile. Between rounds it is among the server's memory, so that a
    checkpoint has it.
    """

    now: float = 0.0  # seconds; between sites it stays 0
    sent: int = 0  # broadcasts that were sent to a client
    flights: Mapping[str, Flight] = field(default_factory=dict)  # by client
    older: Mapping[int, Adapter] = field(default_factory=dict)  # by round: what clients in flight train from

    @classmethod
    def taken_from(cls, state: ServerState) -> tuple[ServerState, "Clock"]:
        """The state without its clock, and the clock; at zero where it has none."""
        mine = {n.removeprefix(PREFIX): t for n, t in state.memory.items() if n.startswith(PREFIX)}
        rest = {n: t for n, t in state.memory.items() if not n.startswith(PREFIX)}
        if not mine:
            return state, cls()
        now, sent = mine["now"].tolist()
        flights: dict[str, Flight] = {}
        older: dict[int, dict[str, Tensor]] = {}
        for name, tensor in mine.items():
            kind, _, of = name.partition("/")
            if kind == "flight":
                round, number, ends = tensor.tolist()
                flights[of] = Flight(int(round), int(number), ends)
            elif kind == "older":
                round, _, of = of.partition("/")
                older.setdefault(int(round), {})[of] = tensor
        form = state.broadcast.adapter
        adapters = {round: form.with_tensors(tensors) for round, tensors in older.items()}
        return replace(state, memory=rest), cls(now, int(sent), flights, adapters)

    def put_in(self, state: ServerState) -> ServerState:
        """The state with this clock; the inverse of `taken_from`."""
        mine = {"now": _numbers(self.now, self.sent)}
        mine |= {f"flight/{client}": _numbers(f.round, f.number, f.ends) for client, f in self.flights.items()}
        mine |= {f"older/{round}/{name}": t for round, adapter in self.older.items() for name, t in adapter.tensors()}
        return replace(state, memory={**state.memory, **{PREFIX + name: t for name, t in mine.items()}})


def _numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def simulated(recipe: Recipe) -> str | None:
    """The recipe key that asks for simulated time; None where none does."""
    asked = {key: getattr(recipe.federation, key) for key in ("buffer", "speeds", "spread")}
    return next((f"federation.{key}" for key, value in asked.items() if value is not None), None)


def check_real(recipe: Recipe) -> None:
    """Raise `RecipeError` naming the key where the recipe says how fast clients are, which those at sites of their own
    are by themselves.
    """
    for key in ("speeds", "spread"):
        if getattr(recipe.federation, key) is not None:
            raise RecipeError(
                f"federation.{key}: time is simulated for clients in one process, not between sites; leave it null"
            )


def check_clients(recipe: Recipe, clients: Collection[str]) -> None:
    """Raise `RecipeError` where the recipe has a speed for a client that there is not, or a buffer for more than there
    are.
    """
    if strange := sorted(set(recipe.federation.speeds or ()) - set(clients)):
        some = choices(sorted(clients)[:8]) + (" and more" if len(clients) > 8 else "")
        raise RecipeError(f"federation.speeds: there is no client {strange[0]!r}; the clients are {some}")
    if (recipe.federation.buffer or 0) > len(clients):
        raise RecipeError(
            f"federation.buffer is {recipe.federation.buffer}, and each of the {len(clients)} clients uploads once a "
            "round at most; lower it"
        )


def seconds_by_client(recipe: Recipe, engine: Engine) -> dict[str, float]:
    """The simulated seconds that each client's local steps take; empty where the recipe asks for no simulated time.

    Raises `RecipeError` where it does and the engine has none, but for a buffer of an engine with real time.
    """
    if not isinstance(engine, Timed):
        check_real(recipe)
        if recipe.federation.buffer is not None and not isinstance(engine, Arriving):
            raise RecipeError("federation.buffer: this engine hears its clients all together; leave it null")
        return {}
    asked = simulated(recipe) is not None
    return {client: engine.steps(client) / speed_of(recipe, client) for client in engine.clients if asked}


def speed_of(recipe: Recipe, client: str) -> float:
    """A client's local steps in a simulated second."""
    given, spread = recipe.federation.speeds or {}, recipe.federation.spread or 0.0
    if client in given:
        return given[client]
    rng = generator(recipe.seed, "speed", client)
    return math.exp(spread * float(torch.randn((), generator=rng, dtype=torch.float64)))
