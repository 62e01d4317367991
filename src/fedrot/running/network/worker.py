"""The resident worker of a site: a process that keeps base model, data and trainer between requests, and its keeper.

Processes that live for one message ask it over a Unix socket (`channel.ask`). What must outlive the worker is what the
client keeps, in its folder; a server has a site that was started again join anew.
"""

import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from fedrot.core.errors import FedrotError, RunError
from fedrot.running.network.channel import Handle, Listener, WorkerError, ask, lock
from fedrot.running.network.keeper import Keeper, Process, Program
from fedrot.running.network.messages import Message, shown
from fedrot.running.network.site import Here, Site

_PING = "here"  # a request that the worker answers itself, at once

_log = logging.getLogger("fedrot")


# Of an earlier request of which kinds the reply still holds when one of a kind has been handled.
_LEAVES: Mapping[str, Set[str]] = {"train": {"join"}, "evaluate": {"join", "train"}}


class Resident:
    """Hands requests to a site one at a time; others wait.

    A request that repeats the last one of its kind is given that one's reply and not handled again: the process that
    asked first may have died while the site trained, and with federation.buffer every round asks a site that trains the
    same. Nothing that would change the reply was handled between the two. Scoring a broadcast, the site begins with
    what it kept of the last accepted round, and leaves alone what it holds of the round that it trained and what it
    wrote of it to the disk. Training, it does not change what it said on joining; and a join that is repeated is not
    handled, so the run is the same. After any other request all earlier replies are forgotten: of a secure sum, a stage
    goes on from the opening that came before, and that must not be given out twice. What the request says of the last
    accepted round was heeded the first time. What was refused is handled anew, since the reason may be mended. Replies
    are not kept on disk: a worker that was started again has the site join and trains again from what the client keeps.
    """

    def __init__(self, name: str, handle: Handle) -> None:
        self._name, self._handle = name, handle
        self._turn = threading.Lock()
        self._last: dict[str, tuple[bytes, Message]] = {}  # by kind: hash of the request, and the reply

    def answer(self, request: Message) -> Message:
        """The reply to a request; a line of the log says what it was and how long it took."""
        if request.header.get("kind") == _PING:
            return Message.of(client=self._name)
        with self._turn:
            kind, asked = str(request.header.get("kind")), _digest(request)
            known, found = self._last.get(kind, (b"", request))
            if known == asked:
                _log.info("%s: asked again, the reply is given again", _about(request))
                return found
            leaves = _LEAVES.get(kind, frozenset())
            self._last = {other: last for other, last in self._last.items() if other in leaves}
            began = time.monotonic()
            reply = self._handle(request)
            seconds, reason = time.monotonic() - began, reply.refused
            _log.info("%s: %.2f s%s", _about(request), seconds, "" if reason is None else f", refused: {reason}")
            if reason is None:
                self._last[kind] = asked, reply
            return reply


def _about(request: Message) -> str:
    """A request's kind and round for a line of the log."""
    kind, number = request.header.get("kind"), request.header.get("round")
    name = kind if isinstance(kind, str) and kind.isidentifier() and len(kind) < 20 else shown(kind)
    return name if number is None else f"{name} of round {shown(number)}"


def _digest(request: Message) -> bytes:
    """A hash of a request's bytes."""
    header = request.header_bytes()
    found = hashlib.blake2b(len(header).to_bytes(8, "big") + header, digest_size=32)
    found.update(request.payload.contiguous().numpy().data)
    return found.digest()


class Worker:
    """Starts a site's worker, starts it again when it dies, and ends it: a context manager.

    Args:
        here: what the site says itself. `compute.threads` holds for the process's libraries, too.
        folder: where what the client keeps and the log (worker.log) are.
        path: the worker's socket.
        seconds: how long it may take until it answers; models are loaded later.
        pause: see `Keeper`.
        limit: see `Keeper`.

    Raises:
        WorkerError: on entering, the worker ended or did not answer in time.
    """

    def __init__(
        self, here: Here, folder: Path, path: Path, seconds: float = 120.0, pause: float = 1.0, limit: int = 5
    ) -> None:
        self._here, self.path, self._seconds = here, path.absolute(), seconds
        self.log = folder.absolute() / "worker.log"
        settings = {"here": asdict(here), "folder": str(folder.absolute()), "socket": str(self.path)}
        environment = {"TOKENIZERS_PARALLELISM": "false"}
        if threads := (here.compute or {}).get("threads"):
            environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        # -P: no module comes from the folder that this happens to be started in.
        command = [sys.executable, "-P", "-m", "fedrot.running.network.worker", json.dumps(settings, default=str)]
        program = Program(f"{here.name}: the worker", command, self.log, environment)
        self.keeper = Keeper(program, self._until_it_answers, pause, limit)

    def __enter__(self) -> "Worker":
        self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.keeper.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.keeper.__exit__(kind, error, at)

    def wait(self, seconds: float | None = None) -> bool:
        """See `Keeper.wait`."""
        return self.keeper.wait(seconds)

    def _until_it_answers(self, process: Process) -> None:
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            if process.poll() is not None:
                raise WorkerError(self.keeper.program.died(process.returncode))
            try:
                reply = ask(self.path, Message.of(kind=_PING), 0.2, patience=5.0)
            except WorkerError:
                continue
            if reply.header.get("client") == self._here.name:
                return
            time.sleep(0.2)  # another one's: this one will end, and say so
        raise WorkerError(f"{self._here.name}: the worker did not answer within {self._seconds:g} s; see {self.log}")


def main(words: Sequence[str]) -> int:
    """The worker's process: serve until whoever started it closes standard input, or is gone."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    _log.setLevel(logging.INFO)
    try:
        here, folder, path = _settings(words)
        name = f"{folder}: another worker keeps this client's state here; end it first"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with lock(folder / "worker.lock", name), Listener(path) as listener:
            threading.Thread(target=_end_with_the_keeper, daemon=True).start()
            resident = Resident(here.name, Site(here, folder).handle)
            _log.info("%s: process %d listens at %s", here.name, os.getpid(), path)
            listener.serve(resident.answer)
    except FedrotError as problem:
        _log.error("%s", problem)
        return 2
    return 0


def _settings(words: Sequence[str]) -> tuple[Here, Path, Path]:
    """(what the site says, the folder, the socket) from the one argument, a JSON object."""
    try:
        (text,) = words
        values: dict[str, Any] = json.loads(text)
        here = {**values["here"], "data": Path(values["here"]["data"])}
        return Here(**here), Path(values["folder"]), Path(values["socket"])
    except (ValueError, TypeError, KeyError) as problem:
        raise RunError(
            f"the worker's settings must be one JSON object of here, folder and socket ({problem})"
        ) from None


def _end_with_the_keeper() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
