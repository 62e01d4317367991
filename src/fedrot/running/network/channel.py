"""Requests and replies over a Unix socket, between a site's worker and the processes on its machine that ask it.

A connection carries one request and its reply, each as a fixed head (magic, version, two lengths), the header's JSON
and the payload's bytes. Only processes of the same user are let in.
"""

import contextlib
import fcntl
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

import torch

from fedrot.core.errors import FedrotError
from fedrot.running.network.messages import LONGEST_HEADER, Message, MessageError

Handle = Callable[[Message], Message]

LONGEST_PAYLOAD = 16 << 30  # bytes
_HEAD = struct.Struct(">4sHIQ")
_MAGIC, _VERSION = b"fdrt", 1
_PIECE = 1 << 20  # bytes that are taken or given at a time
_STALL = 60.0  # seconds without a byte until the worker gives a connection up

_log = logging.getLogger("fedrot")


class WorkerError(FedrotError):
    """A site's worker that cannot be started or reached, or that ended before it replied."""


class _Ended(MessageError):
    """The other side closed the connection before a message began."""


class Listener:
    """The worker's end: a socket at `path` that only this user can reach; it is there when this returns.

    The socket of a process that died is replaced. Raises `WorkerError` where another process listens there, where
    something else is in the way, or where others can write to the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._open = path, True
        _own_folder(path.parent)
        self._lock = lock(path.with_name(f"{path.name}.lock"), f"{path}: another worker listens here; end it first")
        try:
            self._socket = _bound(path)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more, and take the socket away; requests that are being answered go on."""
        if self._open:
            self._open = False
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as knock:
                knock.connect(str(self.path))  # accept() returns
            self.path.unlink(missing_ok=True)
            self._socket.close()
            self._lock.close()

    def serve(self, handle: Handle) -> None:
        """Answer requests until closed, each in a thread of its own. What a connection does ends no other."""
        while self._open:
            try:
                connection, _ = self._socket.accept()
            except OSError as problem:
                if self._open:  # too many open files, say
                    _log.warning("%s: a connection could not be taken (%s)", self.path, problem)
                    time.sleep(0.5)
                continue
            threading.Thread(target=self._answer, args=(connection, handle), daemon=True).start()

    def _answer(self, connection: socket.socket, handle: Handle) -> None:
        with connection:
            try:
                connection.settimeout(_STALL)
                if not _same_user(connection):
                    _log.warning("%s: a process of another user was turned away", self.path)
                    return
                try:
                    reply = handle(receive(connection))
                    reply.header_bytes()
                except _Ended:
                    return
                except MessageError as problem:
                    _log.warning("%s: %s", self.path, problem)
                    reply = Message.refusal(str(problem))
                send(connection, reply)
            except OSError as problem:
                _log.warning("%s: whoever asked is gone (%s)", self.path, problem)


def ask(path: Path, message: Message, seconds: float = 60.0, patience: float | None = None) -> Message:
    """The reply of the worker that listens at `path`.

    Args:
        path: the worker's socket.
        message: the request.
        seconds: how long to wait for a worker that is not there yet.
        patience: how many seconds may pass without a byte of the reply; None: as many as training takes.

    Raises:
        WorkerError: nobody listens there, a process of another user does, or the worker ended before it replied.
        MessageError: what came back is no message, or the request is too long to be one.
    """
    with _connected(path, seconds) as connection:
        if not _same_user(connection):
            raise WorkerError(f"{path}: a process of another user listens here; choose a folder of your own")
        connection.settimeout(patience)
        try:
            send(connection, message)
            return receive(connection)
        except TimeoutError:
            raise WorkerError(f"{path}: the worker gave no reply within {patience:g} s; its log says why") from None
        except (OSError, _Ended):
            raise WorkerError(f"{path}: the worker ended before it replied; its log says why") from None


