"""The linear algebra of aligned averaging: pure functions on batches of small matrices.

Every function takes leading batch dimensions `...`. Rotations are computed in float64: they are r x r, so it costs
nothing, and a rotation that is only orthogonal to half precision would keep B A only to half precision.
"""

import torch
from torch import Tensor


def procrustes(
    m: Tensor,  # (..., r, r) correlation, e.g. A_i A_ref^T
    noise: Tensor | float = 0.0,  # (...) absolute level below which a singular value of m is rounding noise
) -> Tensor:  # (..., r, r)
    """The rotation R in SO(r) that maximises tr(R^T m), which solves min ||R^T A_i - A_ref|| for m = A_i A_ref^T.

    With m = U S V^T, R = U diag(1, ..., 1, det(U V^T)) V^T (paper, section on Procrustes; Umeyama 1991 for the sign).
    Where m has singular values at or below `noise`, every choice fits the data equally well there; R then takes, in
    that null space, the choice nearest to the identity instead of whatever rounding left in m. m = 0 gives I.
    """
    m = m.double()
    u, s, vh = torch.linalg.svd(m)
    floor = torch.as_tensor(noise, dtype=s.dtype, device=s.device).expand(s.shape[:-1])[..., None]
    null = s <= torch.maximum(floor, s[..., :1] * s.shape[-1] * torch.finfo(s.dtype).eps)
    if bool(null.any()):
        # In the null space m says nothing, so the identity's own correlation (u_k . v_l) stands in, scaled below every
        # singular value that is kept, so that it decides there and nowhere else.
        kept = torch.where(null, torch.inf, s).amin(-1, keepdim=True)
        weight = torch.where(torch.isinf(kept), torch.ones_like(kept), 0.5 * kept)
        both = null[..., :, None] & null[..., None, :]
        inner = (u.mT @ vh.mT) * both * weight[..., None] + torch.diag_embed(torch.where(null, 0.0, s))
        u2, _, vh2 = torch.linalg.svd(inner)
        u, vh = u @ u2, vh2 @ vh
    sign = torch.linalg.det(u @ vh).sign()
    u = torch.cat([u[..., :-1], u[..., -1:] * sign[..., None, None]], dim=-1)
    return u @ vh


def soften(
    rotation: Tensor,  # (..., r, r) in SO(r)
    strength: float,
) -> Tensor:  # (..., r, r)
    """The rotation nearest to (1 - strength) I + strength R: the paper's soft rotation of strength lambda in [0, 1].

    0 gives I and 1 gives R, both exactly. Where R turns by pi and strength is 1/2 the mixture is singular; the plane
    in question is then not turned at all.
    """
    eye = torch.eye(rotation.shape[-1], dtype=torch.float64, device=rotation.device)
    if strength == 0.0:
        return eye.expand(rotation.shape).clone()
    if strength == 1.0:
        return rotation.double()
    return procrustes((1.0 - strength) * eye + strength * rotation.double(), noise=1e-12)


def regularised(
    m: Tensor,  # (..., r, r) correlation
    strength: float,
    noise: Tensor | float = 0.0,  # (...) as in `procrustes`
) -> Tensor:  # (..., r, r)
    """The minimiser over SO(r) of ||R^T A_i - A_ref||^2 + mu ||R - I||^2, for m = A_i A_ref^T: another soft rotation.

    Its solution is the rotation nearest to m + mu I, mu = (1 - strength) / strength times m's mean singular value:
    strength 0 gives I and 1 the rotation of `procrustes`. Each direction turns only as far as the data say.
    """
    m = m.double()
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    if strength == 0.0:
        return eye.expand(m.shape).clone()
    if strength == 1.0:
        return procrustes(m, noise)
    size = torch.linalg.svdvals(m).mean(-1)
    size = torch.where(size > 0, size, torch.ones_like(size))
    level = torch.as_tensor(noise, dtype=m.dtype, device=m.device) / size
    return procrustes(strength * m / size[..., None, None] + (1.0 - strength) * eye, strength * level)


def rotation_angle(
    rotation: Tensor,  # (..., r, r) in SO(r)
) -> Tensor:  # (...) radians in [0, pi]
    """The largest angle by which the rotation turns any plane."""
    return torch.linalg.eigvals(rotation.double()).angle().abs().amax(-1)


