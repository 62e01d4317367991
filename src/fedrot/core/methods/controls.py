"""Controls: they implement their definition, and whatever they show stands. None is meant to be used."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.alignment import find_rotations, rotate, same_layers
from fedrot.core.errors import RecipeError
from fedrot.core.methods.base import (
    Broadcast,
    Capabilities,
    ClientResult,
    Method,
    Reduced,
    Seat,
    ServerState,
    Weighting,
    register,
)
from fedrot.core.methods.rotation import FedRot
from fedrot.core.reduce import as_float32

_CONTROL = Capabilities(reduction="sum", control=True)


@register
@dataclass(frozen=True)
class RandomRotation(Method):
    """Each client turns each layer by a uniformly random rotation of its own before the average (the paper's control).

    Not in round 0, where FedRot-LoRA does not rotate either.
    """

    name: ClassVar[str] = "random_rotation"
    paper: ClassVar[str] = "arXiv 2602.23638, ablation"
    capabilities: ClassVar[Capabilities] = _CONTROL

    def client(self, local: Adapter, broadcast: Broadcast, seat: Seat, rng: torch.Generator) -> ClientResult:
        """(R^T A_i, B_i R) with R uniform in SO(r)."""
        if broadcast.round == 0:
            return ClientResult(local, state=seat.state)
        rotations = {name: random_rotation(local.layers[name].rank, rng) for name in sorted(local.layers)}
        return ClientResult(rotate(local, rotations), rotations, seat.state)


def random_rotation(rank: int, rng: torch.Generator) -> Tensor:  # (r, r) float64
    """Uniform in SO(r): the QR factor of a Gaussian matrix, with R's diagonal made positive."""
    q, r = torch.linalg.qr(torch.randn(rank, rank, generator=rng, dtype=torch.float64))
    q = q * torch.diagonal(r).sign()
    return q * torch.cat([torch.ones(rank - 1), torch.linalg.det(q).sign().reshape(1)]).double()


@register
@dataclass(frozen=True)
class Rescale(Method):
    """A scalar instead of a rotation: (A_i / c, B_i c), c making A (odd rounds) or B (even ones) nearest to the
    broadcast's (the paper's control). c = 1 in round 0 and where no positive c is better than none.
    """

    name: ClassVar[str] = "rescale"
    paper: ClassVar[str] = "arXiv 2602.23638, ablation"
    needs_reference: ClassVar[bool] = True
    capabilities: ClassVar[Capabilities] = replace(_CONTROL, reports_turn=False)

    def client(self, local: Adapter, broadcast: Broadcast, seat: Seat, rng: torch.Generator) -> ClientResult:
        """(A_i / c, B_i c) for every layer."""
        if broadcast.round == 0:
            return ClientResult(local, state=seat.state)
        same_layers(local, broadcast.frame)
        local = as_float32(local)
        layers = {}
        for name, pair in local.layers.items():
            reference = broadcast.frame.layers[name]
            odd = bool(broadcast.round % 2)
            mine, theirs = (pair.a, reference.a) if odd else (pair.b, reference.b)
            inner, square = float((mine.double() * theirs.double()).sum()), float(mine.double().square().sum())
            best = inner / square if inner > 0 and square > 0 else 1.0
            c = 1 / best if odd else best
            layers[name] = replace(pair, a=pair.a / c, b=pair.b * c)
        return ClientResult(replace(local, layers=layers), state=seat.state)


@register
@dataclass(frozen=True)
class StaleReference(FedRot):
    """FedRot-LoRA with the global factors of `lag` rounds earlier as the reference (the paper's control, lag 1: t-2
    instead of t-1). The reference is sent beside the broadcast.
    """

    name: ClassVar[str] = "stale_reference"
    paper: ClassVar[str] = "arXiv 2602.23638, ablation"
    capabilities: ClassVar[Capabilities] = replace(_CONTROL, standalone=False)

    lag: int = 1
    """How many rounds older than FedRot-LoRA's the reference is; at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag < 1:
            raise RecipeError(f"method.lag must be at least 1, got {self.lag!r}")

    def server(self, state: ServerState, reduced: Reduced, rng: torch.Generator) -> ServerState:
        """The average, with an older broadcast as reference; before there is one, the oldest there is."""
        last = state.broadcast
        past = {k: v for k, v in state.memory.items() if k.startswith("past/")}
        past |= {f"past/{last.round}/{name}": tensor for name, tensor in last.adapter.tensors()}
        oldest = max(0, last.round + 1 - self.lag)
        past = {name: t for name, t in past.items() if int(name.split("/")[1]) >= oldest}
        prefix = f"past/{oldest}/"
        reference = last.adapter.with_tensors(
            {name.removeprefix(prefix): t for name, t in past.items() if name.startswith(prefix)}
        )
        rest = {k: v for k, v in state.memory.items() if not k.startswith("past/")}
        return ServerState(Broadcast(last.round + 1, reduced.mean, reference), rest | past)


@register
@dataclass(frozen=True)
class AsPublished(FedRot):
    """FedRot-LoRA as its published code has it, to see what the differences do.

    At strength 1 the rotation is the hard one in O(r), without the determinant's fix; it is cast to half precision
    before it is applied; clients are weighted by the rows they processed. The rotation is not reported, since it is
    not one to the precision that is checked, so diagnostics see the factors after alignment only.
    """

    name: ClassVar[str] = "as_published"
    paper: ClassVar[str] = "the published code of arXiv 2602.23638"
    weighting: ClassVar[Weighting | None] = "used"
    capabilities: ClassVar[Capabilities] = replace(_CONTROL, mixed_ranks=False, reports_turn=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        strange = {"factor": self.factor == "joint", "softening": self.softening != "linear", "guard": self.guard}
        for key in [k for k, given in strange.items() if given] + ["strength"] * (self.strength == "auto"):
            raise RecipeError(f"method.{key}: the published code has no {getattr(self, key)!r}; leave it out")

    def client(self, local: Adapter, broadcast: Broadcast, seat: Seat, rng: torch.Generator) -> ClientResult:
        """(R^T A_i, B_i R) with the rotation in half precision."""
        factor = self.aligned_factor(broadcast.round)
        if factor is None:
            return ClientResult(local, state=seat.state)
        same_layers(local, broadcast.frame)
        rotations = {}
        for name, pair in local.layers.items():
            reference = broadcast.frame.layers[name]
            if self.strength == 1.0:
                left, right = (pair.a, reference.a.mT) if factor == "A" else (pair.b.mT, reference.b)
                u, _, vh = torch.linalg.svd(left @ right)
                rotations[name] = (u @ vh).half()
        if not rotations:
            soft = find_rotations(local, broadcast.frame, factor, self.strength)
            rotations = {name: r.half() for name, r in soft.items()}
        return ClientResult(rotate(local, {n: r.double() for n, r in rotations.items()}), state=seat.state)
