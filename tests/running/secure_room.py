"""Clients of one secure sum without models: prepared changes, the real protocol, and faults on the way."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fakes import first_adapter

from fedrot.core.errors import FedrotError
from fedrot.core.methods.base import ALL_PARTS, Upload
from fedrot.core.seeding import generator
from fedrot.running.engine import Failure, Summed
from fedrot.running.network.messages import Message
from fedrot.running.network.secure.server import secure_sum
from fedrot.running.network.secure.site import Consents, Participant
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.secure import SecureSum, in_the_clear, total_weight

FORM = first_adapter()
Fault = Callable[[Message], Message | str | None]  # what arrives of a reply; None: nothing does


@cache
def recipe_of(count: int, *flags: str) -> Recipe:
    values: dict[str, Any] = {
        "model": {"path": "m"},
        "data": {"path": "d", "train": "t.csv"},
        "local": {"steps": 1},
        "partition": {"clients": count},
        "rounds": 5,
    }
    return parse_recipe(values, ["--secure.aggregation=true", *flags])


def lost(reply: Message) -> None:
    return None


class Room:
    """`count` clients whose names sort as they are numbered, and a server that asks them in another order."""

    def __init__(self, count: int, folder: Path, *flags: str, round: int = 2) -> None:
        recipe = recipe_of(count, *flags)
        self.held = {f"c{i:02d}": 10 + 7 * i for i in range(count)}
        self.of = SecureSum(recipe, round, "train", FORM, ALL_PARTS, total_weight(recipe, self.held.values()))
        self.folder = folder
        self.uploads = {client: self._upload(client) for client in self.held}
        self.seats: dict[str, Participant] = {}
        self.faults: dict[tuple[str, str], Fault] = {}  # (client, kind) -> what happens to the reply
        self.carried: dict[tuple[str, str], tuple[Message | None, Message]] = {}

    def _upload(self, client: str) -> Upload:
        rng = generator("change", client)
        local = FORM.map(lambda tensor: tensor + 0.1 * torch.randn(tensor.shape, generator=rng))
        metrics = {"loss": 0.5, "steps": 1, "tokens": 9}
        return Upload(client, local, held=self.held[client], used=8, metrics=metrics)

    def sit(self) -> Iterator[tuple[str, Message | str]]:
        """The replies to the request that a sum begins with."""
        for client, upload in self.uploads.items():
            consents = Consents(self.folder / client)
            seat = self.seats[client] = Participant(client, self.of, self.of.summand(upload), consents)
            yield from self._arrives(client, "ready", None, seat.opening())

    def ask(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Message | str]]:
        """Every reply, or that there is none."""
        for client in sorted(requests, reverse=True):
            request = requests[client]
            try:
                reply = self.seats[client].handle(request)
            except FedrotError as problem:
                reply = Message.refusal(str(problem))
            yield from self._arrives(client, request.header["kind"], request, reply)

    def _arrives(
        self, client: str, kind: str, request: Message | None, reply: Message
    ) -> Iterator[tuple[str, Message | str]]:
        self.carried[client, kind] = request, reply
        arrived = self.faults.get((client, kind), lambda good: good)(reply)
        yield client, "gave no answer" if arrived is None else arrived

    def run(self) -> tuple[Summed | None, dict[str, str]]:
        """The sum, if there is one, and why clients are not in it."""
        results = list(secure_sum(self.of, self.sit(), self.ask, self.held, list(self.held)))
        sums = [result for result in results if isinstance(result, Summed)]
        failed = {result.client: result.reason for result in results if isinstance(result, Failure)}
        assert len(sums) <= 1
        assert len(results) == len(sums) + len(failed)
        assert {*failed, *(sums[0].clients if sums else ())} == set(self.held)
        return (sums[0] if sums else None), failed

    def clear(self, without: Sequence[str] = ()) -> Summed:
        """What the sum of all others is, had they nothing to hide."""
        there = [upload for client, upload in self.uploads.items() if client not in without]
        (summed,) = in_the_clear(there, self.of, self.held)
        assert isinstance(summed, Summed)
        return summed

    def until(self, kind: str, client: str) -> Message:
        """The request of this kind to a client, which it has not been given: all before it went well."""
        found: list[Message] = []

        class Enough(Exception):
            pass

        def ask(requests: Mapping[str, Message]) -> Iterator[tuple[str, Message | str]]:
            if next(iter(requests.values())).header["kind"] == kind:
                found.append(requests[client])
                raise Enough
            return self.ask(requests)

        try:
            list(secure_sum(self.of, self.sit(), ask, self.held, list(self.held)))
        except Enough:
            return found[0]
        raise AssertionError(f"no request {kind}")


def says(**header: Any) -> Callable[[Message], Message]:
    """The message with other values in its header."""
    return lambda message: replace(message, header={**message.header, **header})


def payload(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Message], Message]:
    return lambda message: replace(message, payload=change(message.payload.clone()))


def flipped(place: int, bit: int = 1) -> Callable[[Message], Message]:
    """One bit of the payload is another one."""

    def changed(old: torch.Tensor) -> torch.Tensor:
        old[place] ^= bit
        return old

    return payload(changed)
