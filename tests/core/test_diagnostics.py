"""The aggregation error of a round against dense matrices, and that it measures what it should."""

import math
import re

import pytest
import torch
from core_helpers import (
    SHAPES,
    dense_errors,
    distance,
    make_adapter,
    moved,
    product,
    quick,
    random_rotations,
    ranks,
    seeds,
    turned,
    upload,
    weighted,
)
from hypothesis import given
from hypothesis import strategies as st

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.alignment import align, find_rotations, rotate
from fedrot.core.diagnostics import AggregationErrors, ExactErrors, SketchObserver, exact_errors, observer
from fedrot.core.settings import DiagnosticsSettings

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def assert_dense(found: dict[str, dict[str, float]], adapters: list[Adapter], weights: list[float], key: str) -> None:
    for name, dense in dense_errors(adapters, weights).items():
        size = dense["ideal2"] + sum(float(a.layers[name].b.double().norm()) for a in adapters)
        assert found[name][key] == pytest.approx(dense["error2"], rel=1e-7, abs=1e-14 * size)
        assert found[name]["ideal2"] == pytest.approx(dense["ideal2"], rel=1e-9)
        assert found[name]["floor2"] == pytest.approx(dense["floor2"], rel=1e-7, abs=1e-14 * size)


@quick
@given(
    seeds, ranks, st.sampled_from([0.25, 1.0, 8.0]), st.lists(st.floats(0.01, 100), min_size=1, max_size=7),
    st.sampled_from(DTYPES), st.booleans(),
)  # fmt: skip
def test_errors_are_those_of_dense_matrices(seed, rank, scale, weights, dtype, fan_in_fan_out):
    adapters = [
        make_adapter(seed + i, rank, scale, dtype=dtype, fan_in_fan_out=fan_in_fan_out) for i in range(len(weights))
    ]
    found = exact_errors(adapters, weights)
    assert found.keys() == SHAPES.keys()
    assert_dense(found, adapters, weights, "before2")
    assert all(layer["before2"] == layer["after2"] for layer in found.values())


@quick
@given(seeds, ranks, st.integers(2, 5))
def test_before_and_after_alignment_are_those_of_dense_matrices(seed, rank, count):
    reference = make_adapter(seed, rank, dtype=torch.float64)
    locals_ = [moved(reference, seed + i, 0.5) for i in range(1, count + 1)]
    rotations = [find_rotations(local, reference, "A", 0.7) for local in locals_]
    sent = [rotate(local, r) for local, r in zip(locals_, rotations, strict=True)]
    weights = [float(i) for i in range(1, count + 1)]
    errors = ExactErrors()
    for adapter, rotation, weight in zip(sent, rotations, weights, strict=True):
        errors.add(upload(adapter, rotation), weight)
    found = errors.result()
    assert (found.estimated, found.clients) == (False, count)
    assert_dense(found.layers, locals_, weights, "before2")
    assert_dense(found.layers, sent, weights, "after2")


@quick
@given(seeds, ranks)
def test_zero_b_has_neither_an_update_nor_an_error(seed, rank):
    found = exact_errors([make_adapter(seed + i, rank, zero_b=True) for i in range(3)], [1.0, 2.0, 3.0])
    assert all(value == 0.0 for layer in found.values() for value in layer.values())


@pytest.mark.parametrize("common", ["a", "b"])
def test_the_error_is_zero_where_either_factor_is_common_to_all(common):
    first = make_adapter(0, dtype=torch.float64)
    adapters = []
    for seed in range(4):
        own = dict(make_adapter(seed, dtype=torch.float64).tensors())
        shared = {n: t for n, t in first.tensors() if n.endswith(f"/{common}")}
        adapters.append(first.with_tensors(own | shared))
    for layer in exact_errors(adapters, [1.0, 2.0, 3.0, 4.0]).values():
        assert layer["before2"] <= 1e-28 * layer["ideal2"]


