"""The ways to align beside the paper's: both factors at once, turns as far as the data say, and strength by itself."""

import pytest
import torch
from core_helpers import (
    SHAPES,
    assert_close,
    assert_same,
    distance,
    make_adapter,
    moved,
    quick,
    random_rotation,
    random_rotations,
    ranks,
    refused,
    seeds,
    turned,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedrot import align
from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.alignment import find_rotations, worth_turning
from fedrot.core.linalg import procrustes, regularised, soften

strengths = st.floats(0.02, 0.98)
some_factor = st.sampled_from(["A", "B", "joint"])
softenings = pytest.mark.parametrize("softening", ["linear", "regularised"])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(rotation: Tensor, seed: int, size: float) -> Tensor:
    """A rotation a little away from this one."""
    k = size * normal(seed, *rotation.shape)
    return rotation @ torch.linalg.matrix_exp(k - k.T)


def rivals(rotation: Tensor, seed: int) -> list[Tensor]:
    """No turn, random turns, and turns nearby at several distances."""
    rank = len(rotation)
    anywhere = [random_rotation(seed + k, rank) for k in range(12)]
    nearby = [near(rotation, seed + k, size) for k in range(6) for size in (1e-4, 1e-2, 0.3)]
    return [torch.eye(rank, dtype=torch.float64), *anywhere, *nearby]


def joint_objective(mine: LoraPair, ref: LoraPair, rotation: Tensor) -> float:
    """Both squared distances after the turn, each over its mean square before it."""
    return sum(
        float((x - y).square().sum() / (before - y).square().mean())
        for x, before, y in ((rotation.T @ mine.a, mine.a, ref.a), (mine.b @ rotation, mine.b, ref.b))
    )


def joint_distance2(mine: LoraPair, ref: LoraPair) -> float:
    return float((mine.a - ref.a).square().sum() + (mine.b - ref.b).square().sum())


@quick
@given(seeds, ranks, st.sampled_from([0.1, 0.5, 3.0]), st.sampled_from([1e-3, 1.0, 1e3]))
def test_joint_minimises_both_distances_each_over_its_mean_square(
    seed: int, rank: int, size: float, b_larger: float
) -> None:
    reference = make_adapter(seed, rank, dtype=torch.float64)
    client = moved(turned(reference, random_rotations(seed + 7, reference)), seed + 1, size)
    pairs = [{n: LoraPair(p.a, b_larger * p.b, p.scale) for n, p in one.layers.items()} for one in (client, reference)]
    mine, ref = Adapter(pairs[0]), Adapter(pairs[1])
    for name, rotation in find_rotations(mine, ref, "joint", 1.0).items():
        best = joint_objective(mine.layers[name], ref.layers[name], rotation)
        for rival in rivals(rotation, seed):
            assert best <= joint_objective(mine.layers[name], ref.layers[name], rival) * (1 + 1e-9)


@quick
@given(seeds, st.integers(2, 6), st.sampled_from([1e-6, 1.0, 1e6]))
def test_joint_does_not_depend_on_how_an_update_is_split_between_the_factors(
    seed: int, rank: int, ratio: float
) -> None:
    reference = make_adapter(seed, rank, dtype=torch.float64)
    client = moved(reference, seed + 1, 0.5)
    usual = find_rotations(client, reference, "joint", 1.0)

    def split(one: Adapter) -> Adapter:
        return Adapter({n: LoraPair(p.a * ratio, p.b / ratio, p.scale) for n, p in one.layers.items()})

    for name, rotation in find_rotations(split(client), split(reference), "joint", 1.0).items():
        assert distance(rotation, usual[name]) < 1e-7


def test_joint_undoes_a_turned_frame_and_is_between_what_either_factor_asks_for() -> None:
    reference = make_adapter(0, 4, dtype=torch.float64)
    copy = turned(reference, random_rotations(5, reference))
    for name, pair in align(copy, reference, "joint", 1.0).layers.items():
        assert distance(pair.a, reference.layers[name].a) < 1e-7
        assert distance(pair.b, reference.layers[name].b) < 1e-7


@pytest.mark.parametrize("still", ["a", "b"])
def test_a_factor_that_did_not_move_at_all_holds_the_frame(still: str) -> None:
    reference = make_adapter(0, 3)
    after = dict(moved(reference, 1, 0.5).tensors())
    client = reference.with_tensors({n: t if n.endswith(f"/{still}") else after[n] for n, t in reference.tensors()})
    for rotation in find_rotations(client, reference, "joint", 1.0).values():
        assert distance(rotation, torch.eye(3)) < 1e-5
    for rotation in find_rotations(reference, reference, "joint", 1.0).values():
        assert distance(rotation, torch.eye(3)) < 1e-5


@quick
@given(seeds, ranks, strengths)
def test_the_regularised_turn_minimises_distance_and_turn_together(seed: int, rank: int, strength: float) -> None:
    """||R^T A - A_ref||^2 + mu ||R - I||^2, mu = (1 - strength) / strength times m's mean singular value."""
    a, a_ref = normal(seed, rank, 9), normal(seed + 1, rank, 9)
    m = a @ a_ref.T
    mu = (1 - strength) / strength * float(torch.linalg.svdvals(m).mean())
    eye = torch.eye(rank, dtype=torch.float64)

    def objective(r: Tensor) -> float:
        return float((r.T @ a - a_ref).square().sum() + mu * (r - eye).square().sum())

    found = regularised(m, strength)
    assert distance(found @ found.T, eye) < 1e-10
    assert float(torch.linalg.det(found)) == pytest.approx(1.0)
    assert all(objective(found) <= objective(r) + 1e-9 * (1 + mu) for r in rivals(found, seed))


@quick
@given(seeds, ranks)
def test_the_regularised_turn_is_none_at_strength_0_and_procrustes_at_1(seed: int, rank: int) -> None:
    m = normal(seed, 3, rank, rank)
    assert torch.equal(regularised(m, 0.0), torch.eye(rank, dtype=torch.float64).expand(3, rank, rank))
    torch.testing.assert_close(regularised(m, 1.0), procrustes(m))
    torch.testing.assert_close(regularised(m, 1 - 1e-9), procrustes(m), atol=1e-5, rtol=0)
    torch.testing.assert_close(regularised(m, 1e-9), torch.eye(rank).double().expand(3, rank, rank), atol=1e-6, rtol=0)


@quick
@given(seeds, ranks, strengths, st.floats(1e-6, 1e6))
def test_the_regularised_turn_does_not_depend_on_the_size_of_the_factors(
    seed: int, rank: int, strength: float, size: float
) -> None:
    m = normal(seed, rank, rank)
    torch.testing.assert_close(regularised(size * m, strength), regularised(m, strength), atol=1e-8, rtol=0)


def test_each_direction_turns_only_as_far_as_the_data_say() -> None:
    """Two planes turned alike, one known a thousand times better: linear turns both alike, regularised does not."""

    def plane(angle: float) -> Tensor:
        c, s = torch.tensor(angle).double().cos(), torch.tensor(angle).double().sin()
        return torch.stack([torch.stack([c, -s]), torch.stack([s, c])])

    m = torch.block_diag(1000 * plane(1.0), plane(1.0))
    turn = regularised(m, 0.5)
    known, unknown = (torch.atan2(t[1, 0], t[0, 0]) for t in (turn[:2, :2], turn[2:, 2:]))
    linear = soften(procrustes(m), 0.5)
    assert distance(linear[:2, :2], linear[2:, 2:]) < 1e-12
    assert float(known) > 0.6
    assert float(unknown) < 0.01
    assert distance(turn[:2, 2:], torch.zeros(2, 2)) < 1e-12


def test_a_regularised_batch_is_each_on_its_own_and_no_data_is_no_turn() -> None:
    m = normal(0, 5, 4, 4)
    m[2] = 0
    one_by_one = torch.stack([regularised(x, 0.3) for x in m])
    torch.testing.assert_close(regularised(m, 0.3), one_by_one)
    torch.testing.assert_close(one_by_one[2], torch.eye(4, dtype=torch.float64))
    noisy = regularised(1e-9 * m, 1.0, noise=1e-7)
    torch.testing.assert_close(noisy, torch.eye(4, dtype=torch.float64).expand(5, 4, 4))


@softenings
@quick
@given(seed=seeds, rank=ranks, factor=some_factor)
def test_either_softening_goes_from_no_turn_at_strength_0_to_the_full_one(
    softening: str, seed: int, rank: int, factor: str
) -> None:
    adapter, reference = (make_adapter(seed + k, rank, dtype=torch.float64) for k in (0, 1))
    assert_same(align(adapter, reference, factor, 0.0, softening=softening), adapter)
    full = find_rotations(adapter, reference, factor, 1.0, softening)
    for name, rotation in find_rotations(adapter, reference, factor, 1.0).items():
        assert distance(rotation, full[name]) < 1e-10


@softenings
@quick
@given(seed=seeds, rank=st.integers(2, 6), factor=some_factor, strength=st.one_of(st.just("auto"), st.floats(0, 1)))
def test_every_choice_is_a_rotation_of_every_layer(
    softening: str, seed: int, rank: int, factor: str, strength: float
) -> None:
    adapter, reference = make_adapter(seed, rank), moved(make_adapter(seed, rank), seed + 1, 0.4)
    for guard in (False, True):
        found = find_rotations(adapter, reference, factor, strength, softening, guard)
        assert found.keys() == SHAPES.keys()
        for r in found.values():
            assert r.dtype == torch.float64
            assert distance(r @ r.T, torch.eye(rank)) < 1e-10
            assert float(torch.linalg.det(r)) == pytest.approx(1.0, abs=1e-9)


def shares(rotation: Tensor, mine: LoraPair, ref: LoraPair) -> float:
    """By which share the squared distance of both factors falls, plain or over each one's residual: the lesser."""
    after = LoraPair(rotation.T @ mine.a, mine.b @ rotation, 1.0)
    plain = 1 - joint_distance2(after, ref) / joint_distance2(mine, ref)
    residual = [float((x - y).square().mean()) for x, y in ((mine.a, ref.a), (mine.b, ref.b))]
    left, before = (
        sum(float((x - y).square().sum()) / r for (x, y), r in zip(((p.a, ref.a), (p.b, ref.b)), residual, strict=True))
        for p in (after, mine)
    )
    return min(plain, 1 - left / before)


@quick
@given(seeds, ranks)
def test_what_turning_is_worth_is_the_lesser_fall_of_both_distances(seed: int, rank: int) -> None:
    adapter, reference = (make_adapter(seed + k, rank, dtype=torch.float64) for k in (0, 1))
    rotations = random_rotations(seed + 3, adapter)
    for name, mine in adapter.layers.items():
        ref = reference.layers[name]
        given_ones = (mine.a[None], mine.b[None], ref.a[None], ref.b[None], 1e-16)
        found = worth_turning(rotations[name][None], *given_ones)
        assert float(found) == pytest.approx(shares(rotations[name], mine, ref), rel=1e-8, abs=1e-8)
        assert float(worth_turning(torch.eye(rank).double()[None], *given_ones)) == 0.0


@softenings
@quick
@given(seed=seeds, rank=ranks, factor=some_factor, size=st.sampled_from([0.01, 0.3, 2.0]))
def test_auto_never_takes_both_factors_farther_away_and_no_strength_brings_them_nearer(
    softening: str, seed: int, rank: int, factor: str, size: float
) -> None:
    reference = make_adapter(seed, rank, dtype=torch.float64)
    client = moved(turned(reference, random_rotations(seed + 7, reference)), seed + 1, size)
    found = find_rotations(client, reference, factor, "auto", softening)
    tried = [find_rotations(client, reference, factor, s, softening) for s in (0.25, 0.5, 0.75, 1.0)]
    for name, ref in reference.layers.items():
        mine = client.layers[name]
        others = [shares(one[name], mine, ref) for one in tried]
        least = 0.5 * (rank - 1) / (2 * (mine.a.shape[1] + mine.b.shape[0]))
        if distance(found[name], torch.eye(rank)) > 0:
            assert shares(found[name], mine, ref) >= max(others) - 1e-9
            assert shares(found[name], mine, ref) > least  # under the guard: more than half of what noise would bring
        else:
            assert max(others) <= least + 1e-9


def test_auto_turns_own_frames_back_all_the_way_and_leaves_a_copy_alone() -> None:
    reference = make_adapter(0, 4, dtype=torch.float64)
    copy = turned(reference, random_rotations(5, reference))
    for factor in ("A", "B", "joint"):
        for name, pair in align(copy, reference, factor, "auto").layers.items():
            assert distance(pair.a, reference.layers[name].a) < 1e-7
        assert_close(align(reference, reference, factor, "auto"), reference, rel=1e-12)


def test_auto_and_guard_decide_layer_by_layer() -> None:
    reference = make_adapter(0, 4, dtype=torch.float64)
    own_frame = random_rotations(5, reference)
    eye = torch.eye(4, dtype=torch.float64)
    frames = {n: own_frame[n] if n in ("enc.0.query", "enc.0.out") else eye for n in SHAPES}
    pulled = replace_b_by_gradient(reference)
    client = turned(pulled, frames)
    for strength in (0.5, 1.0, "auto"):
        found = find_rotations(client, reference, "A", strength, guard=True)
        assert {name for name, r in found.items() if distance(r, eye) > 1e-9} == {"enc.0.query", "enc.0.out"}
    without = find_rotations(client, reference, "A", 1.0)
    assert all(distance(r, eye) > 1e-3 for r in without.values())


def replace_b_by_gradient(adapter: Adapter) -> Adapter:
    """A step of plain gradient descent on both factors: orthogonal to every turn of the frame."""
    layers = {}
    for i, (name, pair) in enumerate(adapter.layers.items()):
        gradient = normal(i, pair.b.shape[0], pair.a.shape[1])
        layers[name] = LoraPair(pair.a - 0.05 * pair.b.T @ gradient, pair.b - 0.05 * gradient @ pair.a.T, pair.scale)
    return Adapter(layers, adapter.head)


@pytest.mark.parametrize("guard", [False, True])
def test_rank_one_has_nothing_to_turn_by_any_choice(guard: bool) -> None:
    adapter, reference = make_adapter(0, rank=1), make_adapter(1, rank=1)
    for factor in ("A", "B", "joint"):
        for strength in (0.4, 1.0, "auto"):
            for softening in ("linear", "regularised"):
                assert_same(align(adapter, reference, factor, strength, False, softening, guard), adapter)


@pytest.mark.parametrize("softening", ["hard", "", None])
def test_an_unknown_softening_is_refused_with_the_choices(softening: str | None) -> None:
    with refused("softening", repr(softening), "linear or regularised"):
        align(make_adapter(0), make_adapter(1), softening=softening)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("guard", "yes", "true or false"),
        ("keep_dtype", 1, "true or false"),
        ("strength", True, "a number or auto"),
        ("strength", "much", "a number or auto"),
    ],
)
def test_an_argument_of_another_type_is_refused_by_its_name(key: str, value: object, kind: str) -> None:
    with refused(f"{key} must be {kind}, got {value!r}"):
        align(make_adapter(0), make_adapter(1), **{key: value})


