"""The order in which a client sees its examples: shuffled passes, with examples of like length side by side."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from fedrot.core.seeding import generator

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
