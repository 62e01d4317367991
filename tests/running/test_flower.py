"""Flower carries a run's messages: rounds over its grid are those of the simulation; nodes come, go and break."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.clientapp import ClientApp
from local_grid import LocalGrid, key_of
from network_sites import LocalPost, divide_files
from test_network import ONE_BY_ONE
from tiny_runs import Tiny, assert_equal, begin

from fedrot.running.flower import GridPost
from fedrot.running.flower.records import from_records, to_records
from fedrot.running.flower.seat import client_app
from fedrot.running.network.channel import ask
from fedrot.running.network.engine import Expected, Network
from fedrot.running.network.messages import Message, MessageError
from fedrot.running.prepare import prepare
from fedrot.running.recipe_file import parse_recipe

Made = tuple[Tiny, LocalGrid, Network]


@pytest.fixture
def made(tiny_values: dict[str, Any], tiny_data: Path, tmp_path: Path) -> Made:
    """A server's run over a grid with a node for each of the three sites."""
    sites = LocalPost(divide_files(tiny_data, tmp_path / "sites"), tmp_path / "memory").sites
    grid = LocalGrid({name: client_app(site.handle) for name, site in sites.items()})
    ready = prepare(parse_recipe(tiny_values, [*ONE_BY_ONE, "--federation.quorum", "0.3"]))
    post = GridPost(grid, {key_of(name): name for name in sites}, pause=0.01)
    engine = Network(ready.recipe, Expected(ready.model.read(), ready.model.fingerprint(), ready.dataset.labels), post)
    start = ready.recipe.method.start(ready.model.read())
    return Tiny(ready.recipe, ready, engine, start), grid, engine  # type: ignore[arg-type]


def test_rounds_over_flower_are_those_of_the_simulation(made: Made, tiny_values: dict[str, Any]) -> None:
    tiny, grid, engine = made
    engine.join()
    assert engine.refused == {}
    there = tiny.play(3)
    here = begin(tiny_values, *ONE_BY_ONE).play(3)
    assert_equal(there.adapter, here.adapter)
    kinds = [message.metadata.message_type for message in grid.sent]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"query": 3, "train": 9, "evaluate": 9}


def test_a_message_is_one_array_of_about_the_tensors_size(made: Made) -> None:
    tiny, grid, engine = made
    engine.join()
    tiny.play(1)
    sent = [message for message in grid.sent if message.metadata.message_type == "train"]
    arrays = [message.content["fedrot.payload"]["bytes"] for message in sent]
    assert {array.shape for array in arrays} == {(tiny.adapter.bytes(),)}
    assert {len(array.data) for array in arrays} == {tiny.adapter.bytes()}
    # A broadcast is held, hashed and sent to the SuperLink once, however many clients there are.
    assert len(sent) == len(arrays) == 3
    assert len({id(array) for array in arrays}) == 1