@quick
@given(seeds, ranks, st.lists(st.floats(0.1, 10), min_size=2, max_size=5))
def test_the_error_is_the_cross_covariance_of_the_factors(seed, rank, weights):
    adapters = [make_adapter(seed + i, rank, 1.0, dtype=torch.float64) for i in range(len(weights))]
    for name, layer in exact_errors(adapters, weights).items():
        pairs = [adapter.layers[name] for adapter in adapters]
        p = [w / sum(weights) for w in weights]
        mean_a, mean_b = (sum(x * getattr(q, s) for x, q in zip(p, pairs, strict=True)) for s in "ab")
        covariance = sum(x * (q.b - mean_b) @ (q.a - mean_a) for x, q in zip(p, pairs, strict=True))
        assert layer["before2"] == pytest.approx(float(covariance.square().sum()), rel=1e-9)


@pytest.mark.parametrize("spread", [3e-5, 1e-9])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 20.0, 3.0]])
def test_an_error_far_below_the_rounding_of_the_products_is_still_measured(spread, weights):
    """With a spread of 3e-5 the error is 1e-9 of the update, with 1e-9 it is 1e-18 of it."""
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 12, generator=rng).double(), torch.randn(9, 3, generator=rng).double()
    noise_a, noise_b = torch.randn(3, 3, 12, generator=rng).double(), torch.randn(3, 9, 3, generator=rng).double()
    adapters = [
        Adapter({"q": LoraPair(a + spread * x, b + spread * y, 1.0)}) for x, y in zip(noise_a, noise_b, strict=True)
    ]
    p = torch.tensor(weights, dtype=torch.float64).reshape(-1, 1, 1) / sum(weights)
    centred_a, centred_b = noise_a - (p * noise_a).sum(0), noise_b - (p * noise_b).sum(0)
    expected = spread**2 * float((p * (centred_b @ centred_a)).sum(0).norm())
    found = math.sqrt(exact_errors(adapters, weights)["q"]["before2"])
    assert found == pytest.approx(expected, rel=1e-5)


@quick
@given(seeds, st.integers(2, 6))
def test_the_error_changes_when_one_client_turns_its_frame_but_update_and_floor_do_not(seed, rank):
    adapters = [make_adapter(seed + i, rank, dtype=torch.float64) for i in range(3)]
    other = [turned(adapters[0], random_rotations(seed + 7, adapters[0])), *adapters[1:]]
    before, after = exact_errors(adapters, [1.0] * 3), exact_errors(other, [1.0] * 3)
    for name in SHAPES:
        assert abs(math.sqrt(after[name]["before2"] / before[name]["before2"]) - 1) > 1e-6
        assert after[name]["ideal2"] == pytest.approx(before[name]["ideal2"], rel=1e-9)
        assert after[name]["floor2"] == pytest.approx(before[name]["floor2"], rel=1e-6, abs=1e-12)


def test_turning_all_clients_alike_changes_nothing():
    adapters = [make_adapter(i, dtype=torch.float64) for i in range(3)]
    rotations = random_rotations(5, adapters[0])
    before, after = exact_errors(adapters, [1.0] * 3), exact_errors([turned(a, rotations) for a in adapters], [1.0] * 3)
    for name in SHAPES:
        assert after[name] == pytest.approx(before[name], rel=1e-9)


def test_the_error_carries_the_scale():
    for scale in (2.0, 8.0):
        one, more = (
            AggregationErrors(exact_errors([make_adapter(i, scale=s) for i in range(3)], [1.0] * 3), False, 3).totals()
            for s in (1.0, scale)
        )
        for key in ("ideal", "before", "after", "floor"):
            assert more[key] == pytest.approx(scale * one[key], rel=1e-9)
        assert more["before_relative"] == pytest.approx(one["before_relative"], rel=1e-9)


def test_clients_of_different_scale_are_each_measured_with_their_own():
    adapters = [make_adapter(0, scale=1.0), make_adapter(1, scale=4.0), make_adapter(2, scale=0.5)]
    assert_dense(exact_errors(adapters, [1.0, 2.0, 3.0]), adapters, [1.0, 2.0, 3.0], "before2")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_error_is_below_the_floor(count):
    found = exact_errors([make_adapter(i, dtype=torch.float64) for i in range(count)], [1.0] * count)
    for layer in found.values():
        assert layer["floor2"] <= layer["before2"] * (1 + 1e-9) + 1e-20
        if count == 1:
            assert layer["before2"] <= 1e-28 * layer["ideal2"]


