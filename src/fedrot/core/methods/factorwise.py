"""Methods that average the factors one by one, without turning them."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedrot.core.adapter import Adapter
from fedrot.core.methods.base import Broadcast, Capabilities, ClientResult, Method, Seat, register
from fedrot.core.ranks import Frames, put_back


@register
@dataclass(frozen=True)
class FedIT(Method):
    """FedIT: the server averages A and B separately, (sum p_i A_i, sum p_i B_i).

    The product of the averages is not the average of the products: the difference is the cross-covariance
    sum p_i (B_i - Bbar)(A_i - Abar), the aggregation error.
    """

    name: ClassVar[str] = "fedit"
    paper: ClassVar[str] = "arXiv 2305.05644"
    capabilities: ClassVar[Capabilities] = Capabilities(reduction="sum")


@register
@dataclass(frozen=True)
class FFA(Method):
    """FFA-LoRA: A stays at its shared start A_0, only B is trained and averaged; sum p_i B_i A_0 is exact.

    Deviation: A_0 is the broadcast's, the same bytes at every client. Each client drawing it from a seed of its own
    would bring the error back.
    """

    name: ClassVar[str] = "ffa"
    paper: ClassVar[str] = "arXiv 2403.12313"
    capabilities: ClassVar[Capabilities] = Capabilities(reduction="sum", standalone=False)

    def trainable(self, round: int) -> frozenset[str]:
        """B and the head."""
        return frozenset({"b", "head"})


@register
@dataclass(frozen=True)
class RoLoRA(Method):
    """RoLoRA: B is trained and averaged in even rounds, A in odd ones; the other factor is common, so it is exact.

    Deviations: the head is trained in every round, as for all methods here; parity is that of the server's round,
    so a client that skipped rounds trains what all others train.
    """

    name: ClassVar[str] = "rolora"
    paper: ClassVar[str] = "arXiv 2409.02346"
    capabilities: ClassVar[Capabilities] = Capabilities(reduction="sum", alternates=True, standalone=False)

    def trainable(self, round: int) -> frozenset[str]:
        """One factor and the head."""
        return frozenset({"a" if round % 2 else "b", "head"})

    def widen(self, local: Adapter, frames: Frames, start: Adapter) -> Adapter:
        """With A as it goes beside the common B; in rounds of B it does not travel."""
        return put_back(local, frames, start, beside=True)


@register
@dataclass(frozen=True)
class FedSA(Method):
    """FedSA-LoRA: A is averaged, B_i stays with client i, across rounds.

    There is no one global model: each client's is (Abar, B_i). A client that was not seen before starts at the
    broadcast's B, which is never changed: zero unless the run started from an adapter.
    """

    name: ClassVar[str] = "fedsa"
    paper: ClassVar[str] = "arXiv 2410.01463"
    capabilities: ClassVar[Capabilities] = Capabilities(
        reduction="sum", client_state=True, personal=True, standalone=False
    )

    def uploads(self, round: int) -> frozenset[str]:
        """A and the head."""
        return frozenset({"a", "head"})

    def begin(self, broadcast: Broadcast, seat: Seat) -> Adapter:
        """The broadcast's A with the client's own B."""
        layers = {
            name: replace(pair, b=seat.state.get(f"b/{name}", pair.b))
            for name, pair in broadcast.adapter.layers.items()
        }
        return replace(broadcast.adapter, layers=layers)

    def client(self, local: Adapter, broadcast: Broadcast, seat: Seat, rng: torch.Generator) -> ClientResult:
        """Keeps B."""
        return ClientResult(local, state={f"b/{name}": pair.b for name, pair in local.layers.items()})