def product_norm2(
    b: Tensor,  # (..., d_out, k)
    a: Tensor,  # (..., k, d_in)
) -> Tensor:  # (...)
    """||B A||_F^2 = tr((B^T B)(A A^T)) in float64, clamped at 0, without forming the (d_out, d_in) product."""
    b, a = b.double(), a.double()
    return ((b.mT @ b) * (a @ a.mT)).sum((-2, -1)).clamp_min(0.0)


def product_singular_values(
    b: Tensor,  # (..., d_out, k)
    a: Tensor,  # (..., k, d_in)
) -> Tensor:  # (..., min(k, d_out, d_in)) in descending order
    """The singular values of B A from the QR factors of B and A^T: a core of at most k x k is decomposed.

    Not from Gram matrices, whose squares lose every singular value below 1e-8 of the largest.
    """
    core_b = torch.linalg.qr(b.double(), mode="r").R  # (..., p, k)
    core_a = torch.linalg.qr(a.double().mT, mode="r").R  # (..., q, k)
    return torch.linalg.svdvals(core_b @ core_a.mT)


# Below this size a product's QR is cheap whatever its inner dimension is.
_SMALL = 1024


def low_rank(
    b: Tensor,  # (..., d_out, k)
    a: Tensor,  # (..., k, d_in)
    rank: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (..., d_out, q), (..., q), (..., q, d_in) with q = min(rank, d_out, d_in)
    """The leading singular triples (U, S, V^T) of B A in float64, without forming the (d_out, d_in) product.

    From the QR factors of B and A^T and the SVD of their k x k core. Where k is above half of a large min(d_out, d_in),
    that would cost as much as the product itself: then by subspace iteration on a sketch of twice the rank (Halko et
    al. 2011, alg. 4.4), whose error next to the best one is below 1e-6 where the spectrum has a gap and about 1e-4
    where it is flat.
    """
    b, a = b.double(), a.double()
    size = min(b.shape[-2], a.shape[-1])
    rank = min(rank, size)
    if size <= _SMALL or 2 * b.shape[-1] <= size:
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.mT)
        u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        return q_b @ u[..., :rank], s[..., :rank], vh[..., :rank, :] @ q_a.mT
    rng = torch.Generator().manual_seed(0)
    width = min(2 * rank + 16, size)
    omega = torch.randn(a.shape[-1], width, generator=rng, dtype=b.dtype).to(b.device)
    image = b @ (a @ omega)
    for _ in range(4):
        q, _ = torch.linalg.qr(image)
        back, _ = torch.linalg.qr(a.mT @ (b.mT @ q))
        image = b @ (a @ back)
    q, _ = torch.linalg.qr(image)
    u, s, vh = torch.linalg.svd((q.mT @ b) @ a, full_matrices=False)
    return q @ u[..., :rank], s[..., :rank], vh[..., :rank, :]


def gauge_share(
    a: Tensor,  # (..., r, d_in)
    b: Tensor,  # (..., d_out, r)
    a_ref: Tensor,  # (..., r, d_in)
    b_ref: Tensor,  # (..., d_out, r)
) -> tuple[Tensor, Tensor]:  # (...), (...)
    """How much of the move from the reference only turned the frame: (squared gauge part, squared move).

    The gauge directions at (A_ref, B_ref) are (-K A_ref, B_ref K), K skew: they change the factors and not B A. The
    projection solves K S + S K = X - X^T with X = B_ref^T B - A A_ref^T and S = A_ref A_ref^T + B_ref^T B_ref. Only
    the client's own factors and the reference are needed, so it works under secure aggregation too.
    """
    a, b, a_ref, b_ref = (t.double() for t in (a, b, a_ref, b_ref))
    x = b_ref.mT @ b - a @ a_ref.mT
    eigenvalues, q = torch.linalg.eigh(a_ref @ a_ref.mT + b_ref.mT @ b_ref)
    pair_sum = eigenvalues[..., :, None] + eigenvalues[..., None, :]
    flat = pair_sum <= 1e-12 * eigenvalues.amax(-1)[..., None, None]
    turned = q.mT @ (x - x.mT) @ q
    k = q @ torch.where(flat, 0.0, turned / torch.where(flat, 1.0, pair_sum)) @ q.mT
    gauge = (k @ a_ref).square().sum((-2, -1)) + (b_ref @ k).square().sum((-2, -1))
    move = (a - a_ref).square().sum((-2, -1)) + (b - b_ref).square().sum((-2, -1))
    return gauge, move
