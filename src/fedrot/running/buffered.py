"""Buffered asynchronous rounds (FedBuff, Nguyen et al., arXiv 2106.06639), on simulated time or as uploads come in.

A round is one server update, of the first K uploads that come in (`federation.buffer`); clients that are not heard go
on training from the broadcast that they were sent. `late.py` says what a late upload counts as; with all of them in
every round it is a synchronous one, bit for bit.

Deviation: a client uploads once a round at most. Having been heard it waits for the next broadcast, and another one is
sent the current one in its place, if there is one: fast clients would outweigh the others, with changes that all start
from the same broadcast. So what it trains is a function of (seed, round of its broadcast, client), as everywhere.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch

from fedrot.core.alignment import Rotations, check_finite
from fedrot.core.checks import RejectedUpload, check_upload
from fedrot.core.errors import AdapterError, RunError
from fedrot.core.late import brought_up, damping, turn_between
from fedrot.core.methods.base import Broadcast, Upload
from fedrot.core.seeding import generator
from fedrot.running.client import travelling_parts
from fedrot.running.clock import Arriving, Clock, Flight
from fedrot.running.engine import Engine, Failure, Summed, in_order
from fedrot.running.recipe import Recipe
from fedrot.running.settings import least_uploads


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

    `seconds` is what each client's training takes on simulated time; an engine whose clients take their own needs none.
    `started` is told the clients that the round begins with. Raises `RunError` where federation.deadline passes first
    and fewer than the quorum of K are in.
    """
    if isinstance(engine, Arriving):
        plan = _Plan(recipe, broadcast, clock, dict.fromkeys(engine.clients, 0.0))
        results, late = _as_they_come(recipe, engine, plan, started)
    else:
        plan = _Plan(recipe, broadcast, clock, seconds)
        results, late = _on_simulated_time(recipe, engine, plan, started)
    heard = sorted(results)
    return Heard(heard, [results[client] for client in heard], plan.clock(), late)


_Results = tuple[dict[str, Upload | Failure], dict[str, int]]  # by client: what came, and how late


def _on_simulated_time(
    recipe: Recipe, engine: Engine, plan: "_Plan", started: Callable[[Sequence[str]], None]
) -> _Results:
    """Nobody is trained before it is known to be heard, all of one broadcast together."""
    asked, brought = recipe.federation.buffer or 0, _Brought(recipe, plan.broadcast)
    results: dict[str, Upload | Failure] = {}
    late: dict[str, int] = {}
    missing = asked
    while due := plan.due(missing):
        if not results:
            started(sorted(due))
        for number in sorted(set(due.values())):
            names, sent = sorted(client for client, round in due.items() if round == number), plan.sent_in(number)
            mine = [brought(result, sent) for result in in_order(engine.train(sent, names), names)]
            engine.settle([result.client for result in mine if isinstance(result, Upload)])
            results |= {result.client: result for result in mine}
        late |= {client: plan.broadcast.round - number for client, number in due.items()}
        missing = asked - sum(isinstance(result, Upload) for result in results.values())
    return results, late


def _as_they_come(
    recipe: Recipe, engine: Arriving, plan: "_Plan", started: Callable[[Sequence[str]], None]
) -> _Results:
    """All train at once, and who is heard is known when its upload is there. What each of them would keep counts once
    the round does (`Engine.settle`).
    """
    asked, brought = recipe.federation.buffer or 0, _Brought(recipe, plan.broadcast)
    results: dict[str, Upload | Failure] = {}
    late: dict[str, int] = {}
    missing = asked
    plan.send()
    started(sorted(plan.flights))
    with closing(engine.arrivals(plan.flying)) as arrivals:
        for result in arrivals:
            number = plan.flights.pop(result.client).round
            results[result.client] = found = brought(result, plan.sent_in(number))
            late[result.client] = plan.broadcast.round - number
            missing -= isinstance(found, Upload)
            if not missing:
                break
            plan.send()
    usable, needed = asked - missing, least_uploads(recipe.federation.quorum, asked)
    if usable < needed and plan.flights:
        raise RunError(
            f"round {plan.broadcast.round}: {usable} of {asked} uploads came within {recipe.federation.deadline:g} s "
            f"(federation.deadline), the quorum is {needed} (federation.quorum); {', '.join(sorted(plan.flights))} "
            "still train; the last good state is kept"
        )
    return results, late


