"""Rules against hostile clients: dense oracles, one frame for all, and what one hostile client can reach."""

import math
from dataclasses import replace

import pytest
import torch
from core_helpers import (
    assert_close,
    assert_same,
    make_adapter,
    moved,
    product,
    quick,
    random_rotations,
    refused,
    seeds,
    turned,
    upload,
)
from hypothesis import given
from hypothesis import strategies as st

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.alignment import rotate_back
from fedrot.core.methods.base import ALL_PARTS, Upload
from fedrot.core.robust import (
    Accepted,
    accept,
    bound_scales,
    change_norms,
    check_count,
    hostile_of,
    in_frame,
    krum_order,
    least_uploads,
    product_distances2,
    trimmed_mean,
)
from fedrot.core.settings import RobustSettings

RULES = ["norm", "median", "trimmed", "krum"]
BY_COORDINATE = ["median", "trimmed"]


def settings(rule: str, **more: float) -> RobustSettings:
    return RobustSettings(rule=rule, **more)


def round_of(
    seed: int, count: int, dtype: torch.dtype = torch.float64, size: float = 0.1
) -> tuple[Adapter, list[Adapter]]:
    """A broadcast and what honest clients make of it."""
    form = make_adapter(seed, dtype=dtype)
    return form, [moved(form, seed + i, size) for i in range(1, count + 1)]


def taken(rule: RobustSettings, adapters: list[Adapter], form: Adapter, parts: frozenset[str] = ALL_PARTS) -> Accepted:
    """The rule on uploads as a server takes them."""
    uploads = [in_frame(upload(a, client=f"c{i}"), form, parts) for i, a in enumerate(adapters)]
    return accept(rule, uploads, form, parts, len(adapters))


def result(accepted: Accepted) -> Adapter:
    """The mean that the rule gives, all weights alike."""
    if accepted.mean is not None:
        return accepted.mean
    columns = [dict(u.adapter.tensors()) for u in accepted.uploads]
    return accepted.uploads[0].adapter.with_tensors(
        {n: torch.stack([c[n].double() for c in columns]).mean(0).to(t.dtype) for n, t in columns[0].items()}
    )


def used(accepted: Accepted) -> list[str]:
    return [u.client for u in accepted.uploads]


def dense_distances2(adapters: list[Adapter]) -> torch.Tensor:
    """Squared distances of the materialised updates and heads."""
    found = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for i, one in enumerate(adapters):
        for j, other in enumerate(adapters):
            for name, pair in one.layers.items():
                found[i, j] += (product(pair) - product(other.layers[name])).square().sum()
            for name, tensor in one.head.items():
                found[i, j] += (tensor.double() - other.head[name].double()).square().sum()
    return found


# The frame


@quick
@given(seeds)
def test_an_upload_comes_into_one_frame_whatever_frame_it_was_sent_in(seed):
    form, (local,) = round_of(seed, 1)
    plain = in_frame(upload(local), form, ALL_PARTS)
    sent = turned(local, random_rotations(seed, local))
    found = in_frame(upload(sent), form, ALL_PARTS)
    assert_close(found.adapter, plain.adapter, rel=1e-9)
    for name, pair in local.layers.items():
        torch.testing.assert_close(product(found.adapter.layers[name]), product(pair), rtol=1e-9, atol=1e-9)
    assert_close(rotate_back(found.adapter, found.rotation), sent, rel=1e-9)


def test_a_turned_broadcast_is_the_broadcast_again():
    form = make_adapter(0, dtype=torch.float64)
    found = in_frame(upload(turned(form, random_rotations(3, form))), form, ALL_PARTS)
    assert_close(found.adapter, form, rel=1e-7)


def test_what_the_client_turned_and_what_the_server_turned_are_undone_together():
    form, (local,) = round_of(0, 1)
    claimed = random_rotations(5, local)
    found = in_frame(upload(turned(local, claimed), claimed), form, ALL_PARTS)
    assert_close(rotate_back(found.adapter, found.rotation), local, rel=1e-9)


