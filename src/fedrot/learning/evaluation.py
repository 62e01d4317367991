"""Scoring an adapter on a split: the whole of it, and each client's part."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.seeding import generator
from fedrot.learning.encoding import Encoded
from fedrot.learning.models import ResidentModel
from fedrot.learning.scores import LOWER_IS_BETTER
from fedrot.learning.tasks.base import task_of


@dataclass(frozen=True)
class Evaluation:
    """Scores of one adapter, or of each client's own model, on one split."""

    split: str
    examples: int
    metric: str  # the score that counts
    scores: Mapping[str, float]  # over all examples
    model: str = "global"  # 'global', or 'personal' where every client was scored with its own head
    clients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """Plain values for metrics.jsonl, with the worst client and the spread (standard deviation) over clients."""
        clients = {name: scores[self.metric] for name, scores in self.clients.items()}
        worst = max if self.metric in LOWER_IS_BETTER else min
        spread = {"worst": worst(clients.values()), "spread": float(np.std(list(clients.values())))} if clients else {}
        head = {"split": self.split, "examples": self.examples, "model": self.model, "metric": self.metric}
        return {**head, **self.scores, **spread, "by_client": clients}


@dataclass(frozen=True)
class How:
    """How examples are put through the model; scores stay the same but for rounding."""

    batch: int  # examples at once
    precision: str = "fp32"
    packing: bool = False


def chosen_rows(size: int, limit: int | None, seed: int, split: str) -> NDArray[np.int64]:
    """The places that are scored: all, or a fixed subset that depends on the seed alone."""
    if limit is None or limit >= size:
        return np.arange(size)
    return np.sort(torch.randperm(size, generator=generator(seed, "evaluate", split))[:limit].numpy())


def measure(
    model: ResidentModel, adapter: Adapter, data: Encoded, rows: NDArray[np.int64], how: How
) -> Tensor:  # (n, k), float64
    """The task's numbers of every row, in the order of `rows`; batches are of like length."""
    model.write(adapter)
    task, found = task_of(data), torch.empty(0)
    order = np.argsort(data.lengths_of(rows), kind="stable")
    with torch.no_grad():
        for start in range(0, len(rows), how.batch):
            places = order[start : start + how.batch]
            numbers = task.measure(model, model.collate(data, rows[places], how.packing), how.precision)
            if not start:
                found = numbers.new_empty(len(rows), numbers.shape[1])
            found[places] = numbers
    return found


Piece = tuple[Adapter, NDArray[np.int64]]  # an adapter and places among the rows that it is to score
Measure = Callable[[ResidentModel, Adapter, NDArray[np.int64]], Tensor]  # of rows, (n, k)
Score = Callable[[Tensor, Tensor], dict[str, float]]
Spread = Callable[[Callable[[ResidentModel, Piece], Tensor], Sequence[Piece]], Iterable[Tensor]]

# Batches of a piece of work.
_PIECE = 4


def evaluate(
    spread: Spread,
    adapters: Mapping[str, Adapter],
    data: Encoded,
    split: str,
    parts: Mapping[str, NDArray[np.int64]],
    rows: NDArray[np.int64],
    how: How,
    scored: "Scored | None" = None,
) -> Evaluation:
    """Score `rows` of a split. `spread` puts pieces of work through one or several models, with results in their order.

    `parts` are the clients' places in the split, which cover it; a client without a row among `rows` has no score.
    `adapters` is {'': the global adapter}, or one adapter a client when each has parameters of its own. What is asked
    of the examples is `scored`; None: what their task asks.
    """
    scored = scored or Scored.by_task(data, how)
    owner = np.empty(len(data), dtype=object)
    for client, places in parts.items():
        owner[places] = client
    owners = owner[rows]
    pieces: list[Piece] = []
    for client, adapter in adapters.items():
        mine = np.arange(len(rows)) if client == "" else np.flatnonzero(owners == client)
        mine = mine[np.argsort(data.lengths_of(rows[mine]), kind="stable")]
        pieces += [(adapter, mine[i : i + _PIECE * how.batch]) for i in range(0, len(mine), _PIECE * how.batch)]
    found = torch.empty(0)
    results = spread(lambda model, piece: scored.measure(model, piece[0], rows[piece[1]]), pieces)
    for (_, places), numbers in zip(pieces, results, strict=True):
        if not len(found):
            found = numbers.new_empty(len(rows), numbers.shape[1])
        found[places] = numbers
    truth = torch.from_numpy(data.labels[rows])
    clients = {}
    for client in parts:
        mine = np.flatnonzero(owners == client)
        if len(mine):
            clients[client] = scored.score(found[mine], truth[mine])
    kind = "global" if "" in adapters else "personal"
    return Evaluation(split, len(rows), scored.metric, scored.score(found, truth), kind, clients)


@dataclass(frozen=True)
class Scored:
    """What is asked of every example, and what is made of the answers."""

    metric: str
    measure: Measure
    score: Score

    @classmethod
    def by_task(cls, data: Encoded, how: How) -> "Scored":
        """The scores of the task that the examples are for."""
        task = task_of(data)
        return cls(task.METRIC, lambda m, adapter, rows: measure(m, adapter, data, rows, how), task.score)
