"""What a registered client sends costs nobody but itself: replies that cannot be read, are too large, or never end; and
the SuperLink's control interface is for the server alone.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StopRunRequest, UnregisterNodeRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from superlink_here import Answered, Client, Counted, Piece, SuperLinkHere

from fedrot.core.errors import RunError
from fedrot.running.flower.control import Showing
from fedrot.running.flower.link import SteadyGrid
from fedrot.running.flower.post import GridPost
from fedrot.running.network.messages import Message

SITES = ("books", "films")
MB = 1 << 20


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLinkHere]:
    with pytest.MonkeyPatch.context() as patch:
        yield SuperLinkHere(tmp_path_factory.mktemp("superlink"), SITES, patch)


@pytest.fixture
def grid(here: SuperLinkHere) -> Iterator[Answered]:
    """An open run with two clients that are connected and honest."""
    steady = SteadyGrid(here.link)
    steady.get_nodes()
    # Of the same objects Flower has one.
    replies = {name: Message.of([torch.full((4,), float(SITES.index(name)))], name=name) for name in SITES}
    clients = {name: Client(here, name, reply=reply) for name, reply in replies.items()}
    for client in clients.values():
        client.connect()
    yield Answered(steady, clients)
    here.watch = lambda request: None
    for client in clients.values():
        client.disconnect()
    steady.close()


def post(grid: Answered) -> GridPost:
    names = {key: name for name, key in grid.clients["books"].here.keys.items()}
    return GridPost(grid, names, pause=0.01, grace=60.0)


def asked(grid: Answered, request: Message | None = None) -> dict[str, Message | str]:
    """What both clients are found to answer."""
    return dict(post(grid).ask(dict.fromkeys(SITES, request or Message.of(kind="train")), 600.0))


def body(kind: str, made: bytes) -> Callable[[Piece], Piece]:
    return lambda reply: reply.changed(kind, lambda piece: replace(piece, body=made))


def chunks(*sizes: int) -> tuple[Piece, ...]:
    return tuple(Piece("ArrayChunk", bytes([number]) * size) for number, size in enumerate(sizes))


def array(pieces: tuple[Piece, ...], named: list[int], dtype: str = "uint8") -> Piece:
    about = {"dtype": dtype, "shape": [1], "stype": "fedrot.raw", "arraychunk_ids": named}
    return Piece("Array", json.dumps(about).encode(), pieces)


def arrays(*made: Piece) -> Callable[[Piece], Piece]:
    """With these arrays in place of the payload."""
    about = json.dumps({"bytes" if n == 0 else f"more {n}": piece.number for n, piece in enumerate(made)})
    return lambda reply: reply.changed(
        "ArrayRecord", lambda record: replace(record, body=about.encode(), children=made)
    )


def stranger(reply: Piece) -> Piece:
    """A record that is not among the objects."""
    return reply.changed("RecordDict", lambda piece: replace(piece, named=("0" * 64,)))


SPOILED: dict[str, tuple[Callable[[Piece], Piece], str]] = {
    "no JSON": (body("RecordDict", b"{"), r"the reply cannot be read \(JSONDecodeError"),
    "no list of records": (body("RecordDict", b"[1]"), "the reply cannot be read"),
    "no protobuf": (body("ConfigRecord", b"\xff\xff"), r"the reply cannot be read \(DecodeError"),
    "deep JSON": (body("Array", b"[" * 100_000), r"the reply cannot be read \(RecursionError"),
    "an unknown object": (stranger, r"the reply cannot be read \(KeyError"),
    "no message": (lambda reply: reply.children[0], "the reply is not a message"),
    "a piece again and again": (
        arrays(array(chunks(MB), [0] * 64)),
        "arrays of .* bytes, more than the",
    ),
    "a piece in many arrays": (
        arrays(*(array(chunks(MB), [0], f"u{n}") for n in range(12))),
        "arrays of .* bytes, more than the",
    ),
    "many pieces": (arrays(array(chunks(*[1] * 70), list(range(70)))), "the reply has 75 parts, more than the 72"),
    "one piece too often": (arrays(array(chunks(1), [0] * 99)), "an array of 99 parts"),
    "much payload": (arrays(array(chunks(5 * MB, 5 * MB), [0, 1])), "bytes of ArrayChunk, more than the"),
    "a large header": (body("ConfigRecord", bytes(10 * MB)), "bytes of ConfigRecord, more than the"),
    "a large frame": (body("ArrayRecord", bytes(2 * MB)), "bytes of ArrayRecord, more than the"),
    "one large object": (
        arrays(array(chunks(20 * MB), [0])),
        "a part of .* bytes, more than are allowed",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_reply_that_cannot_be_used_costs_its_client_alone(case: str, grid: Answered) -> None:
    grid.clients["films"].spoil, reason = SPOILED[case]
    found = asked(grid)
    assert isinstance(found["books"], Message)
    assert found["books"].header == {"name": "books"}
    assert re.search(reason, str(found["films"]))
    assert grid.clients["films"].asked == 1  # it is not asked again for that


def test_payloads_that_repeat_themselves_are_read(grid: Answered) -> None:
    grid.clients["films"].reply = Message.of([torch.zeros(11 * MB, dtype=torch.uint8)], name="films")
    found = asked(grid, Message.of([torch.ones(4 * MB, dtype=torch.uint8)], kind="train"))
    assert [len(one.object_content) // MB for one in grid.clients["films"].sent].count(5) == 1  # of two
    assert isinstance(found["films"], Message)
    assert torch.equal(found["films"].payload, torch.zeros(11 * MB, dtype=torch.uint8))


class Enough(Exception):
    """Of looking for replies."""


@pytest.mark.parametrize("withheld", [1, 3])
def test_a_reply_that_does_not_end_holds_nobody_up(withheld: int, grid: Answered, here: SuperLinkHere) -> None:
    counted, looks = Counted(), 0

    def between() -> None:
        nonlocal looks
        looks += 1
        counted.objects.clear()
        if looks > 5:
            raise Enough

    here.watch, grid.between, grid.clients["films"].withheld = counted, between, withheld
    replies = post(grid).ask(dict.fromkeys(SITES, Message.of(kind="train")), 600.0)
    assert next(replies)[0] == "books"
    with pytest.raises(Enough):  # whoever asks is not held in a look, and so sees that a deadline passes
        next(replies)
    assert counted.calls["/v1/runtime/pull-messages"] == 2


def test_a_reply_that_comes_slowly_is_taken_when_it_is_there(grid: Answered, here: SuperLinkHere) -> None:
    counted, films, looks = Counted(), grid.clients["films"], 0
    films.withheld = 2

    def between() -> None:
        nonlocal looks
        looks += 1
        counted.objects.clear()
        if looks == 1:
            here.watch = counted
        if looks == 6:
            here.watch = lambda request: None
            films.finish()

    grid.between = between
    found = asked(grid)
    assert [reply.header for reply in found.values() if isinstance(reply, Message)] == [{"name": n} for n in SITES]
    assert films.asked == 1
    # Flower is asked what there is once, and what there is of one reply is not pulled again at every look.
    assert counted.calls["/v1/runtime/pull-messages"] == 2
    assert counted.calls["/v1/runtime/pull-object"] <= 5 + 5 + 4


def test_what_was_taken_is_not_lost_with_the_superlink(
    grid: Answered, here: SuperLinkHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedrot.running.flower.link._PAUSE", 0.01)
    counted = Counted()

    def watch(request: httpx.Request) -> None:
        counted.objects.clear()
        counted(request)
        if request.url.path == "/v1/runtime/pull-object" and counted.calls[request.url.path] == 7:
            raise httpx.ConnectError("it is being started again")

    here.watch = watch
    found = asked(grid)
    assert [reply.header for reply in found.values() if isinstance(reply, Message)] == [{"name": n} for n in SITES]
    assert [client.asked for client in grid.clients.values()] == [1, 1]
    assert counted.calls["/v1/runtime/pull-object"] > 7


def test_what_a_reply_says_that_it_answers_does_not_count(grid: Answered) -> None:
    numbers: list[str] = []
    push = grid.grid.push_messages

    def noted(messages: object) -> list[str]:
        numbers.extend(push(messages))  # type: ignore[arg-type]
        return numbers

    grid.grid.push_messages = noted  # type: ignore[assignment, method-assign]

    def pretend(reply: Piece) -> Piece:
        message = ProtoMessage.FromString(reply.body)
        assert message.metadata.reply_to_message_id == numbers[1]
        message.metadata.reply_to_message_id = numbers[0]
        return replace(reply, body=message.SerializeToString())

    grid.clients["films"].spoil = pretend
    grid.clients["books"].withheld = 1  # so the other one comes first
    looks = iter([lambda: None, grid.clients["books"].finish])
    grid.between = lambda: next(looks, lambda: None)()
    found = asked(grid)
    assert {name: reply.header for name, reply in found.items()} == {n: {"name": n} for n in SITES}  # type: ignore[union-attr]


@pytest.mark.parametrize("shown", [[], [Showing(b"another")]])
def test_the_control_interface_is_for_who_knows_the_secret(
    shown: list[Showing], grid: Answered, here: SuperLinkHere
) -> None:
    client = ControlHttpClient.from_server_address("here:1", False, None, shown)
    node = grid.clients["films"].node.node_id
    for call, request in (
        (client.UnregisterNode, UnregisterNodeRequest(node_id=node)),
        (client.RegisterNode, RegisterNodeRequest(public_key=b"mine")),
        (client.StopRun, StopRunRequest(run_id=1)),
        (client.ListNodes, ListNodesRequest()),
    ):
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            call(request)  # type: ignore[operator]
    assert all(isinstance(reply, Message) for reply in asked(grid).values())


def test_an_interface_that_is_open_is_refused(here: SuperLinkHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here.app.state.account_access_dep, "authn_plugin", NoOpControlAuthnPlugin())
    with pytest.raises(RunError, match="the SuperLink's control interface is open to all"):
        SteadyGrid(here.link).get_nodes()


def test_clients_that_were_struck_off_are_named_at_once(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        there = SuperLinkHere(tmp_path, SITES, patch)
        there.link.open().close()
        there.link.open().close()  # registered already
        control = ControlHttpClient.from_server_address("here:1", False, None, [Showing(there.link.secret)])
        (films,) = [n.node_id for n in control.ListNodes(ListNodesRequest()).nodes_info if n.name == "films"]
        control.UnregisterNode(UnregisterNodeRequest(node_id=films))
        with pytest.raises(RunError, match=r"lets films in no more; remove flower/state\.db\* from the run folder"):
            SteadyGrid(there.link).get_nodes()
