"""Replies that are spoiled on their way, and a run whose second round can be played with and without them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fakes import Silent
from network_sites import ONE_BY_ONE, LocalPost, deployed, divide_files
from tiny_runs import Tiny, assert_equal, begin

from fedrot.core.methods.base import ServerState
from fedrot.running.engine import Failure
from fedrot.running.network.engine import Network
from fedrot.running.network.messages import Message, MessageError
from fedrot.running.rounds import play_round

OTHERS = ["books", "films"]
Spoil = Callable[[Message], Message | str | None]


@dataclass
class Known:
    """A run after its first round, whose sites keep nothing, so that its second round can be played over and over."""

    tiny: Tiny
    post: LocalPost
    without: ServerState  # what the second round gives in one process where music's upload was dropped

    @property
    def engine(self) -> Network:
        return self.tiny.engine  # type: ignore[return-value]

    def again(self, **faults: Spoil) -> tuple[ServerState, dict[str, Any]]:
        """The second round with these faults of music's replies."""
        self.post.faults = {("music", kind): self._fault(spoil) for kind, spoil in faults.items()}
        return play_round(self.tiny.recipe, self.engine, self.tiny.state, Silent())

    @staticmethod
    def _fault(spoil: Spoil) -> Callable[[Message, Message], Message | str | None]:
        return lambda request, reply: spoil(reply)

    def dropped(self, spoil: Spoil) -> str:
        """The reason why music's upload was dropped; the state is checked to be as without it."""
        state, record = self.again(train=spoil)
        assert record["clients"]["used"] == OTHERS
        assert list(record["clients"]["dropped"]) == ["music"]
        assert_equal(state.broadcast.adapter, self.without.broadcast.adapter)
        reason: str = record["clients"]["dropped"]["music"]
        assert reason.isprintable()  # it goes into the log and the report
        assert len(reason) <= 500
        json.dumps(record, allow_nan=False)
        return reason


def known_run(values: dict[str, Any], data: Path, folder: Path) -> Known:
    """The run after its first round, with a bound on uploads' norms."""
    flags = ("--checks.max_norm", "1e3")
    post = LocalPost(divide_files(data, folder / "sites"), folder / "memory")
    tiny = deployed(values, post, *flags).play()
    here = begin(values, *ONE_BY_ONE, *flags).play()
    assert_equal(tiny.adapter, here.adapter)
    here.engine.faults["music"] = lambda upload: Failure(upload.client, "lost")
    return Known(tiny, post, here.play().state)


def arrived(header: bytes, payload: torch.Tensor) -> Message | str:
    """What a post makes of bytes: a message, or why there is none."""
    try:
        return Message.from_parts(header, payload)
    except MessageError as problem:
        return str(problem)


def says(**header: Any) -> Spoil:
    return lambda reply: arrived(json.dumps({**reply.header, **header}).encode(), reply.payload)


def lacks(key: str) -> Spoil:
    return lambda reply: replace(reply, header={k: v for k, v in reply.header.items() if k != key})


def within(key: str, change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """A change of one value of the header."""
    return lambda reply: says(**{key: change(dict(reply.header[key]))})(reply)


def of_a_layer(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """A change of the numbers of the first layer."""

    def changed(layers: dict[str, Any]) -> dict[str, Any]:
        first = min(layers)
        return {**layers, first: change(layers[first])}

    return within("layers", changed)


def header(text: bytes) -> Spoil:
    return lambda reply: arrived(text, reply.payload)


def payload(change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return lambda reply: replace(reply, payload=change(reply.payload))


def number(place: int, value: float) -> Spoil:
    """One float32 of the payload; from the end are the rotations of 2 x 2."""

    def changed(old: torch.Tensor) -> torch.Tensor:
        numbers = old.clone().view(torch.float32)
        numbers[place] = value
        return numbers.view(torch.uint8)

    return payload(changed)
