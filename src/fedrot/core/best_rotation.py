"""The best that any rotation of the clients' frames could do, found numerically: the yardstick for alignment."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedrot.core.linalg import procrustes


def best_rotation_error2(
    a: Tensor,  # (N, L, r, d_in)
    b: Tensor,  # (N, L, d_out, r)
    p: Tensor,  # (N), summing to one
    iterations: int = 60,
) -> Tensor:  # (L)
    """Min over R in SO(r)^N of ||sum_i p_i B_i A_i - (sum_i p_i B_i R_i)(sum_i p_i R_i^T A_i)||_F^2, by layer.

    A local search (L-BFGS on R_i = R_i0 exp(K_i), K_i skew) from the frames as they are and from two generalised
    Procrustes solutions, the best of all kept; never above the error of the frames as they are.
    """
    a, b = a.double(), b.double()
    n, layers, r, _ = a.shape
    # The error lives in the joint row and column spaces: QR shrinks both sides to at most N r.
    cols_b = torch.linalg.qr(torch.cat(list(b), -1), mode="r").R.unflatten(-1, (n, r)).permute(2, 0, 1, 3)
    cols_a = torch.linalg.qr(torch.cat(list(a), -2).mT, mode="r").R.unflatten(-1, (n, r)).permute(2, 0, 3, 1)
    weight = p.to(a.device).reshape(n, 1, 1, 1)
    ideal = (weight * (cols_b @ cols_a)).sum(0)

    def error2(rotation: Tensor) -> Tensor:  # (L)
        mean_b, mean_a = (weight * (cols_b @ rotation)).sum(0), (weight * (rotation.mT @ cols_a)).sum(0)
        return (ideal - mean_b @ mean_a).square().sum((-2, -1))

    eye = torch.eye(r, dtype=torch.float64, device=a.device).expand(n, layers, r, r)
    starts = [eye, _common_frame(cols_a, weight), _common_frame(cols_b.mT, weight)]
    return torch.stack([_descend(error2, start, iterations) for start in starts]).amin(0)


def _common_frame(rows: Tensor, weight: Tensor, sweeps: int = 5) -> Tensor:
    """Generalised Procrustes: turn every client's (N, L, r, k) rows to their own weighted mean, repeatedly."""
    rotation = procrustes(rows @ rows[:1].mT)
    for _ in range(sweeps):
        mean = (weight * (rotation.mT @ rows)).sum(0, keepdim=True)
        rotation = procrustes(rows @ mean.mT)
    return rotation


def _descend(error2: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> Tensor:
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
        return torch.minimum(error2(turned()), error2(start))
