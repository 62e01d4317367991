"""Who gets which example: everything once, by name of the seed, as uneven as asked for."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from learning_helpers import label_names, labelled, quick, random_dataset, refused, seeds

from fedrot.core.errors import DataError, RecipeError
from fedrot.learning.data import Dataset
from fedrot.learning.partition import Partition, divide
from fedrot.learning.settings import PartitionSettings

KINDS = ["iid", "dirichlet", "size", "column"]


def settings_of(kind: str, clients: int, rng: np.random.Generator, **keys: Any) -> PartitionSettings:
    """Settings of this kind for so many clients."""
    if kind == "column":
        return PartitionSettings(kind="column", **keys)
    if kind == "size":
        return PartitionSettings(kind="size", sizes=rng.uniform(0.5, 3.0, clients).tolist(), **keys)
    return PartitionSettings(kind=kind, clients=clients, **keys)  # type: ignore[arg-type]


def grouped(dataset: Dataset, clients: int, rng: np.random.Generator) -> Dataset:
    """The data set with group names, each of which has training examples."""
    splits = {}
    for split, rows in dataset.splits.items():
        names = [f"group-{i}" for i in rng.integers(0, clients, len(rows))]
        if split == "train":
            names[:clients] = [f"group-{i}" for i in range(clients)]
        splits[split] = labelled(rows.label, names)
    return Dataset(splits, dataset.labels)


def counts(partition: Partition, dataset: Dataset, split: str) -> np.ndarray:
    """(clients, labels): how many examples of each label each client holds."""
    parts, labels = partition.indices[split], np.asarray(dataset.splits[split].label)
    assert tuple(parts) == partition.clients
    return np.array([np.bincount(labels[places], minlength=len(dataset.labels)) for places in parts.values()])


def same(left: Partition, right: Partition) -> bool:
    """Whether every client has the same examples in both."""
    return left.clients == right.clients and all(
        np.array_equal(places, right.indices[split][client])
        for split, parts in left.indices.items()
        for client, places in parts.items()
    )


@quick
@given(st.sampled_from(KINDS), seeds, st.integers(1, 8), st.integers(8, 120), st.integers(1, 40))
def test_every_example_of_every_split_belongs_to_exactly_one_client(
    kind: str, seed: int, clients: int, train: int, validation: int
) -> None:
    rng = np.random.default_rng(seed)
    dataset = grouped(random_dataset(seed, train, validation), clients, rng)
    try:
        found = divide(dataset, settings_of(kind, clients, rng, concentration=1.0), seed)
    except DataError:
        assume(False)
    assert len(found.clients) == len(set(found.clients)) == clients
    assert list(found.clients) == sorted(found.clients)
    for split, rows in dataset.splits.items():
        parts = found.indices[split]
        assert tuple(parts) == found.clients
        assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(rows)))
        assert all((np.diff(places) > 0).all() for places in parts.values())
        totals = counts(found, dataset, split).sum(axis=0)
        assert totals.tolist() == np.bincount(rows.label, minlength=3).tolist()


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "size"])
def test_the_seed_alone_decides_the_division(kind: str) -> None:
    dataset = random_dataset(0, 200, 50)
    settings = settings_of(kind, 4, np.random.default_rng(1))
    first, second, other = (divide(dataset, settings, seed) for seed in (1, 1, 2))
    assert same(first, second)
    assert not same(first, other)


def test_a_seed_of_the_partitions_own_goes_before_the_recipes() -> None:
    dataset = random_dataset(0, 200, 50)
    own = PartitionSettings(clients=4, seed=9)
    assert same(divide(dataset, own, 1), divide(dataset, own, 2))
    assert same(divide(dataset, own, 1), divide(dataset, PartitionSettings(clients=4), 9))


def test_a_split_is_divided_alike_whatever_other_splits_there_are() -> None:
    dataset = random_dataset(0, 200, 50)
    alone = Dataset({"train": dataset.splits["train"]}, dataset.labels)
    settings = PartitionSettings(kind="dirichlet", clients=4)
    both, one = divide(dataset, settings, 1).indices["train"], divide(alone, settings, 1).indices["train"]
    assert all(np.array_equal(both[client], one[client]) for client in both)


@quick
@given(seeds, st.integers(1, 30), st.integers(30, 400))
def test_iid_sizes_differ_by_at_most_one(seed: int, clients: int, train: int) -> None:
    dataset = random_dataset(seed, train, train // 3)
    found = divide(dataset, PartitionSettings(clients=clients), seed)
    for split in dataset.splits:
        sizes = counts(found, dataset, split).sum(axis=1)
        assert sizes.max() - sizes.min() <= 1


@quick
@given(seeds, st.lists(st.floats(0.2, 5.0), min_size=1, max_size=8), st.integers(60, 300))
def test_sizes_follow_the_proportions_in_every_split(seed: int, sizes: list[float], train: int) -> None:
    dataset = random_dataset(seed, train, 50)
    found = divide(dataset, PartitionSettings(kind="size", sizes=sizes), seed)
    for split, rows in dataset.splits.items():
        wanted = np.array(sizes) / sum(sizes) * len(rows)
        assert np.abs(counts(found, dataset, split).sum(axis=1) - wanted).max() <= 1 + 1e-9


def test_iid_and_size_mix_the_examples() -> None:
    """Sorted data must not give a client one label."""
    dataset = Dataset({"train": labelled([0] * 150 + [1] * 150)}, label_names(2))
    for settings in (PartitionSettings(clients=3), PartitionSettings(kind="size", sizes=[1, 1, 1.5])):
        assert counts(divide(dataset, settings, 0), dataset, "train").min() > 20


def test_a_dirichlet_split_draws_each_labels_examples_at_random() -> None:
    """Neither a run of neighbours for one client, nor the same examples for every seed."""
    dataset = Dataset({"train": labelled([0, 1] * 200)}, label_names(2))
    settings = PartitionSettings(kind="dirichlet", clients=2, concentration=1e6)
    first, other = (divide(dataset, settings, seed).indices["train"]["client-0"] for seed in (0, 1))
    assert all(
        40 < ((places < 200) & (places % 2 == label)).sum() < 60 for places in (first, other) for label in (0, 1)
    )
    assert len(set(first.tolist()) & set(other.tolist())) < 150


def unevenness(concentration: float, seed: int) -> float:
    """Mean distance of the clients' label shares from the whole's, for a Dirichlet division."""
    dataset = random_dataset(seed, 2000, 10, labels=4)
    settings = PartitionSettings(kind="dirichlet", clients=5, concentration=concentration)
    held = counts(divide(dataset, settings, seed), dataset, "train")
    return float(np.abs(held / held.sum(axis=1, keepdims=True) - held.sum(axis=0) / held.sum()).sum(axis=1).mean())


@pytest.mark.parametrize("seed", range(3))
def test_a_small_concentration_is_uneven_and_a_large_one_is_even(seed: int) -> None:
    small, middle, large = (unevenness(concentration, seed) for concentration in (0.05, 1.0, 1000.0))
    assert small > 0.8 > 0.1 > large
    assert small > middle > large


@quick
@given(seeds, st.floats(0.01, 100.0), st.integers(1, 6), st.integers(1, 40))
def test_the_minimum_is_respected_or_refused(seed: int, concentration: float, clients: int, minimum: int) -> None:
    dataset = random_dataset(seed, 120, 10)
    settings = PartitionSettings(
        kind="dirichlet", clients=clients, concentration=concentration, minimum=minimum, redraws=20
    )
    if divides(dataset, settings, seed):
        held = counts(divide(dataset, settings, seed), dataset, "train").sum(axis=1)
        assert held.min() >= minimum
    else:
        with refused("partition", f"each of {clients} clients {minimum} examples"):
            divide(dataset, settings, seed)


def test_a_draw_below_the_minimum_is_drawn_again() -> None:
    dataset = random_dataset(0, 120, 10)

    def refusals(redraws: int) -> int:
        settings = PartitionSettings(kind="dirichlet", clients=4, concentration=0.5, minimum=10, redraws=redraws)
        return sum(not divides(dataset, settings, seed) for seed in range(20))

    assert refusals(1) > 0
    assert refusals(1000) == 0


def divides(dataset: Dataset, settings: PartitionSettings, seed: int) -> bool:
    """Whether there is such a division."""
    try:
        divide(dataset, settings, seed)
    except DataError:
        return False
    return True


@quick
@given(seeds, st.sampled_from([0.1, 0.5, 5.0]), st.integers(2, 6))
def test_evaluation_splits_are_divided_by_the_shares_of_training(seed: int, concentration: float, clients: int) -> None:
    """A label's part goes to each client in one proportion, up to the rounding of a whole example."""
    dataset = random_dataset(seed, 400, 200)
    settings = PartitionSettings(kind="dirichlet", clients=clients, concentration=concentration)
    found = divide(dataset, settings, seed)
    train, validation = counts(found, dataset, "train"), counts(found, dataset, "validation")
    many, few = train.sum(axis=0), validation.sum(axis=0)
    assert (np.abs(train / many - validation / few) <= 1 / many + 1 / few + 1e-9).all()


