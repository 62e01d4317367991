"""The linear algebra of alignment, each function against a dense or brute-force formula."""

import math

import pytest
import torch
from core_helpers import quick, random_rotation, ranks, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedrot.core.linalg import (
    gauge_share,
    procrustes,
    product_norm2,
    product_singular_values,
    rotation_angle,
    soften,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eye(rank: int) -> Tensor:
    return torch.eye(rank, dtype=torch.float64)


def assert_rotation(r: Tensor) -> None:
    identity = eye(r.shape[-1]).expand(r.shape)
    assert r.dtype == torch.float64
    torch.testing.assert_close(r @ r.mT, identity, atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(r.shape[:-2], dtype=r.dtype), atol=1e-10, rtol=0)


def plane_turn(angles: list[float], rank: int, seed: int) -> Tensor:
    """A rotation by `angles` in planes that are random but orthogonal."""
    r = eye(rank)
    for i, angle in enumerate(angles):
        c, s = math.cos(angle), math.sin(angle)
        r[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    q = random_rotation(seed, rank)
    return q @ r @ q.T


@quick
@given(seeds, ranks)
def test_procrustes_is_a_rotation_even_where_the_determinant_is_negative(seed, rank):
    m = normal(seed, 4, rank, rank)
    for sign in (1.0, -1.0):
        flip = torch.cat([m[..., :-1] * sign, m[..., -1:]], dim=-1)
        assert_rotation(procrustes(flip))


@quick
@given(seeds, ranks)
def test_procrustes_is_not_beaten_by_the_identity_or_any_random_rotation(seed, rank):
    a, a_ref = normal(seed, rank, 9), normal(seed + 1, rank, 9)
    best = (procrustes(a @ a_ref.T).T @ a - a_ref).norm()
    rivals = [eye(rank), *(random_rotation(seed + k, rank) for k in range(20))]
    assert all(best <= (r.T @ a - a_ref).norm() + 1e-12 for r in rivals)


@pytest.mark.parametrize("seed", range(8))
def test_procrustes_in_the_plane_matches_a_search_over_all_angles(seed):
    m = normal(seed, 2, 2)
    angle = torch.linspace(-math.pi, math.pi, 20001, dtype=torch.float64)
    gains = angle.cos() * (m[0, 0] + m[1, 1]) + angle.sin() * (m[1, 0] - m[0, 1])  # tr(R^T M)
    assert float((procrustes(m) * m).sum()) == pytest.approx(float(gains.max()), rel=1e-6)


@quick
@given(seeds, ranks)
def test_procrustes_finds_the_frame_that_a_reference_was_turned_by(seed, rank):
    a_ref, q = normal(seed, rank, 16), random_rotation(seed + 1, rank)
    torch.testing.assert_close(procrustes((q @ a_ref) @ a_ref.T), q, atol=1e-8, rtol=0)


def test_procrustes_treats_every_matrix_of_a_batch_on_its_own():
    m = normal(0, 2, 3, 4, 4)
    m[0, 1] = 0.0  # one without any information must not disturb its neighbours
    one_by_one = torch.stack([torch.stack([procrustes(x) for x in row]) for row in m])
    torch.testing.assert_close(procrustes(m), one_by_one, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_procrustes_works_in_double_precision_whatever_comes_in(dtype):
    assert_rotation(procrustes(normal(0, 5, 5).to(dtype)))


@pytest.mark.parametrize("rank", range(1, 7))
def test_procrustes_of_nothing_is_the_identity(rank):
    torch.testing.assert_close(procrustes(torch.zeros(rank, rank)), eye(rank), atol=1e-12, rtol=0)
    noisy = 1e-9 * normal(rank, rank, rank)
    torch.testing.assert_close(procrustes(noisy, noise=1e-7), eye(rank), atol=1e-12, rtol=0)


@quick
@given(seeds, st.integers(2, 6))
def test_rounding_noise_does_not_turn_the_null_space(seed, rank):
    u = normal(seed, rank, 1)
    m = u @ u.T / u.square().sum() + 1e-8 * normal(seed + 1, rank, rank)
    noise = torch.tensor(1e-8 * 10 * rank, dtype=torch.float64)
    assert (procrustes(m, noise) - eye(rank)).norm() < 1e-6


def test_without_the_noise_level_rounding_noise_would_turn_the_null_space():
    u = normal(0, 4, 1)
    m = u @ u.T / u.square().sum() + 1e-8 * normal(1, 4, 4)
    assert (procrustes(m) - eye(4)).norm() > 0.5


@pytest.mark.parametrize("seed", range(6))
def test_in_the_null_space_the_choice_nearest_to_the_identity_is_taken(seed):
    u, v = (normal(seed + k, 3, 1) for k in (0, 10))
    u, v = u / u.norm(), v / v.norm()
    r = procrustes(u @ v.T)
    torch.testing.assert_close(r @ v, u, atol=1e-10, rtol=0)  # the data's one direction is matched
    # Every rotation that matches it is r turned about u; none of them has a larger trace.
    cross = torch.linalg.cross(eye(3), u.T.expand(3, 3)).T
    turns = [torch.linalg.matrix_exp(angle * cross) @ r for angle in torch.linspace(-3.14, 3.14, 629).tolist()]
    assert all(float((t @ v - u).norm()) < 1e-8 for t in turns)
    assert float(r.trace()) >= max(float(t.trace()) for t in turns) - 1e-9


@quick
@given(seeds, ranks)
def test_softening_by_0_gives_the_identity_and_by_1_the_rotation_exactly(seed, rank):
    r = random_rotation(seed, rank)
    assert torch.equal(soften(r, 0.0), eye(rank))
    assert torch.equal(soften(r, 1.0), r)


@quick
@given(st.floats(-3.1, 3.1), st.floats(0.0, 1.0))
def test_softening_in_the_plane_takes_the_angle_of_the_mixture(angle, strength):
    soft = soften(plane_turn([angle], 2, 0), strength)
    expected = math.atan2(strength * math.sin(angle), 1 - strength + strength * math.cos(angle))
    torch.testing.assert_close(soft, plane_turn([expected], 2, 0), atol=1e-8, rtol=0)


@quick
@given(seeds, ranks, st.floats(0.0, 1.0))
def test_a_soft_rotation_stays_within_twice_its_strength(seed, rank, strength):
    r = random_rotation(seed, rank)
    soft = soften(r, strength)
    assert_rotation(soft)
    assert (soft - eye(rank)).norm() <= 2 * strength * (r - eye(rank)).norm() + 1e-10


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_half_of_a_half_turn_leaves_that_plane_alone(rank):
    angles = [math.pi] if rank < 4 else [math.pi, 0.8]
    soft = soften(plane_turn(angles, rank, seed=3), 0.5)
    assert_rotation(soft)
    rest = plane_turn([0.0] if rank < 4 else [0.0, 0.4], rank, seed=3)
    torch.testing.assert_close(soft, rest, atol=1e-6, rtol=0)


def test_softening_a_batch_is_softening_each():
    r = torch.stack([random_rotation(k, 4) for k in range(6)]).unflatten(0, (2, 3))
    one_by_one = torch.stack([torch.stack([soften(x, 0.3) for x in row]) for row in r])
    torch.testing.assert_close(soften(r, 0.3), one_by_one, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("rank", "angles"), [(2, [0.7]), (3, [2.5]), (4, [0.3, 1.2]), (5, [3.0, 0.1]), (4, [0, 0])])
def test_the_angle_of_a_rotation_is_that_of_its_most_turned_plane(rank, angles):
    assert float(rotation_angle(plane_turn(angles, rank, seed=1))) == pytest.approx(max(angles), abs=1e-7)


def test_a_rank_one_rotation_has_no_angle():
    assert float(rotation_angle(torch.ones(1, 1))) == 0.0


@quick
@given(seeds, st.integers(1, 20))
def test_product_norm_and_singular_values_are_the_dense_product_s(seed, k):
    b, a = normal(seed, 2, 9, k), normal(seed + 1, 2, k, 7)
    dense = b @ a
    torch.testing.assert_close(product_norm2(b, a), dense.square().sum((-2, -1)))
    values = torch.linalg.svdvals(dense)
    found = product_singular_values(b, a)
    assert found.shape[-1] == min(k, 9, 7)
    torch.testing.assert_close(found, values[..., : min(k, 7)], atol=1e-10, rtol=1e-10)


def test_a_product_of_nothing_has_norm_zero_and_never_less():
    b, a = normal(0, 50, 5, 2), normal(1, 50, 1, 6)
    cancelling = product_norm2(torch.cat([b, -b.sum(-1, keepdim=True)], -1), a.expand(50, 3, 6))
    assert bool((cancelling >= 0.0).all())  # rounding alone puts some of them below
    assert bool((cancelling < 1e-12).all())
    assert float(product_norm2(torch.zeros(5, 1), a[0])) == 0.0


def test_singular_values_far_below_the_largest_are_not_lost():
    u, v = torch.linalg.qr(normal(0, 9, 3))[0], torch.linalg.qr(normal(1, 7, 3))[0]
    sizes = torch.tensor([1.0, 1e-5, 1e-11], dtype=torch.float64)
    torch.testing.assert_close(product_singular_values(u * sizes, v.T), sizes, rtol=1e-4, atol=0)


def dense_gauge(a: Tensor, b: Tensor, a_ref: Tensor, b_ref: Tensor) -> tuple[float, float]:
    """Least-squares projection of the move onto all tangents (-K A_ref, B_ref K) of the gauge orbit."""
    rank = a.shape[0]
    tangents = [torch.zeros(a.numel() + b.numel(), dtype=torch.float64)]
    for i in range(rank):
        for j in range(i):
            k = torch.zeros(rank, rank, dtype=torch.float64)
            k[i, j], k[j, i] = 1.0, -1.0
            tangents.append(torch.cat([(-k @ a_ref).flatten(), (b_ref @ k).flatten()]))
    basis = torch.stack(tangents, -1)
    move = torch.cat([(a - a_ref).flatten(), (b - b_ref).flatten()])
    along = basis @ torch.linalg.pinv(basis, rtol=1e-10) @ move
    return float(along.square().sum()), float(move.square().sum())


@quick
@given(seeds, ranks, st.sampled_from(["both", "zero B", "rank one A", "nothing"]))
def test_the_gauge_share_is_the_projection_onto_the_tangents_of_the_orbit(seed, rank, kind):
    a_ref, b_ref = normal(seed, rank, 8), normal(seed + 1, 5, rank)
    if kind in ("zero B", "rank one A", "nothing"):
        b_ref = torch.zeros_like(b_ref)
    if kind == "rank one A":
        a_ref = a_ref[:, :1] @ a_ref[:1]
    if kind == "nothing":
        a_ref = torch.zeros_like(a_ref)
    a, b = a_ref + 0.4 * normal(seed + 2, rank, 8), b_ref + 0.4 * normal(seed + 3, 5, rank)
    gauge, move = gauge_share(a, b, a_ref, b_ref)
    expected_gauge, expected_move = dense_gauge(a, b, a_ref, b_ref)
    assert float(gauge) == pytest.approx(expected_gauge, rel=1e-7, abs=1e-10)
    assert float(move) == pytest.approx(expected_move, rel=1e-10)


def test_a_small_turn_of_the_frame_is_all_gauge_and_a_gradient_step_none():
    a, b = normal(0, 4, 9), normal(1, 6, 4)
    turn = plane_turn([1e-5, 2e-5], 4, seed=0)
    gauge, move = gauge_share(turn.T @ a, b @ turn, a, b)
    assert float(gauge / move) == pytest.approx(1.0, abs=1e-6)
    gradient = normal(2, 6, 9)  # of the loss by B A
    gauge, move = gauge_share(a - 0.1 * b.T @ gradient, b - 0.1 * gradient @ a.T, a, b)
    assert float(gauge / move) < 1e-25
