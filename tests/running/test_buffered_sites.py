"""Buffered rounds between sites, whose uploads come in an order that the test sets."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import Silent, first_adapter, outcome
from network_faults import number
from network_sites import ONE_BY_ONE, LocalPost, carried, divide_files
from test_network_run import SITES, deploy
from tiny_runs import Tiny, assert_equal, begin

from fedrot.core.errors import RecipeError, RunError
from fedrot.core.methods.base import Broadcast
from fedrot.running.clock import Clock
from fedrot.running.engine import Failure
from fedrot.running.network.buffered import Buffered
from fedrot.running.network.engine import Expected
from fedrot.running.network.messages import Message
from fedrot.running.network.site import Site
from fedrot.running.network.worker import Resident
from fedrot.running.prepare import first_adapter as prepared_adapter
from fedrot.running.prepare import prepare
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.rounds import play_round

Bytes = tuple[bytes, bytes]


class Killed(BaseException):
    """The server's process ends here."""


class Scripted(LocalPost):
    """Sites begin with what they are asked at once; their uploads come in the order of `script`, a set of clients a
    round. Where it ends, so does the server.
    """

    def __init__(self, folders: Mapping[str, Path], memory: Path) -> None:
        self.residents: dict[str, Resident] = {}
        self.trained: list[tuple[str, int]] = []  # what sites trained, again where they did so again
        self.asked: dict[tuple[str, int], list[Bytes]] = {}  # requests to train, by client and round
        self.script: list[set[str]] = []
        super().__init__(folders, memory)

    def site(self, name: str) -> Site:
        site = super().site(name)

        def handle(request: Message) -> Message:
            reply = site.handle(request)
            if request.header["kind"] == "train" and reply.refused is None:
                self.trained.append((name, request.header["round"]))
            return reply

        self.residents[name] = Resident(name, handle)
        return site

    def ask(self, requests: Mapping[str, Message], seconds: float | None) -> Iterator[tuple[str, Message | str]]:
        replies: dict[str, Message | str] = {}
        for client, request in requests.items():
            if request.header["kind"] == "train":
                about = request.header_bytes(), request.payload.numpy().tobytes()
                self.asked.setdefault((client, request.header["round"]), []).append(about)
            there = client in self.sites
            replies[client] = self.residents[client].answer(carried(request)) if there else "is not connected"
        for client, request in requests.items():  # what is no upload comes at once
            reply = replies[client]
            if request.header["kind"] != "train" or isinstance(reply, str) or reply.refused is not None:
                yield client, reply
                del replies[client]
        while replies:
            if not self.script:
                raise Killed
            client = min(self.script[0] & replies.keys())
            self.script[0].remove(client)
            self.script = self.script if self.script[0] else self.script[1:]
            fault, reply = self.faults.get((client, "train")), replies.pop(client)
            yield client, fault(requests[client], reply) if fault and isinstance(reply, Message) else reply  # type: ignore[misc]


@pytest.fixture
def post(tiny_data: Path, tmp_path: Path) -> Scripted:
    return Scripted(divide_files(tiny_data, tmp_path / "sites"), tmp_path / "memory")


def between(values: Mapping[str, Any], post: LocalPost, *flags: str) -> Tiny:
    """A run whose sites have joined."""
    ready = prepare(parse_recipe(values, (*ONE_BY_ONE, *flags)))
    expected = Expected(prepared_adapter(ready.recipe, ready.model), ready.model.fingerprint(), ready.dataset.labels)
    engine = Buffered(ready.recipe, expected, post, SITES)
    engine.begin([])
    return Tiny(ready.recipe, ready, engine, ready.recipe.method.start(ready.model.read()))  # type: ignore[arg-type]


