"""Buffered asynchronous rounds (FedBuff, Nguyen et al., arXiv 2106.06639), on simulated time.

A round is one server update, of the first K uploads that come in (`federation.buffer`); clients that are not heard go
on training from the broadcast that they were sent. `late.py` says what a late upload counts as; with all of them in
every round it is a synchronous one, bit for bit.

Deviation: a client uploads once a round at most. Having been heard it waits for the next broadcast, and another one is
sent the current one in its place, if there is one: fast clients would outweigh the others, with changes that all start
from the same broadcast. So what it trains is a function of (seed, round of its broadcast, client), as everywhere.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedrot.core.alignment import check_finite
from fedrot.core.checks import RejectedUpload, check_upload
from fedrot.core.errors import AdapterError
from fedrot.core.late import brought_up, damping, turn_between
from fedrot.core.methods.base import Broadcast, Upload
from fedrot.core.seeding import generator
from fedrot.running.client import travelling_parts
from fedrot.running.clock import Clock, Flight
from fedrot.running.engine import Engine, Failure, Summed, in_order
from fedrot.running.recipe import Recipe


@dataclass(frozen=True)
class Heard:
    """Who was heard in a round, and what came."""

    clients: Sequence[str]  # sorted
    results: Iterable[Upload | Failure | Summed]  # in the clients' order
    clock: Clock  # after the last of them
    late: Mapping[str, int] = field(default_factory=dict)  # client -> rounds since the broadcast that it trained from


def fill_buffer(
    recipe: Recipe,
    engine: Engine,
    broadcast: Broadcast,
    clock: Clock,
    seconds: Mapping[str, float],
    started: Callable[[Sequence[str]], None],
) -> Heard:
    """Send the broadcast out and let time go on until K usable uploads are in, or every client was heard.

    Nobody is trained before it is known to be heard, all of one broadcast together. `seconds` is what each client's
    training takes; `started` is told the clients that the round begins with.
    """
    asked = recipe.federation.buffer or 0
    plan = _Plan(recipe, broadcast.round, clock, seconds)
    late: dict[str, int] = {}
    results: dict[str, Upload | Failure] = {}
    missing = asked
    while due := plan.due(missing):
        if not results:
            started(sorted(due))
        for number in sorted(set(due.values())):
            names = sorted(client for client, round in due.items() if round == number)
            sent = broadcast if number == broadcast.round else Broadcast(number, clock.older[number])
            results |= {result.client: result for result in _trained(recipe, engine, sent, broadcast, names)}
        late |= {client: broadcast.round - number for client, number in due.items()}
        missing = asked - sum(isinstance(result, Upload) for result in results.values())
    adapters = {**clock.older, broadcast.round: broadcast.adapter}
    older = {number: adapters[number] for number in sorted({flight.round for flight in plan.flights.values()})}
    heard = sorted(results)
    return Heard(heard, [results[client] for client in heard], Clock(plan.now, plan.sent, plan.flights, older), late)


class _Plan:
    """Who trains when in a round; changes as time goes on."""

    def __init__(self, recipe: Recipe, round: int, clock: Clock, seconds: Mapping[str, float]) -> None:
        self._seed, self._round, self._seconds = recipe.seed, round, seconds
        self._most = recipe.federation.concurrency or len(seconds)
        self.now, self.sent, self.flights = clock.now, clock.sent, dict(clock.flights)
        self._waiting = sorted(seconds.keys() - self.flights.keys())  # for the broadcast of this round

    def due(self, count: int) -> dict[str, int]:
        """The next clients to be heard, with the rounds of their broadcasts; fewer where there are no more."""
        due: dict[str, int] = {}
        while len(due) < count:
            self._send()
            if not self.flights:
                break
            client = min(self.flights, key=lambda c: (self.flights[c].ends, self.flights[c].number))
            flight = self.flights.pop(client)
            self.now, due[client] = flight.ends, flight.round
        return due

    def _send(self) -> None:
        """Send the broadcast to clients that wait for it, drawn one by one, as long as fewer than the most train."""
        while self._waiting and len(self.flights) < self._most:
            rng = generator(self._seed, self.sent, "send")
            client = self._waiting.pop(int(torch.randint(len(self._waiting), (), generator=rng)))
            self.flights[client] = Flight(self._round, self.sent, self.now + self._seconds[client])
            self.sent += 1


def _trained(
    recipe: Recipe, engine: Engine, sent: Broadcast, now: Broadcast, clients: Sequence[str]
) -> list[Upload | Failure]:
    """What clients make of the broadcast that they were sent, checked against it, as uploads of the current one."""
    parts, late = travelling_parts(recipe, sent.round), now.round - sent.round
    turn = turn_between(sent.adapter, now.adapter, parts) if late else {}
    damp = damping(recipe.federation.staleness, late)
    results: list[Upload | Failure] = []
    for result in in_order(engine.train(sent, clients), clients):
        if isinstance(result, Upload):
            try:
                check_upload(result, sent.adapter, recipe.checks)
                if late:
                    result = brought_up(result, sent.adapter, now.adapter, turn, damp)
                    check_finite(result.adapter)
            except (RejectedUpload, AdapterError) as problem:
                result = Failure(result.client, str(problem))
        results.append(result)
    engine.settle([result.client for result in results if isinstance(result, Upload)])
    return results
