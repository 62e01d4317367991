"""Many sites in one process behind Flower's grid: messages go through Flower's own bytes, uploads are prepared.

What the server's process does, `GridPost`, the engine and the round, is the real thing, and so is what Flower does with
messages there: objects, hashes, bytes. HTTP, TLS and the SuperLink, which is another process, are left out.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from flwr.app import Message as FlowerMessage
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedrot import __version__
from fedrot.core.adapter import Adapter
from fedrot.core.drift import client_drift
from fedrot.core.methods.base import ALL_PARTS, Seat, Upload
from fedrot.core.packed import Layout
from fedrot.core.seeding import generator
from fedrot.running.client import Round, turns_travel
from fedrot.running.flower.records import from_records, to_records
from fedrot.running.network.messages import Message
from fedrot.running.network.tensors import read_broadcast, upload_message
from fedrot.running.recipe import Recipe

# Flower sets this where it starts an app's process; a message cannot be made without it.
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

MODEL, LABELS, HELD = "the same", ("negative", "positive"), 100
_KINDS = 3  # different uploads of a round; clients take them in turn
_LAST = 10  # replies that are there at a time where the last client answers first


@dataclass(frozen=True)
class Sizes:
    """Bytes of a request or a reply."""

    payload: int
    header: int
    flower: int  # of Flower's objects around them

    @classmethod
    def of(cls, message: Message, contents: dict[str, bytes]) -> "Sizes":
        """Of a message whose objects' bytes are these."""
        payload, header = len(message.payload), len(message.header_bytes())
        return cls(payload, header, sum(map(len, contents.values())) - payload - header)


class Wire:
    """A grid with `clients` sites of the form behind it. `backwards`: those that are asked last answer first."""

    def __init__(self, recipe: Recipe, form: Adapter, clients: int, backwards: bool = False) -> None:
        self._recipe, self._form, self._backwards = recipe, form, backwards
        self._nodes = [NodeInfo(node_id=100 + i, name=f"site-{i:04d}") for i in range(clients)]
        self._objects: dict[str, bytes] = {}  # what was pushed last, by hash
        self._asked: dict[str, list[str]] = {}  # message -> its objects
        self._prepared: list[FlowerMessage | Message] = []
        self._round = -1
        self.site_seconds = 0.0  # CPU time that is the sites' own
        self.down: list[Sizes] = []
        self.up: list[Sizes] = []

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The sites."""
        return self._nodes

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        """As `HttpGrid` does it, up to where it would send the objects that the SuperLink does not have."""
        listed = list(messages)
        with no_object_id_recompute():
            for message in listed:
                message.metadata.__dict__["_message_id"] = message.object_id
            nested = [get_all_nested_objects(message) for message in listed]
            self._asked = {m.object_id: list(found) for m, found in zip(listed, nested, strict=True)}
            objects = dict(chain.from_iterable(found.items() for found in nested))
        self._objects = {key: one.deflate() for key, one in objects.items()}
        return list(self._asked)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[FlowerMessage]:
        """The replies, whose sites answer only now: none of them waits here."""
        there = list(self._asked)[-_LAST:] if self._backwards else self._asked
        found = []
        for number in [number for number in message_ids if number in there]:
            began = time.process_time()
            reply, contents = self._answer({key: self._objects[key] for key in self._asked.pop(number)}, number)
            self.site_seconds += time.process_time() - began
            message = inflate_object_from_contents(reply, contents)
            assert isinstance(message, FlowerMessage)
            found.append(message)
        return found

    def _answer(self, contents: dict[str, bytes], number: str) -> tuple[str, dict[str, bytes]]:
        """A site's reply: its number, and its objects' bytes."""
        asked = inflate_object_from_contents(number, contents, keep_object_contents=True)
        assert isinstance(asked, FlowerMessage)
        asked.metadata.__dict__["_message_id"] = number
        request = from_records(asked.content)
        trains = request.header["kind"] == "train"
        made = self._upload(request, asked.metadata.dst_node_id) if trains else self._introduction()
        reply = FlowerMessage(to_records(made), reply_to=asked)
        with no_object_id_recompute():
            answer = {key: one.deflate() for key, one in get_all_nested_objects(reply).items()}
            name = reply.object_id
        if trains:
            self.down.append(Sizes.of(request, contents))
            self.up.append(Sizes.of(made, answer))
        return name, answer

    def _introduction(self) -> Message:
        about: dict[str, Any] = {"fedrot": __version__, "model": MODEL, "labels": list(LABELS)}
        return Message.of(schema=Layout.of(self._form, ALL_PARTS).schema, examples={"train": HELD}, **about)

    def _upload(self, request: Message, node: int) -> Message:
        """One of the round's prepared uploads."""
        if self._round != request.header["round"]:
            self._round = request.header["round"]
            self._uploads = prepared(request, self._form, self._recipe)
        return self._uploads[node % _KINDS]


def prepared(request: Message, form: Adapter, recipe: Recipe) -> Sequence[Message]:
    """Uploads for a round as sites send them, of factors that were moved at random instead of trained."""
    broadcast = read_broadcast(request, form, recipe)
    found = []
    for kind in range(_KINDS):
        rng = generator("prepared", broadcast.round, kind)
        moved = {name: t + 0.01 * torch.randn(t.shape, generator=rng) for name, t in broadcast.adapter.tensors()}
        local = broadcast.adapter.with_tensors(moved)
        made = recipe.method.client(local, broadcast, Seat(str(kind)), rng)
        turns = turns_travel(recipe, broadcast.round)
        upload = Upload(
            client=str(kind),
            adapter=made.adapter,
            held=HELD,
            used=HELD,
            rotation=made.rotation if turns else {},
            metrics={"loss": 0.6931471805599453, "steps": 10.0, "tokens": 2345.0},
            layers=client_drift(local, broadcast.adapter, made.rotation) if turns else {},
            seconds={"train": 1.2345678901234567, "align": 0.012345678901234567, "diagnose": 0.012345678901234567},
        )
        found.append(upload_message(Round(upload, {}, local), broadcast, recipe))
    return found
