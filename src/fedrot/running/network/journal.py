"""exchanges.jsonl: what went to each site and came back, when, and why something did not."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from fedrot.core.errors import RunError

NAME = "exchanges.jsonl"


@dataclass(frozen=True)
class Exchange:
    """A request to a site and what became of it."""

    time: float  # seconds since 1970, when the reply came or was given up
    client: str
    kind: str  # join, train, answer, evaluate, finish, and the stages of a secure sum
    round: int | None
    sent: int  # bytes of the request's tensors
    received: int  # bytes of the reply's tensors
    headers: int  # bytes of both headers
    seconds: float  # from asking to the reply
    refused: str | None  # why there is nothing that could be used
    answered: bool  # whether the site gave any reply, if only a refusal


class Journal(Protocol):
    """Where exchanges are noted."""

    def add(self, exchange: Exchange) -> None:
        """Note one."""


class FileJournal:
    """A line of exchanges.jsonl for each. The run does not depend on it, so a line is not forced to the disk."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME

    def add(self, exchange: Exchange) -> None:
        """Append a line; one that an end of the process cut is ended first."""
        with self._path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(asdict(exchange), allow_nan=False).encode() + b"\n")


def read_exchanges(folder: Path) -> list[Exchange]:
    """The exchanges of a run folder, in order; none where no sites took part. Lines that a kill cut are left out."""
    path = folder / NAME
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            values: Mapping[str, Any] = json.loads(line)
        except ValueError:
            continue
        try:
            found.append(Exchange(**values))
        except TypeError:
            raise RunError(f"{path}: a line is not that of an exchange: {line[:80]!r}") from None
    return found


def now() -> float:
    """The time of an exchange."""
    return time.time()