@pytest.mark.parametrize("factor", ["A", "B", "joint"])
def test_the_guard_asks_for_more_than_half_of_what_noise_alone_would_bring(factor: str) -> None:
    """A turn that brings less than (r - 1) / (4 (d_in + d_out)) of the squared distance is not made, one above is."""
    reference = make_adapter(0, 4, shapes={"q": (24, 20)}, dtype=torch.float64)
    k = 0.02 * normal(3, 4, 4)
    small_turn = {"q": torch.linalg.matrix_exp(k - k.T)}
    pair = reference.layers["q"]
    # Moves that no turn can undo: outside of A's row space and of B's column space.
    rows, columns = torch.linalg.qr(pair.a.T)[0], torch.linalg.qr(pair.b)[0]
    off_a, off_b = normal(5, 4, 24), normal(6, 20, 4)
    off_a, off_b = off_a - off_a @ rows @ rows.T, off_b - columns @ columns.T @ off_b
    decided = []
    for size in (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0):
        away = Adapter({"q": LoraPair(pair.a + size * off_a, pair.b + size * off_b, pair.scale)})
        client = turned(away, small_turn)
        free, guarded = (find_rotations(client, reference, factor, 1.0, guard=g)["q"] for g in (False, True))
        mine, ref = client.layers["q"], reference.layers["q"]
        before = joint_distance2(mine, ref)
        gain = before - joint_distance2(LoraPair(free.T @ mine.a, mine.b @ free, 1.0), ref)
        worth = gain > 3 / (4 * 44) * before
        assert distance(guarded, free if worth else torch.eye(4)) < 1e-12
        assert gain > 0
        decided.append(worth)
    assert set(decided) == {False, True}
