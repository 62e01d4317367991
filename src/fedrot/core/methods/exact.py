"""Methods that send the best rank-r approximation of the ideal update: no method of one rank-r adapter loses less."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedrot.core.linalg import low_rank, procrustes
from fedrot.core.methods.base import Broadcast, Capabilities, Method, Reduced, ServerState, register
from fedrot.core.products import refill, weighted_products, widened


@register
@dataclass(frozen=True)
class FlexLoRA(Method):
    """FlexLoRA: the rank-r SVD of sum p_i s_i B_i A_i, as B = U S / s and A = V^T.

    Deviations: the dense product is never formed (QR of the stacked factors, SVD of the small core), and the whole of
    S goes to B, so that a direction whose singular value is zero keeps a row of A to learn from. The frame is the
    SVD's own, which jumps from round to round.
    """

    name: ClassVar[str] = "flexlora"
    paper: ClassVar[str] = "arXiv 2402.11505"
    capabilities: ClassVar[Capabilities] = Capabilities(reduction="factors", keeps_frame=False)

    def server(self, state: ServerState, reduced: Reduced, rng: torch.Generator) -> ServerState:
        """(U S / s, V^T) for every layer."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for sums in weighted_products(reduced.factors):
            u, s, vh = low_rank(sums.b, sums.a, sums.rank)
            found.update(zip(sums.names, zip(u * s[..., None, :], vh, strict=True), strict=True))
        return ServerState(Broadcast(state.broadcast.round + 1, refill(reduced.mean, found)), state.memory)


@register
@dataclass(frozen=True)
class FlexLoRARegauge(Method):
    """FlexLoRA's optimum, turned to the last global factors, so that the frame does not jump.

    A = c R^T V^T and B = U S R / (c s), with c the root mean square row norm of the last global A and R in SO(r) the
    Procrustes rotation of c V^T to it, up to the signs of singular vectors, which mean nothing. The product is
    FlexLoRA's.
    """

    name: ClassVar[str] = "flexlora_regauge"
    paper: ClassVar[str] = "fedrot (after arXiv 2402.11505)"
    capabilities: ClassVar[Capabilities] = Capabilities(reduction="factors")

    def server(self, state: ServerState, reduced: Reduced, rng: torch.Generator) -> ServerState:
        """FlexLoRA's product in the frame of the last broadcast."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for sums in weighted_products(reduced.factors):
            u, s, vh = low_rank(sums.b, sums.a, sums.rank)
            last = torch.stack([state.broadcast.adapter.layers[name].a.double() for name in sums.names])
            size = last.norm(dim=(-2, -1), keepdim=True) / last.shape[-2] ** 0.5
            size = torch.where(size > 0, size, torch.ones_like(size))
            b, a = proper(*widened(u * s[..., None, :], vh, sums.rank), last)
            r = procrustes(a @ last.mT)
            b, a = b @ r / size, size * (r.mT @ a)
            found.update(zip(sums.names, zip(b, a, strict=True), strict=True))
        return ServerState(Broadcast(state.broadcast.round + 1, refill(reduced.mean, found)), state.memory)


def proper(
    b: Tensor,  # (..., d_out, r)
    a: Tensor,  # (..., r, d_in)
    to: Tensor,  # (..., r, d_in)
) -> tuple[Tensor, Tensor]:
    """The same product with the last pair's sign such that a rotation, without reflection, is enough to reach `to`.

    The signs of singular vectors mean nothing, but a wrong one costs SO(r) a whole direction.
    """
    sign = torch.linalg.det(a @ to.mT).sign()[..., None, None]
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    return torch.cat([b[..., :-1], b[..., -1:] * sign], -1), torch.cat([a[..., :-1, :], a[..., -1:, :] * sign], -2)
