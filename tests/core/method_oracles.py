"""What each method should give, in dense matrices and from its published formula alone: nothing of the library is used.

All matrices are in float64 and updates are (d_out, d_in).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One layer of one round, as an oracle may know it."""

    number: int
    s: float
    p: list[float]  # weights, summing to one
    a: list[Tensor]  # the clients' factors after local training
    b: list[Tensor]
    a0: Tensor  # the broadcast's
    b0: Tensor
    ref_a: Tensor  # what clients align to
    ref_b: Tensor
    base: Tensor  # what was added to the base weight before this round
    rotations: list[Tensor]  # drawn at random by the clients

    def mean(self, of: list[Tensor], weights: list[float] | None = None) -> Tensor:
        return sum(w * x for w, x in zip(weights or self.p, of, strict=True))

    @property
    def ideal(self) -> Tensor:
        """sum_i p_i s B_i A_i."""
        return self.s * self.mean([b @ a for a, b in zip(self.a, self.b, strict=True)])

    @property
    def average(self) -> Tensor:
        """S Bbar Abar."""
        return self.s * self.mean(self.b) @ self.mean(self.a)


def polar(m: Tensor) -> Tensor:
    """The rotation nearest to m; where m says nothing (its null space), the one of these nearest to the identity."""
    u, s, vh = torch.linalg.svd(m)
    kept = int((s > 1e-9 * s[0]).sum())
    blank_u, blank_v = u[:, kept:], vh[kept:].T
    x, _, yh = torch.linalg.svd(blank_u.T @ blank_v)
    u, vh = torch.cat([u[:, :kept], blank_u @ x], 1), torch.cat([vh[:kept], yh @ blank_v.T])
    signs = torch.ones(len(m), dtype=m.dtype)
    signs[-1] = torch.linalg.det(u @ vh)
    return u @ torch.diag(signs) @ vh


