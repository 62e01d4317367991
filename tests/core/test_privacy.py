"""Clipped changes and noise: the bound holds whatever is sent, and noise is what theory says."""

import math

import pytest
import torch
from core_helpers import assert_close, assert_same, make_adapter, moved, quick, random_rotations, refused, seeds, turned
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.methods.base import ALL_PARTS
from fedrot.core.privacy import NoisyMean, clipped_change, seeded_normals, system_normals, with_change, with_noise
from fedrot.core.seeding import generator

FORM = make_adapter(0)
parts = st.sampled_from([ALL_PARTS, frozenset({"b"}), frozenset({"a", "head"})])


def norm(change: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(x.square().sum()) for x in change.values()))


def difference(adapter: Adapter, other: Adapter) -> dict[str, torch.Tensor]:
    theirs = dict(other.tensors())
    return {name: t.double() - theirs[name].double() for name, t in adapter.tensors()}


@quick
@given(seeds, st.floats(1e-6, 1e6), st.floats(1e-3, 1e4), parts)
def test_a_clipped_change_is_within_the_bound_and_points_where_it_did(seed, bound, size, travelling):
    local = moved(FORM, seed, size)
    whole = {n: x for n, x in difference(local, FORM).items() if part_of(n) in travelling}
    clipped = clipped_change(local, FORM, travelling, bound)
    assert clipped.keys() == whole.keys()
    assert norm(clipped) <= bound * (1 + 1e-12)
    share = min(1.0, bound / norm(whole))
    for name, x in whole.items():
        torch.testing.assert_close(clipped[name], share * x, rtol=1e-9, atol=0)


@quick
@given(seeds)
def test_a_change_within_the_bound_comes_back_bit_for_bit(seed):
    local = moved(FORM, seed)
    assert_same(with_change(FORM, clipped_change(local, FORM, ALL_PARTS, 1e9)), local)
    sent = with_change(FORM, clipped_change(local, FORM, frozenset({"b"}), 1e9))
    for name, tensor in sent.tensors():
        assert torch.equal(tensor, dict((local if part_of(name) == "b" else FORM).tensors())[name]), name


@quick
@given(seeds)
def test_clipping_does_not_depend_on_the_frame_if_the_broadcast_turns_too(seed):
    local, bound = moved(FORM, seed, 2.0), 3.0
    rotations = random_rotations(seed, FORM)
    clipped = with_change(FORM, clipped_change(local, FORM, ALL_PARTS, bound))
    other_form, other = turned(FORM, rotations), turned(local, rotations)
    assert_close(
        with_change(other_form, clipped_change(other, other_form, ALL_PARTS, bound)), turned(clipped, rotations)
    )
    # Turned alone, the same update is another change.
    assert norm(clipped_change(other, FORM, ALL_PARTS, 1e9)) != pytest.approx(norm(difference(local, FORM)), rel=1e-3)


def test_values_beyond_float32_s_square_are_clipped_too():
    far = FORM.map(lambda t: torch.full_like(t, 3e38))
    assert norm(clipped_change(far, FORM, ALL_PARTS, 2.0)) == pytest.approx(2.0, rel=1e-12)


def mean_of(adapters, bound=1e9, deviation=0.0, expected=None, seed=0, travelling=ALL_PARTS):
    reduction = NoisyMean(
        FORM, travelling, bound, deviation, expected or len(adapters), seeded_normals(generator("noise", seed))
    )
    for adapter in adapters:
        reduction.add(adapter, 1.0)
    return reduction.result()


def test_without_noise_and_within_the_bound_it_is_the_mean():
    locals_ = [moved(FORM, seed) for seed in range(5)]
    found = mean_of(locals_)
    assert found.count == 5
    columns = [dict(a.tensors()) for a in locals_]
    for name, tensor in found.mean.tensors():
        torch.testing.assert_close(tensor, torch.stack([c[name] for c in columns]).mean(0), rtol=1e-5, atol=1e-6)