def test_a_perfect_alignment_shows_as_no_error_after_and_the_full_one_before():
    reference = make_adapter(0, dtype=torch.float64)
    locals_ = [turned(reference, random_rotations(seed, reference)) for seed in (10, 20, 30)]
    rotations = [find_rotations(local, reference, "A", 1.0) for local in locals_]
    errors = ExactErrors()
    for local, rotation in zip(locals_, rotations, strict=True):
        errors.add(upload(rotate(local, rotation), rotation), 1.0)
    totals = errors.result().totals()
    assert totals["after_relative"] < 1e-12
    assert totals["before_relative"] > 0.3


def test_uploads_that_were_not_turned_are_alike_before_and_after():
    errors = ExactErrors()
    for i in range(3):
        errors.add(upload(align(make_adapter(i), make_adapter(9))), 1.0)  # how they came about does not matter
    assert all(layer["before2"] == layer["after2"] for layer in errors.result().layers.values())


def test_one_turned_upload_among_others_is_enough_to_tell_before_from_after():
    locals_ = [make_adapter(i, dtype=torch.float64) for i in range(3)]
    rotation = random_rotations(4, locals_[1])
    sent = [locals_[0], turned(locals_[1], rotation), locals_[2]]
    errors = ExactErrors()
    for i, adapter in enumerate(sent):
        errors.add(upload(adapter, rotation if i == 1 else {}), 1.0)
    found = errors.result()
    assert_dense(found.layers, locals_, [1.0] * 3, "before2")
    assert_dense(found.layers, sent, [1.0] * 3, "after2")


def layer(**squares: float) -> dict[str, float]:
    return {f"{key}2": value for key, value in squares.items()}


def test_totals_are_root_sums_of_squares_over_layers():
    layers = {
        "x": layer(ideal=64.0, before=16.0, after=9.0, floor=1.0),
        "y": layer(ideal=36.0, before=9.0, after=7.0, floor=3.0),
    }
    assert AggregationErrors(layers, True, 4).totals() == {
        "estimated": True, "clients": 4, "ideal": 10.0, "before": 5.0, "before_relative": 0.5,
        "after": 4.0, "after_relative": 0.4, "floor": 2.0, "floor_relative": 0.2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "best", "floor", "rho"),
    [
        (25.0, 4.0, 4.0, 1.0),
        (25.0, 25.0, 4.0, 0.0),
        (25.0, 16.0, 9.0, 0.5),
        (25.0, 36.0, 4.0, 0.0),
        (4.0, 4.0, 4.0, 0.0),
    ],
)
def test_rho_is_the_share_of_the_avoidable_error_that_rotations_take_away(before, best, floor, rho):
    layers = {"x": layer(ideal=100.0, before=before, after=before, floor=floor, best=best)}
    assert AggregationErrors(layers, False, 2).totals()["rho"] == pytest.approx(rho)


def test_totals_of_a_round_without_any_update_are_zero_and_not_a_division_by_it():
    totals = AggregationErrors(
        exact_errors([make_adapter(0, zero_b=True)] * 2, [1.0, 1.0], rho=True), False, 2
    ).totals()
    assert all(value == 0.0 for key, value in totals.items() if key not in ("estimated", "clients"))


@pytest.mark.parametrize(("every", "measured"), [(0, []), (1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6])])
def test_every_nth_round_is_measured(every, measured):
    settings = DiagnosticsSettings(every=every)
    assert [n for n in range(7) if observer(settings, n, 3, 0) is not None] == measured


def test_few_uploads_are_measured_exactly_and_many_by_a_sketch():
    settings = DiagnosticsSettings(exact_clients=3)
    kinds = [type(observer(settings, 0, uploads, 0).observer) for uploads in (1, 3, 4, 100)]
    assert kinds == [ExactErrors, ExactErrors, SketchObserver, SketchObserver]


