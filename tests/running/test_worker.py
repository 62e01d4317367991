"""A site's worker: what it remembers, and that it is started again with all that counts when it dies."""

import json
import logging
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from network_sites import LocalPost, divide_files, network
from test_network import ONE_BY_ONE
from tiny_runs import Tiny

from fedrot.app.cli.service import log_here
from fedrot.core.errors import FedrotError
from fedrot.running.network.channel import Listener, WorkerError, ask, lock, receive, send
from fedrot.running.network.messages import Message
from fedrot.running.network.site import Here
from fedrot.running.network.worker import Resident, Worker, main
from fedrot.running.prepare import prepare
from fedrot.running.recipe_file import parse_recipe


class Counting:
    """A site that counts what it handles, and refuses what it is told to."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, request: Message) -> Message:
        self.calls.append(request.header["kind"])
        if request.header.get("bad"):
            return Message.refusal("no")
        return Message.of([torch.tensor([float(len(self.calls))])], calls=len(self.calls))


def request(kind: str, value: float = 0.0, **header: Any) -> Message:
    return Message.of([torch.tensor([value])], kind=kind, **header)


@pytest.fixture
def site() -> Counting:
    return Counting()


@pytest.fixture
def resident(site: Counting) -> Resident:
    return Resident("books", site)


def test_a_repeated_request_is_handled_once(resident: Resident, site: Counting) -> None:
    first = resident.answer(request("train", 1.0, round=1))
    again = resident.answer(request("train", 1.0, round=1))
    assert site.calls == ["train"]
    assert again.header == first.header
    assert torch.equal(again.payload, first.payload)


def test_only_the_last_one_is_remembered_by_all_its_bytes(resident: Resident, site: Counting) -> None:
    one = request("train", 1.0, round=1, accepted=None)
    for other in (
        request("train", 1.0, round=2, accepted=None),
        request("train", 2.0, round=1, accepted=None),
        request("train", 1.0, round=1, accepted=0),
        request("answer", 1.0, round=1, accepted=None),
        request("join", 1.0),
    ):
        before = len(site.calls)
        for asked in (one, other, one):
            resident.answer(asked)
        assert len(site.calls) == before + 3
        resident.answer(request("other"))


def test_what_was_trained_is_remembered_while_others_are_scored_and_a_server_starts_again(
    resident: Resident, site: Counting
) -> None:
    join, train = request("join"), request("train", 1.0, round=1)
    resident.answer(join)
    reply = resident.answer(train)
    for asked in (request("evaluate", 1.0), request("evaluate", 2.0), join, train):
        given = resident.answer(asked)
    assert torch.equal(given.payload, reply.payload)
    assert site.calls == ["join", "train", "evaluate", "evaluate"]
    resident.answer(request("join", 1.0))  # another run, say
    resident.answer(train)
    assert site.calls[4:] == ["join", "train"]


def test_a_refusal_is_not_remembered(resident: Resident, site: Counting) -> None:
    for _ in range(2):
        assert resident.answer(request("train", bad=True)).refused == "no"
    assert len(site.calls) == 2


def test_one_request_at_a_time_and_its_repetition_waits_for_the_reply() -> None:
    begun, go_on = threading.Event(), threading.Event()
    running: list[int] = []

    def slow(asked: Message) -> Message:
        running.append(1)
        begun.set()
        assert go_on.wait(10.0)
        return Message.of(calls=len(running))

    resident, found = Resident("books", slow), []
    threads = [
        threading.Thread(target=lambda: found.append(resident.answer(request("train")).header)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(10.0)
    assert resident.answer(Message.of(kind="here")).header == {"client": "books"}  # at once, whatever is going on
    time.sleep(0.2)  # the others would be in by now
    go_on.set()
    for thread in threads:
        thread.join()
    assert found == [{"calls": 1}] * 3


@pytest.mark.parametrize("words", [[], ["{"], ['{"here": {}}'], ['{"here": {"data": "x", "odd": 1}}']])
def test_settings_that_cannot_be_are_one_line_and_code_2(words: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert main(words) == 2
    (line,) = caplog.messages
    assert line.startswith("the worker's settings must be one JSON object of here, folder and socket")


def broken(folder: Path, code: int) -> Path:
    """An interpreter that ends at once."""
    program = folder / "program"
    program.write_text(f"#!/bin/sh\necho it broke\nexit {code}\n")
    program.chmod(0o700)
    return program


class Dying(Worker):
    """Starts what ends at once, and waits for nothing."""

    def _until_it_answers(self, process: Any) -> None:
        pass


@pytest.mark.parametrize(("code", "starts"), [(3, 3), (2, 1)])
def test_what_dies_again_and_again_is_given_up(
    code: int, starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.executable", str(broken(tmp_path, code)))
    reason = rf"books: the worker ended \(code {code}; .*worker\.log ends with: it broke\); it is not started again"
    worker = Dying(Here("books", tmp_path), tmp_path / "m", tmp_path / "w.sock", pause=0.01, limit=2)
    with worker, pytest.raises(WorkerError, match=reason):
        worker.wait()
    assert worker.log.read_text() == "it broke\n" * starts
    assert sum("it is started again" in line for line in caplog.messages) == starts - 1


def test_a_worker_that_does_not_come_up_is_an_error_on_entering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(broken(tmp_path, 3)))
    with pytest.raises(WorkerError, match=r"books: the worker ended \(code 3; .* it broke\)$"):
        Worker(Here("books", tmp_path), tmp_path / "m", tmp_path / "w.sock").__enter__()


def test_a_second_worker_at_the_same_socket_or_folder_ends_with_code_2(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def words(folder: str, path: str) -> list[str]:
        where = {"folder": str(tmp_path / folder), "socket": str(tmp_path / path)}
        return [json.dumps({"here": {"name": "books", "data": "x"}, **where})]

    (tmp_path / "m").mkdir()
    with Listener(tmp_path / "w.sock"), lock(tmp_path / "m" / "worker.lock", "taken"):
        assert main(words("other", "w.sock")) == 2
        assert main(words("m", "v.sock")) == 2
    one, two = caplog.messages
    assert one.endswith("w.sock: another worker listens here; end it first")
    assert two.endswith("m: another worker keeps this client's state here; end it first")


@pytest.fixture
def fedrot_log() -> Iterator[None]:
    """The log of fedrot as it was, afterwards."""
    log = logging.getLogger("fedrot")
    before = list(log.handlers), log.level, log.propagate
    yield
    for handler in set(log.handlers) - set(before[0]):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(before[1])
    log.propagate = before[2]


@pytest.mark.parametrize("umask", [0o002, 0o022], ids=oct)
@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_the_folder_of_a_command_that_stays_is_its_user_s_alone(
    umask: int, there: bool, tmp_path: Path, fedrot_log: None
) -> None:
    """A log is the first thing in it, and a worker's socket another."""
    folder, before = tmp_path / "sites" / "books", os.umask(umask)
    try:
        if there:
            folder.mkdir(parents=True)
        log_here(folder / "client.log")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        Listener(folder / "worker.sock").close()
    finally:
        os.umask(before)


