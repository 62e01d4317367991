"""Who gets which example. A partition depends on the data, the settings and its seed, and on nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedrot.core.errors import DataError, RecipeError
from fedrot.core.seeding import seed_of
from fedrot.learning.data import Dataset
from fedrot.learning.settings import ModelSettings, PartitionSettings
from fedrot.learning.strata import Indices, Strata, by_group, by_label, strata


@dataclass(frozen=True)
class Partition:
    """Every split's examples by client; each example belongs to exactly one client."""

    clients: tuple[str, ...]
    indices: Mapping[str, Mapping[str, Indices]]  # split -> client -> places in the split, ascending
    strata: Strata  # what a Dirichlet split is uneven in; of other kinds, the labels where there are some

    def counts(self, split: str) -> dict[str, list[int]]:
        """How many examples of each stratum every client holds."""
        of, number = self.strata.of[split], len(self.strata.names)
        return {c: np.bincount(of[i], minlength=number).tolist() for c, i in self.indices[split].items()}


def divide(dataset: Dataset, settings: PartitionSettings, seed: int, model: ModelSettings | None = None) -> Partition:
    """Divide every split among the clients by the same rule, so that a client is scored on data like its own. `model`
    is what clusters are found with where the settings name no encoder.

    Raises `RecipeError` naming the setting, or `DataError` naming the client that would have no training data.
    """
    seed = seed if settings.seed is None else settings.seed
    if settings.kind == "column":
        found = by_label(dataset)
        clients, indices = _by_column(dataset, settings)
    else:
        count = _client_count(settings)
        if count > len(dataset.split("train")):
            raise DataError(f"partition.clients: {count} clients share {len(dataset.split('train'))} training examples")
        clients = tuple(f"client-{i:0{len(str(count - 1))}d}" for i in range(count))
        uneven = settings.kind == "dirichlet"
        if uneven and not settings.concentration > 0:
            raise RecipeError(f"partition.concentration must be positive, got {settings.concentration}")
        found = strata(dataset, settings, count, seed, model or ModelSettings()) if uneven else by_label(dataset)
        shares = _shares(found, settings, count, seed)
        indices = {
            split: dict(zip(clients, _cut(of, shares, seed, split), strict=True)) for split, of in found.of.items()
        }
    for client in clients:
        size = len(indices["train"][client])
        if size < max(1, settings.minimum):
            raise DataError(
                f"client {client!r} would have {size} training examples, partition.minimum is {settings.minimum}; "
                "use fewer clients, a larger concentration, or another seed"
            )
    return Partition(clients, indices, found)


def _client_count(settings: PartitionSettings) -> int:
    if settings.kind == "size":
        if not settings.sizes or not all(0 < size < float("inf") for size in settings.sizes):
            raise RecipeError("partition.sizes: give a positive proportion for every client (kind size)")
        if settings.clients not in (None, len(settings.sizes)):
            raise RecipeError(f"partition.clients is {settings.clients}, partition.sizes has {len(settings.sizes)}")
        return len(settings.sizes)
    if settings.clients is None:
        raise RecipeError(f"partition.clients: give the number of clients (kind {settings.kind})")
    return settings.clients


def _by_column(dataset: Dataset, settings: PartitionSettings) -> tuple[tuple[str, ...], dict[str, dict[str, Indices]]]:
    found = by_group(dataset, "partition.kind column")
    clients = found.names
    if settings.clients not in (None, len(clients)):
        raise RecipeError(
            f"partition.clients is {settings.clients}, data.group has {len(clients)} values; leave it out"
        )
    return clients, {
        split: {client: np.flatnonzero(of == place) for place, client in enumerate(clients)}
        for split, of in found.of.items()
    }


def _shares(found: Strata, settings: PartitionSettings, count: int, seed: int) -> NDArray[np.float64]:
    """(strata, clients): the share of each stratum's examples that goes to each client; rows sum to one."""
    number = len(found.names)
    if settings.kind == "iid":
        return np.full((number, count), 1.0 / count)
    if settings.kind == "size":
        sizes = np.asarray(settings.sizes, dtype=np.float64)
        return np.tile(sizes / sizes.sum(), (number, 1))
    rng = np.random.default_rng(seed_of(seed, "partition"))
    numbers = np.bincount(found.of["train"], minlength=number)
    smallest = 0.0
    for _ in range(max(1, settings.redraws)):
        shares = rng.dirichlet(np.full(count, settings.concentration), size=number)
        sizes = np.sum([_sizes(int(n), row) for n, row in zip(numbers, shares, strict=True)], axis=0)
        smallest = max(smallest, int(np.min(sizes)))
        if np.min(sizes) >= max(1, settings.minimum):
            return shares
    raise DataError(
        f"partition: in {settings.redraws} draws no Dirichlet({settings.concentration:g}) split gave each of {count} "
        f"clients {settings.minimum} examples (the best gave {smallest:g}); use fewer clients, a larger "
        "concentration or a smaller minimum"
    )


def _sizes(number: int, shares: NDArray[np.float64]) -> Indices:
    """How many of `number` examples each share gets; the parts sum to `number`."""
    cuts = np.rint(np.cumsum(shares) * number).astype(np.int64)
    cuts[-1] = number
    return np.diff(cuts, prepend=0)


def _cut(of: Indices, shares: NDArray[np.float64], seed: int, split: str) -> list[Indices]:
    """Each client's places in a split whose examples belong to these strata."""
    rng = np.random.default_rng(seed_of(seed, "partition", split))
    parts: list[list[Indices]] = [[] for _ in range(shares.shape[1])]
    even = bool((shares == shares[0]).all())
    groups = (
        [rng.permutation(len(of))]
        if even
        else [rng.permutation(np.flatnonzero(of == stratum)) for stratum in range(len(shares))]
    )
    for group, row in zip(groups, shares, strict=False):
        for part, piece in zip(parts, np.split(group, np.cumsum(_sizes(len(group), row))[:-1]), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]
