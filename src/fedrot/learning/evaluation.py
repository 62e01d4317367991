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
from fedrot.learning.tasks import classification


@dataclass(frozen=True)
class Evaluation:
    """Scores of one adapter, or of each client's own model, on one split."""

    split: str
    examples: int
    scores: Mapping[str, float]  # accuracy, macro_f1, loss over all examples
    model: str = "global"  # 'global', or 'personal' where every client was scored with its own head
    clients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """Plain values for metrics.jsonl, with the worst client and the spread (standard deviation) over clients."""
        accuracies = [scores["accuracy"] for scores in self.clients.values()]
        spread = {"worst": min(accuracies), "spread": float(np.std(accuracies))} if accuracies else {}
        clients = {name: scores["accuracy"] for name, scores in self.clients.items()}
        head = {"split": self.split, "examples": self.examples, "model": self.model}
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


def predict(
    model: ResidentModel, adapter: Adapter, data: Encoded, rows: NDArray[np.int64], how: How
) -> tuple[Tensor, Tensor]:
    """(predicted label, loss) of every row, both of shape (n), in the order of `rows`; batches are of like length."""
    model.write(adapter)
    predicted = torch.empty(len(rows), dtype=torch.int64)
    losses = torch.empty(len(rows))
    order = np.argsort(data.lengths_of(rows), kind="stable")
    with torch.no_grad():
        for start in range(0, len(rows), how.batch):
            places = order[start : start + how.batch]
            batch = model.collate(data, rows[places], how.packing)
            logits = model.forward(batch, how.precision).float().cpu()
            predicted[places] = logits.argmax(-1)
            losses[places] = classification.loss(logits, batch.labels, reduction="none")
    return predicted, losses


Piece = tuple[Adapter, NDArray[np.int64]]  # an adapter and places among the rows that it is to score
Predicted = tuple[Tensor, Tensor]  # labels and losses of a piece's places
Spread = Callable[[Callable[[ResidentModel, Piece], Predicted], Sequence[Piece]], Iterable[Predicted]]

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
) -> Evaluation:
    """Score `rows` of a split. `spread` puts pieces of work through one or several models, with results in their order.

    `parts` are the clients' places in the split, which cover it; a client without a row among `rows` has no score.
    `adapters` is {'': the global adapter}, or one adapter a client when each has parameters of its own.
    """
    owner = np.empty(len(data), dtype=object)
    for client, places in parts.items():
        owner[places] = client
    owners = owner[rows]
    pieces: list[Piece] = []
    for client, adapter in adapters.items():
        mine = np.arange(len(rows)) if client == "" else np.flatnonzero(owners == client)
        mine = mine[np.argsort(data.lengths_of(rows[mine]), kind="stable")]
        pieces += [(adapter, mine[i : i + _PIECE * how.batch]) for i in range(0, len(mine), _PIECE * how.batch)]
    predicted, losses = torch.empty(len(rows), dtype=torch.int64), torch.empty(len(rows))
    found = spread(lambda model, piece: predict(model, piece[0], data, rows[piece[1]], how), pieces)
    for (_, places), (labels, loss) in zip(pieces, found, strict=True):
        predicted[places], losses[places] = labels, loss
    truth = torch.from_numpy(data.labels[rows])
    clients = {}
    for client in parts:
        mine = np.flatnonzero(owners == client)
        if len(mine):
            clients[client] = classification.score(predicted[mine], truth[mine], losses[mine])
    kind = "global" if "" in adapters else "personal"
    return Evaluation(split, len(rows), classification.score(predicted, truth, losses), kind, clients)