def test_the_best_rotation_is_searched_only_on_request():
    for rho in (False, True):
        found = observer(DiagnosticsSettings(rho=rho), 0, 2, 0)
        for i in range(2):
            found.add(upload(make_adapter(i)), 1.0)
        assert ("rho" in found.result().totals()) == rho


@pytest.mark.parametrize("exact_clients", [0, 9])
def test_errors_that_are_not_finite_or_cannot_be_computed_are_none_with_the_reason(exact_clients: int):
    settings = DiagnosticsSettings(exact_clients=exact_clients)
    good, nan = make_adapter(0), make_adapter(1).map(lambda t: torch.full_like(t, math.nan))
    for adapter, sent, words in (
        (nan, good, "not finite|LinAlgError|RuntimeError"),
        (good, nan, "not finite|LinAlgError|RuntimeError"),
        (good, Adapter({}), "KeyError"),
    ):
        found = observer(settings, 0, 2, 0)
        found.add(upload(adapter), 1.0)
        assert found.result((sent,)) is None
        assert re.search(words, found.problem), found.problem
    found.add(upload(good), 1.0)  # nothing more is tried
    assert found.result() is None


@quick
@given(seeds, ranks, st.integers(1, 4), st.lists(st.integers(1, 12), min_size=1, max_size=3), st.booleans())
def test_what_was_sent_is_measured_against_the_ideal_update_whatever_its_ranks_and_scales(
    seed: int, rank: int, count: int, sent_ranks: list[int], fan_in_fan_out: bool
) -> None:
    uploads = [make_adapter(seed + i, rank, dtype=torch.float64, fan_in_fan_out=fan_in_fan_out) for i in range(count)]
    sent = [make_adapter(seed + 50 + i, r, 0.5 + i, dtype=torch.float64) for i, r in enumerate(sent_ranks)]
    weights = [1.0 + i for i in range(count)]
    errors = ExactErrors()
    for adapter, weight in zip(uploads, weights, strict=True):
        errors.add(upload(adapter), weight)
    found = errors.result(sent).layers
    assert all("sent2" not in layer for layer in errors.result().layers.values())
    for name in SHAPES:
        ideal = weighted([product(a.layers[name]) for a in uploads], weights)
        made = sum(product(one.layers[name]) for one in sent)
        assert found[name]["sent2"] == pytest.approx(distance(ideal, made) ** 2, rel=1e-9)
    totals = errors.result(sent).totals()
    assert totals["sent"] == pytest.approx(math.sqrt(sum(layer["sent2"] for layer in found.values())))


def test_a_round_that_lost_nothing_is_measured_as_that_to_the_rounding_of_the_factors() -> None:
    uploads = [make_adapter(i, 3, dtype=torch.float64) for i in range(3)]
    errors = ExactErrors()
    for adapter in uploads:
        errors.add(upload(adapter), 1.0)
    # The uploads themselves, at a third of their scale, are what a base change may be.
    parts = [Adapter({n: LoraPair(p.a, p.b, p.scale / 3) for n, p in one.layers.items()}) for one in uploads]
    for layer in errors.result(parts).layers.values():
        assert layer["sent2"] < 1e-28 * layer["ideal2"]


def test_what_was_sent_is_measured_in_the_frames_the_uploads_came_in() -> None:
    """Turning leaves an update what it was: aligned or not, the ideal is the same."""
    locals_ = [make_adapter(i, dtype=torch.float64) for i in range(3)]
    sent = make_adapter(9, dtype=torch.float64)
    plain, rotated = ExactErrors(), ExactErrors()
    for i, local in enumerate(locals_):
        rotation = random_rotations(i, local)
        plain.add(upload(local), 1.0)
        rotated.add(upload(turned(local, rotation), rotation), 1.0)
    one, other = plain.result([sent]).layers, rotated.result([sent]).layers
    for name in SHAPES:
        assert other[name]["sent2"] == pytest.approx(one[name]["sent2"], rel=1e-9)
