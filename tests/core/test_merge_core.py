"""`aggregate` and `combine` on adapters that are not alike, and what they say was lost, against dense matrices."""

import math

import pytest
import torch
from core_helpers import (
    SHAPES,
    assert_close,
    assert_same,
    dense_errors,
    distance,
    make_adapter,
    moved,
    product,
    quick,
    random_rotations,
    seeds,
    turned,
    weighted,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedrot import aggregate
from fedrot.core.adapter import Adapter
from fedrot.core.aggregate import alike, combine, errors_of
from fedrot.core.methods import methods
from fedrot.core.ranks import first_frames, pad

STANDALONE = [name for name, cls in methods().items() if cls.capabilities.standalone]
EXACT = [name for name in STANDALONE if methods()[name].capabilities.changes_base]
OPTIMAL = ["flexlora", "flexlora_regauge", "fedrot_svd"]
WEIGHTS = [1.0, 5.0, 2.0]
orientations = pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["linear", "conv1d"])


def mixed(fan_in_fan_out: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Adapter]:
    """Three adapters, each of a rank and a scale of its own; the widest is not the first."""
    forms = [(2, 4.0), (5, 0.5), (3, 2.0)]
    return [make_adapter(seed + i, r, s, dtype=dtype, fan_in_fan_out=fan_in_fan_out) for i, (r, s) in enumerate(forms)]


def ideal(adapters: list[Adapter], weights: list[float], name: str) -> Tensor:
    return weighted([product(adapter.layers[name]) for adapter in adapters], weights)


@pytest.mark.parametrize("name", EXACT)
@orientations
def test_what_goes_into_the_base_comes_back_as_extra_rank_and_nothing_is_lost(name: str, fan_in_fan_out: bool) -> None:
    adapters = mixed(fan_in_fan_out)
    merged = aggregate(adapters, WEIGHTS, name)
    for layer, pair in merged.layers.items():
        expected = ideal(adapters, WEIGHTS, layer)
        assert distance(product(pair), expected) < 1e-12 * sum(float(product(a.layers[layer]).norm()) for a in adapters)
        assert 5 < pair.rank <= min(SHAPES[layer])
        assert (pair.scale, pair.fan_in_fan_out) == (4.0, fan_in_fan_out)
        assert tuple(pair.delta().shape) == (SHAPES[layer] if fan_in_fan_out else SHAPES[layer][::-1])


@pytest.mark.parametrize("name", OPTIMAL)
def test_adapters_of_mixed_ranks_and_scales_merge_to_the_best_of_the_largest_rank(name: str) -> None:
    adapters = mixed()
    merged = aggregate(adapters, WEIGHTS, name, reference=make_adapter(9, 5, dtype=torch.float64))
    for layer, pair in merged.layers.items():
        expected = ideal(adapters, WEIGHTS, layer)
        tail = torch.linalg.svdvals(expected)[5:]
        assert (pair.rank, pair.scale) == (5, 4.0)
        assert distance(product(pair), expected) == pytest.approx(float(tail.norm()), rel=1e-9)


@orientations
def test_fedit_of_mixed_ranks_is_that_of_factors_padded_with_zeros_at_one_scale(fan_in_fan_out: bool) -> None:
    adapters = mixed(fan_in_fan_out)
    merged = aggregate(adapters, WEIGHTS)
    for layer, pair in merged.layers.items():
        a, b = torch.zeros(5, SHAPES[layer][0]).double(), torch.zeros(SHAPES[layer][1], 5).double()
        for adapter, weight in zip(adapters, WEIGHTS, strict=True):
            mine = adapter.layers[layer]
            a[: mine.rank] += weight / 8 * mine.a
            b[:, : mine.rank] += weight / 8 * mine.b * mine.scale / 4.0
        torch.testing.assert_close(pair.a, a)
        torch.testing.assert_close(pair.b, b)


@pytest.mark.parametrize("name", STANDALONE)
@pytest.mark.parametrize("count", [1, 3])
def test_one_update_at_several_ranks_and_scales_is_merged_to_itself(name: str, count: int) -> None:
    """Adapters that say the same in different ways: no method changes it, but for the control that turns at random."""
    first = make_adapter(0, 2, 4.0, dtype=torch.float64)
    form = make_adapter(1, 5, 0.5, dtype=torch.float64)
    padded = pad(first, first_frames(form, 2), form)
    adapters = [first, padded, first][:count]
    reference = pad(first, first_frames(form, 2), form) if count > 1 else first
    merged = aggregate(adapters, WEIGHTS[:count], name, reference)
    same = name != "random_rotation" or count == 1
    for layer, pair in merged.layers.items():
        update = product(first.layers[layer])
        assert (
            distance(product(pair), update) < (2e-3 if name == "as_published" else 1e-9) * float(update.norm())
        ) == same


