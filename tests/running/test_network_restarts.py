"""Sites and servers that stop and start again: the run is the simulation's in which the same uploads were dropped."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from network_sites import ONE_BY_ONE, LocalPost, deployed, divide_files, network
from tiny_runs import Tiny, assert_equal, begin

from fedrot.core.errors import RunError
from fedrot.core.methods.base import ClientState, ServerState
from fedrot.running.engine import Failure
from fedrot.running.network.engine import Network
from fedrot.running.network.memory import Memory
from fedrot.running.network.messages import Message

CLIENTS = ["books", "films", "music"]
# What clients keep: a factor, a head, control variates, what compression lost.
STATEFUL = [
    ("--method.name", "fedsa"),
    ("--lora.head", "personal"),
    ("--local.scaffold", "true"),
    ("--federation.compression", "int8"),
]
stateful = pytest.mark.parametrize("flags", STATEFUL, ids=lambda flags: flags[0].removeprefix("--") + "=" + flags[1])
ROUNDS = 4


@pytest.fixture
def post(tiny_data: Path, tmp_path: Path) -> LocalPost:
    return LocalPost(divide_files(tiny_data, tmp_path / "sites"), tmp_path / "memory")


class Crash(BaseException):
    """The process dies here."""


def simulated(values: dict[str, Any], *flags: str, lost: Mapping[int, Iterable[str]] | None = None) -> Tiny:
    """The rounds in one process, where these clients' uploads never arrive in these rounds."""
    here = begin(values, *ONE_BY_ONE, *flags)
    for number in range(ROUNDS):
        here.engine.faults = dict.fromkeys((lost or {}).get(number, ()), lambda upload: Failure(upload.client, "lost"))
        here.play()
    return here


def assert_same_runs(there: Tiny, here: Tiny, post: LocalPost) -> None:
    """The same adapter, the same clients in every round, the same kept by every client, the same scores."""
    assert_equal(there.adapter, here.adapter)
    assert len(there.records) == len(here.records) == ROUNDS
    used = [[record["clients"]["used"] for record in tiny.records] for tiny in (there, here)]
    assert used[0] == used[1]
    for client, state in here.engine.states().items():
        accepted = max(record["round"] for record in here.records if client in record["clients"]["used"])
        assert_same_state(Memory(post.memory / client / "run").of(accepted, client), state)
    scores = [[record["evaluation"]["by_client"] for record in tiny.records] for tiny in (there, here)]
    assert scores[0] == scores[1]


def assert_same_state(found: ClientState, wanted: ClientState) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []


@stateful
def test_a_site_that_is_killed_before_its_upload_arrives(
    flags: tuple[str, ...], tiny_values: dict[str, Any], post: LocalPost
) -> None:
    """What it kept of that round is on its disk, and must not count."""
    there = deployed(tiny_values, post, "--rounds", str(ROUNDS), *flags).play()

    def killed(request: Message, reply: Message) -> None:
        assert (post.memory / "music" / "run" / "round-000001.safetensors").exists()
        post.restart("music")

    post.faults["music", "train"] = killed
    there.play()
    assert there.records[1]["clients"]["dropped"] == {"music": "gave no answer"}
    del post.faults["music", "train"]
    there.play(2)
    assert_same_runs(there, simulated(tiny_values, "--rounds", str(ROUNDS), *flags, lost={1: ["music"]}), post)


@stateful
def test_sites_that_are_killed_between_rounds(
    flags: tuple[str, ...], tiny_values: dict[str, Any], post: LocalPost
) -> None:
    """Before they are told that their upload was accepted, and after; they join again and miss nothing."""
    there = deployed(tiny_values, post, "--rounds", str(ROUNDS), "--evaluation.every", "2", *flags)
    for _ in range(ROUNDS):
        there.play()
        for client in CLIENTS:
            post.restart(client)
    here = begin(tiny_values, *ONE_BY_ONE, "--rounds", str(ROUNDS), "--evaluation.every", "2", *flags).play(ROUNDS)
    assert_equal(there.adapter, here.adapter)
    for client, state in here.engine.states().items():
        assert_same_state(Memory(post.memory / client / "run").of(ROUNDS - 1, client), state)
    assert [record["clients"]["dropped"] for record in there.records] == [{}] * ROUNDS


@stateful
def test_a_site_that_cannot_be_reached_for_a_while(
    flags: tuple[str, ...], tiny_values: dict[str, Any], post: LocalPost
) -> None:
    """It was not told that its upload was accepted, and is then told of it rounds later."""
    every = ("--rounds", str(ROUNDS), "--evaluation.every", str(ROUNDS))
    there = deployed(tiny_values, post, *every, *flags).play()
    post.away = {"music"}
    there.play(2)
    post.away = set()
    there.play()
    here = begin(tiny_values, *ONE_BY_ONE, *every, *flags).play()
    here.engine.faults = {"music": lambda upload: Failure("music", "lost")}
    here.play(2)
    here.engine.faults = {}
    here.play()
    assert_equal(there.adapter, here.adapter)
    assert_same_state(Memory(post.memory / "music" / "run").of(ROUNDS - 1, "music"), here.engine.states()["music"])


