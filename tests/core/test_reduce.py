"""The streamed weighted mean between clients and server."""

import gc
import math
import weakref

import pytest
import torch
from core_helpers import assert_same, make_adapter, quick, refused, seeds, weighted
from hypothesis import given
from hypothesis import strategies as st

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.methods.base import ALL_PARTS
from fedrot.core.reduce import Reduction, as_float32

PARTS = [frozenset(p) for p in (set(), {"a"}, {"b"}, {"head"}, {"a", "head"}, {"b", "head"}, {"a", "b"}, ALL_PARTS)]


def reduced(adapters: list[Adapter], weights: list[float], parts: frozenset[str] = ALL_PARTS) -> Adapter:
    reduction = Reduction(adapters[0], parts)
    for adapter, weight in zip(adapters, weights, strict=True):
        reduction.add(adapter, weight)
    return reduction.result().mean


@quick
@given(seeds, st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=6))
def test_the_mean_is_the_dense_weighted_mean(seed, weights):
    adapters = [make_adapter(seed + i, dtype=torch.float64) for i in range(len(weights))]
    columns = [dict(adapter.tensors()) for adapter in adapters]
    for name, tensor in reduced(adapters, weights).tensors():
        torch.testing.assert_close(tensor, weighted([c[name] for c in columns], weights), atol=1e-12, rtol=1e-9)


@quick
@given(seeds, st.floats(1e-6, 1e6))
def test_weights_need_not_sum_to_one(seed, scale):
    adapters = [make_adapter(seed + i) for i in range(3)]
    one, other = (reduced(adapters, w) for w in ([1.0, 2.0, 5.0], [scale, 2 * scale, 5 * scale]))
    for (_, x), (_, y) in zip(one.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("parts", PARTS, ids=lambda p: "+".join(sorted(p)) or "none")
def test_only_named_parts_are_averaged_and_the_others_are_the_form_s_bit_for_bit(parts):
    form, clients = make_adapter(0), [make_adapter(1), make_adapter(2)]
    reduction = Reduction(form, parts)
    for client in clients:
        reduction.add(client, 1.0)
    columns = [dict(c.tensors()) for c in (form, *clients)]
    for name, tensor in reduction.result().mean.tensors():
        if part_of(name) in parts:
            mean = weighted([c[name] for c in columns[1:]], [1.0, 1.0])
            torch.testing.assert_close(tensor, mean.float(), atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(tensor, columns[0][name])


def test_one_client_comes_out_bit_for_bit_whatever_its_weight():
    for weight in (1.0, 3.0, 0.1, 12345.678):
        assert_same(reduced([make_adapter(0)], [weight]), make_adapter(0))


def test_a_small_term_is_not_lost_between_large_ones():
    ones = make_adapter(0).map(torch.ones_like)
    mean = reduced([ones.map(lambda t: 1e8 * t), ones, ones.map(lambda t: -1e8 * t)], [1.0, 3.0, 1.0])
    assert all(torch.equal(t, torch.full_like(t, 0.6)) for _, t in mean.tensors())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_mean_comes_back_in_the_form_s_dtype_rounded_once(dtype):
    form = make_adapter(0, dtype=dtype)
    reduction = Reduction(form, ALL_PARTS)
    clients = [make_adapter(i, dtype=torch.float64) for i in (1, 2, 3)]
    for client in clients:
        reduction.add(client, 1.0)
    columns = [dict(c.tensors()) for c in clients]
    for name, tensor in reduction.result().mean.tensors():
        assert tensor.dtype == dtype
        mean = weighted([c[name] for c in columns], [1.0] * 3)
        torch.testing.assert_close(tensor.double(), mean, atol=0, rtol=torch.finfo(dtype).eps)


def test_memory_does_not_grow_no_adapter_is_held():
    reduction = Reduction(make_adapter(0), ALL_PARTS)
    client = make_adapter(1)
    tensor = weakref.ref(client.layers["enc.0.out"].a)
    seen = weakref.ref(client)
    reduction.add(client, 1.0)
    del client
    gc.collect()
    assert seen() is None
    assert tensor() is None
    assert reduction.result().factors == ()


def test_where_factors_are_needed_they_are_kept_as_they_came_with_normalised_weights():
    clients = [make_adapter(1), make_adapter(2)]
    reduction = Reduction(make_adapter(0), ALL_PARTS, keep=True)
    for client, weight in zip(clients, (1.0, 3.0), strict=True):
        reduction.add(client, weight)
    factors = reduction.result().factors
    assert [w for w, _ in factors] == [0.25, 0.75]
    assert all(kept is client for (_, kept), client in zip(factors, clients, strict=True))


@pytest.mark.parametrize("weight", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 1e308, 1e-320])
def test_a_weight_that_is_not_positive_or_could_overflow_is_refused_and_changes_nothing(weight):
    reduction = Reduction(make_adapter(0), ALL_PARTS)
    reduction.add(make_adapter(1), 2.0)
    with refused("weight", repr(weight)):
        reduction.add(make_adapter(2), weight)
    assert reduction.count == 1
    assert_same(reduction.result().mean, make_adapter(1))


def test_a_result_of_no_uploads_is_refused():
    with refused("nothing to average"):
        Reduction(make_adapter(0), ALL_PARTS).result()


def test_the_form_and_the_clients_are_left_alone():
    form, client = make_adapter(0), make_adapter(1)
    reduction = Reduction(form, ALL_PARTS)
    reduction.add(client, 2.0)
    reduction.add(client, 3.0)
    assert_same(reduction.result().mean, client)
    assert_same(reduction.result().mean, client)  # asking twice is no second step
    assert_same(form, make_adapter(0))
    assert_same(client, make_adapter(1))


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_half_precision_is_widened_and_double_stays(dtype, wide):
    adapter = make_adapter(0, dtype=dtype)
    widened = as_float32(adapter)
    originals = dict(adapter.tensors())
    for name, tensor in widened.tensors():
        assert tensor.dtype == wide
        assert torch.equal(tensor, originals[name].to(wide))
