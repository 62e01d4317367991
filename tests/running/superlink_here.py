"""Flower's own SuperLink in this process, as fedrot starts it, and clients that may send it anything."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node, NodeInfo
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_id,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from starlette.testclient import TestClient

from fedrot.running.flower import control, tether
from fedrot.running.flower.keys import client_keys, make_client_key, make_server_keys
from fedrot.running.flower.link import Link, SteadyGrid
from fedrot.running.flower.records import to_records
from fedrot.running.network.messages import Message as FedrotMessage

Watch = Callable[[httpx.Request], None]  # sees what goes to the SuperLink, and may raise


class SuperLinkHere:
    """A SuperLink whose state is in memory, and the keys of its clients. Every client of Flower's that is made while
    `patch` lasts reaches it.
    """

    def __init__(self, folder: Path, names: Iterable[str], patch: pytest.MonkeyPatch) -> None:
        make_server_keys(folder / "tls", ["127.0.0.1"])
        self.private = {name: make_client_key(folder / "keys", name)[0] for name in names}
        (folder / "secret").write_bytes(b"s" * 32)
        self.keys = client_keys(folder / "keys")
        self.link = Link("here:1", (folder / "tls" / "ca.crt").read_bytes(), b"s" * 32, self.keys)
        self.watch: Watch = lambda request: None
        self.app = self._app(folder, patch)
        self._app_client = TestClient(self.app, "https://here:1", raise_server_exceptions=False)

        def reach(cls: type[Any], *_: Any, **given: Any) -> Any:
            # (server_address, insecure, root_certificates, interceptors), by place or by name
            client = cls("https://here:1", interceptors=given.get("interceptors") or _[3])
            client._client = httpx.Client(transport=httpx.MockTransport(self._carry))
            return client

        patch.setattr(ProtobufClient, "from_server_address", classmethod(reach))

    def _carry(self, request: httpx.Request) -> httpx.Response:
        self.watch(request)
        headers = dict(request.headers)
        found = self._app_client.request(request.method, str(request.url), content=request.read(), headers=headers)
        return httpx.Response(found.status_code, headers=dict(found.headers), stream=httpx.ByteStream(found.content))

    def _app(self, folder: Path, patch: pytest.MonkeyPatch) -> Any:
        flower = import_module("flwr.superlink.cli.flower_superlink")
        patch.setattr(flower, "load_control_authn_plugin", flower.load_control_authn_plugin)  # put back at the end
        secret, tls = folder / "secret", folder / "tls"
        words = ["--database", ":flwr-in-memory:", "--isolation", "process", "--enable-supernode-auth"]
        words += ["--superexec-auth-secret-file", str(secret), "--ssl-ca-certfile", str(tls / "ca.crt")]
        words += ["--ssl-certfile", str(tls / "server.crt"), "--ssl-keyfile", str(tls / "server.key")]
        made = []

        def run(program: Callable[[], object], name: str, words: list[str]) -> None:
            assert program is flower.flower_superlink
            patch.setattr(sys, "argv", [name, *words])
            config = flower._parse_superlink_lifespan_config()
            made.append(import_module("flwr.superlink.main").create_app(config, flower.SuperLinkLifespan))

        patch.setattr(tether, "run", run)
        patch.setattr(sys, "argv", control.command(secret, *words)[3:])
        control.main()
        return made[0]


@dataclass(frozen=True)
class Piece:
    """An object of Flower's as it travels, which need not be one."""

    kind: str
    body: bytes
    children: tuple["Piece", ...] = ()
    named: tuple[str, ...] | None = None  # what the head says its children are, if it is not the children

    @classmethod
    def of(cls, thing: InflatableObject) -> "Piece":
        """An honest one."""
        head, body = thing.deflate().split(b"\0", 1)
        return cls(head.split(b" ")[0].decode(), body, tuple(map(cls.of, (thing.children or {}).values())))

    @property
    def content(self) -> bytes:
        """Head and body."""
        named = [child.number for child in self.children] if self.named is None else self.named
        return f"{self.kind} {','.join(named)} {len(self.body)}".encode() + b"\0" + self.body

    @property
    def number(self) -> str:
        """Its hash."""
        return get_object_id(self.content)

    def tree(self) -> ObjectTree:
        """As Flower is told of it."""
        return ObjectTree(object_id=self.number, children=[child.tree() for child in self.children])

    def all(self) -> dict[str, bytes]:
        """What is to be sent of it, by number."""
        found: dict[str, bytes] = {}
        for child in self.children:
            found |= child.all()
        return found | {self.number: self.content}

    def changed(self, kind: str, how: Callable[["Piece"], "Piece"]) -> "Piece":
        """With the objects of a kind changed."""
        mine = replace(self, children=tuple(child.changed(kind, how) for child in self.children))
        return how(mine) if self.kind == kind else mine