@pytest.mark.parametrize("parts", [{"a"}, {"b"}, {"b", "head"}, {"a", "head"}, {"a", "b"}])
def test_what_does_not_travel_is_the_broadcasts_whatever_was_sent(parts):
    """Only where both factors travel is there a frame to choose."""
    form, (local,) = round_of(0, 1)
    found = dict(in_frame(upload(local), form, frozenset(parts)).adapter.tensors())
    mine, base = dict(local.tensors()), dict(form.tensors())
    for name, tensor in found.items():
        if part_of(name) not in parts:
            assert torch.equal(tensor, base[name])
        elif not {"a", "b"} <= parts or part_of(name) == "head":
            assert torch.equal(tensor, mine[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uploads_are_held_in_float32_or_better(dtype):
    form, (local,) = round_of(0, 1, dtype)
    held = in_frame(upload(local), form, ALL_PARTS).adapter
    assert {t.dtype for _, t in held.tensors()} == {torch.promote_types(dtype, torch.float32)}


# The formulas


@quick
@given(seeds, st.integers(1, 9), st.integers(0, 4))
def test_the_trimmed_mean_is_the_one_of_sorted_lists(seed, count, cut):
    form, adapters = round_of(seed, count)
    cut = min(cut, (count - 1) // 2)
    mean, low, high = trimmed_mean(adapters, form, ALL_PARTS, cut, cut)
    columns = [dict(a.tensors()) for a in adapters]
    for name, tensor in mean.tensors():
        flat = [c[name].flatten().tolist() for c in columns]
        for i in range(0, tensor.numel(), 7):
            left = sorted(values[i] for values in flat)[cut : count - cut]
            assert float(tensor.flatten()[i]) == pytest.approx(sum(left) / len(left), rel=1e-12, abs=1e-15)
            assert (float(low[name].flatten()[i]), float(high[name].flatten()[i])) == (left[0], left[-1])


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_the_median_is_numpys(count):
    form, adapters = round_of(1, count)
    found = taken(settings("median"), adapters, form)
    held = [dict(in_frame(upload(a), form, ALL_PARTS).adapter.tensors()) for a in adapters]
    for name, tensor in result(found).tensors():
        wanted = torch.stack([h[name] for h in held]).quantile(0.5, dim=0)
        torch.testing.assert_close(tensor, wanted, rtol=1e-12, atol=1e-15)


@quick
@given(seeds, st.integers(2, 6), st.sampled_from([0.25, 1.0, 8.0]))
def test_distances_are_those_of_dense_updates_in_any_frame(seed, count, scale):
    form = make_adapter(seed, scale=scale, dtype=torch.float64)
    adapters = [moved(form, seed + i, 0.3) for i in range(1, count + 1)]
    wanted = dense_distances2(adapters)
    found = product_distances2(adapters, form)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    frames = [turned(a, random_rotations(seed + i, a)) for i, a in enumerate(adapters)]
    torch.testing.assert_close(product_distances2(frames, form), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("apart", [1e-3, 1e-6])
def test_uploads_that_nearly_agree_keep_the_digits_of_their_distance(apart):
    """Updates of size 100 that differ by `apart` times a change of 1e-3: at 1e-6, 1e-11 of them."""
    form = make_adapter(0, dtype=torch.float64)
    common = moved(form, 1, 1e-3)
    adapters = [moved(common, i, apart * 1e-3) for i in (2, 3, 4)]
    found = product_distances2(adapters, form)
    wanted = torch.zeros(3, 3, dtype=torch.float64)
    for i, one in enumerate(adapters):
        for j, other in enumerate(adapters):
            for name, x in one.layers.items():
                y = other.layers[name]
                # The same difference, in which nothing cancels.
                wanted[i, j] += (x.scale * ((x.b - y.b) @ x.a + y.b @ (x.a - y.a))).square().sum()
            wanted[i, j] += sum((t - other.head[n]).square().sum() for n, t in one.head.items())
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)


def test_krums_order_is_that_of_its_scores():
    points = torch.tensor([[0.0], [1.0], [1.5], [10.0], [1.2], [-7.0], [0.9]], dtype=torch.float64)
    distances2 = torch.cdist(points, points).square()
    scores = []
    for i in range(7):
        others = sorted(float(distances2[i, j]) for j in range(7) if j != i)
        scores.append(sum(others[: 7 - 2 - 2]))
    assert krum_order(distances2, 2) == sorted(range(7), key=lambda i: scores[i])
    assert krum_order(torch.zeros(5, 5, dtype=torch.float64), 1) == [0, 1, 2, 3, 4]


def test_a_distance_that_is_no_number_counts_as_the_largest():
    distances2 = torch.ones(5, 5, dtype=torch.float64)
    distances2[0] = distances2[:, 0] = math.nan
    assert krum_order(distances2, 1)[-1] == 0


def test_a_bound_scales_what_is_above_it_and_nothing_else():
    assert bound_scales([1.0, 2.0, 4.0, 0.0], 2.0, 9.0) == [1.0, 1.0, 0.5, 1.0]
    assert bound_scales([1.0, 2.0, 16.0], None, 2.0) == [1.0, 1.0, 0.25]
    assert bound_scales([1.0, 2.0, 16.0, 32.0], None, 1.0) == [1.0, 1.0, 0.125, 0.0625]  # the lower middle one
    assert bound_scales([0.0, 0.0, 5.0], None, 2.0) == [1.0, 1.0, 0.0]


def test_norm_scales_changes_from_the_broadcast():
    form, adapters = round_of(0, 4)
    adapters[2] = moved(form, 9, 5.0)
    uploads = [in_frame(upload(a, client=str(i)), form, ALL_PARTS) for i, a in enumerate(adapters)]
    norms = change_norms([u.adapter for u in uploads], form)
    bound = sorted(norms)[1]
    found = accept(settings("norm", bound=bound), uploads, form, ALL_PARTS, 4)
    assert used(found) == ["0", "1", "2", "3"]
    for before, after, norm in zip(uploads, found.uploads, norms, strict=True):
        c = min(1.0, bound / norm)
        assert found.kept[before.client] == pytest.approx(c)
        if c == 1.0:
            assert_same(after.adapter, before.adapter)
        start, sent = dict(form.tensors()), dict(before.adapter.tensors())
        for name, tensor in after.adapter.tensors():
            torch.testing.assert_close(tensor, start[name] + c * (sent[name] - start[name]), rtol=1e-9, atol=1e-12)
    assert max(change_norms([u.adapter for u in found.uploads], form)) <= bound * (1 + 1e-9)


@pytest.mark.parametrize(("chosen", "count"), [(1, 1), (2, 2), (3, 3), (None, 3), (7, 3)])
def test_krum_takes_the_best_and_never_more_than_are_safe(chosen, count):
    form, adapters = round_of(0, 7)
    found = taken(settings("krum", chosen=chosen, share=0.3), adapters, form)  # f = 2
    best = krum_order(dense_distances2(adapters), 2)[:count]
    assert used(found) == [f"c{i}" for i in sorted(best)]
    assert found.kept == {f"c{i}": float(i in best) for i in range(7)}


# What holds for every rule


@quick
@given(seeds, st.sampled_from(RULES))
def test_clients_that_agree_in_their_own_frames_give_what_they_agree_on(seed, rule):
    form, (local,) = round_of(seed, 1)
    adapters = [turned(local, random_rotations(seed + i, local)) for i in range(5)]
    found = result(taken(settings(rule), adapters, form))
    for name, pair in local.layers.items():
        torch.testing.assert_close(product(found.layers[name]), product(pair), rtol=1e-7, atol=1e-7)
    assert_close(replace(found, layers={}), replace(local, layers={}), rel=1e-12)


@quick
@given(seeds, st.sampled_from(RULES))
def test_frames_change_neither_the_choice_nor_the_result(seed, rule):
    form, adapters = round_of(seed, 6)
    adapters[seed % 6] = moved(form, seed, 2.0)
    frames = [turned(a, random_rotations(seed + i, a)) for i, a in enumerate(adapters)]
    plain, other = taken(settings(rule), adapters, form), taken(settings(rule), frames, form)
    assert used(plain) == used(other)
    assert other.kept == pytest.approx(plain.kept, abs=1e-2)  # a number at the range's end may fall on either side
    for name, pair in result(plain).layers.items():
        torch.testing.assert_close(product(result(other).layers[name]), product(pair), rtol=1e-7, atol=1e-7)


HOSTILE = st.tuples(seeds, st.sampled_from([1e-6, 0.05, 0.3, 3.0, 1e3, 1e12, 1e30, 3e38]))


def attack(form: Adapter, seed: int, size: float) -> Adapter:
    """Anything finite in float32."""
    noise = make_adapter(seed, dtype=torch.float64)
    tensors = dict(noise.tensors())
    most = torch.finfo(torch.float32).max
    return form.with_tensors(
        {n: (t.double() + size * tensors[n]).clamp(-most, most).float() for n, t in form.tensors()}
    )


@quick
@given(seeds, HOSTILE, st.integers(0, 4), st.sampled_from(BY_COORDINATE))
def test_one_of_five_cannot_move_a_number_out_of_the_honest_range(seed, hostile, place, rule):
    form, honest = round_of(seed, 4, torch.float32)
    adapters = [*honest[:place], attack(form, *hostile), *honest[place:]]
    found = taken(settings(rule), adapters, form)
    kept = [dict(in_frame(upload(a), form, ALL_PARTS).adapter.tensors()) for a in honest]
    for name, tensor in result(found).tensors():
        values = torch.stack([k[name] for k in kept])
        assert bool((tensor >= values.amin(0)).all())
        assert bool((tensor <= values.amax(0)).all())
    for sent in found.uploads:  # nor what the diagnostics see
        for name, tensor in sent.adapter.tensors():
            values = torch.stack([k[name] for k in kept])
            assert bool(((tensor >= values.amin(0)) & (tensor <= values.amax(0))).all())


@quick
@given(seeds, HOSTILE, st.integers(0, 4), st.sampled_from([1, None]))
def test_krum_takes_one_of_five_only_where_it_is_as_near_as_honest_ones(seed, hostile, place, chosen):
    form, honest = round_of(seed, 4, torch.float32)
    bad = attack(form, *hostile)
    found = taken(settings("krum", chosen=chosen), [*honest[:place], bad, *honest[place:]], form)
    assert len(found.uploads) == (chosen or 2)
    if f"c{place}" not in used(found):
        return
    near2 = dense_distances2([*honest, bad])[-1, :4].min()
    widest2 = dense_distances2(honest).max()
    assert float(near2) <= 2 * float(widest2)  # n - f - 2 = 2 neighbours
    norms = change_norms([in_frame(upload(a), form, ALL_PARTS).adapter for a in [*honest, bad]], form)
    assert norms[-1] <= 2 * max(norms[:-1])


@quick
@given(seeds, st.integers(0, 4), st.sampled_from([1e2, 1e6, 1e12]))
def test_krum_does_not_take_an_honest_product_in_a_stretched_frame(seed, place, stretch):
    """(c B, A / c) is the same update, but in an average of factors it counts c times and not at all."""
    form, adapters = round_of(seed, 5, torch.float32)
    victim = adapters[place]
    layers = {n: replace(p, a=p.a / stretch, b=p.b * stretch) for n, p in victim.layers.items()}
    adapters[place] = replace(victim, layers=layers)
    assert f"c{place}" not in used(taken(settings("krum"), adapters, form))


@quick
@given(seeds, HOSTILE)
def test_under_a_bound_one_of_five_counts_no_more_than_its_weight_of_the_bound(seed, hostile):
    form, honest = round_of(seed, 4, torch.float32)
    alone = change_norms([in_frame(upload(a), form, ALL_PARTS).adapter for a in honest], form)
    found = taken(settings("norm"), [*honest, attack(form, *hostile)], form)
    assert change_norms([found.uploads[-1].adapter], form)[0] <= 2 * max(alone) * (1 + 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_hostile_client_is_seen_in_what_was_kept(rule):
    form, honest = round_of(0, 4, torch.float32)
    kept = taken(settings(rule), [*honest, attack(form, 3, 1e6)], form).kept
    assert kept["c4"] < 1e-3
    assert sum(kept[f"c{i}"] for i in range(4)) > 1.9


@pytest.mark.parametrize("rule", RULES)
def test_nothing_that_was_given_is_changed(rule):
    form, adapters = round_of(0, 5)
    taken(settings(rule), adapters, form)
    again, same = round_of(0, 5)
    assert_same(form, again)
    for one, other in zip(adapters, same, strict=True):
        assert_same(one, other)


# How many


@pytest.mark.parametrize(
    ("share", "clients", "hostile"),
    [(0.2, 5, 1), (0.2, 4, 1), (0.2, 9, 1), (0.2, 10, 2), (0.3, 10, 3), (0.07, 100, 7), (0.01, 3, 1)],
)
def test_the_hostile_are_the_share_and_one_at_least(share, clients, hostile):
    assert hostile_of(settings("krum", share=share), clients) == hostile


@pytest.mark.parametrize(("rule", "least"), [("none", 1), ("norm", 1), ("median", 5), ("trimmed", 5), ("krum", 7)])
def test_a_rule_says_how_many_uploads_it_needs_against_two(rule, least):
    assert least_uploads(settings(rule), 2) == least
    check_count(settings(rule), least, 10)
    if least > 1:
        with refused(
            f"robust.rule {rule} needs {least} uploads", "2 hostile of 10", "robust.share", f"are {least - 1}"
        ):
            check_count(settings(rule), least - 1, 10)


def test_too_few_uploads_are_refused_not_averaged():
    form, adapters = round_of(0, 4)
    uploads: list[Upload] = [in_frame(upload(a, client=str(i)), form, ALL_PARTS) for i, a in enumerate(adapters)]
    with refused("krum needs 5 uploads", "there are 4"):
        accept(settings("krum"), uploads, form, ALL_PARTS, 5)
