"""The leading singular triples of a product of factors, by either way of computing them, against a dense SVD."""

import pytest
import torch
from core_helpers import quick, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedrot.core import linalg
from fedrot.core.linalg import low_rank

sizes = st.integers(1, 14)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum(kind: str, d_out: int, d_in: int, k: int) -> tuple[Tensor, Tensor]:
    """Factors of a product whose singular values fall as `kind` says."""
    b, a = normal(0, d_out, k), normal(1, k, d_in)
    if kind == "flat":
        return b, a
    if kind == "falling":
        return b * torch.logspace(0, -4, k, dtype=torch.float64), a
    if kind == "common":  # what clients that share most of an update stack up to
        count = k // 4
        near, far = normal(2, d_out, 4), normal(3, 4, d_in)
        return (
            torch.cat([near + 0.3 * normal(10 + i, d_out, 4) for i in range(count)], 1) / count,
            torch.cat([far + 0.3 * normal(10**6 + i, 4, d_in) for i in range(count)]),
        )
    assert kind == "of rank three"
    return normal(4, d_out, 3) @ normal(5, 3, k), a


def assert_triples(b: Tensor, a: Tensor, rank: int, of_best: float, values: float) -> None:
    """Orthonormal U and V^T; U S V^T is within `of_best` of the best error, S within `values` of the largest one."""
    u, s, vh = low_rank(b, a, rank)
    dense_s = torch.linalg.svdvals(b @ a)
    q = min(rank, *dense_s.shape[-1:])
    assert (u.shape[-1], s.shape[-1], vh.shape[-2]) == (q, q, q)
    eye = torch.eye(q, dtype=torch.float64)
    assert float((u.mT @ u - eye).abs().max()) < 1e-10
    assert float((vh @ vh.mT - eye).abs().max()) < 1e-10
    assert bool((s[..., :-1] >= s[..., 1:] - 1e-12).all())
    largest = dense_s[..., 0].amax().clamp_min(1e-300)
    assert float((s - dense_s[..., :q]).abs().max()) <= values * float(largest)
    best = dense_s[..., q:].norm(dim=-1)
    error = (b @ a - u @ torch.diag_embed(s) @ vh).norm(dim=(-2, -1))
    assert bool((error <= best * (1 + of_best) + 1e-11 * largest).all())


@quick
@given(seeds, sizes, sizes, st.integers(1, 20), st.integers(1, 6))
def test_small_products_are_the_dense_svd_s(seed: int, d_out: int, d_in: int, k: int, rank: int) -> None:
    b, a = normal(seed, 2, d_out, k), normal(seed + 1, 2, k, d_in)
    q = min(rank, d_out, d_in)
    u, s, vh = low_rank(b, a, rank)
    assert s.shape[-1] == min(q, k)
    dense_u, dense_s, dense_vh = torch.linalg.svd(b @ a, full_matrices=False)
    torch.testing.assert_close(s, dense_s[..., : s.shape[-1]], rtol=1e-9, atol=1e-10)
    best = dense_u[..., :q] @ torch.diag_embed(dense_s[..., :q]) @ dense_vh[..., :q, :]
    found = u @ torch.diag_embed(s) @ vh
    tail = dense_s[..., q:].norm(dim=-1)
    torch.testing.assert_close((b @ a - found).norm(dim=(-2, -1)), tail, rtol=1e-8, atol=1e-9)
    gap = dense_s[..., q - 1] - (dense_s[..., q] if dense_s.shape[-1] > q else 0.0)
    if bool((gap > 1e-3 * dense_s[..., 0]).all()):  # else the best one is not the only one
        torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["flat", "falling", "common", "of rank three"])
@pytest.mark.parametrize(("d_out", "d_in", "k"), [(60, 50, 80), (50, 60, 32), (60, 50, 25), (120, 150, 100)])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_exact_way_is_as_exact_as_a_dense_svd(kind: str, d_out: int, d_in: int, k: int, rank: int) -> None:
    assert_triples(*spectrum(kind, d_out, d_in, k), rank, of_best=1e-9, values=1e-12)


@pytest.mark.parametrize(
    ("kind", "of_best"), [("flat", 1e-3), ("falling", 1e-4), ("common", 1e-3), ("of rank three", 0)]
)
@pytest.mark.parametrize(("d_out", "d_in", "k"), [(60, 50, 80), (120, 150, 100), (300, 260, 400)])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_sketch_is_next_to_a_dense_svd(
    kind: str, of_best: float, d_out: int, d_in: int, k: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "_SMALL", 1)
    assert_triples(*spectrum(kind, d_out, d_in, k), rank, of_best, values=0.02 if kind == "flat" else 1e-3)


def test_where_the_spectrum_has_a_gap_the_sketch_is_exact_to_a_millionth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "_SMALL", 1)
    b, a = spectrum("common", 300, 260, 400)
    assert_triples(b, a, 4, of_best=1e-6, values=1e-6)
    values = torch.linalg.svdvals(b @ a)
    assert float(values[3] / values[4]) > 2
    assert float(values[4:].norm() / values.norm()) > 5e-3  # and there is an error to be near to


def test_which_way_is_taken_depends_on_size_and_inner_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "_SMALL", 20)
    sketched: list[int] = []
    original = torch.randn

    def counted(*args: int, **kwargs: object) -> Tensor:
        sketched.append(args[1])
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "randn", counted)
    shapes = {(20, 40, 90): 0, (40, 20, 90): 0, (40, 30, 15): 0, (40, 30, 16): 1, (30, 40, 16): 1}
    for (d_out, d_in, k), times in shapes.items():
        sketched.clear()
        low_rank(torch.ones(d_out, k), torch.ones(k, d_in), 2)
        assert len(sketched) == times, (d_out, d_in, k)


@pytest.mark.parametrize("small", [1, 1024])
def test_a_batch_is_each_on_its_own_and_a_product_of_nothing_is_zeros(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "_SMALL", small)
    b, a = normal(0, 3, 40, 30), normal(1, 3, 30, 50)
    b[1] = 0.0
    u, s, vh = low_rank(b, a, 5)
    assert not bool(s[1].any())
    assert all(bool(torch.isfinite(t).all()) for t in (u, s, vh))
    for i in (0, 2):
        alone_u, alone_s, alone_vh = low_rank(b[i], a[i], 5)
        torch.testing.assert_close(s[i], alone_s, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(
            u[i] @ torch.diag(s[i]) @ vh[i], alone_u @ torch.diag(alone_s) @ alone_vh, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("small", [1, 1024])
def test_the_same_product_gives_the_same_bits_and_no_global_randomness_is_used(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "_SMALL", small)
    b, a = normal(0, 40, 30), normal(1, 30, 50)
    before = torch.random.get_rng_state()
    one, two = low_rank(b, a, 5), low_rank(b, a, 5)
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_singular_values_far_below_the_largest_are_not_lost() -> None:
    u, v = torch.linalg.qr(normal(0, 40, 3))[0], torch.linalg.qr(normal(1, 30, 3))[0]
    values = torch.tensor([1.0, 1e-6, 1e-11], dtype=torch.float64)
    torch.testing.assert_close(low_rank(u * values, v.T, 3)[1], values, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_comes_in_the_work_is_done_in_double_precision(dtype: torch.dtype) -> None:
    b, a = normal(0, 20, 6).to(dtype), normal(1, 6, 15).to(dtype)
    u, s, vh = low_rank(b, a, 6)
    assert {t.dtype for t in (u, s, vh)} == {torch.float64}
    torch.testing.assert_close(u @ torch.diag(s) @ vh, b.double() @ a.double())
