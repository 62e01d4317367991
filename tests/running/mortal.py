"""Processes that die at a chosen file operation or message, and sites that are started again by their keepers.

A process that died does nothing more: no cleaning up, no buffer that is written at last. What it had written and not
forced to the disk is lost by half, as in a power cut.
"""

import builtins
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from network_sites import LocalPost

from fedrot.running.network.messages import Message
from fedrot.running.network.site import Site


class Crash(BaseException):
    """A process dies here."""


class Disk:
    """Counts what the processes that may die do to files below `root`, each write in two halves, and ends them.

    `lives`: after how many steps each process dies, one after the other, counted from the death before; when they are
    used up, nobody dies.
    """

    def __init__(self, root: Path, lives: Iterator[int]) -> None:
        self.root, self.lives, self.left = root, lives, next(lives, None)
        self.steps: list[str] = []
        self.deaths: list[str] = []  # the steps that were not done any more
        self.dead = False
        self._who, self._mortal = "nobody", False  # the process that runs now, and whether it may die and is counted
        self._loose: dict[tuple[int, int], _Loose] = {}  # inode -> a file that is not wholly on the disk

    def step(self, what: str) -> None:
        """Something is about to be done; `Crash` where the process dies before it, or is dead."""
        if not self._mortal:
            return
        if not self.dead and self.left == 0:
            self.dead = True
            self.deaths.append(what)
            self._lose()
        if self.dead:
            raise Crash(what)
        self.steps.append(what)
        self.left = None if self.left is None else self.left - 1

    def start(self) -> None:
        """A process is started in the place of the one that died."""
        assert self.dead
        self.dead, self.left = False, next(self.lives, None)

    @contextmanager
    def process(self, who: str, mortal: bool) -> Iterator[None]:
        """For a while, this process runs; one that is not mortal does not die, and is not counted."""
        before, (self._who, self._mortal) = (self._who, self._mortal), (who, mortal)
        try:
            yield
        finally:
            self._who, self._mortal = before

    def loosen(self, handle: int) -> None:
        """An open file is about to be written to."""
        found = os.fstat(handle)
        if (found.st_dev, found.st_ino) not in self._loose:
            self._loose[found.st_dev, found.st_ino] = _Loose(self._who, os.dup(handle), found.st_size)

    def fsync(self, handle: int) -> None:
        """What was written to an open file is on the disk."""
        found = os.fstat(handle)
        if loose := self._loose.pop((found.st_dev, found.st_ino), None):
            os.close(loose.handle)

    def _lose(self) -> None:
        for place, file in list(self._loose.items()):
            if file.who == self._who:
                os.ftruncate(file.handle, file.size + (os.fstat(file.handle).st_size - file.size) // 2)
                os.close(self._loose.pop(place).handle)

    def close(self) -> None:
        """Let go of all files."""
        for file in self._loose.values():
            os.close(file.handle)
        self._loose.clear()


class _Loose(NamedTuple):
    """A file with content that its process has not forced to the disk."""

    who: str
    handle: int
    size: int  # that is on the disk


class _File:
    """An open file whose buffer is written when it is flushed or closed by a process that lives."""

    def __init__(self, disk: Disk, file: Any) -> None:
        self._disk, self._file = disk, file
        self._buffer: Any = None

    def write(self, content: Any) -> int:
        self._buffer = content if self._buffer is None else self._buffer + content
        return len(content)

    def flush(self) -> None:
        content, self._buffer = self._buffer, None
        if content is None:
            return
        self._disk.loosen(self._file.fileno())
        middle = len(content) // 2
        for half in (content[:middle], content[middle:]):
            self._disk.step(f"write {Path(self._file.name).name}")
            self._file.write(half)
            self._file.flush()

    def close(self) -> None:
        try:
            if not self._disk.dead:
                self.flush()
        finally:
            self._file.close()

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def on(disk: Disk) -> Iterator[Disk]:
    """For a while, all files are on this disk."""
    real = {name: getattr(os, name) for name in ("fsync", "getpid", "mkdir", "replace", "rename", "unlink", "rmdir")}

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+") or not Path(file).is_relative_to(disk.root):
            return builtins_open(file, mode, *args, **kwargs)
        disk.step(f"open {Path(file).name}")
        return _File(disk, builtins_open(file, mode, *args, **kwargs))

    def fsync(handle: int) -> None:
        disk.step("fsync")
        disk.fsync(handle)  # and not in truth, which takes long

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if not os.path.lexists(path):
            disk.step(f"mkdir {Path(path).name}")
        real["mkdir"](path, *args, **kwargs)

    def counted(name: str) -> Any:
        def call(path: Any, *more: Any, **kwargs: Any) -> Any:
            disk.step(" to ".join([f"{name} {Path(path).name}", *(Path(target).name for target in more)]))
            return real[name](path, *more, **kwargs)

        return call

    builtins_open = builtins.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "mkdir", mkdir)
        for name in ("replace", "rename", "unlink", "rmdir"):
            patch.setattr(os, name, counted(name))
        # A process that is started again has another number.
        patch.setattr(os, "getpid", lambda: real["getpid"]() + len(disk.deaths))
        try:
            yield disk
        finally:
            disk.close()


class _Kept:
    """A site whose process may die. What is started in its place is asked again, as the carrier does; it may not die
    before it has answered: who dies twice in a request is dropped from the round.
    """

    def __init__(self, post: "MortalPost", name: str) -> None:
        self._post, self._name, self._site = post, name, post.fresh(name)
        self._spared = False

    def handle(self, request: Message) -> Message:
        disk = self._post.disk
        with disk.process(self._name, self._post.mortal and not self._spared):
            try:
                disk.step(f"{self._name} is asked to {request.header['kind']}")
                reply = self._site.handle(request)
                disk.step(f"{self._name} answers")
            except Crash:
                disk.start()
                self._site, self._spared = self._post.fresh(self._name), True
                return self.handle(request)
        self._spared = self._spared and (request.header["kind"] == "join" or reply.refused is not None)
        return reply


class MortalPost(LocalPost):
    """A post to sites that may die, if they are `mortal`."""

    def __init__(self, folders: Mapping[str, Path], memory: Path, disk: Disk, mortal: bool) -> None:
        self.disk, self.mortal = disk, mortal
        super().__init__(folders, memory)

    def fresh(self, name: str) -> Site:
        return super().site(name)

    def site(self, name: str) -> Any:
        return _Kept(self, name)

    def ask(self, requests: Mapping[str, Message], seconds: float | None) -> Iterator[tuple[str, Message | str]]:
        for client, reply in super().ask(requests, seconds):
            self.disk.step(f"{client}'s reply arrives")
            yield client, reply