@dataclass
class Client:
    """A registered client: says `reply` to whatever it is asked, in the form that `spoil` makes of it."""

    here: SuperLinkHere
    name: str
    spoil: Callable[[Piece], Piece] = lambda piece: piece
    reply: FedrotMessage = field(default_factory=FedrotMessage.of)
    withheld: int = 0  # objects that are not sent
    asked: int = 0
    sent: list[PushObjectRequest] = field(default_factory=list)

    def connect(self) -> None:
        """Its SuperNode has started."""
        private: Any = load_ssh_private_key(self.here.private[self.name].read_bytes(), None)
        guard = NodeAuthHttpInterceptor(private, private.public_key())
        self._client = FleetHttpClient.from_server_address("here:1", False, None, [guard])
        request = ActivateNodeRequest(public_key=self.here.keys[self.name], heartbeat_interval=30.0)
        self.node = Node(node_id=self._client.ActivateNode(request).node_id)

    def disconnect(self) -> None:
        """Its SuperNode ended, and said so."""
        self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id))

    def answer(self) -> None:
        """Take what is there and send the reply, but for what is withheld."""
        found = self._client.PullMessages(PullMessagesRequest(node=self.node))
        for about, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            run = about.metadata.run_id
            pull = make_pull_object_fn_protobuf(self._client.PullObject, self.node, run)
            message = pull_and_inflate_object_from_tree(tree, pull, lambda number: None, return_type=Message)
            message.metadata.__dict__["_message_id"] = tree.object_id
            self.asked += 1
            self._send(run, Message(to_records(self.reply), reply_to=message))

    def _send(self, run: int, reply: Message) -> None:
        piece = self.spoil(Piece.of(reply))
        about = message_to_proto(remove_content_from_message(reply))
        about.metadata.message_id = piece.number
        request = PushMessagesRequest(node=self.node, messages_list=[about], message_object_trees=[piece.tree()])
        pushed = self._client.PushMessages(request)
        contents = piece.all()
        self.sent = [
            PushObjectRequest(
                node=self.node,
                run_id=run,
                object_id=number,
                object_content=contents[number],
                session_id=pushed.session_id,
            )
            for number in dict.fromkeys(pushed.objects_to_push)
        ]
        for one in self.sent[self.withheld :]:
            assert self._client.PushObject(one).stored

    def finish(self) -> None:
        """Send what was withheld."""
        for one in self.sent[: self.withheld]:
            assert self._client.PushObject(one).stored


class Answered:
    """A grid whose clients answer what is sent at once; `between` runs before every look for replies."""

    def __init__(self, grid: SteadyGrid, clients: Mapping[str, Client]) -> None:
        self.grid, self.clients = grid, clients
        self.between: Callable[[], None] = lambda: None

    def get_nodes(self) -> list[NodeInfo]:
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        numbers = self.grid.push_messages(messages)
        for client in self.clients.values():
            client.answer()
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.between()
        return self.grid.pull_messages(message_ids)


class Counted:
    """Counts the calls by path, and how often an object is asked for between two looks."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.objects: Counter[bytes] = Counter()

    def __call__(self, request: httpx.Request) -> None:
        self.calls[request.url.path] += 1
        if request.url.path == "/v1/runtime/pull-object":
            self.objects[request.content] += 1
            assert self.objects[request.content] == 1, "an object is waited for"
