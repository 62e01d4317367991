"""Alignment at the server: the clients' factors are turned to each other, not to the last broadcast."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedrot.core.adapter import stacks
from fedrot.core.best_rotation import search_rotations
from fedrot.core.errors import RecipeError
from fedrot.core.methods.base import Broadcast, Capabilities, Method, Reduced, ServerState, register
from fedrot.core.products import refill


@register
@dataclass(frozen=True)
class FedRotConsensus(Method):
    """What rotation can do at most: R_i such that (sum p_i B_i R_i)(sum p_i R_i^T A_i) is nearest to the ideal update.

    The distance to the last broadcast is not the distance of the clients to each other. Where the server sees the
    factors, it can turn them to each other: generalised Procrustes on both factors, then `steps` steps of L-BFGS on
    the aggregation error itself. Never worse than FedIT on the same uploads. Compare with `fedrot_svd`, which is
    cheaper and at the floor.
    """

    name: ClassVar[str] = "fedrot_consensus"
    paper: ClassVar[str] = "fedrot"
    capabilities: ClassVar[Capabilities] = Capabilities(reduction="factors")

    steps: int = 60
    """Steps of the numerical search after generalised Procrustes; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0:
            raise RecipeError(f"method.steps must be at least 0, got {self.steps!r}")

    def server(self, state: ServerState, reduced: Reduced, rng: torch.Generator) -> ServerState:
        """Averages of the turned factors."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        p = torch.tensor([weight for weight, _ in reduced.factors], dtype=torch.float64)
        for stack in stacks([adapter for _, adapter in reduced.factors], torch.float64):
            b = stack.b * stack.scale[..., None, None]
            weight = p.to(b.device).reshape(-1, 1, 1, 1)
            r = search_rotations(stack.a, b, p, self.steps)
            pairs = zip((weight * (b @ r)).sum(0), (weight * (r.mT @ stack.a)).sum(0), strict=True)
            found.update(zip(stack.names, pairs, strict=True))
        return ServerState(Broadcast(state.broadcast.round + 1, refill(reduced.mean, found)), state.memory)