class _Plan:
    """Who trains from which broadcast in a round; changes as time goes on."""

    def __init__(self, recipe: Recipe, broadcast: Broadcast, clock: Clock, seconds: Mapping[str, float]) -> None:
        self._seed, self.broadcast, self._seconds = recipe.seed, broadcast, seconds
        self._most = recipe.federation.concurrency or len(seconds)
        self._now, self._sent, self.flights = clock.now, clock.sent, dict(clock.flights)
        self._broadcasts = {number: Broadcast(number, adapter) for number, adapter in clock.older.items()}
        self._broadcasts[broadcast.round] = broadcast
        self._waiting = sorted(seconds.keys() - self.flights.keys())  # for the broadcast of this round

    def sent_in(self, round: int) -> Broadcast:
        """The broadcast of a round that somebody trains from."""
        return self._broadcasts[round]

    def flying(self) -> dict[str, Broadcast]:
        """Who trains now, and from what; who was sent its broadcast first is first."""
        flights = sorted(self.flights.items(), key=lambda item: item[1].number)
        return {client: self._broadcasts[flight.round] for client, flight in flights}

    def clock(self) -> Clock:
        """The clock as it is now, with what those who train do so from."""
        rounds = sorted({flight.round for flight in self.flights.values()})
        older = {number: self._broadcasts[number].adapter for number in rounds}
        return Clock(self._now, self._sent, self.flights, older)

    def due(self, count: int) -> dict[str, int]:
        """The next clients to be heard on simulated time, with the rounds of their broadcasts; fewer where there are no
        more.
        """
        due: dict[str, int] = {}
        while len(due) < count:
            self.send()
            if not self.flights:
                break
            client = min(self.flights, key=lambda c: (self.flights[c].ends, self.flights[c].number))
            flight = self.flights.pop(client)
            self._now, due[client] = flight.ends, flight.round
        return due

    def send(self) -> None:
        """Send the broadcast to clients that wait for it, drawn one by one, as long as fewer than the most train."""
        while self._waiting and len(self.flights) < self._most:
            rng = generator(self._seed, self._sent, "send")
            client = self._waiting.pop(int(torch.randint(len(self._waiting), (), generator=rng)))
            self.flights[client] = Flight(self.broadcast.round, self._sent, self._now + self._seconds[client])
            self._sent += 1


class _Brought:
    """Checks uploads against the broadcasts that their clients were sent, and makes them ones of the current one."""

    def __init__(self, recipe: Recipe, now: Broadcast) -> None:
        self._recipe, self._now = recipe, now
        self._turns: dict[int, Rotations] = {}  # by round of the broadcast

    def __call__(self, result: Upload | Failure, sent: Broadcast) -> Upload | Failure:
        """The upload, or why it cannot be used."""
        if isinstance(result, Failure):
            return result
        late = self._now.round - sent.round
        turn = self._turn(sent) if late else {}
        try:
            check_upload(result, sent.adapter, self._recipe.checks)
            if late:
                damp = damping(self._recipe.federation.staleness, late)
                result = brought_up(result, sent.adapter, self._now.adapter, turn, damp)
                check_finite(result.adapter)
        except (RejectedUpload, AdapterError) as problem:
            return Failure(result.client, str(problem))
        return result

    def _turn(self, sent: Broadcast) -> Rotations:
        if sent.round not in self._turns:
            parts = travelling_parts(self._recipe, sent.round)
            self._turns[sent.round] = turn_between(sent.adapter, self._now.adapter, parts)
        return self._turns[sent.round]