@pytest.mark.parametrize("name", STANDALONE)
def test_a_merged_adapter_survives_its_file_whatever_rank_and_scale_it_got(name: str, tmp_path) -> None:
    merged = aggregate(mixed(True, torch.float32), WEIGHTS, name, make_adapter(9, 5, 0.25, fan_in_fan_out=True))
    merged.save(tmp_path)
    assert_same(Adapter.load(tmp_path), merged)
    for layer, pair in Adapter.load(tmp_path).layers.items():
        assert pair.scale == pytest.approx(merged.layers[layer].scale)


@quick
@given(seeds, st.permutations(range(3)))
def test_the_order_of_mixed_adapters_does_not_matter_to_the_update(seed: int, order: list[int]) -> None:
    adapters = mixed(seed=seed)
    for name in ("flora", "flexlora", "hetlora"):
        one = aggregate(adapters, WEIGHTS, name)
        other = aggregate([adapters[i] for i in order], [WEIGHTS[i] for i in order], name)
        for layer, pair in one.layers.items():
            assert distance(product(pair), product(other.layers[layer])) < 1e-9 * float(product(pair).norm())
            assert other.layers[layer].scale == adapters[order[0]].layers[layer].scale


@pytest.mark.parametrize("name", [n for n in STANDALONE if not methods()[n].needs_reference and n != "random_rotation"])
def test_without_a_reference_no_adapter_is_privileged(name: str) -> None:
    adapters = [make_adapter(i, 3, dtype=torch.float64) for i in range(3)]
    one, other = aggregate(adapters, WEIGHTS, name), aggregate(adapters[::-1], WEIGHTS[::-1], name)
    # The search of the best rotations ends where it ends.
    rel = 0.3 if name == "fedrot_consensus" else 1e-9
    for layer, pair in one.layers.items():
        assert distance(product(pair), product(other.layers[layer])) < rel * float(product(pair).norm())


def test_alike_keeps_every_update_and_gives_the_largest_rank_of_each_layer_and_the_first_scale() -> None:
    wide = make_adapter(3, 6, 1.0, {n: s for n, s in SHAPES.items() if n == "enc.0.out"}, torch.float64)
    adapters = mixed()
    adapters[1] = Adapter({**adapters[1].layers, **wide.layers}, adapters[1].head)
    for before, after in zip(adapters, alike(adapters), strict=True):
        for layer, pair in after.layers.items():
            assert pair.rank == (6 if layer == "enc.0.out" else 5)
            assert pair.scale == 4.0
            assert distance(product(pair), product(before.layers[layer])) < 1e-12 * float(product(pair).norm())
        assert all(torch.equal(t, before.head[n]) for n, t in after.head.items())


def test_alike_leaves_adapters_of_one_form_bit_for_bit_half_precision_too() -> None:
    adapters = [make_adapter(i) for i in range(3)]
    for before, after in zip(adapters, alike(adapters), strict=True):
        assert_same(after, before)
    half = [make_adapter(i, dtype=torch.bfloat16) for i in range(2)]
    for before, after in zip(half, alike(half), strict=True):
        assert_same(after, before)


@pytest.mark.parametrize("name", STANDALONE)
@orientations
def test_combine_s_errors_are_those_of_dense_matrices(name: str, fan_in_fan_out: bool) -> None:
    reference = make_adapter(9, 3, 0.5, dtype=torch.float64, fan_in_fan_out=fan_in_fan_out)
    adapters = [moved(reference, i, 0.5) for i in range(3)]
    made = combine(adapters, WEIGHTS, name, reference)
    assert_same(made.adapter, aggregate(adapters, WEIGHTS, name, reference))
    assert (made.errors.estimated, made.errors.clients) == (False, 3)
    assert made.errors.layers.keys() == SHAPES.keys()
    for layer, dense in dense_errors(adapters, WEIGHTS).items():
        found = made.errors.layers[layer]
        sent2 = distance(ideal(adapters, WEIGHTS, layer), product(made.adapter.layers[layer])) ** 2
        slack = 1e-20 * dense["ideal2"]
        assert found["ideal2"] == pytest.approx(dense["ideal2"], rel=1e-9)
        assert found["before2"] == pytest.approx(dense["error2"], rel=1e-8, abs=slack)
        assert found["floor2"] == pytest.approx(dense["floor2"], rel=1e-8, abs=slack)
        assert found["sent2"] == pytest.approx(sent2, rel=1e-7, abs=1e-18 * dense["ideal2"])
        if name == "fedit":
            assert found["sent2"] == pytest.approx(found["before2"], rel=1e-8)
        if name in OPTIMAL:
            assert found["sent2"] == pytest.approx(found["floor2"], rel=1e-8)
        if name in EXACT:
            assert found["sent2"] < 1e-22 * found["ideal2"]