def test_by_column_a_client_is_named_by_its_value_and_holds_its_rows() -> None:
    dataset = Dataset(
        {"train": labelled([0, 1, 0, 1], ["b", "a", "b", "c"]), "validation": labelled([1, 0], ["a", "a"])},
        label_names(2),
    )
    found = divide(dataset, PartitionSettings(kind="column"), 0)
    held = {
        split: {client: places.tolist() for client, places in parts.items()} for split, parts in found.indices.items()
    }
    assert found.clients == ("a", "b", "c")
    assert held == {"train": {"a": [1], "b": [0, 2], "c": [3]}, "validation": {"a": [0, 1], "b": [], "c": []}}
    assert same(found, divide(dataset, PartitionSettings(kind="column", clients=3), 1))


def test_label_counts_name_every_label_of_every_client() -> None:
    dataset = Dataset({"train": labelled([2, 0, 2, 0], ["x", "x", "y", "x"])}, label_names(4))
    found = divide(dataset, PartitionSettings(kind="column"), 0)
    assert found.counts("train") == {"x": [2, 0, 1, 0], "y": [0, 0, 1, 0]}


def test_clients_sort_by_number() -> None:
    clients = divide(random_dataset(0, 40, 5), PartitionSettings(clients=11), 0).clients
    assert (clients[0], clients[2], clients[10]) == ("client-00", "client-02", "client-10")
    assert divide(random_dataset(0, 40, 5), PartitionSettings(clients=1), 0).clients == ("client-0",)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (PartitionSettings(), ["partition.clients", "iid"]),
        (PartitionSettings(kind="dirichlet"), ["partition.clients", "dirichlet"]),
        (PartitionSettings(kind="dirichlet", clients=2, concentration=0.0), ["partition.concentration", "0.0"]),
        (PartitionSettings(kind="dirichlet", clients=2, concentration=float("nan")), ["partition.concentration"]),
        (PartitionSettings(kind="size"), ["partition.sizes"]),
        (PartitionSettings(kind="size", sizes=[]), ["partition.sizes"]),
        (PartitionSettings(kind="size", sizes=[1.0, 0.0]), ["partition.sizes"]),
        (PartitionSettings(kind="size", sizes=[1.0, -1.0]), ["partition.sizes"]),
        (PartitionSettings(kind="size", sizes=[1.0, float("nan")]), ["partition.sizes"]),
        (PartitionSettings(kind="size", sizes=[1.0, float("inf")]), ["partition.sizes"]),
        (
            PartitionSettings(kind="size", sizes=[1.0, 2.0], clients=3),
            ["partition.clients is 3", "partition.sizes", "2"],
        ),
        (PartitionSettings(kind="column"), ["data.group"]),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_its_key(settings: PartitionSettings, words: list[str]) -> None:
    with refused(*words, error=RecipeError):
        divide(random_dataset(0, 30, 5), settings, 0)


