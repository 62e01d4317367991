"""Starts a process, starts it again when it dies, and ends it with what started it."""

import contextlib
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from fedrot.running.network.channel import WorkerError

_LIVED = 600.0  # seconds after which a death is not counted with those before

Process = subprocess.Popen[bytes]

_log = logging.getLogger("fedrot")


@dataclass(frozen=True)
class Program:
    """What is kept running. Its standard input is a pipe that this process alone holds open: its end tells the program
    that nobody keeps it any more, whatever the keeper died of.
    """

    name: str  # for the log, e.g. "books: the worker"
    command: Sequence[str]
    log: Path  # where its output goes, added to what is there
    environment: Mapping[str, str] = field(default_factory=dict)  # beside this process's own
    final: frozenset[int] = frozenset({2})  # exit codes that say what must be mended: it is not started again

    def start(self) -> Process:
        """Start it once."""
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            return subprocess.Popen(
                list(self.command),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,  # an interrupt is for the keeper, which ends it
            )
        finally:
            os.close(log)

    def died(self, code: int) -> str:
        """How it ended, with the last line of its log."""
        text = ""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 2000))
            text = file.read().decode(errors="replace")
        last = next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "nothing")[:300]
        how = f"signal {-code}" if code < 0 else f"code {code}"
        return f"{self.name} ended ({how}; {self.log} ends with: {last})"


class Keeper:
    """Keeps a program running: a context manager.

    Args:
        program: what runs.
        ready: returns when a process that was started does its work; raises `WorkerError` where it never will.
        pause: seconds before it is started again; twice as many after every further death.
        limit: deaths in a row, less than ten minutes after the start, after which it is given up; None: never.
        longest: seconds that a pause takes at most.

    Raises:
        WorkerError: on entering, what `ready` raised.
    """

    def __init__(
        self,
        program: Program,
        ready: Callable[[Process], None],
        pause: float = 1.0,
        limit: int | None = 5,
        longest: float = 60.0,
    ) -> None:
        self.program, self._ready = program, ready
        self._pause, self._limit, self._longest = pause, limit, longest
        self.process: Process | None = None
        self._starting, self._ending, self._over = threading.Lock(), threading.Event(), threading.Event()
        self._reason: str | None = None
        self._watcher = threading.Thread(target=self._watch, name="fedrot-keeper", daemon=True)

    def __enter__(self) -> "Keeper":
        self.process = self.program.start()
        try:
            self._ready(self.process)
        except BaseException:
            _end(self.process)
            raise
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._starting:
            self._ending.set()
        if self.process is not None:
            _end(self.process)
        self._watcher.join()

    def wait(self, seconds: float | None = None) -> bool:
        """Return when it was ended, True, or after these seconds. Raises `WorkerError` when it was given up."""
        over = self._over.wait(seconds)
        if self._reason is not None:
            raise WorkerError(self._reason)
        return over

    def _watch(self) -> None:
        deaths, process = 0, self.process
        while process is not None:
            began = time.monotonic()
            code = process.wait()
            if self._ending.is_set():
                break
            deaths = 1 if time.monotonic() - began > _LIVED else deaths + 1
            died = self.program.died(code)
            if code in self.program.final or (self._limit is not None and deaths > self._limit):
                self._give_up(f"{died}; it is not started again")
                break
            pause = min(self._pause * 2 ** (deaths - 1), self._longest)
            _log.warning("%s; it is started again in %g s", died, pause)
            self._ending.wait(pause)
            with self._starting:
                if self._ending.is_set():
                    break
                try:
                    process = self.process = self.program.start()
                except OSError as problem:
                    self._give_up(f"{self.program.name} cannot be started again ({problem})")
                    break
        self._over.set()

    def _give_up(self, reason: str) -> None:
        self._reason = reason
        _log.error("%s", reason)


def _end(process: Process) -> None:
    """What is kept so writes its files in one step each: it may be ended at any time."""
    if process.stdin is not None:
        process.stdin.close()
    process.terminate()
    try:
        process.wait(10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