@pytest.mark.parametrize("name", ["fedit", "flexlora", "fedex", "fedask"])
def test_combine_of_mixed_adapters_measures_against_their_own_updates(name: str) -> None:
    adapters = mixed()
    made = combine(adapters, WEIGHTS, name)
    for layer, found in made.errors.layers.items():
        target = ideal(adapters, WEIGHTS, layer)
        assert found["ideal2"] == pytest.approx(float(target.square().sum()), rel=1e-9)
        sent2 = distance(target, product(made.adapter.layers[layer])) ** 2
        assert found["sent2"] == pytest.approx(sent2, rel=1e-7, abs=1e-18 * found["ideal2"])
        floor2 = float(torch.linalg.svdvals(target)[5:].square().sum())  # of the largest rank
        assert found["floor2"] == pytest.approx(floor2, rel=1e-8, abs=1e-20 * found["ideal2"])


@quick
@given(seeds, st.lists(st.floats(0.01, 100), min_size=1, max_size=4), st.integers(1, 9))
def test_what_any_adapter_lost_of_a_weighted_sum_is_the_dense_distance(
    seed: int, weights: list[float], rank: int
) -> None:
    adapters = [make_adapter(seed + i, 3, dtype=torch.float64) for i in range(len(weights))]
    made = make_adapter(seed + 9, rank, 0.25, dtype=torch.float64)
    for layer, found in errors_of(adapters, weights, made).layers.items():
        expected = distance(ideal(adapters, weights, layer), product(made.layers[layer])) ** 2
        assert found["sent2"] == pytest.approx(expected, rel=1e-9)


def test_totals_of_a_merge_name_what_was_sent() -> None:
    adapter = make_adapter(0, dtype=torch.float64)
    clients = [turned(adapter, random_rotations(seed, adapter)) for seed in (10, 20, 30)]
    lost = combine(clients).errors.totals()
    assert lost["sent_relative"] == pytest.approx(lost["before_relative"])
    assert lost["sent_relative"] > 0.1
    found = combine(clients, None, "fedrot", adapter, strength=1.0).errors.totals()
    assert found["sent_relative"] < 1e-9
    assert found["before_relative"] == pytest.approx(lost["before_relative"])
    assert math.isclose(found["ideal"], lost["ideal"])


def test_the_head_is_averaged_whatever_the_ranks_are() -> None:
    adapters = mixed()
    for name in ("fedit", "flora", "fedask", "hetlora"):
        for key, tensor in aggregate(adapters, WEIGHTS, name).head.items():
            torch.testing.assert_close(tensor, weighted([a.head[key] for a in adapters], WEIGHTS))


def test_mixed_half_precision_is_widened_before_it_is_padded() -> None:
    half, wide = mixed(dtype=torch.bfloat16), [a.map(Tensor.float) for a in mixed(dtype=torch.bfloat16)]
    assert_same(aggregate(half, WEIGHTS, "flexlora"), aggregate(wide, WEIGHTS, "flexlora"))
    assert_close(aggregate(half, WEIGHTS), aggregate(wide, WEIGHTS), rel=1e-7)


def test_a_reference_of_another_scale_is_the_same_frame() -> None:
    adapters = mixed()
    reference = make_adapter(9, 5, 4.0, dtype=torch.float64)
    other = Adapter({n: type(p)(p.a, p.b * 8, 0.5, p.fan_in_fan_out) for n, p in reference.layers.items()})
    one, two = (aggregate(adapters, WEIGHTS, "fedrot", ref, strength=1.0, factor="B") for ref in (reference, other))
    assert_close(one, two, rel=1e-9)