def same(found: Message, wanted: Message) -> None:
    """The same reply, bit for bit, but for how long it took."""
    drop = {"seconds"}
    assert {k: v for k, v in found.header.items() if k not in drop} == {
        k: v for k, v in wanted.header.items() if k not in drop
    }
    assert torch.equal(found.payload, wanted.payload)


def test_a_worker_answers_as_the_site_does_and_goes_on_after_it_was_killed(
    tiny_values: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    folders = divide_files(tiny_data, tmp_path / "sites")
    post = LocalPost({"books": folders["books"]}, tmp_path / "memory")
    flags = [*ONE_BY_ONE, "--method.name", "fedsa", "--evaluation.every", "9"]  # clients keep a factor
    ready = prepare(parse_recipe(tiny_values, flags))
    engine = network(ready, post)
    engine.join()
    Tiny(ready.recipe, ready, engine, ready.recipe.method.start(ready.model.read())).play(3)  # type: ignore[arg-type]
    join, *rounds = [(asked, reply) for _, asked, reply in post.carried if asked.header["kind"] != "evaluate"]
    assert [asked.header["round"] for asked, _ in rounds] == [0, 1, 2]

    here, path = Here("books", folders["books"], compute={"workers": 1, "threads": 1}), tmp_path / "w" / "books.sock"
    with Worker(here, tmp_path / "state", path, pause=0.1) as worker:
        for asked, reply in (join, *rounds[:2]):
            same(ask(path, asked), reply)
        same(ask(path, rounds[1][0]), rounds[1][1])
        log = worker.log.read_text()
        count = {what: log.count(what) for what in ("listens at", " join: ", "train of round", "given again")}
        assert count == {"listens at": 1, " join: ": 1, "train of round": 3, "given again": 1}

        first = worker.keeper.process
        assert first is not None
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            send(connection, rounds[2][0])
            os.kill(first.pid, signal.SIGKILL)
            with pytest.raises((FedrotError, OSError)):
                receive(connection)
        assert first.wait(10.0) == -signal.SIGKILL
        refused = ask(path, rounds[2][0])  # waits for the next one
        assert refused.header["join"] is True
        for asked, reply in (join, rounds[2]):  # from the factor that is on disk
            same(ask(path, asked), reply)

        second = worker.keeper.process
        assert second is not None
        assert second.stdin is not None
        assert second.pid != first.pid
        worker.keeper._ending.set()
        second.stdin.close()  # as when the keeper is gone
        assert second.wait(10.0) == 0