@stateful
def test_sites_that_are_not_drawn_go_on_from_what_they_are_sent(
    flags: tuple[str, ...], tiny_values: dict[str, Any], post: LocalPost
) -> None:
    flags = ("--rounds", str(ROUNDS), "--federation.participation", "0.34", *flags)
    there = deployed(tiny_values, post, *flags)
    for _ in range(ROUNDS):
        there.play()
        post.restart("films")
    assert_same_runs(there, simulated(tiny_values, *flags), post)


def restarted(there: Tiny, post: LocalPost, state: ServerState, rounds: int) -> Tiny:
    """The server's process anew, with a checkpoint's state and the records of its rounds."""
    engine = network(there.ready, post)
    engine.remember(there.records[:rounds])
    engine.join()
    assert engine.refused == {}
    return Tiny(there.recipe, there.ready, engine, state, records=there.records[:rounds])  # type: ignore[arg-type]


@pytest.mark.parametrize("flags", [*STATEFUL, ("--method.name", "flora")])  # whose rounds change sites' base models
def test_a_server_that_starts_again(flags: tuple[str, ...], tiny_values: dict[str, Any], post: LocalPost) -> None:
    flags = ("--rounds", str(ROUNDS), *flags)
    there = deployed(tiny_values, post, *flags).play()
    post.faults["films", "train"] = lambda request, reply: None
    there.play()
    post.faults = {}
    there = restarted(there, post, there.state, 2).play(2)
    assert_same_runs(there, simulated(tiny_values, *flags, lost={1: ["films"]}), post)


@stateful
def test_a_server_that_stops_before_a_round_counts(
    flags: tuple[str, ...], tiny_values: dict[str, Any], post: LocalPost
) -> None:
    """The sites scored what came of the round, and the checkpoint was not written: the round is played again."""
    flags = ("--rounds", str(ROUNDS), *flags)
    there = deployed(tiny_values, post, *flags).play(2)
    checkpoint = there.state
    there.play()
    there = restarted(there, post, checkpoint, 2).play(2)
    assert_same_runs(there, simulated(tiny_values, *flags), post)


def test_records_say_whose_uploads_were_accepted(tiny_values: dict[str, Any], post: LocalPost) -> None:
    """An upload that a rule against hostile clients let nothing through of was accepted all the same."""
    engine: Network = deployed(tiny_values, post).engine  # type: ignore[assignment]
    engine.remember(
        [
            {"round": 0, "clients": {"used": ["books", "films", "music"], "dropped": {}}},
            {
                "round": 1,
                "clients": {"used": ["books"], "dropped": {"music": "late"}, "kept": {"books": 1, "films": 0}},
            },
        ]
    )
    post.carried.clear()
    engine.evaluate(begin(tiny_values).state.broadcast, "validation")
    told = {client: request.header["accepted"] for client, request, _ in post.carried}
    assert told == {"books": 1, "films": 1, "music": 0}


def test_a_site_whose_base_model_is_another_after_it_started_again(
    tiny_values: dict[str, Any], post: LocalPost
) -> None:
    """It is asked what it has before it trains; once it is mended it takes part."""
    there = deployed(tiny_values, post, "--rounds", "4").play()
    post.restart("music")
    post.faults["music", "join"] = lambda request, reply: Message({**reply.header, "model": "0" * 64})
    there.play()
    assert there.records[1]["clients"]["dropped"] == {
        "music": "has another base model (the hash of its weights differs)"
    }
    post.restart("music")
    post.faults["music", "join"] = lambda request, reply: None
    there.play()
    assert "gave no answer" in there.records[2]["clients"]["dropped"]["music"]
    post.faults = {}
    there.play()
    assert there.records[3]["clients"]["used"] == CLIENTS


