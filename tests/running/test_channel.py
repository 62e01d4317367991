"""The worker's socket: messages arrive whole or are refused, only this user is let in, and no connection ends it."""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fedrot.running.network import channel
from fedrot.running.network.channel import Listener, WorkerError, ask, receive, send
from fedrot.running.network.messages import Message, MessageError

HEAD = struct.Struct(">4sHIQ")
REQUEST = Message.of([torch.arange(5.0)], kind="train", round=3, numbers={"a": 1.5}, none=None)


def echo(request: Message) -> Message:
    return Message({**request.header, "echo": True}, request.payload)


Serve = Callable[[channel.Handle], Path]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serve a handle; gives the socket's path."""
    listeners: list[tuple[Listener, threading.Thread]] = []

    def start(handle: channel.Handle) -> Path:
        listener = Listener(tmp_path / "s" / "site.sock")
        thread = threading.Thread(target=listener.serve, args=(handle,))
        thread.start()
        listeners.append((listener, thread))
        return listener.path

    yield start
    for listener, thread in listeners:
        listener.close()
        thread.join(5.0)
        assert not thread.is_alive()
        assert not listener.path.exists()


def raw(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX)
    found.settimeout(10.0)
    found.connect(str(path))
    return found


def test_messages_go_both_ways_bit_for_bit(serve: Serve) -> None:
    path = serve(echo)
    for request in (REQUEST, Message.of(kind="join"), Message.of([torch.randn(700_000)], kind="large")):
        reply = ask(path, request)
        assert reply.header == {**request.header, "echo": True}
        assert torch.equal(reply.payload, request.payload)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "no message of fedrot's"),
        (HEAD.pack(b"fdrt", 9, 2, 0), "version 9, not 1"),
        (HEAD.pack(b"fdrt", 1, 2**32 - 1, 0), "header has 4294967295 bytes, more than the 8388608 allowed"),
        (HEAD.pack(b"fdrt", 1, 2, 2**64 - 1), "payload has 18446744073709551615 bytes, more than"),
        (HEAD.pack(b"fdrt", 1, 2, 0) + b"[1", "is not JSON"),
        (HEAD.pack(b"fdrt", 1, 3, 0) + b"[1]", "is not an object"),
        (HEAD.pack(b"fdrt", 1, 2, 9) + b"{}1234", "broke off after 4 of 9 bytes"),
        (HEAD.pack(b"fdrt", 1, 9, 0)[:7], "broke off after 7 of 18 bytes"),
        (os.urandom(4000), "no message of fedrot's"),
    ],
)
def test_what_is_no_message_is_refused_and_the_next_one_is_answered(serve: Serve, sent: bytes, reason: str) -> None:
    calls: list[Message] = []
    path = serve(lambda request: calls.append(request) or echo(request))
    with raw(path) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert reason in (receive(connection).refused or "")
    assert calls == []
    assert ask(path, REQUEST).header["echo"] is True


def test_an_announced_length_costs_no_memory(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "LONGEST_PAYLOAD", 2**62)
    path = serve(echo)
    with raw(path) as connection:
        connection.sendall(HEAD.pack(b"fdrt", 1, 2, 2**61) + b"{}")
        connection.shutdown(socket.SHUT_WR)
        assert "broke off after 0 of" in (receive(connection).refused or "")


def test_too_long_a_message_is_not_sent(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    path = serve(echo)
    monkeypatch.setattr(channel, "LONGEST_PAYLOAD", 19)
    with pytest.raises(MessageError, match="payload has 20 bytes, more than the 19 allowed"):
        ask(path, REQUEST)


def test_who_vanishes_or_only_looks_ends_nothing(serve: Serve) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def slow(request: Message) -> Message:
        if request.header["kind"] == "train":
            begun.set()
            go_on.wait(10.0)
            done.set()
            return Message.of([torch.zeros(1_000_000)])  # more than fits a socket that nobody reads
        return echo(request)

    path = serve(slow)
    raw(path).close()
    with raw(path) as connection:
        send(connection, REQUEST)
        assert begun.wait(10.0)
    go_on.set()
    assert done.wait(10.0)
    assert ask(path, Message.of(kind="join")).header["echo"] is True


def test_a_reply_that_cannot_be_written_is_refused(serve: Serve) -> None:
    path = serve(lambda request: Message.of(score=float("nan")))
    assert "not finite" in (ask(path, REQUEST).refused or "")


def test_a_worker_that_goes_or_is_silent_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "site.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        with pytest.raises(WorkerError, match=r"site\.sock: the worker gave no reply within 0\.05 s"):
            ask(path, REQUEST, patience=0.05)
        listener.accept()[0].close()
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        with pytest.raises(WorkerError, match=r"site\.sock: the worker ended before it replied"):
            ask(path, REQUEST)
        thread.join()


def test_a_worker_that_is_not_there_is_waited_for(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "s" / "site.sock"
    with pytest.raises(
        WorkerError, match=r"site\.sock: no worker listens here \(No such file.*start the site's worker"
    ):
        ask(path, REQUEST, seconds=0.1)
    late = threading.Timer(0.2, serve, (echo,))
    late.start()
    assert ask(path, REQUEST, seconds=10.0).header["echo"] is True
    late.join()


def test_only_this_user_can_reach_the_socket(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    path = serve(echo)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)  # now whoever is on the other side is somebody else
    with pytest.raises(WorkerError, match="a process of another user listens here"):
        ask(path, REQUEST)
    with raw(path) as connection, pytest.raises((MessageError, OSError)):
        receive(connection)
    monkeypatch.undo()
    assert ask(path, REQUEST).header["echo"] is True


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(WorkerError, match="open: others can write to the folder"):
        Listener(folder / "site.sock")


def test_the_socket_of_a_dead_process_is_replaced(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s" / "site.sock"))
        dead.listen(1)
    assert ask(serve(echo), REQUEST).header["echo"] is True


def test_a_living_socket_and_what_is_no_socket_are_left_alone(serve: Serve, tmp_path: Path) -> None:
    path = serve(echo)
    with pytest.raises(WorkerError, match=r"site\.sock: another worker listens here; end it first"):
        Listener(path)
    assert ask(path, REQUEST).header["echo"] is True
    other = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(other))
        foreign.listen(1)
        with pytest.raises(WorkerError, match=r"other\.sock: another process listens here"):
            Listener(other)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(WorkerError, match="file: there is something else"):
        Listener(file)
    assert file.read_text() == "mine"


def test_a_path_that_is_too_long_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="choose another path"):
        Listener(tmp_path / ("x" * 120))
    with pytest.raises(WorkerError, match="no worker listens here"):  # at once
        ask(tmp_path / ("x" * 120), REQUEST, seconds=3600.0)


def test_many_at_a_time(serve: Serve) -> None:
    path = serve(lambda request: time.sleep(0.01) or echo(request))
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(ask(path, Message.of(kind="x", n=n)).header["n"]))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(20))
