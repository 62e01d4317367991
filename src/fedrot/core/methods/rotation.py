"""Methods that turn each client's factors into a common frame before the factors are averaged."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from fedrot.core.adapter import Adapter
from fedrot.core.alignment import (
    Factor,
    Softening,
    Strength,
    check_strength,
    find_rotations,
    rotate,
    same_layers,
)
from fedrot.core.errors import RecipeError
from fedrot.core.methods.base import Broadcast, Capabilities, ClientResult, Method, Seat, register

Schedule = Literal["alternate", "A", "B", "joint"]


@register
@dataclass(frozen=True)
class FedRot(Method):
    """FedRot-LoRA: each client turns its factors towards the broadcast, then the server averages as FedIT does.

    Per layer R = argmin over SO(r) of ||R^T A_i - A_ref|| or ||B_i R - B_ref||, softened to `strength`; the client
    uploads (R^T A_i, B_i R), whose product is unchanged. Round 0 is not rotated, since B_ref = 0 there.

    Deviations: hard and soft rotations are both in SO(r) (the published code's hard path is in O(r)); rotations are
    found in float64 and applied in float32 or better; directions in which the correlation holds nothing but rounding
    are left as they are. `joint`, `regularised`, `guard` and `auto` are not the paper's; the defaults are.
    """

    name: ClassVar[str] = "fedrot"
    paper: ClassVar[str] = "arXiv 2602.23638"
    needs_reference: ClassVar[bool] = True
    capabilities: ClassVar[Capabilities] = Capabilities(reduction="sum")

    strength: Strength = 0.4
    """How far to turn, in [0, 1]: 0 is FedIT, 1 the full rotation. The paper found 0.4 to 0.6 best mostly. auto: as far
    as brings both factors together nearest to the broadcast, layer by layer, under the guard."""
    factor: Schedule = "alternate"
    """Which factor is matched: 'alternate' is A in odd and B in even rounds (the paper's), 'A' or 'B' only that one,
    'joint' both in one Procrustes problem, each over its mean squared residual."""
    softening: Softening = "linear"
    """How a strength below 1 is reached: 'linear' is the paper's; 'regularised' turns each direction only as far as
    the data say."""
    guard: bool = False
    """Leave a layer as it is where turning would not bring both factors together nearer to the broadcast by more than
    noise does: B's early reference is noise, and turning to it multiplies the error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            check_strength(self.strength)
        except ValueError as problem:
            raise RecipeError(f"method.{problem}") from None

    @classmethod
    def standalone(cls, **settings: Any) -> "FedRot":
        """Outside rounds there is nothing to alternate with: A unless 'A' or 'B' is given."""
        method = cls(**{"factor": "A", **settings})
        if method.factor == "alternate":
            raise RecipeError("factor 'alternate' needs rounds; choose A, B or joint")
        return method

    def aligned_factor(self, round: int) -> Factor | None:
        """The factor that is matched in this round; None where factors are left as they are."""
        if round == 0 or self.strength == 0.0:
            return None
        if self.factor == "alternate":
            return "A" if round % 2 else "B"
        return self.factor

    def client(self, local: Adapter, broadcast: Broadcast, seat: Seat, rng: torch.Generator) -> ClientResult:
        """(R^T A_i, B_i R) for every layer, with the rotations beside it."""
        factor = self.aligned_factor(broadcast.round)
        if factor is None:
            return ClientResult(local, state=seat.state)
        same_layers(local, broadcast.frame)
        rotations = find_rotations(local, broadcast.frame, factor, self.strength, self.softening, self.guard)
        return ClientResult(rotate(local, rotations), rotations, seat.state)
