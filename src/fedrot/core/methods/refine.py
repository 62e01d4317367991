"""Methods that refine FedIT's average with the clients' own factors at hand."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter, stacks
from fedrot.core.errors import RecipeError
from fedrot.core.linalg import product_norm2
from fedrot.core.methods.base import Broadcast, Capabilities, Method, Reduced, ServerState, register
from fedrot.core.products import refill, weighted_products
from fedrot.core.ranks import Frames, first_frames, pad


@register
@dataclass(frozen=True)
class LoraFair(Method):
    """LoRA-FAIR: keeps Abar and corrects Bbar, B' = Bbar + dB, so that B' Abar comes near the ideal update.

    dB minimises ||(Bbar + dB) Abar - sum p_i B_i A_i||_F^2 + mu ||dB||_F^2, whose closed form is
    dB = E Abar^T (Abar Abar^T + mu I)^-1, E = sum p_i B_i A_i - Bbar Abar, computed through the factors.

    Deviation: the published method maximises a cosine similarity by gradient steps; the Frobenius loss needs none.
    """

    name: ClassVar[str] = "lora_fair"
    paper: ClassVar[str] = "arXiv 2411.14961"
    capabilities: ClassVar[Capabilities] = Capabilities(reduction="factors")

    mu: float = 0.01
    """Weight of ||dB||^2, relative to the mean diagonal of Abar Abar^T; at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mu < float("inf"):
            raise RecipeError(f"method.mu must be at least 0, got {self.mu!r}")

    def server(self, state: ServerState, reduced: Reduced, rng: torch.Generator) -> ServerState:
        """(Abar, Bbar + dB)."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for sums in weighted_products(reduced.factors):
            mean = [reduced.mean.layers[name] for name in sums.names]
            a = torch.stack([pair.a.double() for pair in mean])
            b = torch.stack([pair.b.double() * pair.scale for pair in mean])
            gram = a @ a.mT
            residual = sums.b @ (sums.a @ a.mT) - b @ gram  # E Abar^T
            size = torch.diagonal(gram, dim1=-2, dim2=-1).mean(-1)[..., None, None]
            eye = torch.eye(a.shape[-2], dtype=a.dtype, device=a.device)
            b = b + residual @ torch.linalg.pinv(gram + self.mu * size * eye, hermitian=True)
            found.update(zip(sums.names, zip(b, a, strict=True), strict=True))
        return ServerState(Broadcast(state.broadcast.round + 1, refill(reduced.mean, found)), state.memory)


@register
@dataclass(frozen=True)
class HetLoRA(Method):
    """HetLoRA: clients of different rank; zero-padded factors are averaged with weights ||s_i B_i A_i||_F.

    A client of rank q takes the first q components (truncation) and its upload is padded with zeros. The weights are
    by layer; where all updates of a layer are zero they are the usual ones. The head has the usual weights.

    Deviation: ranks stay as the recipe gives them, the published self-pruning is left out.
    """

    name: ClassVar[str] = "hetlora"
    paper: ClassVar[str] = "arXiv 2401.06432"
    capabilities: ClassVar[Capabilities] = Capabilities(reduction="factors")

    def narrow(self, adapter: Adapter, rank: int) -> Frames:
        """The first components."""
        return first_frames(adapter, rank)

    def widen(self, local: Adapter, frames: Frames, start: Adapter) -> Adapter:
        """Zero rows and columns for all others, as published."""
        return pad(local, frames, start)

    def server(self, state: ServerState, reduced: Reduced, rng: torch.Generator) -> ServerState:
        """Factor-wise averages, weighted by the updates' norms."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        p = torch.tensor([weight for weight, _ in reduced.factors], dtype=torch.float64)
        for stack in stacks([adapter for _, adapter in reduced.factors], torch.float64):
            b = stack.b * stack.scale[..., None, None]
            norms = product_norm2(b, stack.a).sqrt()  # (N, L)
            total = norms.sum(0)
            weights = torch.where(total > 0, norms / total, p.to(norms.device)[:, None])[..., None, None]
            pairs = zip((weights * b).sum(0), (weights * stack.a).sum(0), strict=True)
            found.update(zip(stack.names, pairs, strict=True))
        return ServerState(Broadcast(state.broadcast.round + 1, refill(reduced.mean, found)), state.memory)
