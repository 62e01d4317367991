"""Dropout whose masks have names: equal (seed, round, client, step, layer), equal mask, whatever else runs."""

import torch
from torch import Tensor, nn

from fedrot.core.seeding import generator


class KeyedDropout(nn.Module):
    """Inverted dropout on the input of one adapted layer.

    Inactive until `key` is set; the trainer sets it before every step and clears it at the end. The mask is drawn
    afresh from the key at each call, so gradient checkpointing sees the same mask twice.
    """

    def __init__(self, p: float, layer: str) -> None:
        super().__init__()
        self.p = p
        self.layer = layer
        self.key: tuple[int | str, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x` of any shape, with a share p of its entries zeroed and the rest scaled by 1 / (1 - p)."""
        if self.key is None or self.p == 0.0:
            return x
        keep = torch.empty(x.shape).bernoulli_(1.0 - self.p, generator=generator(*self.key, self.layer))
        return x * keep.mul_(1.0 / (1.0 - self.p)).to(x.device, x.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"p={self.p}, layer={self.layer!r}"