def test_a_site_that_starts_again_between_the_phases_of_a_round(tiny_values: dict[str, Any], post: LocalPost) -> None:
    there = deployed(tiny_values, post, "--method.name", "fedask")

    def killed(request: Message, reply: Message) -> Message:
        post.restart("music")
        return reply

    post.faults["music", "train"] = killed
    there.play()
    assert there.records[0]["clients"]["dropped"] == {
        "music": "second phase: answer: music: has nothing of round 0 to answer from"
    }
    post.faults = {}
    there.play()
    assert there.records[1]["clients"]["used"] == CLIENTS


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_memory_that_is_lost_is_said_and_can_be_brought_back(
    damage: str, tiny_values: dict[str, Any], post: LocalPost, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ("--rounds", str(ROUNDS), "--method.name", "fedsa")
    there = deployed(tiny_values, post, *flags).play()
    shutil.copytree(post.memory / "music" / "run", tmp_path / "copy")
    post.restart("music")
    path = post.memory / "music" / "run" / "round-000000.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-9])
    there.play()
    reason = there.records[1]["clients"]["dropped"]["music"]
    assert str(path.parent) not in reason
    if damage == "gone":
        assert f"what was kept of it is gone here; bring {path.name} of the run's folder there back" in reason
    else:
        assert reason == "music: cannot do what is asked; the site's own log says why"
        assert f"{path}: not a readable safetensors file" in caplog.text
    assert there.records[1]["clients"]["used"] == ["books", "films"]
    path.write_bytes(content)
    there.play(2)
    here = simulated(tiny_values, *flags, lost={1: ["music"]})
    assert_equal(there.adapter, here.adapter)


def test_a_method_that_keeps_nothing_needs_no_memory(tiny_values: dict[str, Any], post: LocalPost) -> None:
    there = deployed(tiny_values, post).play(2)
    assert not post.memory.exists()
    assert [record["clients"]["dropped"] for record in there.records] == [{}, {}]


def state(seed: int) -> ClientState:
    rng = torch.Generator().manual_seed(seed)
    return {"method/b": torch.randn(3, 2, generator=rng), "head/weight": torch.randn(4, generator=rng)}


# What holding a round does to the disk: write, flush and rename its file, flush the folder, drop an older one.
STEPS = [(Path, "open"), (os, "fsync"), (Path, "replace"), (os, "open"), (os, "fsync"), (Path, "unlink")]


def crash(monkeypatch: pytest.MonkeyPatch, at: int) -> list[str]:
    """The process dies before step `at`: nothing that would be done after it is done, debris stays. Gives the steps."""
    done: list[str] = []

    def step(name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        if len(done) >= at:
            raise Crash
        done.append(name)
        return original(*args, **kwargs)

    for holder, name in set(STEPS):
        original = getattr(holder, name)
        monkeypatch.setattr(holder, name, lambda *args, n=name, o=original, **kwargs: step(n, o, *args, **kwargs))
    return done


@pytest.mark.parametrize("at", range(len(STEPS) + 1))
def test_a_crash_at_any_step_of_holding_leaves_what_was_kept(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(tmp_path)
    memory.hold(0, state(0), None)
    memory.hold(1, state(1), 0)
    with monkeypatch.context() as patch:
        done = crash(patch, at)
        try:
            memory.hold(2, state(2), 1)
        except Crash:
            assert at < len(STEPS)
        assert done == [name for _, name in STEPS[:at]]
    memory = Memory(tmp_path)
    assert_same_state(memory.of(1, "c"), state(1))
    renamed = (tmp_path / "round-000002.safetensors").exists()
    assert renamed == (at > 2)
    if renamed:
        assert_same_state(memory.of(2, "c"), state(2))
    # The round is played again, and the next one.
    memory.hold(2, state(2), 1)
    memory.hold(3, state(3), 2)
    assert [path.name for path in sorted(tmp_path.glob("round-*"))] == [f"round-00000{n}.safetensors" for n in (2, 3)]
    assert_same_state(memory.of(2, "c"), state(2))


@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_site_that_crashes_while_it_holds_a_round_goes_on(
    at: int, tiny_values: dict[str, Any], post: LocalPost, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--rounds", "3", "--method.name", "fedsa")
    there = deployed(tiny_values, post, *flags).play()
    handle = post.sites["music"].handle

    def dying(request: Message) -> Message:
        if request.header["kind"] != "train":
            return handle(request)
        with monkeypatch.context() as patch:
            crash(patch, at)
            with pytest.raises(Crash):
                handle(request)
        post.restart("music")
        return Message.refusal("its process died")

    post.sites["music"].handle = dying  # type: ignore[method-assign]
    there.play(2)
    assert there.records[1]["clients"]["dropped"] == {"music": "its process died"}
    here = begin(tiny_values, *ONE_BY_ONE, *flags).play()
    here.engine.faults = {"music": lambda upload: Failure("music", "lost")}
    here.play()
    here.engine.faults = {}
    here.play()
    assert_equal(there.adapter, here.adapter)


def test_memory_does_not_grow_with_the_rounds(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    for number in range(9):
        memory.hold(number, state(number), 1 if number > 1 else None)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"round-00000{n}.safetensors" for n in (1, 8)]
    (tmp_path / "round-notes.safetensors").write_bytes(b"not a round")
    memory.hold(9, {}, 8)
    assert memory.of(9, "c") == {}
    assert memory.of(None, "c") == {}
    with pytest.raises(RunError, match="what was kept of it is gone here"):
        memory.of(1, "c")
