"""What rounds.py asks of an engine, whatever it runs on."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedrot.core.adapter import Adapter
from fedrot.core.methods.base import Broadcast, ClientState, Upload
from fedrot.learning.evaluation import Evaluation


@dataclass(frozen=True)
class Failure:
    """A client that gave no upload, and why."""

    client: str
    reason: str


class Engine(Protocol):
    """Runs clients. `train` yields each client's upload or failure as it comes, in any order."""

    @property
    def clients(self) -> Sequence[str]:
        """Every client's name, sorted."""

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Upload | Failure]:
        """One round of local training by these clients."""

    def settle(self, accepted: Collection[str]) -> None:
        """The uploads of these clients went into the round; what a dropped client would have kept is forgotten."""

    def answer(self, question: Adapter, clients: Sequence[str]) -> Iterator[Upload | Failure]:
        """The second phase of a round, for the methods that have one, by clients whose upload was accepted."""

    def evaluate(self, broadcast: Broadcast, split: str, limit: int | None = None) -> Evaluation:
        """Score the global model, or each client's own where models are personal, on at most `limit` rows."""

    def states(self) -> Mapping[str, ClientState]:
        """What the clients in this process keep between rounds, for the checkpoint."""

    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Put back what `states` gave."""