def test_no_more_replies_are_held_than_were_said(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, grid, engine = made
    engine.join()
    pulled: list[int] = []
    pull = grid.pull_messages

    def noted(numbers: Iterable[str]) -> Iterable[Message]:
        found = list(pull(numbers))  # type: ignore[call-overload]
        pulled.append(len(found))
        return found

    monkeypatch.setattr(grid, "pull_messages", noted)
    monkeypatch.setattr("fedrot.running.flower.post._TAKEN", 2 * tiny.adapter.bytes())
    tiny.play(1)
    assert pulled == [2, 1] * 2  # train and evaluate
    assert tiny.records[0]["clients"]["used"] == ["books", "films", "music"]


def test_who_has_no_registered_key_takes_no_part(made: Made) -> None:
    _, grid, engine = made
    grid.apps["stranger"] = grid.apps["books"]
    grid.numbers["stranger"] = 999
    engine.join()
    assert list(engine.clients) == ["books", "films", "music"]


def test_without_keys_nodes_go_by_their_names(made: Made) -> None:
    _, grid, _ = made
    assert list(GridPost(grid, None).clients()) == ["books", "films", "music"]


def test_nodes_that_are_gone_silent_or_broken_are_dropped_with_the_reason(made: Made) -> None:
    tiny, grid, engine = made
    engine.join()
    tiny.play(1)
    grid.gone, grid.broken = {"books"}, {"films"}
    tiny.play(1)
    dropped = tiny.records[-1]["clients"]["dropped"]
    assert dropped == {"books": "is not connected", "films": "Flower says: it broke (code 2)"}
    assert tiny.records[-1]["clients"]["used"] == ["music"]


def test_a_deadline_ends_the_waiting(made: Made) -> None:
    _, grid, engine = made
    engine.join()
    grid.silent = {"music"}
    post = GridPost(grid, None, pause=0.01)
    request = Message.of(kind="nothing that is known")
    found = dict(post.ask({"books": request, "music": request}, 0.05))
    assert found["music"] == "gave no answer within 0.05 s (federation.deadline)"
    assert isinstance(found["books"], Message)
    assert "is not known to this version" in (found["books"].refused or "")


def test_who_stops_waiting_is_not_asked_twice_and_hears_what_was_taken(made: Made) -> None:
    _, grid, _ = made
    calls: list[str] = []

    def counting(name: str) -> ClientApp:
        return client_app(lambda request: calls.append(name) or Message.of(name=name, number=request.header["n"]))

    grid.apps = {name: counting(name) for name in grid.apps}
    grid.silent = {"music"}
    post = GridPost(grid, None, pause=0.01)
    one, two = Message.of([torch.ones(3)], kind="train", n=1), Message.of([torch.ones(3)], kind="train", n=2)
    asked = post.ask(dict.fromkeys(grid.apps, one), None)
    assert next(asked)[0] == "books"
    asked.close()
    grid.silent = set()
    number = grid.sent[-1].metadata.message_id  # music's
    late = post.ask({"films": Message(dict(one.header), one.payload.clone()), "music": one}, None)
    client, reply = next(late)  # what was taken before
    assert (client, reply.header["number"]) == ("films", 1)  # type: ignore[union-attr]
    assert (calls, len(grid.sent)) == (["books", "films"], 3)
    grid._replies[number] = counting("music")(grid.sent[-1], Context(1, 102, {}, RecordDict(), {}))
    late.close()
    # Asked for something else, it is sent that, and the reply to what it was asked before is no reply.
    found = list(post.ask({"music": two}, None))
    assert [(client, reply.header["number"]) for client, reply in found] == [("music", 2)]  # type: ignore[union-attr]
    assert len(grid.sent) == 4
    assert list(grid._replies) == [number]


def test_what_flower_dropped_meanwhile_is_sent_again(made: Made) -> None:
    _, grid, _ = made
    grid.silent = {"music"}
    post, request = GridPost(grid, None, pause=0.01), Message.of(kind="nothing that is known")
    asked = post.ask({"books": request, "music": request}, 0.05)
    assert next(asked)[0] == "books"
    asked.close()
    time.sleep(0.06)
    grid.silent = set()
    assert [client for client, _ in post.ask({"music": request}, 5.0)] == ["music"]
    assert [grid.numbers["music"] == sent.metadata.dst_node_id for sent in grid.sent] == [False, True, True]


def test_a_worker_that_does_not_answer_is_a_refusal_without_its_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "there-is-none.sock"
    grid = LocalGrid({"books": client_app(lambda message: ask(path, message, seconds=0.0))})
    found = dict(GridPost(grid, None, pause=0.01).ask({"books": Message.of(kind="join")}, 5.0))
    assert isinstance(found["books"], Message)
    assert found["books"].refused == "the site's worker did not answer; its log says why"
    assert str(path) in caplog.text


def test_records_and_messages_are_each_other_s_inverse() -> None:
    message = Message.of([torch.arange(5.0)], kind="train", numbers={"a": 1.5}, none=None)
    found = from_records(to_records(message))
    assert found.header == message.header
    assert torch.equal(found.payload, message.payload)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"fedrot.header": ConfigRecord({"bytes": b"{}"})}),
        RecordDict({"fedrot.header": ConfigRecord({"bytes": "{}"}), "fedrot.payload": ArrayRecord()}),
        RecordDict(
            {
                "fedrot.header": ConfigRecord({"bytes": b"{}"}),
                "fedrot.payload": ArrayRecord({"bytes": Array("uint8", (1,), "numpy.ndarray", b"\x93NUMPY")}),
            }
        ),
        RecordDict(
            {
                "fedrot.header": ConfigRecord({"bytes": b"[1"}),
                "fedrot.payload": ArrayRecord({"bytes": Array("uint8", (0,), "fedrot.raw", b"")}),
            }
        ),
    ],
)
def test_records_that_are_not_fedrot_s_are_refused(content: RecordDict) -> None:
    with pytest.raises(MessageError):
        from_records(content)
