"""What a task family's file holds, and which one examples are for."""

from typing import Protocol

from torch import Tensor

from fedrot.learning.batching import Batch
from fedrot.learning.encoding import Encoded
from fedrot.learning.models import ResidentModel
from fedrot.learning.tasks import classification, generation


class Task(Protocol):
    """A file of this folder. `encode`, which differs in what it needs, stands beside these."""

    METRIC: str  # the score that methods are compared by

    def losses(self, model: ResidentModel, batch: Batch, precision: str) -> Tensor:
        """(U) a loss for each of the batch's scored places."""

    def measure(self, model: ResidentModel, batch: Batch, precision: str) -> Tensor:
        """(n, k) numbers of each example, that `score` makes scores of."""

    def score(self, found: Tensor, labels: Tensor) -> dict[str, float]:
        """The scores of n examples, from (n, k) numbers and (n) labels."""


def task_of(data: Encoded) -> Task:
    """The task that encoded examples are for."""
    return classification if data.learnt is None else generation
