"""The order in which a client sees its examples."""

from itertools import islice

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from learning_helpers import quick, seeds

from fedrot.core.seeding import generator
from fedrot.learning.batching import shuffled_batches

sizes = st.integers(1, 70)
batches = st.integers(1, 20)


def lengths_of(seed: int, n: int) -> np.ndarray:
    """Token counts of n examples, as uneven as those of sentences."""
    return np.random.default_rng(seed).geometric(0.08, n) + 2


def take(lengths: np.ndarray, batch: int, count: int, key: tuple[int | str, ...] = (1, 0, "c")) -> list[list[int]]:
    """The first `count` batches."""
    return [places.tolist() for places in islice(shuffled_batches(lengths, batch, key), count)]


@quick
@given(seeds, sizes, batches)
def test_n_batches_hold_every_example_equally_often(seed: int, n: int, batch: int) -> None:
    """The passes' ends need not be batches' ends, so only n batches of size b are sure to be b whole passes."""
    seen = np.bincount(np.concatenate(take(lengths_of(seed, n), batch, n)), minlength=n)
    assert seen.tolist() == [min(batch, n)] * n


@quick
@given(seeds, st.integers(1, 8), st.integers(1, 12))
def test_where_batches_fill_a_pass_each_pass_holds_every_example_once(seed: int, per_pass: int, batch: int) -> None:
    n = per_pass * batch
    found = take(lengths_of(seed, n), batch, 3 * per_pass)
    passes = [sorted(np.concatenate(found[i * per_pass : (i + 1) * per_pass]).tolist()) for i in range(3)]
    assert passes == [list(range(n))] * 3


@quick
@given(seeds, sizes, batches)
def test_no_example_is_ever_more_than_a_pass_ahead_of_another(seed: int, n: int, batch: int) -> None:
    """Within the windows of a pass the order is free; at every pass's end counts differ by one at most."""
    found = take(lengths_of(seed, n), batch, 3 * n)
    seen = np.zeros(n, dtype=int)
    size = min(batch, n)
    ends = {number * n // size for number in range(1, 3 * size + 1)}
    for number, places in enumerate(found, start=1):
        np.add.at(seen, places, 1)
        if number in ends:
            assert seen.max() - seen.min() <= 1


@quick
@given(seeds, sizes, batches)
def test_every_batch_has_the_one_size(seed: int, n: int, batch: int) -> None:
    assert {len(places) for places in take(lengths_of(seed, n), batch, 2 * n)} == {min(batch, n)}


def test_a_client_with_fewer_examples_than_a_batch_sees_all_of_them_each_step() -> None:
    assert [sorted(places) for places in take(lengths_of(0, 5), 16, 4)] == [[0, 1, 2, 3, 4]] * 4


@quick
@given(seeds, st.integers(20, 70), st.integers(1, 8))
def test_the_key_names_the_order(seed: int, n: int, batch: int) -> None:
    lengths = lengths_of(seed, n)
    first = take(lengths, batch, 12, (seed, 3, "client-1"))
    assert first == take(lengths, batch, 12, (seed, 3, "client-1"))
    for other in [(seed, 3, "client-2"), (seed, 4, "client-1"), (seed + 1, 3, "client-1")]:
        assert first != take(lengths, batch, 12, other)


def test_passes_have_different_orders() -> None:
    found = take(lengths_of(0, 40), 4, 20)
    assert found[:10] != found[10:]
    assert sorted(map(sorted, found[:10])) != sorted(map(sorted, found[10:]))


def padding(lengths: np.ndarray, found: list[list[int]]) -> int:
    """Padded tokens in these batches."""
    return sum(int((lengths[places].max() - lengths[places]).sum()) for places in found)


def test_batches_of_like_length_are_padded_far_less_than_those_of_a_random_order() -> None:
    lengths = lengths_of(0, 640)
    order = torch_order(640)
    random = [order[i : i + 16] for i in range(0, 640, 16)]
    assert padding(lengths, take(lengths, 16, 40)) < 0.4 * padding(lengths, random)


def torch_order(n: int) -> list[int]:
    """A random order of n places."""
    import torch

    return torch.randperm(n, generator=generator("random order")).tolist()


def test_short_batches_do_not_come_before_long_ones() -> None:
    """Grouping by length must not turn into a curriculum: batches of a window come in random order."""
    lengths = lengths_of(0, 640)
    means = np.array([lengths[places].mean() for places in take(lengths, 16, 40)])
    assert abs(np.corrcoef(np.arange(40), means)[0, 1]) < 0.4
    assert any((np.diff(means[i : i + 8]) < 0).any() for i in range(0, 40, 8))
