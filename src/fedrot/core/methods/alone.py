"""Reference lines: what each client gets without the others, and what all data in one place would give."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedrot.core.adapter import Adapter
from fedrot.core.methods.base import Broadcast, Capabilities, ClientResult, Method, Seat, register


@register
@dataclass(frozen=True)
class Local(Method):
    """No federation: every client goes on from its own adapter, factors and head; nothing is sent.

    Same steps, same search; evaluated and exported by client.
    """

    name: ClassVar[str] = "local"
    paper: ClassVar[str] = "a reference line"
    capabilities: ClassVar[Capabilities] = Capabilities(
        reduction="sum", client_state=True, personal=True, server_optimizer=False, standalone=False
    )

    def uploads(self, round: int) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def begin(self, broadcast: Broadcast, seat: Seat) -> Adapter:
        """The client's own adapter, or the common start."""
        if not seat.state:
            return broadcast.adapter
        return broadcast.adapter.with_tensors(seat.state)

    def client(self, local: Adapter, broadcast: Broadcast, seat: Seat, rng: torch.Generator) -> ClientResult:
        """Keeps all of it."""
        return ClientResult(local, state=dict(local.tensors()))


@register
@dataclass(frozen=True)
class Centralised(Method):
    """All data in one place: one client holds every example and takes, a round, as many steps as all clients would.

    What the data allow when nobody minds sharing them. Scores by client are on the clients' parts all the same.
    """

    name: ClassVar[str] = "centralised"
    paper: ClassVar[str] = "a reference line"
    capabilities: ClassVar[Capabilities] = Capabilities(
        reduction="sum", pooled=True, mixed_ranks=False, server_optimizer=False, standalone=False
    )
