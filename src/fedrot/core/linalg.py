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
