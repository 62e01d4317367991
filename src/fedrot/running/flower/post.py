"""The post of `network.engine.Network` over a Flower grid: SuperLink and SuperNodes carry the messages."""

import time
from collections.abc import Iterator, Mapping, Sequence

from flwr.app import Message as FlowerMessage
from flwr.app import MessageType
from flwr.serverapp import Grid

from fedrot.running.flower.records import from_records, to_records
from fedrot.running.network.messages import Message, MessageError

# Flower's types of the requests: what a request is, its header says.
_TYPES = {"train": MessageType.TRAIN, "answer": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}


class GridPost:
    """Sites are Flower nodes. A node is known by the key that it registered with, so no site can speak for another.

    `names` gives the client's name for each public key, as Flower's registry holds keys; None: nodes without keys, on a
    network where that is not a matter, by the name that the registry gives them or else their number.
    """

    def __init__(self, grid: Grid, names: Mapping[bytes, str] | None, pause: float = 1.0) -> None:
        self._grid, self._names, self._pause = grid, names, pause

    def clients(self) -> Sequence[str]:
        """The nodes that are connected now, by their clients' names."""
        return sorted(self._nodes())

    def ask(self, requests: Mapping[str, Message], seconds: float | None) -> Iterator[tuple[str, Message | str]]:
        """Every client's reply as it comes, or why there is none; a node that is gone is said to be."""
        nodes, began = self._nodes(), time.monotonic()
        there = [client for client in requests if client in nodes]
        for client in requests:
            if client not in nodes:
                yield client, "is not connected"
        waiting = dict(zip(self._push(requests, there, nodes, seconds), there, strict=True))
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                if (number := reply.metadata.reply_to_message_id) in waiting:
                    yield waiting.pop(number), _read(reply)
            if seconds is not None and time.monotonic() - began > seconds:
                break
            if waiting:
                time.sleep(self._pause)
        for client in waiting.values():
            yield client, f"gave no answer within {seconds:g} s (federation.deadline)"

    def _push(
        self, requests: Mapping[str, Message], clients: Sequence[str], nodes: Mapping[str, int], seconds: float | None
    ) -> list[str]:
        """Send the requests; Flower's number of each message, in the clients' order."""
        sent = [
            FlowerMessage(
                content=to_records(requests[client]),
                dst_node_id=nodes[client],
                message_type=_TYPES.get(str(requests[client].header.get("kind")), MessageType.QUERY),
                ttl=seconds,
                group_id=str(requests[client].header.get("round", "")),
            )
            for client in clients
        ]
        return [str(number) for number in self._grid.push_messages(sent)]

    def _nodes(self) -> dict[str, int]:
        """The number of each connected node, by its client's name; nodes without one are passed over."""
        found: dict[str, int] = {}
        for node in self._grid.get_nodes():
            name = (node.name or str(node.node_id)) if self._names is None else self._names.get(node.public_key)
            if name is not None:
                found[name] = node.node_id
        return found


def _read(reply: FlowerMessage) -> Message | str:
    """A reply's message, or why it has none."""
    if reply.has_error():
        reason = " ".join(str(reply.error.reason or "no reason was given").split())
        return f"Flower says: {reason[:300]} (code {reply.error.code})"
    try:
        return from_records(reply.content)
    except MessageError as problem:
        return str(problem)
