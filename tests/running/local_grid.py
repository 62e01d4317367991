"""Flower's grid in this process: nodes are ClientApps; messages go through Flower's own bytes."""

import time
from collections.abc import Iterable, Mapping
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

# Flower sets this where it starts an app's process; a message cannot be made without it.
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


class LocalGrid(Grid):
    """Nodes by name, each with an app and a public key. A node in `gone` is no longer connected, one in `silent` never
    answers, one in `broken` raises.
    """

    def __init__(self, apps: Mapping[str, ClientApp]) -> None:
        self.apps = dict(apps)
        self.numbers = {name: 100 + i for i, name in enumerate(apps)}
        self.gone: set[str] = set()
        self.silent: set[str] = set()
        self.broken: set[str] = set()
        self.sent: list[Message] = []
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        there = [name for name in self.apps if name not in self.gone]
        return [NodeInfo(node_id=self.numbers[name], public_key=key_of(name), name=name) for name in there]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbers = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self.sent.append(message)
            numbers.append(message.metadata.message_id)
            (name,) = [n for n, number in self.numbers.items() if number == message.metadata.dst_node_id]
            if name in self.silent:
                continue
            if name in self.broken:
                self._replies[numbers[-1]] = Message(Error(code=2, reason="it broke"), reply_to=message)
                continue
            node = message.metadata.dst_node_id
            context = Context(1, node, {"partition-id": node - 100}, RecordDict(), {})
            self._replies[numbers[-1]] = self.apps[name](message, context)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(number) for number in list(message_ids) if number in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        numbers = list(self.push_messages(messages))
        time.sleep(0)
        return self.pull_messages(numbers)


def key_of(name: str) -> bytes:
    """The public key that a node of this name registered with."""
    return f"key of {name}".encode()
