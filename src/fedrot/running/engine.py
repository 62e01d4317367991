"""What rounds.py asks of an engine, whatever it runs on."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedrot.core.adapter import Adapter
from fedrot.core.methods.base import Broadcast, ClientState, Upload
from fedrot.learning.evaluation import Evaluation


@dataclass(frozen=True)
class Failure:
    """A client that gave no upload, and why."""

    client: str
    reason: str


@dataclass(frozen=True)
class Summed:
    """What is known of several clients whose uploads nobody saw: their weighted mean (secure.aggregation)."""

    clients: tuple[str, ...]
    mean: Adapter
    weight: int  # of all of them together
    clipped: float  # share of their numbers that secure.range cut off
    reports: Mapping[str, float]  # loss: the weighted mean; rows, tokens: sums. Empty where clients report nothing
    up: int  # bytes that travelled for it, of all clients together
    down: int  # beside the broadcast or the question


class Engine(Protocol):
    """Runs clients. `train` yields each client's upload or failure as it comes, in any order."""

    @property
    def clients(self) -> Sequence[str]:
        """Every client's name, sorted."""

    @property
    def held(self) -> Mapping[str, int]:
        """Training examples of every client that is there: between sites, of those that have joined."""

    def begin(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Rounds are about to be played, after those whose records these are. Raises `RunError` where they cannot."""

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Upload | Failure]:
        """One round of local training by these clients."""

    def train_summed(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Summed | Failure]:
        """`train` with secure.aggregation: a failure for each client that is lost, and what is known of the others."""

    def settle(self, accepted: Collection[str]) -> None:
        """The uploads of these clients went into the round; what a dropped client would have kept is forgotten."""

    def answer(self, question: Adapter, clients: Sequence[str]) -> Iterator[Upload | Failure]:
        """The second phase of a round, for the methods that have one, by clients whose upload was accepted."""

    def answer_summed(self, question: Adapter, clients: Sequence[str]) -> Iterator[Summed | Failure]:
        """`answer` with secure.aggregation."""

    def evaluate(self, broadcast: Broadcast, split: str, limit: int | None = None) -> Evaluation:
        """Score the global model, or each client's own where models are personal, on at most `limit` rows."""

    def answers(self, broadcast: Broadcast, split: str) -> Evaluation:
        """Score what a language model writes, after the last round."""

    def finish(self, broadcast: Broadcast) -> Mapping[str, Adapter]:
        """The run is over. Each client's own model, where models are personal and clients are in this process."""

    def states(self) -> Mapping[str, ClientState]:
        """What the clients in this process keep between rounds, for the checkpoint."""

    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Put back what `states` gave."""


def in_order(results: Iterable[Upload | Failure], expected: Sequence[str]) -> Iterator[Upload | Failure]:
    """The results in the order of `expected`, whatever order they came in: sums then have one order of terms.

    A second result of a client, or one of a client that was not asked, is passed over. A client that never answered
    becomes a failure.
    """
    waiting: dict[str, Upload | Failure] = {}
    missing, place = set(expected), 0
    for result in results:
        if result.client in missing:
            missing.remove(result.client)
            waiting[result.client] = result
        while place < len(expected) and expected[place] in waiting:
            yield waiting.pop(expected[place])
            place += 1
    for client in expected[place:]:
        yield waiting.get(client) or Failure(client, "gave no answer")
