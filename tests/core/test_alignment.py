"""Alignment of adapters: the update never changes, the frame does, and as far as the strength says."""

import math
from dataclasses import replace

import pytest
import torch
from core_helpers import (
    SHAPES,
    assert_close,
    assert_same,
    distance,
    factors,
    make_adapter,
    moved,
    product,
    quick,
    random_rotation,
    random_rotations,
    ranks,
    refused,
    seeds,
    strengths,
    turned,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedrot import align
from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.alignment import find_rotations, rotate, rotate_back

halves = st.sampled_from([torch.float16, torch.bfloat16])
WIDE = {"q": (24, 20), "v": (24, 20), "k": (30, 18)}


def gap(adapter: Adapter, reference: Adapter, factor: str, name: str) -> float:
    """The objective of the alignment by `factor` in one layer."""
    mine, theirs = adapter.layers[name], reference.layers[name]
    return distance(mine.a, theirs.a) if factor == "A" else distance(mine.b, theirs.b)


@quick
@given(seeds, ranks, factors, strengths, st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
def test_the_update_stays_what_it_was_even_from_half_precision(seed, rank, factor, strength, dtype):
    adapter, reference = make_adapter(seed, rank, dtype=dtype), make_adapter(seed + 1, rank, dtype=dtype)
    result = align(adapter, reference, factor, strength)
    for name, pair in adapter.layers.items():
        size = float(pair.b.double().norm() * pair.a.double().norm())
        kept = distance(product(result.layers[name], scaled=False), product(pair, scaled=False))
        assert kept <= (1e-12 if dtype == torch.float64 else 1e-6) * size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_factors_come_back_in_float32_or_better_and_in_their_own_dtype_on_request(dtype):
    adapter = make_adapter(0, dtype=dtype)
    wide, kept = (align(adapter, make_adapter(1, dtype=dtype), keep_dtype=k) for k in (False, True))
    for name in SHAPES:
        assert wide.layers[name].a.dtype == wide.layers[name].b.dtype == torch.promote_types(dtype, torch.float32)
        assert kept.layers[name].a.dtype == kept.layers[name].b.dtype == dtype
        assert torch.equal(kept.layers[name].a, wide.layers[name].a.to(dtype))


def test_only_the_factors_change():
    adapter = replace(make_adapter(0, scale=0.7, fan_in_fan_out=True), config={"r": 3})
    result = align(adapter, moved(make_adapter(1), 2), strength=1.0)
    assert result.config == {"r": 3}
    assert all(torch.equal(tensor, adapter.head[name]) for name, tensor in result.head.items())
    assert all(p.scale == 0.7 and p.fan_in_fan_out for p in result.layers.values())
    assert all(distance(p.a, adapter.layers[n].a) > 0.1 for n, p in result.layers.items())


def test_inputs_are_not_changed():
    adapter, reference = make_adapter(0), make_adapter(1)
    align(adapter, reference, strength=1.0)
    assert_same(adapter, make_adapter(0))
    assert_same(reference, make_adapter(1))


@quick
@given(seeds, ranks, factors, strengths)
def test_every_rotation_found_is_in_so_r(seed, rank, factor, strength):
    found = find_rotations(make_adapter(seed, rank), make_adapter(seed + 1, rank), factor, strength)
    assert found.keys() == SHAPES.keys()
    for r in found.values():
        assert r.dtype == torch.float64
        assert distance(r @ r.T, torch.eye(rank)) < 1e-10
        assert float(torch.linalg.det(r)) == pytest.approx(1.0, abs=1e-10)


@quick
@given(seeds, ranks, factors)
def test_a_full_turn_is_not_beaten_by_no_turn_or_any_random_one(seed, rank, factor):
    adapter, reference = (make_adapter(seed + k, rank, dtype=torch.float64) for k in (0, 1))
    result = align(adapter, reference, factor, strength=1.0)
    rivals = [adapter, *(turned(adapter, random_rotations(seed + 10 * k, adapter)) for k in range(10))]
    for name in SHAPES:
        best = gap(result, reference, factor, name)
        assert all(best <= gap(rival, reference, factor, name) + 1e-9 for rival in rivals)


@quick
@given(seeds, ranks, factors)
def test_a_client_s_own_frame_does_not_matter_to_a_full_turn(seed, rank, factor):
    reference = make_adapter(seed, rank, shapes=WIDE, dtype=torch.float64)
    client = moved(reference, seed + 1, 0.3)
    other_frame = turned(client, random_rotations(seed + 2, client))
    assert_close(align(other_frame, reference, factor, 1.0), align(client, reference, factor, 1.0), rel=1e-7)


@quick
@given(seeds, ranks)
def test_a_turned_copy_of_the_reference_is_turned_back_by_either_factor(seed, rank):
    reference = make_adapter(seed, rank, shapes=WIDE, dtype=torch.float64)
    copy = turned(reference, random_rotations(seed + 1, reference))
    for factor in ("A", "B"):
        assert_close(align(copy, reference, factor, 1.0), reference, rel=1e-8)


@quick
@given(seeds, ranks, factors)
def test_strength_0_leaves_the_adapter_bit_for_bit(seed, rank, factor):
    adapter = make_adapter(seed, rank)
    assert_same(align(adapter, make_adapter(seed + 1, rank), factor, 0.0), adapter)


@quick
@given(seeds, ranks, factors)
def test_a_tiny_strength_is_next_to_none_at_all(seed, rank, factor):
    adapter, reference = (make_adapter(seed + k, rank, dtype=torch.float64) for k in (0, 1))
    assert_close(align(adapter, reference, factor, 1e-7), adapter, rel=1e-6)


@quick
@given(seeds, ranks, factors, strengths)
def test_a_soft_rotation_is_within_twice_its_strength_of_the_full_one(seed, rank, factor, strength):
    adapter, reference = make_adapter(seed, rank), make_adapter(seed + 1, rank)
    soft, full = (find_rotations(adapter, reference, factor, s) for s in (strength, 1.0))
    for name in SHAPES:
        eye = torch.eye(rank)
        assert distance(soft[name], eye) <= 2 * strength * distance(full[name], eye) + 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [2, 4, 6])
@pytest.mark.parametrize("seed", range(4))
def test_rank_one_factors_do_not_turn_in_the_directions_that_are_only_rounding(seed, rank, dtype):
    rng = torch.Generator().manual_seed(seed)
    u, v = torch.randn(rank, 1, generator=rng), torch.randn(1, 64, generator=rng)
    reference = Adapter({"q": LoraPair((u @ v).to(dtype), torch.zeros(32, rank, dtype=dtype), 1.0)})
    client = Adapter({"q": LoraPair((1.37 * u @ v).to(dtype), torch.zeros(32, rank, dtype=dtype), 1.0)})
    rotations = find_rotations(client, reference, "A", 1.0)
    # The one direction that the data know is known to the factors' own rounding, no better.
    assert distance(rotations["q"], torch.eye(rank)) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("coarse", ["adapter", "reference"])
@pytest.mark.parametrize("seed", range(4))
def test_the_coarser_of_adapter_and_reference_says_what_is_rounding(seed, coarse):
    rng = torch.Generator().manual_seed(seed)
    u, v = torch.randn(4, 1, generator=rng), torch.randn(1, 64, generator=rng)
    fine = Adapter({"q": LoraPair(u @ v + 0.01 * torch.randn(4, 64, generator=rng), torch.zeros(32, 4), 1.0)})
    # Beside the leading direction, this one holds nothing but its own rounding.
    rounded = Adapter({"q": LoraPair((u @ v).bfloat16(), torch.zeros(32, 4).bfloat16(), 1.0)})
    client, reference = (rounded, fine) if coarse == "adapter" else (fine, rounded)
    rotations = find_rotations(client, reference, "A", 1.0)
    assert distance(rotations["q"], torch.eye(4)) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weak_direction_that_is_well_above_rounding_is_still_turned(dtype):
    sizes = torch.tensor([1.0, 1.0, 0.01, 0.01]).unsqueeze(-1)  # in the correlation one to ten thousand
    wide = make_adapter(0, 4, shapes=WIDE, dtype=dtype)
    reference = replace(wide, layers={n: replace(p, a=(sizes * p.a).to(dtype)) for n, p in wide.layers.items()})
    turn = torch.block_diag(torch.eye(2), torch.tensor([[0.6, -0.8], [0.8, 0.6]])).double()
    client = turned(reference, dict.fromkeys(WIDE, turn))
    result = align(client, reference, "A", 1.0)
    for name in WIDE:
        assert distance(result.layers[name].a[2:], reference.layers[name].a[2:]) < 1e-3 * 0.01


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_reference_of_zeros_turns_nothing(factor):
    adapter = make_adapter(0, rank=4)
    nothing = make_adapter(1, rank=4).map(torch.zeros_like)
    assert_close(align(adapter, nothing, factor, 1.0), adapter, rel=1e-6)


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_half_strength_at_half_a_turn_gives_finite_factors_of_the_same_update(rank):
    reference = make_adapter(0, rank, shapes=WIDE, dtype=torch.float64)
    half_turn = torch.diag(torch.tensor([-1.0, -1.0] + [1.0] * (rank - 2), dtype=torch.float64))
    basis = random_rotation(5, rank)
    client = turned(reference, dict.fromkeys(WIDE, basis @ half_turn @ basis.T))
    result = align(client, reference, "A", 0.5)
    for name in WIDE:
        assert bool(torch.isfinite(result.layers[name].a).all())
        update = product(client.layers[name])
        assert distance(product(result.layers[name]), update) < 1e-10 * float(update.norm())


def test_layers_are_aligned_each_on_its_own():
    adapter, reference = make_adapter(0), make_adapter(1)
    together = align(adapter, reference, strength=0.6)
    for name in SHAPES:
        alone = align(Adapter({name: adapter.layers[name]}), Adapter({name: reference.layers[name]}), strength=0.6)
        torch.testing.assert_close(alone.layers[name].a, together.layers[name].a, atol=1e-6, rtol=0)


def test_the_reference_s_head_and_scale_do_not_matter():
    adapter, reference = make_adapter(0), make_adapter(1)
    bare = make_adapter(1, scale=9.0, head=False)
    assert_same(align(adapter, bare), align(adapter, reference))


@quick
@given(seeds, ranks)
def test_turning_back_undoes_a_rotation(seed, rank):
    adapter = make_adapter(seed, rank, dtype=torch.float64)
    rotations = random_rotations(seed + 1, adapter)
    assert_close(rotate(adapter, rotations), turned(adapter, rotations), rel=1e-12)
    assert_close(rotate_back(rotate(adapter, rotations), rotations), adapter, rel=1e-12)


def test_without_rotations_turning_back_gives_the_very_adapter():
    adapter = make_adapter(0)
    assert rotate_back(adapter, {}) is adapter


def test_rank_one_has_nothing_to_turn_and_keeps_its_sign():
    adapter = make_adapter(0, rank=1)
    opposite = adapter.map(Tensor.neg)
    assert_same(align(adapter, opposite, strength=1.0), adapter)


@pytest.mark.parametrize("strength", [-0.1, 1.0001, math.nan, math.inf, -math.inf, "much", None, [0.4]])
def test_a_strength_outside_0_to_1_is_refused(strength):
    with refused("strength", repr(strength)):
        align(make_adapter(0), make_adapter(1), strength=strength)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("strength", [0.4, "auto"])
def test_live_parameters_are_aligned_as_their_values(strength):
    adapter, reference = make_adapter(0), make_adapter(1)
    live = [one.map(lambda t: nn.Parameter(t.clone())) for one in (adapter, reference)]
    found = align(*live, strength=strength)
    assert not any(t.requires_grad for _, t in found.tensors())
    assert_same(found, align(adapter, reference, strength=strength))


@pytest.mark.parametrize("factor", ["C", "a", "", "alternate", None])
def test_an_unknown_factor_is_refused_with_the_choices(factor):
    with refused("factor", repr(factor), "A, B or joint"):
        align(make_adapter(0), make_adapter(1), factor)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (make_adapter(1, shapes={"enc.0.out": (7, 16)}), ("layer 'enc.0.query'", "not in the reference")),
        (make_adapter(1, shapes={**SHAPES, "enc.9.out": (7, 16)}), ("layer 'enc.9.out'", "missing")),
        (make_adapter(1, shapes={**SHAPES, "enc.0.out": (7, 15)}), ("enc.0.out/b", "(16, 3)", "(15, 3)")),
        (make_adapter(1, rank=2), ("(3, 7)", "(2, 7)")),
        (make_adapter(1, rank=1), ("(3, 7)", "(1, 7)")),
    ],
)
def test_a_reference_of_another_form_is_refused_by_what_differs(reference, words):
    with refused(*words):
        align(make_adapter(0), reference)