def test_a_number_of_clients_other_than_the_columns_is_refused() -> None:
    dataset = Dataset({"train": labelled([0, 1], ["a", "b"])}, label_names(2))
    with refused("partition.clients is 3", "data.group has 2", error=RecipeError):
        divide(dataset, PartitionSettings(kind="column", clients=3), 0)


def test_a_group_that_only_an_evaluation_split_has_is_refused_by_name() -> None:
    dataset = Dataset({"train": labelled([0, 1], ["a", "b"]), "test": labelled([0, 1], ["a", "z"])}, label_names(2))
    with refused("'test'", "'z'"):
        divide(dataset, PartitionSettings(kind="column"), 0)


def test_a_client_without_enough_training_data_is_named() -> None:
    dataset = Dataset({"train": labelled([0, 1, 0], ["a", "b", "a"])}, label_names(2))
    with refused("'b'", "1 training examples", "partition.minimum is 2"):
        divide(dataset, PartitionSettings(kind="column", minimum=2), 0)
    with refused("'client-1'", "0 training examples"):
        divide(random_dataset(0, 30, 5), PartitionSettings(kind="size", sizes=[1.0, 1e-6, 1.0]), 0)


def test_more_clients_than_training_examples_are_refused() -> None:
    with refused("partition.clients", "31 clients", "30 training examples"):
        divide(random_dataset(0, 30, 5), PartitionSettings(clients=31), 0)


def test_a_dirichlet_split_that_never_comes_is_refused_with_the_best_found() -> None:
    settings = PartitionSettings(kind="dirichlet", clients=10, concentration=0.01, minimum=10, redraws=5)
    with refused("5 draws", "Dirichlet(0.01)", "10 clients", "10 examples", "the best gave"):
        divide(random_dataset(0, 100, 5), settings, 0)