def shown(records: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What does not depend on how time went, nor on whose examples are scored."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "clock", "evaluation")} for r in records]


ROUNDS = 4
SCORED = ("--evaluation.every", "9", "--rounds", str(ROUNDS))
SLOW = '--federation.speeds={"films": 0.4}'
TWO = "--federation.buffer=2"


@pytest.mark.parametrize(
    "flags",
    [
        (TWO,),
        (TWO, "--federation.concurrency=2", "--method.name=ffa", "--server.optimizer=adam"),
        (TWO, "--lora.head=personal", "--federation.compression=int8", "--federation.staleness=linear"),
    ],
    ids=["fedrot", "two at once", "what clients keep"],
)
def test_uploads_that_come_as_on_simulated_time_give_the_simulated_run(
    flags: tuple[str, ...], tiny_values: dict[str, Any], post: Scripted
) -> None:
    here = begin(tiny_values, *ONE_BY_ONE, *SCORED, *flags, SLOW).play(ROUNDS)
    assert any(max(record["clients"]["late"].values()) for record in here.records)
    post.script = [set(record["clients"]["used"]) for record in here.records]
    there = between(tiny_values, post, *SCORED, *flags).play(ROUNDS)
    assert_equal(there.adapter, here.adapter)
    assert shown(there.records) == shown(here.records)
    assert all("clock" not in record for record in there.records)
    one, other = (Clock.taken_from(tiny.state)[1] for tiny in (there, here))
    assert (one.sent, one.flights.keys(), one.older.keys()) == (other.sent, other.flights.keys(), other.older.keys())
    assert len(post.trained) == len(set(post.trained))  # nobody trains twice from one broadcast


def test_with_every_client_in_every_round_it_is_the_synchronous_run(
    tiny_values: dict[str, Any], post: Scripted
) -> None:
    here = begin(tiny_values, *ONE_BY_ONE, "--evaluation.every=9").play(3)
    post.script = [set(SITES) for _ in range(3)]
    there = between(tiny_values, post, "--evaluation.every=9", "--federation.buffer=3").play(3)
    assert_equal(there.adapter, here.adapter)
    late = [record["clients"].pop("late") for record in there.records]  # type: ignore[attr-defined]
    assert late == [dict.fromkeys(SITES, 0)] * 3
    assert shown(there.records) == shown(here.records)


KEEPING = (TWO, "--lora.head=personal", "--federation.compression=int8", "--rounds", str(ROUNDS))
SCRIPT = [{"books", "music"}, {"books", "music"}, {"films", "music"}, {"books", "films"}]


def test_a_server_that_was_killed_asks_the_same_and_hears_what_was_trained(
    tiny_values: dict[str, Any], post: Scripted, tiny_data: Path, tmp_path: Path
) -> None:
    """Sites keep heads and what rounding lost: what was accepted of whom must be right to the round."""
    other = Scripted(divide_files(tiny_data, tmp_path / "other"), tmp_path / "other memory")
    other.script = [set(names) for names in SCRIPT]
    whole = deploy(tiny_values, other, tmp_path / "whole", *KEEPING)
    assert [record["clients"]["late"] for record in whole.metrics()] == [
        {"books": 0, "music": 0},
        {"books": 0, "music": 0},
        {"films": 2, "music": 0},
        {"books": 1, "films": 0},
    ]
    # Killed in the second round; in the third when films was heard, which counts once the round does; in the last.
    scripts = [SCRIPT[0], {"music"}], [SCRIPT[1], {"films"}], [SCRIPT[2], {"films"}]
    for resume, script in enumerate(scripts):
        post.script = [set(names) for names in script]
        with pytest.raises(Killed):
            deploy(tiny_values, post, tmp_path / "cut", *KEEPING, resume=bool(resume))
    post.script = [set(SCRIPT[3])]
    cut = deploy(tiny_values, post, tmp_path / "cut", *KEEPING, resume=True)
    found, wanted = outcome(cut.path), outcome(whole.path)
    assert found == wanted
    assert len(post.asked["films", 0]) == 5
    assert all(len(set(asked)) == 1 for asked in post.asked.values())
    assert len(post.trained) == len(set(post.trained))
    for name in SITES:  # of its own, each has what it would have
        adapters = []
        for memory, run in ((post.memory, cut), (other.memory, whole)):
            file = memory / name / run.read_json("sites.json")["run"] / "adapter" / "adapter_model.safetensors"
            adapters.append(hashlib.sha256(file.read_bytes()).digest())
        assert adapters[0] == adapters[1]


def test_a_site_that_starts_again_while_it_trains_begins_anew(tiny_values: dict[str, Any], post: Scripted) -> None:
    post.script = [{"books", "music"}, {"books", "films"}]
    there = between(tiny_values, post, TWO, "--evaluation.every=0").play()
    post.restart("films")
    there.play()
    assert there.records[1]["clients"] == {
        "drawn": 2,
        "used": ["books", "films"],
        "dropped": {},
        "late": {"books": 0, "films": 1},
    }
    assert post.trained.count(("films", 0)) == 2
    assert post.trained.count(("music", 1)) == 1  # it was asked again because of films, and had it ready


def test_a_site_that_is_gone_leaves_its_place_and_comes_back_with_the_next_broadcast(
    tiny_values: dict[str, Any], post: Scripted
) -> None:
    flags = (TWO, "--evaluation.every=0", "--federation.quorum=1")
    post.script = [{"books", "music"}, {"books", "music"}, {"films", "music"}]
    there = between(tiny_values, post, *flags).play()
    films = post.sites.pop("films")
    there.play()
    assert there.records[1]["clients"]["dropped"] == {"films": "is not connected"}
    assert there.records[1]["clients"]["used"] == ["books", "music"]  # K uploads are there, so the quorum is
    post.sites["films"] = films
    there.play()
    assert there.records[2]["clients"]["late"] == {"films": 0, "music": 0}


SPOILT = [
    (lambda request, reply: number(0, float("nan"))(reply), "not finite"),
    (lambda request, reply: replace(reply, header={**reply.header, "round": 1}), "of round 1, not of round 0"),
    (lambda request, reply: replace(reply, payload=reply.payload[:-4]), "bytes"),
    (lambda request, reply: replace(reply, header={**reply.header, "held": 10**6}), "examples are held"),
]


def test_a_late_upload_that_cannot_be_used_is_dropped_and_the_next_one_waited_for(
    tiny_values: dict[str, Any], post: Scripted
) -> None:
    """It is checked against the broadcast that its site was sent."""
    post.script = [{"books", "music"}]
    there = between(tiny_values, post, TWO, "--evaluation.every=0").play()
    here = begin(tiny_values, *ONE_BY_ONE, TWO, "--evaluation.every=0", '--federation.speeds={"films": 0.01}').play(2)
    for spoil, reason in SPOILT:
        post.script = [{"films"}, {"books", "music"}]
        post.faults["films", "train"] = spoil
        state, record = play_round(there.recipe, there.engine, there.state, Silent())
        assert reason in record["clients"]["dropped"]["films"]
        assert record["clients"]["late"] == {"books": 0, "music": 0}
        assert_equal(state.broadcast.adapter, here.adapter)


def test_scores_are_of_those_that_do_not_train_but_for_the_last_ones(
    tiny_values: dict[str, Any], post: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fedrot")
    post.script = [{"books", "music"}, {"books", "films"}]
    there = between(tiny_values, post, TWO, "--rounds=2").play(2)
    scored = [record["evaluation"] for record in there.records]
    assert [list(scores["by_client"]) for scores in scored] == [["books", "music"], SITES]
    assert [scores["examples"] for scores in scored] == [40, 60]
    assert "films is left out of the scores of validation: it trains" in caplog.messages


class Told:
    """A post of one `ask` a list of replies; each request that it was given."""

    def __init__(self, *replies: list[tuple[str, Any]]) -> None:
        self.replies, self.requests, self.closed = list(replies), [], 0
        self.seconds: list[float | None] = []

    def ask(self, requests: Mapping[str, Message], seconds: float | None) -> Iterator[tuple[str, Any]]:
        self.requests.append(dict(requests))
        self.seconds.append(seconds)
        try:
            yield from self.replies.pop(0)
        finally:
            self.closed += 1


@pytest.fixture
def alone(tiny_values: dict[str, Any]) -> Any:
    """An engine whose three sites have joined, over a post of set replies."""

    def make(post: Told, *flags: str) -> Buffered:
        recipe = parse_recipe(tiny_values, (TWO, *flags))
        engine = Buffered(recipe, Expected(first_adapter(), "", []), post, SITES)  # type: ignore[arg-type]
        engine._joined |= {name: {"train": 5} for name in SITES}
        return engine

    return make


def heard(engine: Buffered, flying: dict[str, Broadcast], count: int) -> list[tuple[str, str]]:
    """The first failures: who, and why."""
    found = []
    arrivals = engine.arrivals(lambda: flying)
    for result in arrivals:
        assert isinstance(result, Failure)
        found.append((result.client, result.reason))
        del flying[result.client]
        if len(found) == count:
            break
    arrivals.close()
    return found


def test_replies_of_others_twice_or_missing(alone: Any) -> None:
    refused = {name: Message.refusal(f"no, says {name}") for name in (*SITES, "stranger")}
    post = Told([("stranger", refused["stranger"]), ("music", refused["music"]), ("music", refused["music"])])
    flying = {name: Broadcast(0, first_adapter()) for name in SITES}
    found = heard(alone(post), flying, 3)
    assert found == [("music", "no, says music"), ("books", "gave no answer"), ("films", "gave no answer")]


def test_who_stopped_waiting_waits_no_more_and_asks_the_same(alone: Any) -> None:
    post = Told([("music", "lost")], [("books", "lost"), ("films", "lost")])
    engine, flying = alone(post), {name: Broadcast(0, first_adapter()) for name in SITES}
    assert heard(engine, flying, 1) == [("music", "lost")]
    assert post.closed == 1
    flying["music"] = Broadcast(1, first_adapter(seed=1))
    assert heard(engine, flying, 2) == [("books", "lost"), ("films", "lost")]
    first, second = post.requests
    for name in ("books", "films"):
        assert second[name] is first[name]
    assert second["music"].header["round"] == 1
    assert not torch.equal(second["music"].payload, first["music"].payload)


def test_a_site_that_wants_to_join_again_and_again_is_dropped(alone: Any) -> None:
    join = Message.refusal("was not told the recipe yet", join=True)
    post = Told([("music", join)], [("music", Message.of(kind="odd"))])
    engine, flying = alone(post), {"music": Broadcast(0, first_adapter())}
    assert heard(engine, flying, 1) == [("music", "the message's fedrot must be of type str, got None")]
    assert [asked["music"].header["kind"] for asked in post.requests] == ["train", "join"]
    post = Told([("music", join)], [("music", Message.of())], [("music", join)])
    engine, flying = alone(post), {"music": Broadcast(0, first_adapter())}
    engine._admit = lambda client, request, reply: None  # it has what it must
    assert heard(engine, flying, 1) == [("music", "was not told the recipe yet")]


def test_a_deadline_leaves_those_that_train_at_it_and_too_few_uploads_end_the_run(
    tiny_values: dict[str, Any], post: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = 0.0
    monkeypatch.setattr("fedrot.running.network.buffered.time.monotonic", lambda: passed)
    flags = ("--federation.buffer=3", "--federation.deadline=10", "--evaluation.every=0", "--federation.quorum=0.6")
    post.script = [{"books", "music"}, {"films"}]
    there, ask = between(tiny_values, post, *flags), post.ask

    def slow(requests: Mapping[str, Message], seconds: float | None) -> Iterator[tuple[str, Message | str]]:
        nonlocal passed
        assert seconds == 10
        for count, found in enumerate(ask(requests, seconds), 1):
            yield found
            if count == len(came):
                break
        passed += 10
        yield "films", "gave no answer within 10 s (federation.deadline)"

    monkeypatch.setattr(post, "ask", slow)
    came = ["books", "music"]
    there.play()
    assert there.records[0]["clients"] == {"drawn": 2, "used": came, "dropped": {}, "late": dict.fromkeys(came, 0)}
    came = ["films"]
    with pytest.raises(
        RunError, match=r"round 1: 1 of 3 uploads came within 10 s .*quorum is 2 .*; books, music still"
    ):
        play_round(there.recipe, there.engine, there.state, Silent())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--federation.buffer", "4"), r"federation\.buffer is 4, and each of the 3 clients uploads once"),
        ((TWO, SLOW), r"federation\.speeds: time is simulated .* not between sites"),
        ((TWO, "--federation.spread", "1"), r"federation\.spread: time is simulated"),
        ((TWO, "--evaluation.choose", "best"), r"evaluation\.choose: between sites, with federation\.buffer"),
    ],
)
def test_what_sites_cannot_do_in_buffered_rounds_is_refused(
    flags: tuple[str, ...], words: str, tiny_values: dict[str, Any], post: Scripted, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        deploy(tiny_values, post, tmp_path / "out", *flags)