def send(connection: socket.socket, message: Message) -> None:
    """Write a message. Raises `MessageError`, before anything is sent, where it is too long, and `OSError`."""
    header, payload = message.header_bytes(), message.payload.contiguous().numpy().data
    _check_lengths(len(header), len(payload))
    connection.sendall(_HEAD.pack(_MAGIC, _VERSION, len(header), len(payload)) + header)
    for start in range(0, len(payload), _PIECE):  # a socket's timeout is for a whole call, however much it sends
        connection.sendall(payload[start : start + _PIECE])


def receive(connection: socket.socket) -> Message:
    """Read a message. Raises `MessageError` where there is none or only a part of one, and `OSError`."""
    head = _exactly(connection, _HEAD.size)
    magic, version, header, payload = _HEAD.unpack(head)
    if magic != _MAGIC:
        raise MessageError("what came over the worker's socket is no message of fedrot's")
    if version != _VERSION:
        raise MessageError(f"the message is of version {version}, not {_VERSION}; start the worker again")
    _check_lengths(header, payload)
    values, body = bytes(_exactly(connection, header)), _exactly(connection, payload)
    return Message.from_parts(values, torch.frombuffer(body, dtype=torch.uint8) if body else torch.empty(0).byte())


def lock(path: Path, taken: str) -> IO[str]:
    """An open file that no other process can lock until this one closes it or dies. `WorkerError`, saying `taken`."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise WorkerError(taken) from None
    return file


def _check_lengths(header: int, payload: int) -> None:
    for what, length, most in (("header", header, LONGEST_HEADER), ("payload", payload, LONGEST_PAYLOAD)):
        if length > most:
            raise MessageError(f"the message's {what} has {length} bytes, more than the {most} allowed")


def _exactly(connection: socket.socket, count: int) -> bytearray:
    """The next `count` bytes. Room is made as they come, not as they are announced."""
    found = bytearray()
    while len(found) < count:
        piece = connection.recv(min(count - len(found), _PIECE))
        if not piece:
            kind = MessageError if found or count != _HEAD.size else _Ended
            raise kind(f"the message broke off after {len(found)} of {count} bytes")
        found += piece
    return found


def _own_folder(folder: Path) -> None:
    """Make the folder, for this user alone; one that is there must be this user's to write to."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as problem:
        raise WorkerError(f"{folder}: no folder for the worker's socket ({problem.strerror})") from None
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise WorkerError(
            f"{folder}: others can write to the folder of the worker's socket; chmod 700 it, or take another"
        )


def _bound(path: Path) -> socket.socket:
    """A socket that listens at `path`, in the place of one that nobody listens at."""
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(path))
            raise WorkerError(f"{path}: another process listens here; end it first")
        path.unlink()
    elif os.path.lexists(path):
        raise WorkerError(f"{path}: there is something else where the worker's socket should be; choose another path")
    found = socket.socket(socket.AF_UNIX)
    try:
        found.bind(str(path))
        path.chmod(0o600)  # nobody can connect before listen()
        found.listen(64)
    except OSError as problem:
        found.close()
        reason = problem.strerror or problem  # a path that is too long has no number
        raise WorkerError(f"{path}: the worker's socket cannot be made ({reason}); choose another path") from None
    return found


def _connected(path: Path, seconds: float) -> socket.socket:
    """A connection to who listens at `path`, as soon as somebody does."""
    end = time.monotonic() + seconds
    while True:
        found = socket.socket(socket.AF_UNIX)
        try:
            found.connect(str(path))
            return found
        except OSError as problem:
            found.close()
            soon = isinstance(problem, (FileNotFoundError, ConnectionRefusedError, BlockingIOError))
            if not soon or time.monotonic() >= end:
                reason = problem.strerror or problem
                raise WorkerError(f"{path}: no worker listens here ({reason}); start the site's worker") from None
        time.sleep(0.05)


def _same_user(connection: socket.socket) -> bool:
    """Whether the process on the other side is this user's; where the system does not say, the folder is the guard."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    form = struct.Struct("iII")
    _, user, _ = form.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, form.size))
    return bool(user == os.geteuid())
