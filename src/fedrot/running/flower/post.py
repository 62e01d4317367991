"""The post of `network.engine.Network` over a Flower grid: SuperLink and SuperNodes carry the messages."""

import math
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from flwr.app import Message as FlowerMessage
from flwr.app import MessageType
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo

from fedrot.running.flower.records import from_records, payload_record, said, to_records
from fedrot.running.network.messages import Message, MessageError

# Flower's types of the requests: what a request is, its header says.
_TYPES = {"train": MessageType.TRAIN, "answer": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}
# Bytes of replies that are taken from the SuperLink at a time.
_TAKEN = 16 << 20
# What Flower says where a node, or what it was sent, is gone.
_GONE = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)


class PushPull(Protocol):
    """What a post needs of a grid; Flower's `Grid` has it."""

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The connected nodes."""

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        """Send messages; their numbers."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[FlowerMessage]:
        """The replies that are there; each is given once."""


@dataclass
class _Asked:
    """A request to a client, until its reply is there."""

    request: Message
    number: str | None = None  # Flower's of the message; None: it has not been sent yet
    since: str = ""  # when the node that it was sent to connected
    until: float = math.inf  # when Flower drops the message, in monotonic seconds
    reply: Message | str | None = None  # taken from Flower, which gives it once


@dataclass(frozen=True)
class _Node:
    number: int
    since: str  # when it connected: a node that was started again has forgotten what it was sent


class GridPost:
    """Sites are Flower nodes. A node is known by the key that it registered with, so no site can speak for another.

    Args:
        grid: where they are connected.
        names: the client's name for each public key, as Flower's registry holds keys; None: nodes without keys, on a
            network where that is not a matter, by the name that the registry gives them or else their number.
        pause: seconds between two looks for replies.
        grace: seconds that a node which is gone may take to come back; it is asked again then.
    """

    def __init__(
        self, grid: PushPull, names: Mapping[bytes, str] | None, pause: float = 1.0, grace: float = 0.0
    ) -> None:
        self._grid, self._names, self._pause, self._grace = grid, names, pause, grace
        self._seen: dict[str, float] = {}  # client -> when its node was last connected, in monotonic seconds
        self._left: dict[str, _Asked] = {}  # client -> what was asked of it when whoever asked stopped waiting

    def clients(self) -> Sequence[str]:
        """The nodes that are connected now, by their clients' names."""
        return sorted(self._nodes())

    def ask(
        self, requests: Mapping[str, Message], seconds: float | None
    ) -> Generator[tuple[str, Message | str], None, None]:
        """Every client's reply as it comes, or why there is none; a node that is gone is said to be.

        What was asked before, by an iterator that was closed, and is asked again is not sent again: the reply to the
        message that is on its way is waited for. A reply to anything else that was asked before is never taken.
        """
        waiting = {client: self._taken_up(client, request) for client, request in requests.items()}
        end = math.inf if seconds is None else time.monotonic() + seconds
        try:
            while True:
                nodes = self._nodes()
                self._send(waiting, nodes, seconds, end)
                for client, reply in self._pull(waiting):
                    del waiting[client]
                    yield client, reply
                over = time.monotonic()
                for client in [c for c in waiting if c not in nodes and over - self._seen.get(c, -1e9) >= self._grace]:
                    del waiting[client]
                    yield client, "is not connected"
                if not waiting or over > end:
                    break
                time.sleep(self._pause)
            for client in list(waiting):
                del waiting[client]
                yield client, f"gave no answer within {seconds:g} s (federation.deadline)"
        finally:
            self._left |= waiting

    def _taken_up(self, client: str, request: Message) -> _Asked:
        """What is on its way to a client, if it is this request; the request as a new one otherwise."""
        left = self._left.pop(client, None)
        return left if left is not None and _same(left.request, request) else _Asked(request)

    def _send(
        self, waiting: Mapping[str, _Asked], nodes: Mapping[str, _Node], seconds: float | None, end: float
    ) -> None:
        """Send what its node does not have: what is new, what it had before it was started again, and what Flower
        dropped since it was asked for first.
        """
        now = time.monotonic()

        def missing(client: str, asked: _Asked) -> bool:
            if client not in nodes or asked.reply is not None:
                return False
            return asked.number is None or asked.since != nodes[client].since or asked.until < min(now, end)

        due = {client: asked for client, asked in waiting.items() if missing(client, asked)}
        # A broadcast is one payload: it is copied, hashed and sent to the SuperLink once.
        payloads = {id(asked.request.payload): asked.request.payload for asked in due.values()}
        records = {key: payload_record(payload) for key, payload in payloads.items()}
        messages = [
            FlowerMessage(
                content=to_records(asked.request, records[id(asked.request.payload)]),
                dst_node_id=nodes[client].number,
                message_type=_TYPES.get(str(asked.request.header.get("kind")), MessageType.QUERY),
                ttl=seconds,
                group_id=str(asked.request.header.get("round", "")),
            )
            for client, asked in due.items()
        ]
        numbers = self._grid.push_messages(messages) if messages else ()
        for (client, asked), message, number in zip(due.items(), messages, numbers, strict=True):
            asked.number, asked.since, asked.until = str(number), nodes[client].since, now + message.metadata.ttl

    def _pull(self, waiting: Mapping[str, _Asked]) -> Iterator[tuple[str, Message | str]]:
        """The replies that are there, a part of them at a time in memory, in the order in which clients were asked.

        What Flower says of a node that is gone is none: it may come back.
        """
        for name, asked in list(waiting.items()):
            if asked.reply is not None:
                yield name, asked.reply
        numbers = {asked.number: client for client, asked in waiting.items() if asked.number is not None}
        # A reply has about the size of its request.
        largest = max((len(asked.request.payload) for asked in waiting.values()), default=0)
        due, size = list(numbers), max(1, _TAKEN // max(1, largest))
        for part in (due[start : start + size] for start in range(0, len(due), size)):
            found: list[tuple[str, Message | str]] = []
            for reply in self._grid.pull_messages(part):
                client = numbers.pop(reply.metadata.reply_to_message_id, None)
                if client is None:
                    continue
                if reply.has_error() and reply.error.code in _GONE and self._grace:
                    waiting[client].number = None
                else:
                    answer = waiting[client].reply = _read(reply)
                    found.append((client, answer))
            yield from found

    def _nodes(self) -> dict[str, _Node]:
        """Each connected node, by its client's name; nodes without one are passed over."""
        found: dict[str, _Node] = {}
        for node in self._grid.get_nodes():
            name = (node.name or str(node.node_id)) if self._names is None else self._names.get(node.public_key)
            if name is not None:
                found[name] = _Node(node.node_id, node.last_activated_at)
        self._seen |= dict.fromkeys(found, time.monotonic())
        return found


def _same(one: Message, other: Message) -> bool:
    """Whether two requests are the same bytes."""
    alike = one.payload is other.payload or torch.equal(one.payload, other.payload)
    return alike and one.header_bytes() == other.header_bytes()


def _read(reply: FlowerMessage) -> Message | str:
    """A reply's message, or why it has none."""
    if reply.has_error():
        return said(reply.error)
    try:
        return from_records(reply.content)
    except MessageError as problem:
        return str(problem)
