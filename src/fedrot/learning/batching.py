"""Batches: the order in which a client sees its examples, and how a batch lies in memory, padded or packed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrot.core.seeding import generator
from fedrot.learning.dropout import Layout
from fedrot.learning.encoding import Encoded
from fedrot.learning.packing import Packing, pack

# Examples are sorted by length within windows of this many batches, so little is padded and order stays random.
_WINDOW = 8


def shuffled_batches(lengths: NDArray[np.int64], batch: int, key: tuple[int | str, ...]) -> Iterator[NDArray[np.int64]]:
    """Endless batches of places in `lengths` (tokens of a client's examples), each of min(batch, n) examples.

    Every pass is a fresh permutation named by `key` and its number. A pass that ends within a batch is continued by
    the next one, so all batches have one size. Batches within a window come in random order.
    """
    n = len(lengths)
    batch = min(batch, n)
    left: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    number = 0
    while True:
        rng = generator(*key, "pass", number)
        number += 1
        order = np.concatenate([left, torch.randperm(n, generator=rng).numpy()])
        whole = len(order) - len(order) % batch
        order, left = order[:whole], order[whole:]
        for start in range(0, whole, _WINDOW * batch):
            window = order[start : start + _WINDOW * batch]
            window = window[np.argsort(lengths[window], kind="stable")]
            pieces = window.reshape(-1, batch)
            yield from pieces[torch.randperm(len(pieces), generator=rng).numpy()]


@dataclass(frozen=True)
class Batch:
    """n examples with T tokens in all, of one client or of several, client after client.

    Each example is scored in one place or in several: a classifier's in one, a language model's in every token that it
    is to write; U places in all.
    """

    inputs: Mapping[str, Tensor]  # (n, longest) each, or (1, T) where packed
    labels: Tensor  # (U) the label of each example, or the token that each place is to be followed by
    lengths: NDArray[np.int64]  # (n) tokens of each example
    scored: NDArray[np.int64]  # (n) places of each example
    layout: Layout
    packing: Packing | None = None  # None: padded


def padded(data: Encoded, rows: NDArray[np.int64]) -> Batch:
    """These examples, each padded to the longest of them."""
    inputs, labels = data.batch(rows)
    layout, lengths = padded_layout(inputs["attention_mask"]), data.lengths_of(rows)
    if data.learnt is None:
        return Batch(inputs, labels, lengths, np.ones(len(rows), dtype=np.int64), layout)
    places, tokens, counts = data.targets(rows)
    layout = Layout(layout.rows, torch.from_numpy(places), layout.places)
    return Batch(inputs, torch.from_numpy(tokens), lengths, counts, layout)


def padded_layout(mask: Tensor) -> Layout:
    """The layout of a batch padded to the right, from its attention mask (n, longest)."""
    lengths = mask.sum(1)
    return Layout(mask.numel(), lengths.cumsum(0) - lengths, mask.flatten().nonzero().flatten())


def packed(data: Encoded, rows: NDArray[np.int64], first_position: int, reads_last: bool) -> Batch:
    """These examples in one row without padding; for the arguments see architectures.py. What is learnt says where a
    language model is read.
    """
    lengths = data.lengths_of(rows)
    packing = pack(lengths)
    tokens, segments = data.flat(rows)
    starts = packing.starts.numpy()
    places = np.arange(len(tokens)) - np.repeat(starts, lengths)
    read, labels, scored = starts, data.labels[rows], np.ones(len(rows), dtype=np.int64)
    if data.learnt is not None:
        read, labels, scored = data.targets(rows)
    elif reads_last:
        # As transformers counts: trailing tokens that are the padding token are padding, wherever they came from.
        real = np.where(tokens != data.pad, places, 0)
        read = starts + np.maximum.reduceat(real, starts)
    inputs = {"input_ids": tokens, "position_ids": places + first_position}
    if segments is not None:
        inputs["token_type_ids"] = segments
    rows_of = {name: torch.from_numpy(array)[None] for name, array in inputs.items()}
    layout = Layout(len(tokens), torch.from_numpy(read))
    return Batch(rows_of, torch.from_numpy(labels), lengths, scored, layout, packing)
