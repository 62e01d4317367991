"""`fedrot_svd`: the rank-r optimum in a frame and a scale that do not jump, with memory on request."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.errors import RecipeError
from fedrot.core.linalg import low_rank, product_norm2
from fedrot.core.methods.base import Broadcast, Capabilities, Method, Reduced, ServerState, register
from fedrot.core.methods.exact import proper
from fedrot.core.products import Products, refill, weighted_products, widened

# How far the general gauge may stretch a direction against a rotation of one size. Rows of A* that are far from the
# clients' mean would come back much too large, and the next round's steps with them.
_STRETCH = 4.0


@register
@dataclass(frozen=True)
class FedRotSVD(Method):
    """The best rank-r update in the gauge nearest to the clients' mean factors.

    With (B*, A*) the rank-r SVD of M = sum p_i s_i B_i A_i and Abar = sum p_i A_i, the broadcast is (B* G, G^-1 A*),
    G = A* Abar^T (Abar Abar^T)^-1: the product is FlexLoRA's, and A is next to FedIT's. G's singular values
    are held to within a factor of 4 of those of a rotation at Abar's size. Everything in factored form: O(d k^2 + k^3).

    With `momentum` beta the server goes to B_t A_t + V with V <- T_q(beta V + M - B_t A_t). With `feedback` it keeps
    the next q singular terms of what it could not send, at most `feedback_clip` of the norm of what it sent, and adds
    them to the next round's M. T_q is the best approximation of rank q.
    """

    name: ClassVar[str] = "fedrot_svd"
    paper: ClassVar[str] = "fedrot"
    capabilities: ClassVar[Capabilities] = Capabilities(reduction="factors")

    momentum: float = 0.0
    """beta of the momentum in product space, in [0, 1); 0: none."""
    feedback: bool = False
    """Error feedback: what the rank-r approximation cut off is added in the next round."""
    feedback_clip: float = 1.0
    """Largest norm of what is fed back, as a multiple of the norm of what was sent."""
    kept_rank: int | None = None
    """q, the rank of what momentum and error feedback keep; null: the adapter's rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"method.momentum must be in [0, 1), got {self.momentum!r}")
        if not 0 <= self.feedback_clip < float("inf"):
            raise RecipeError(f"method.feedback_clip must be at least 0, got {self.feedback_clip!r}")
        if self.kept_rank is not None and self.kept_rank < 1:
            raise RecipeError(f"method.kept_rank must be at least 1, or null, got {self.kept_rank!r}")

    def server(self, state: ServerState, reduced: Reduced, rng: torch.Generator) -> ServerState:
        """The next broadcast, and what momentum and feedback keep."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        memory = dict(state.memory)
        for sums in weighted_products(reduced.factors):
            q = self.kept_rank or sums.rank
            b, a = sums.b, sums.a
            if self.momentum:
                b, a = self._with_momentum(sums, state, memory, q)
            if self.feedback:
                b, a = _append((b, a), _recall(memory, "feedback", sums.names))
            u, s, vh = low_rank(b, a, sums.rank + (q if self.feedback else 0))
            r = sums.rank
            sent_b, sent_a = widened(u[..., :r] * s[..., None, :r], vh[..., :r, :], r)
            if self.feedback:
                rest, size = s[..., r:], s[..., :r].norm(dim=-1)
                most = self.feedback_clip * size / rest.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
                rest = rest * most.clamp_max(1.0)[..., None]
                _remember(memory, "feedback", sums.names, u[..., r:] * rest[..., None, :], vh[..., r:, :])
            mean_a = torch.stack([reduced.mean.layers[name].a.double() for name in sums.names])
            found.update(zip(sums.names, zip(*gauged(sent_b, sent_a, mean_a), strict=True), strict=True))
        return ServerState(Broadcast(state.broadcast.round + 1, refill(reduced.mean, found)), memory)

    def _with_momentum(
        self, sums: Products, state: ServerState, memory: dict[str, Tensor], q: int
    ) -> tuple[Tensor, Tensor]:
        last = next(weighted_products([(1.0, _only(state.broadcast.adapter, sums.names))]))
        change = _append((sums.b, sums.a), (-last.b, last.a))
        velocity = _recall(memory, "momentum", sums.names)
        if velocity is not None:
            change = _append(change, (self.momentum * velocity[0], velocity[1]))
        u, s, vh = low_rank(*change, q)
        _remember(memory, "momentum", sums.names, u * s[..., None, :], vh)
        return _append((last.b, last.a), (u * s[..., None, :], vh))


def gauged(
    b: Tensor,  # (..., d_out, r)
    a: Tensor,  # (..., r, d_in) with orthonormal rows
    to: Tensor,  # (..., r, d_in)
) -> tuple[Tensor, Tensor]:
    """(B G, G^-1 A) with G^-1 A as near to `to` as is safe; the product stays. A product of zero gives (0, to)."""
    r = a.shape[-2]
    b, a = proper(b, a, to)
    gram = to @ to.mT
    size = torch.diagonal(gram, dim1=-2, dim2=-1).sum(-1) / r
    size = torch.where(size > 0, size, torch.ones_like(size))[..., None].sqrt()
    left, values, right = torch.linalg.svd(a @ to.mT @ torch.linalg.pinv(gram, hermitian=True))
    values = values.clamp(1 / (_STRETCH * size), _STRETCH / size)
    g = left * values[..., None, :] @ right
    inverse = right.mT / values[..., None, :] @ left.mT
    empty = (product_norm2(b, a) == 0)[..., None, None]
    return torch.where(empty, 0.0, b @ g), torch.where(empty, to, inverse @ a)


def _only(adapter: Adapter, names: tuple[str, ...]) -> Adapter:
    return Adapter({name: adapter.layers[name] for name in names})


def _append(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The sum of two products as one."""
    if second is None:
        return first
    return torch.cat([first[0], second[0]], dim=-1), torch.cat([first[1], second[1]], dim=-2)


def _remember(memory: dict[str, Tensor], what: str, names: tuple[str, ...], b: Tensor, a: Tensor) -> None:
    for i, name in enumerate(names):
        memory[f"{what}/{name}/b"], memory[f"{what}/{name}/a"] = b[i], a[i]


def _recall(memory: dict[str, Tensor], what: str, names: tuple[str, ...]) -> tuple[Tensor, Tensor] | None:
    if f"{what}/{names[0]}/b" not in memory:
        return None
    kept = [torch.stack([memory[f"{what}/{name}/{side}"] for name in names]) for side in ("b", "a")]
    return kept[0], kept[1]
