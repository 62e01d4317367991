"""A run's grid outlives what happens to the SuperLink, and nodes that were started again are asked again."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Error, Message
from flwr.proto.node_pb2 import NodeInfo
from local_grid import LocalGrid, key_of
from network_sites import ONE_BY_ONE, LocalPost, divide_files
from tiny_runs import Tiny, assert_equal, begin

from fedrot.core.errors import RunError
from fedrot.running.flower import GridPost, link
from fedrot.running.flower.link import SteadyGrid
from fedrot.running.flower.seat import client_app
from fedrot.running.network.engine import Expected, Network
from fedrot.running.network.messages import Message as FedrotMessage
from fedrot.running.prepare import prepare
from fedrot.running.recipe_file import parse_recipe

Trouble = Callable[[str], None]  # told which call is made, it may raise or break something


class Frail(LocalGrid):
    """An open run of Flower's that can be lost, with everything that was sent in it."""

    def __init__(self, whole: LocalGrid, trouble: Trouble) -> None:
        super().__init__(whole.apps)
        self.lost, self.trouble, self.closed, self.known = threading.Event(), trouble, False, set[str]()

    def close(self) -> None:
        self.closed = True

    def get_nodes(self) -> Iterable[NodeInfo]:
        self.trouble("nodes")
        return super().get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.trouble("push")
        numbers = list(super().push_messages(messages))
        self.known |= set(numbers)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.trouble("pull")
        assert set(message_ids) <= self.known  # Flower knows no numbers of other runs
        return super().pull_messages(message_ids)


class FrailLink:
    """Opens a new run each time."""

    address = "127.0.0.1:1"

    def __init__(self, grid: LocalGrid) -> None:
        self.grid, self.opened = grid, list[Frail]()
        self.trouble: Trouble = lambda call: None

    def open(self) -> Frail:
        self.opened.append(Frail(self.grid, lambda call: self.trouble(call)))
        return self.opened[-1]


def refusal(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://127.0.0.1:1")
    return httpx.HTTPStatusError(str(status), request=request, response=httpx.Response(status, request=request))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_PAUSE", 0.01)


@pytest.fixture
def grid(tiny_data: Path, tmp_path: Path) -> LocalGrid:
    sites = LocalPost(divide_files(tiny_data, tmp_path / "sites"), tmp_path / "memory").sites
    return LocalGrid({name: client_app(site.handle) for name, site in sites.items()})


def played(values: dict[str, Any], grid: LocalGrid, steady: SteadyGrid, rounds: int) -> Tiny:
    """Rounds over this grid."""
    ready = prepare(parse_recipe(values, ONE_BY_ONE))
    expected = Expected(ready.model.read(), ready.model.fingerprint(), ready.dataset.labels)
    post = GridPost(steady, {key_of(name): name for name in grid.apps}, pause=0.01, grace=5.0)
    engine = Network(ready.recipe, expected, post)
    engine.join()
    start = ready.recipe.method.start(ready.model.read())
    return Tiny(ready.recipe, ready, engine, start).play(rounds)  # type: ignore[arg-type]


def test_whatever_happens_to_the_superlink_the_rounds_are_those_of_the_simulation(
    tiny_values: dict[str, Any], grid: LocalGrid
) -> None:
    frail, calls = FrailLink(grid), 0

    def trouble(call: str) -> None:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise httpx.ConnectError("it is being started again")
        if calls % 11 == 0:
            raise refusal(403)  # the run is none any more
        if calls % 13 == 0:
            frail.opened[-1].lost.set()

    frail.trouble = trouble
    found = played(tiny_values, grid, SteadyGrid(frail), 3)  # type: ignore[arg-type]
    assert_equal(found.adapter, begin(tiny_values, *ONE_BY_ONE).play(3).adapter)
    assert [record["clients"]["dropped"] for record in found.records] == [{}] * 3
    assert len(frail.opened) > 4
    assert all(run.closed for run in frail.opened[:-1])


def test_what_was_sent_is_sent_again_in_the_next_run(grid: LocalGrid) -> None:
    frail = FrailLink(grid)
    steady = SteadyGrid(frail)  # type: ignore[arg-type]
    numbers = steady.push_messages([Message(_content(), 100, "query", ttl=60.0)])
    frail.opened[0].lost.set()
    (reply,) = steady.pull_messages(numbers)
    assert reply.metadata.reply_to_message_id == numbers[0]  # the number that was given out
    assert len(frail.opened) == 2
    assert steady.pull_messages(numbers) == []  # each is given once


def _content() -> Any:
    from fedrot.running.flower.records import to_records

    return to_records(FedrotMessage.of(kind="odd"))


def test_errors_of_the_superlink_end_a_run_after_some_and_the_patience_at_last(grid: LocalGrid) -> None:
    frail, left = FrailLink(grid), 12

    def trouble(call: str) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise refusal(500)

    frail.trouble = trouble
    assert len(SteadyGrid(frail).get_nodes()) == 3  # type: ignore[arg-type]
    assert len(frail.opened) == 3
    left = 10**9
    with pytest.raises(RunError, match=r"the SuperLink gave no answer for 0\.1 s"):
        SteadyGrid(frail, patience=0.1).get_nodes()  # type: ignore[arg-type]


class Coming(LocalGrid):
    """Nodes that are started again: what they were sent before is forgotten, and may be answered with an error."""

    def __init__(self, grid: LocalGrid, error: bool) -> None:
        super().__init__(grid.apps)
        self.times, self.error, self.pulls = dict.fromkeys(grid.apps, 0), error, 0

    def get_nodes(self) -> Iterable[NodeInfo]:
        there = list(super().get_nodes())
        for node in there:
            node.last_activated_at = f"start {self.times[node.name]}"
        return there

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls += 1
        if self.pulls == 1 and self.error:  # Flower's word for a node that is gone
            numbers = list(message_ids)
            sent = {message.metadata.message_id: message for message in self.sent}
            self.times = dict.fromkeys(self.times, 1)
            return [Message(Error(code=5, reason="node unavailable"), reply_to=sent[number]) for number in numbers]
        if self.pulls == 1:
            self._replies.clear()
            self.times = dict.fromkeys(self.times, 1)
            return []
        return super().pull_messages(message_ids)


@pytest.mark.parametrize("error", [False, True])
def test_nodes_that_were_started_again_are_asked_again(error: bool, grid: LocalGrid) -> None:
    coming = Coming(grid, error)
    post = GridPost(coming, None, pause=0.01, grace=5.0)
    found = dict(post.ask(dict.fromkeys(grid.apps, FedrotMessage.of(kind="odd")), 20.0))
    assert {name: reply.refused for name, reply in found.items()} == dict.fromkeys(  # type: ignore[union-attr]
        grid.apps, "a request of kind 'odd' is not known to this version of fedrot"
    )
    assert len(coming.sent) == 6


def test_a_node_that_is_gone_has_a_grace_and_no_more(grid: LocalGrid) -> None:
    post, request = GridPost(grid, None, pause=0.01, grace=0.2), FedrotMessage.of(kind="odd")
    post.clients()
    grid.gone = {"books"}
    asked = post.ask({"books": request}, None)
    timer = threading.Timer(0.1, grid.gone.clear)
    timer.start()
    assert [name for name, reply in asked if isinstance(reply, FedrotMessage)] == ["books"]
    grid.gone = {"books"}
    assert dict(post.ask({"books": request}, None)) == {"books": "is not connected"}
