"""The best that any rotation of the clients' frames could do, found numerically: the yardstick for alignment."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedrot.core.linalg import procrustes

Errors = Callable[[Tensor], Tensor]  # (N, L, r, r) -> (L)


def best_rotation_error2(
    a: Tensor,  # (N, L, r, d_in)
    b: Tensor,  # (N, L, d_out, r)
    p: Tensor,  # (N), summing to one
    iterations: int = 60,
) -> Tensor:  # (L)
    """Min over R in SO(r)^N of ||sum_i p_i B_i A_i - (sum_i p_i B_i R_i)(sum_i p_i R_i^T A_i)||_F^2, by layer.

    A local search (L-BFGS on R_i = R_i0 exp(K_i), K_i skew) from the frames as they are and from generalised
    Procrustes solutions, the best of all kept; never above the error of the frames as they are.
    """
    cols_b, cols_a, weight = _shrunk(a, b, p)
    error2 = _error2(cols_b, cols_a, weight)
    n, layers, r, _ = cols_a.shape
    eye = torch.eye(r, dtype=torch.float64, device=a.device).expand(n, layers, r, r)
    starts = [
        eye,
        common_frame(cols_a, cols_a.new_zeros(cols_b.shape), weight),
        common_frame(cols_b.mT, cols_b.new_zeros(cols_a.mT.shape), weight),
        common_frame(cols_a, cols_b, weight),
    ]
    return torch.stack([error2(_descend(error2, start, iterations)) for start in starts]).amin(0)


def search_rotations(
    a: Tensor,  # (N, L, r, d_in)
    b: Tensor,  # (N, L, d_out, r)
    p: Tensor,  # (N), summing to one
    iterations: int,
) -> Tensor:  # (N, L, r, r) float64
    """Rotations of low error, searched from generalised Procrustes on both factors; I in layers where it is no gain."""
    cols_b, cols_a, weight = _shrunk(a, b, p)
    error2 = _error2(cols_b, cols_a, weight)
    eye = torch.eye(a.shape[-2], dtype=torch.float64, device=a.device).expand(*a.shape[:2], -1, -1)
    start = _better(error2, eye, common_frame(cols_a, cols_b, weight))
    return _better(error2, eye, _descend(error2, start, iterations) if iterations else start)


def _shrunk(a: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors in the joint row and column spaces, where the error lives: QR shrinks both sides to at most N r."""
    a, b = a.double(), b.double()
    n, _, r, _ = a.shape
    cols_b = torch.linalg.qr(torch.cat(list(b), -1), mode="r").R.unflatten(-1, (n, r)).permute(2, 0, 1, 3)
    cols_a = torch.linalg.qr(torch.cat(list(a), -2).mT, mode="r").R.unflatten(-1, (n, r)).permute(2, 0, 3, 1)
    return cols_b, cols_a, p.to(a.device).reshape(n, 1, 1, 1)


def _error2(cols_b: Tensor, cols_a: Tensor, weight: Tensor) -> Errors:
    ideal = (weight * (cols_b @ cols_a)).sum(0)

    def error2(rotation: Tensor) -> Tensor:
        mean_b, mean_a = (weight * (cols_b @ rotation)).sum(0), (weight * (rotation.mT @ cols_a)).sum(0)
        return (ideal - mean_b @ mean_a).square().sum((-2, -1))

    return error2


def common_frame(
    a: Tensor,  # (N, L, r, k)
    b: Tensor,  # (N, L, m, r)
    weight: Tensor,  # (N, 1, 1, 1)
    sweeps: int = 10,
) -> Tensor:  # (N, L, r, r)
    """Generalised Procrustes: turn every client's factors to their weighted means, repeatedly.

    Each factor counts over the mean squared distance of the clients from its mean. Starts from the first client's.
    """
    n, layers, r, _ = a.shape
    rotation = procrustes(a @ a[:1].mT + b.mT @ b[:1])
    for _ in range(sweeps):
        m = torch.zeros((n, layers, r, r), dtype=a.dtype, device=a.device)
        for rows, turned in ((a, rotation.mT @ a), (b.mT, rotation.mT @ b.mT)):
            mean = (weight * turned).sum(0, keepdim=True)
            spread = (weight * (turned - mean).square()).sum(0).mean((-2, -1))[..., None, None]
            size = mean[0].square().mean((-2, -1))[..., None, None]
            # Clients that agree to rounding would count without limit.
            m = m + rows @ mean.mT / torch.maximum(spread, 1e-12 * size).clamp_min(torch.finfo(a.dtype).tiny)
        rotation = procrustes(m)
    return rotation


def _better(error2: Errors, first: Tensor, second: Tensor) -> Tensor:
    """Of two choices the one of lower error, layer by layer."""
    return torch.where((error2(second) < error2(first))[:, None, None], second, first)


def _descend(error2: Errors, start: Tensor, iterations: int) -> Tensor:
    # Each layer counts by its own error at the start, so that small ones are searched as far as large ones.
    size = error2(start).clamp_min(torch.finfo(torch.float64).tiny)
    free = torch.zeros_like(start, requires_grad=True)
    search = torch.optim.LBFGS([free], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def turned() -> Tensor:
        return start @ torch.linalg.matrix_exp(free - free.mT)

    def closure() -> Tensor:
        search.zero_grad()
        loss = (error2(turned()) / size).sum()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        search.step(closure)
    with torch.no_grad():
        # A joint search over layers can leave one of them worse than it began.
        return _better(error2, start, turned())
