"""Weighted sums of updates, kept as factors, against dense matrices."""

import pytest
import torch
from core_helpers import SHAPES, assert_same, distance, make_adapter, product, quick, ranks, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.products import change_of, joined, refill, weighted_products, wide

weights_of = st.lists(st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3), min_size=1, max_size=5)


def pairs_of(seed: int, form: Adapter, k: int) -> dict[str, tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(pair.b.shape[0], k, generator=rng, dtype=torch.float64),
            torch.randn(k, pair.a.shape[1], generator=rng, dtype=torch.float64),
        )
        for name, pair in form.layers.items()
    }


@quick
@given(seeds, ranks, weights_of)
def test_the_product_of_the_wide_factors_is_the_weighted_sum_of_the_updates(
    seed: int, rank: int, weights: list[float]
) -> None:
    adapters = [make_adapter(seed + i, rank, scale=0.5 + i) for i in range(len(weights))]
    seen: set[str] = set()
    for sums in weighted_products(list(zip(weights, adapters, strict=True))):
        seen |= set(sums.names)
        assert sums.rank == rank
        assert sums.b.dtype == sums.a.dtype == torch.float64
        for i, name in enumerate(sums.names):
            dense = sum(w * product(x.layers[name]) for w, x in zip(weights, adapters, strict=True))
            assert sums.a[i].shape[0] == rank * len(weights)
            size = sum(abs(w) * float(product(x.layers[name]).norm()) for w, x in zip(weights, adapters, strict=True))
            assert distance(sums.b[i] @ sums.a[i], dense) < 1e-12 * size
    assert seen == SHAPES.keys()


def test_both_sides_carry_the_same_share_of_a_weight() -> None:
    """A weight of 1e-12 in one factor alone would make its QR needlessly bad."""
    adapters = [make_adapter(0, 2, 1.0), make_adapter(0, 2, 1.0)]
    for sums in weighted_products([(0.81, adapters[0]), (0.09, adapters[1])]):
        torch.testing.assert_close(sums.b[..., 2:] * 3, sums.b[..., :2])
        torch.testing.assert_close(sums.a[..., 2:, :] * 3, sums.a[..., :2, :])


def test_wide_puts_the_clients_side_by_side_in_their_order() -> None:
    stacked = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert torch.equal(wide(stacked, -1), torch.cat([stacked[0], stacked[1]], -1))
    assert torch.equal(wide(stacked, -2), torch.cat([stacked[0], stacked[1]], -2))


@quick
@given(seeds, st.sampled_from([0.5, 2.0, 8.0]), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_refilling_keeps_the_product_the_scale_the_dtype_and_the_head(
    seed: int, scale: float, dtype: torch.dtype, fan_in_fan_out: bool
) -> None:
    form = make_adapter(seed, 3, scale, dtype=dtype, fan_in_fan_out=fan_in_fan_out)
    pairs = pairs_of(seed + 1, form, 3)
    filled = refill(form, pairs)
    for name, pair in filled.layers.items():
        b, a = pairs[name]
        assert (pair.scale, pair.fan_in_fan_out, pair.a.dtype) == (scale, fan_in_fan_out, dtype)
        assert distance(product(pair), b @ a) < (1e-6 if dtype == torch.float32 else 1e-13) * float(b.norm() * a.norm())
    assert all(torch.equal(t, form.head[n]) for n, t in filled.head.items())


@quick
@given(seeds, st.integers(1, 20), st.booleans())
def test_a_change_has_scale_one_no_head_and_any_rank(seed: int, k: int, fan_in_fan_out: bool) -> None:
    form = make_adapter(seed, 3, 8.0, fan_in_fan_out=fan_in_fan_out)
    pairs = pairs_of(seed + 1, form, k)
    change = change_of(form, pairs)
    assert not change.head
    for name, pair in change.layers.items():
        b, a = pairs[name]
        assert (pair.rank, pair.scale, pair.fan_in_fan_out) == (k, 1.0, fan_in_fan_out)
        assert distance(product(pair), b @ a) < 1e-6 * float(b.norm() * a.norm())
        assert pair.delta().shape == (a.shape[1], b.shape[0]) if fan_in_fan_out else (b.shape[0], a.shape[1])


@quick
@given(seeds, st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0.25, 1.0, 6.0])), min_size=1, max_size=4))
def test_joined_is_the_dense_sum_at_the_first_one_s_scale_and_no_wider_than_the_layer(
    seed: int, parts: list[tuple[int, float]]
) -> None:
    adapters = [make_adapter(seed + i, rank, scale, dtype=torch.float64) for i, (rank, scale) in enumerate(parts)]
    whole = joined(*adapters)
    for name, pair in whole.layers.items():
        dense = sum(product(one.layers[name]) for one in adapters)
        size = sum(float(product(one.layers[name]).norm()) for one in adapters)
        assert pair.scale == parts[0][1]
        assert distance(product(pair), dense) < 1e-12 * size
        assert pair.rank == min(sum(rank for rank, _ in parts), *SHAPES[name]) or len(parts) == 1
    assert all(torch.equal(t, adapters[0].head[n]) for n, t in whole.head.items())


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=["wide", "tall"])
def test_a_sum_wider_than_the_layer_is_held_as_identity_and_product(shape: tuple[int, int]) -> None:
    adapters = [make_adapter(i, 4, 2.0, {"q": shape}) for i in range(2)]
    pair = joined(*adapters).layers["q"]
    small = pair.b if shape[1] <= shape[0] else pair.a
    assert torch.equal(small, torch.eye(5))
    assert distance(product(pair), sum(product(x.layers["q"]) for x in adapters)) < 1e-5


def test_one_adapter_alone_is_joined_to_itself_whatever_it_is() -> None:
    adapter = make_adapter(0, 3)
    assert_same(joined(adapter), adapter)


def test_inputs_of_different_dtype_are_joined_in_the_first_one_s_kind_of_update() -> None:
    first = Adapter({"q": LoraPair(torch.ones(1, 9), torch.ones(7, 1), 2.0)})
    other = Adapter({"q": LoraPair(torch.full((1, 9), 0.5).double(), torch.ones(7, 1).double(), 1.0)})
    assert distance(product(joined(first, other).layers["q"]), torch.full((7, 9), 2.5)) < 1e-6