@quick
@given(seeds, st.integers(0, 4), st.floats(0.01, 100.0))
def test_one_client_moves_the_sum_by_no_more_than_the_bound_whatever_it_sends(seed, which, bound):
    locals_ = [moved(FORM, seed + i, 10.0**i) for i in range(5)]
    wide = FORM.map(torch.Tensor.double)

    def total(adapters):
        reduction = NoisyMean(wide, ALL_PARTS, bound, 0.0, 1.0, system_normals)
        for adapter in adapters:
            reduction.add(adapter, 1.0)
        return reduction.result().mean

    without = total([a for i, a in enumerate(locals_) if i != which])
    assert norm(difference(total(locals_), without)) <= bound * (1 + 1e-9) + 1e-9


def test_the_noise_has_the_deviation_of_theory():
    clients, z, bound = 7, 1.3, 0.5
    locals_ = [moved(FORM, seed) for seed in range(clients)]
    still = mean_of(locals_, bound)
    off = [
        torch.cat(
            [x.flatten() for x in difference(mean_of(locals_, bound, z * bound, seed=s).mean, still.mean).values()]
        )
        for s in range(60)
    ]
    values = torch.cat(off) / (z * bound / clients)
    assert float(values.std()) == pytest.approx(1.0, abs=5 / math.sqrt(2 * len(values)))
    assert abs(float(values.mean())) < 5 / math.sqrt(len(values))
    # Every number of every round has noise of its own.
    assert len(values.unique()) > 0.99 * len(values)


def test_noise_is_on_what_travels_alone():
    found = mean_of([FORM], 1.0, 1.0, travelling=frozenset({"b"})).mean
    for name, x in difference(found, FORM).items():
        assert bool((x != 0).all() if part_of(name) == "b" else (x == 0).all()), name


def test_the_divisor_is_the_expected_number_whoever_came():
    one = moved(FORM, 1, 0.1)
    for name, x in difference(mean_of([one], expected=4).mean, FORM).items():
        torch.testing.assert_close(x, difference(one, FORM)[name] / 4, rtol=1e-4, atol=1e-6)
    nobody = mean_of([], 1.0, 2.0, expected=4)
    assert nobody.count == 0
    spread = torch.cat([x.flatten() for x in difference(nobody.mean, FORM).values()]).std()
    assert float(spread) == pytest.approx(0.5, rel=0.2)


def test_clients_count_alike():
    reduction = NoisyMean(FORM, ALL_PARTS, 1.0, 1.0, 1.0, system_normals)
    with refused("weight is 1", "2.0"):
        reduction.add(FORM, 2.0)


def test_half_precision_stays_and_noise_is_not_lost_in_the_sum():
    form = make_adapter(0, dtype=torch.bfloat16)
    sent = with_change(form, with_noise(clipped_change(form, form, ALL_PARTS, 1.0), 0.7, system_normals))
    assert {t.dtype for _, t in sent.tensors()} == {torch.bfloat16}
    spread = torch.cat([x.flatten() for x in difference(sent, form).values()]).std()
    assert float(spread) == pytest.approx(0.7, rel=0.15)


def test_seeded_noise_comes_again_and_the_system_s_does_not():
    shape = torch.Size([3, 4])
    one, same, other = (seeded_normals(generator("k", key))(shape) for key in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(system_normals(shape), system_normals(shape))
    assert system_normals(torch.Size([0, 3])).shape == (0, 3)


def test_the_system_s_noise_is_standard_normal():
    values = system_normals(torch.Size([200, 500]))
    assert values.dtype == torch.float64
    assert bool(torch.isfinite(values).all())
    assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-7
    neighbours = torch.corrcoef(torch.stack([values.flatten()[:-1], values.flatten()[1:]]))[0, 1]
    assert abs(float(neighbours)) < 6 / math.sqrt(values.numel())


def test_no_noise_draws_nothing():
    change = clipped_change(moved(FORM, 1), FORM, ALL_PARTS, 1.0)

    def never(shape):
        raise AssertionError("noise was drawn")

    assert with_noise(change, 0.0, never).keys() == change.keys()
