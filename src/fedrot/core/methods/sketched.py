"""FedASK: near the SVD's result from sums alone, so that it works under secure aggregation."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedrot.core.adapter import Adapter, stacks
from fedrot.core.methods.base import (
    Broadcast,
    Capabilities,
    ClientResult,
    Method,
    Reduced,
    Seat,
    ServerState,
    register,
)
from fedrot.core.products import refill
from fedrot.core.reduce import as_float32


def columns(matrix: Tensor, rank: int) -> Tensor:
    """The matrix with columns of zeros up to `rank`, where a layer's sides are smaller than the rank."""
    return pad(matrix, (0, rank - matrix.shape[-1]))


@register
@dataclass(frozen=True)
class FedASK(Method):
    """FedASK: two sketching phases, each a sum over clients.

    First Y = sum p_i s B_i (A_i S) and Q = orth(Y); then Z = sum p_i (Q^T s B_i) A_i; the update is Q Z, a rank-r
    approximation of sum p_i s B_i A_i. S = orth(A_t^T), the row space that all clients started from, warm-starts the
    sketch. What is uploaded in both phases together is as large as FedIT's; Q comes down once more.

    Deviations: no oversampling, so that both phases fit the factors' shapes; the result is sent as (Q U S / s, V^T)
    from the SVD of the r x d_in matrix Z; the paper's noise for differential privacy is a matter of the run, not of
    the method.
    """

    name: ClassVar[str] = "fedask"
    paper: ClassVar[str] = "arXiv 2507.09990"
    capabilities: ClassVar[Capabilities] = Capabilities(
        reduction="sum", second_phase=True, server_optimizer=False, standalone=True
    )

    def uploads(self, round: int) -> frozenset[str]:
        """Y in the place of b, and the head; Z follows in the place of a."""
        return frozenset({"b", "head"})

    def client(self, local: Adapter, broadcast: Broadcast, seat: Seat, rng: torch.Generator) -> ClientResult:
        """Y_i = B_i (A_i S) in the place of b."""
        local = as_float32(local)
        layers = dict(local.layers)
        for stack in stacks([local, broadcast.adapter], torch.float64):
            basis, _ = torch.linalg.qr(stack.a[1].mT)
            sketch = columns(stack.b[0] @ (stack.a[0] @ basis), stack.a.shape[-2])
            for i, name in enumerate(stack.names):
                layers[name] = replace(local.layers[name], b=sketch[i].to(local.layers[name].b.dtype))
        return ClientResult(replace(local, layers=layers), state=seat.state)

    def ask(self, state: ServerState, reduced: Reduced) -> Adapter:
        """Q = orth(Y) in the place of b."""
        layers = dict(reduced.mean.layers)
        for stack in stacks([reduced.mean], torch.float64):
            basis = columns(torch.linalg.qr(stack.b[0])[0], stack.a.shape[-2])
            for i, name in enumerate(stack.names):
                layers[name] = replace(layers[name], b=basis[i].to(layers[name].b.dtype))
        return replace(reduced.mean, layers=layers)

    def answer(self, local: Adapter, question: Adapter) -> Adapter:
        """Z_i = (Q^T B_i) A_i in the place of a, and Q as it came in that of b."""
        layers = {}
        for name, pair in question.layers.items():
            mine = local.layers[name]
            z = (pair.b.double().mT @ mine.b.double()) @ mine.a.double()
            layers[name] = replace(pair, a=z.to(pair.a.dtype))
        return replace(question, layers=layers)

    def server(self, state: ServerState, reduced: Reduced, rng: torch.Generator) -> ServerState:
        """The SVD of Q Z, from that of Z alone."""
        if reduced.answer is None:
            raise ValueError("fedask needs the answers of its second phase")
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for stack in stacks([reduced.answer], torch.float64):
            u, s, vh = torch.linalg.svd(stack.a[0], full_matrices=False)
            b = stack.b[0] @ (u * s[..., None, :]) * stack.scale[0][..., None, None]
            found.update(zip(stack.names, zip(b, vh, strict=True), strict=True))
        adapter = refill(replace(reduced.answer, head=reduced.mean.head), found)
        return ServerState(Broadcast(state.broadcast.round + 1, adapter), state.memory)