def best_rank(m: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


def turned(layer: Layer, rotations: list[Tensor]) -> Tensor:
    """S (sum p_i B_i R_i)(sum p_i R_i^T A_i)."""
    b = layer.mean([x @ r for x, r in zip(layer.b, rotations, strict=True)])
    a = layer.mean([r.T @ x for x, r in zip(layer.a, rotations, strict=True)])
    return layer.s * b @ a


def correlations(layer: Layer) -> list[Tensor]:
    """With the reference's A in odd rounds, with its B in even ones."""
    if layer.number % 2:
        return [a @ layer.ref_a.T for a in layer.a]
    return [b.T @ layer.ref_b for b in layer.b]


def fedrot(layer: Layer, strength: float = 0.4) -> Tensor:
    if layer.number == 0:
        return layer.average
    eye = torch.eye(len(layer.a0), dtype=torch.float64)
    return turned(layer, [polar((1 - strength) * eye + strength * polar(m)) for m in correlations(layer)])


def as_published(layer: Layer, strength: float = 0.4) -> Tensor:
    if layer.number == 0:
        return layer.average
    eye = torch.eye(len(layer.a0), dtype=torch.float64)
    soft = [polar((1 - strength) * eye + strength * polar(m)) for m in correlations(layer)]
    return turned(layer, [r.half().double() for r in soft])


def random_rotation(layer: Layer) -> Tensor:
    return turned(layer, layer.rotations) if layer.number else layer.average


def rescale(layer: Layer) -> Tensor:
    """A_i c is nearest to A_ref (or B_i c to B_ref) at c = <x, ref> / ||x||^2, where that is positive."""
    if layer.number == 0:
        return layer.average
    odd = layer.number % 2
    a, b = [], []
    for mine_a, mine_b in zip(layer.a, layer.b, strict=True):
        x, ref = (mine_a, layer.ref_a) if odd else (mine_b, layer.ref_b)
        c = float((x * ref).sum() / x.square().sum()) if bool(x.any()) else 0.0
        c = c if c > 0 else 1.0
        a.append(mine_a * c if odd else mine_a / c)
        b.append(mine_b / c if odd else mine_b * c)
    return layer.s * layer.mean(b) @ layer.mean(a)


def lora_fair(layer: Layer, mu: float = 0.01) -> Tensor:
    """Least ||(Bbar + dB) Abar - ideal / s||^2 + mu' ||dB||^2, mu' = mu times the mean diagonal of Abar Abar^T."""
    a, b = layer.mean(layer.a), layer.mean(layer.b)
    gram = a @ a.T
    ridge = mu * torch.trace(gram) / len(gram) * torch.eye(len(gram), dtype=a.dtype)
    error = layer.ideal / layer.s - b @ a
    return layer.s * (b + torch.linalg.solve(gram + ridge, a @ error.T).T) @ a


def hetlora(layer: Layer) -> Tensor:
    norms = [float((b @ a).norm()) for a, b in zip(layer.a, layer.b, strict=True)]
    weights = [n / sum(norms) for n in norms] if sum(norms) > 0 else layer.p
    return layer.s * layer.mean(layer.b, weights) @ layer.mean(layer.a, weights)


def fedask(layer: Layer) -> Tensor:
    """Q Q^T ideal, Q the column space of ideal S, S the row space of the broadcast's A."""
    _, _, rows = torch.linalg.svd(layer.a0, full_matrices=False)
    u, s, _ = torch.linalg.svd(layer.ideal @ rows.T, full_matrices=False)
    q = u[:, s > 1e-12 * s.max()]
    return q @ q.T @ layer.ideal


def rank_optimum(layer: Layer) -> Tensor:
    return best_rank(layer.ideal, len(layer.a0))


def exact(layer: Layer) -> Tensor:
    """Nothing is lost: the base weight and the adapter together hold the mean of the clients' models."""
    return layer.base + layer.ideal


def rolora(layer: Layer) -> Tensor:
    if layer.number % 2:
        return layer.s * layer.b0 @ layer.mean(layer.a)
    return layer.s * layer.mean(layer.b) @ layer.a0


GLOBAL: dict[str, Callable[[Layer], Tensor]] = {
    "as_published": as_published,
    "centralised": lambda layer: layer.average,
    "fedask": fedask,
    "fedex": exact,
    "fedit": lambda layer: layer.average,
    "fedrot": fedrot,
    "fedrot_svd": rank_optimum,
    "ffa": lambda layer: layer.s * layer.mean(layer.b) @ layer.a0,
    "flexlora": rank_optimum,
    "flexlora_regauge": rank_optimum,
    "flora": exact,
    "hetlora": hetlora,
    "lora_fair": lora_fair,
    "random_rotation": random_rotation,
    "rescale": rescale,
    "rolora": rolora,
    "stale_reference": fedrot,  # towards the reference it was sent
}

# What each client's own model is.
PERSONAL: dict[str, Callable[[Layer], list[Tensor]]] = {
    "fedsa": lambda layer: [layer.s * b @ layer.mean(layer.a) for b in layer.b],
    "local": lambda layer: [layer.s * b @ a for a, b in zip(layer.a, layer.b, strict=True)],
}


def consensus(layer: Layer, found: Tensor) -> None:
    """No formula: rotations only, never worse than FedIT, and of course no better than the best of that rank."""
    rank = len(layer.a0)
    error = float((found - layer.ideal).norm())
    slack = 1e-9 * float(layer.ideal.norm())
    assert error <= float((layer.average - layer.ideal).norm()) + slack
    assert error >= float((best_rank(layer.ideal, rank) - layer.ideal).norm()) - slack
    assert int(torch.linalg.matrix_rank(found, rtol=1e-9)) <= rank


# Where there is no formula, what must hold of the change that was found.
BOUNDS: dict[str, Callable[[Layer, Tensor], None]] = {"fedrot_consensus": consensus}
