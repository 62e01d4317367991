"""Changes as whole numbers: what rounding does, sums in any order, and sums that are not those of honest clients."""

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedrot.core.checks import RejectedUpload
from fedrot.core.errors import FedrotError
from fedrot.core.secure_sum import COUNTS, Scale, Summand, bytes_of
from fedrot.core.seeding import generator

SCALE = Scale(bound=2.0, total=1000)
REPORTS = {"loss": 0.7, "rows": 12, "tokens": 90}


def normals(*key: int | str, size: int = 500) -> Tensor:
    return torch.randn(size, generator=generator(*key), dtype=torch.float64) * 0.3


def summand(change: Tensor, weight: int, *key: int | str, scale: Scale = SCALE) -> Summand:
    return scale.summand(change, weight, REPORTS, generator("round", *key))


def three() -> tuple[list[tuple[Tensor, int]], list[Summand]]:
    parts = [(normals(i), weight) for i, weight in enumerate((700, 200, 5))]
    return parts, [summand(change, weight, i) for i, (change, weight) in enumerate(parts)]


def test_the_sum_is_the_weighted_mean_to_its_steps() -> None:
    parts, summands = three()
    mean = SCALE.mean(summands[0] + summands[1] + summands[2], 3, 905)
    wanted = sum(weight * change for change, weight in parts) / 905
    step = SCALE.bound * SCALE.total / (2**27 * 905)
    assert float((mean.change - wanted).abs().max()) <= 3 * step
    assert mean.reports == {"loss": pytest.approx(0.7, abs=1e-4), "rows": 36, "tokens": 270}
    assert (mean.weight, mean.clipped) == (905, 0.0)


def test_the_order_changes_no_bit() -> None:
    sums = [a + b + c for a, b, c in permutations(three()[1])]
    assert all(np.array_equal(one.numbers, sums[0].numbers) for one in sums)


def test_rounding_has_no_bias_and_is_of_its_key() -> None:
    """A number between two whole ones is each of them as often as its place says."""
    step = SCALE.bound * SCALE.total / 2**27
    found = summand(torch.full((40_000,), 0.3 * step, dtype=torch.float64), 1, "bias").numbers
    assert set(found.tolist()) == {0, 1}
    assert float(found.mean()) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 40_000))
    again, other = (summand(normals(1), 7, key).numbers for key in ("a", "b"))
    assert np.array_equal(again, summand(normals(1), 7, "a").numbers)
    assert not np.array_equal(again, other)


def test_numbers_beyond_the_range_are_cut_and_counted() -> None:
    mean = SCALE.mean(summand(torch.tensor([3.0, -9.0, 1.0, 2.0]).double(), 1000), 1, 1000)
    assert mean.change.tolist() == pytest.approx([2.0, -2.0, 1.0, 2.0], abs=1e-6)
    assert mean.clipped == 0.5


@pytest.mark.parametrize("clients", [1, 1000])
def test_the_largest_sum_does_not_wrap(clients: int) -> None:
    """Everyone at the end of the range, with all the weight there is."""
    scale = Scale(2.0, total=2**30)
    parts = [summand(torch.tensor([2.0, -2.0]).double(), 2**30 // clients, i, scale=scale) for i in range(clients)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert scale.mean(total, clients).change.tolist() == pytest.approx([2.0, -2.0], abs=1e-4)


def test_a_summand_travels_as_its_bytes() -> None:
    one = summand(normals("bytes"), 9)
    payload = one.payload()
    assert payload.shape == (bytes_of(500),)
    back = Summand.of(payload, 500)
    assert np.array_equal(back.numbers, one.numbers)
    assert np.array_equal(back.counts, one.counts)


def with_count(total: Summand, **counts: int) -> Summand:
    changed = total.counts.copy()
    for key, value in counts.items():
        changed[COUNTS.index(key)] = value
    return replace(total, counts=changed)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"weight": 904}, "weight is 904, not 905"),
        ({"weight": 0}, "weight is 0"),
        ({"weight": 2**63}, "weight is 9223372036854775808"),
        ({"clipped": 1501}, "count of clipped is 1501, above the 1500"),
        ({"rows": 2**60}, "count of rows"),
        ({"tokens": 2**60}, "count of tokens"),
        ({"loss": 2**62}, "count of loss"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts: dict[str, int], words: str) -> None:
    first, second, third = three()[1]
    with pytest.raises(RejectedUpload, match=words):
        SCALE.mean(with_count(first + second + third, **counts), 3, 905)


def test_a_sum_that_is_none_is_seen() -> None:
    """A mask that was not taken off, and one number that a client sent far beyond the range."""
    first, second, third = three()[1]
    total = first + second + third
    mask = np.random.default_rng(0).integers(0, 2**32, 500, dtype=np.uint32)
    with pytest.raises(RejectedUpload, match=r"4\d\d of 500 means beyond secure\.range 2"):
        SCALE.mean(replace(total, numbers=total.numbers + mask), 3)
    total.numbers[3:4] += np.uint32(2**29)
    with pytest.raises(RejectedUpload, match="1 of 500 means beyond"):
        SCALE.mean(total, 3)


def test_what_cannot_be_summed_is_refused_at_the_client() -> None:
    with pytest.raises(FedrotError, match="weight in the secure sum is 1001"):
        summand(normals(0), 1001)
    with pytest.raises(FedrotError, match="not finite"):
        summand(torch.tensor([1.0, float("nan")]).double(), 1)
    with pytest.raises(FedrotError, match=r"these to 2147483648; set federation\.weighting uniform"):
        Scale(1.0, 2**31)
