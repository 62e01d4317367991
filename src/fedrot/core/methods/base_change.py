"""Exact methods that put into the base weights what a rank-r adapter cannot hold."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter, stacks
from fedrot.core.methods.base import Broadcast, Capabilities, Method, Reduced, ServerState, register
from fedrot.core.products import Pairs, change_of, joined, weighted_products, wide


@dataclass(frozen=True)
class _ChangesBase(Method):
    """What both have in common."""

    dequantize: bool = False
    """Hold the adapted layers of a half-precision base in float32, so that a change of them is not rounded away.
    Without it such a base is refused."""

    capabilities: ClassVar[Capabilities] = Capabilities(reduction="factors", changes_base=True, server_optimizer=False)

    @staticmethod
    def changed(state: ServerState, adapter: Adapter, pairs: Pairs) -> ServerState:
        """The next state: `adapter` to train from, and `pairs` added to the base weights."""
        last = state.broadcast
        step = joined(change_of(adapter, pairs))
        delta = step if last.base_delta is None else joined(last.base_delta, step)
        return ServerState(Broadcast(last.round + 1, adapter, base_delta=delta, base_step=step), state.memory)


@register
@dataclass(frozen=True)
class FedEx(_ChangesBase):
    """FedEx-LoRA: FedIT's average, and its aggregation error s sum p_i (B_i - Bbar)(A_i - Abar) added to the base.

    Deviations: the residual is in the orientation of each layer (the published one is transposed for nn.Linear), has
    the scale s, and travels as factors of rank N r, never as a dense matrix.
    """

    name: ClassVar[str] = "fedex"
    paper: ClassVar[str] = "arXiv 2410.09432"

    def server(self, state: ServerState, reduced: Reduced, rng: torch.Generator) -> ServerState:
        """(Abar, Bbar), and the residual for the base."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        weights = torch.tensor([p for p, _ in reduced.factors], dtype=torch.float64)
        for stack in stacks([adapter for _, adapter in reduced.factors], torch.float64):
            root = weights.to(stack.a.device).sqrt().reshape(-1, 1, 1, 1)
            a, b = stack.a, stack.b * stack.scale[..., None, None]
            centred = [(t - (root.square() * t).sum(0)) * root for t in (b, a)]
            found.update(zip(stack.names, zip(wide(centred[0], -1), wide(centred[1], -2), strict=True), strict=True))
        return self.changed(state, reduced.mean, found)


@register
@dataclass(frozen=True)
class FLoRA(_ChangesBase):
    """FLoRA: the clients' updates are stacked, sum p_i s_i B_i A_i goes into the base, fresh factors start each round.

    Fresh A is uniform in (-1, 1) / sqrt(d_in), as PEFT starts it, the same at every client; B is zero. What comes down
    is of rank N r.
    """

    name: ClassVar[str] = "flora"
    paper: ClassVar[str] = "arXiv 2409.05976"
    capabilities: ClassVar[Capabilities] = replace(_ChangesBase.capabilities, keeps_frame=False)

    def server(self, state: ServerState, reduced: Reduced, rng: torch.Generator) -> ServerState:
        """Everything into the base; fresh factors."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for sums in weighted_products(reduced.factors):
            found.update(zip(sums.names, zip(sums.b, sums.a, strict=True), strict=True))
        fresh = {name: t for name, t in reduced.mean.tensors() if name.startswith("head/")}
        for name, pair in reduced.mean.layers.items():
            a = (2 * torch.rand(pair.a.shape, generator=rng) - 1) / pair.a.shape[1] ** 0.5
            fresh[f"layers/{name}/a"] = a.to(pair.a.dtype).to(pair.a.device)
            fresh[f"layers/{name}/b"] = torch.zeros_like(pair.b)
        return self.changed(state, reduced.mean.with_tensors(fresh), found)
