"""Dropout whose masks have names: equal (seed, round, client, step, layer), equal mask, whatever else runs."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedrot.core.seeding import seed_of

Key = tuple[int | str, ...]
_LEVELS = 1 << 16


def dropped_share(p: float) -> float:
    """The share that is dropped where p was asked for: masks are drawn from 16 bits an entry."""
    return _level(p) / _LEVELS


def _level(p: float) -> int:
    return min(round(p * _LEVELS), _LEVELS - 1)


def keep_mask(key: Key, layer: str, p: float, tokens: int, width: int) -> Tensor:  # (tokens, width) bool
    """True for what is kept of the tokens' features, in the order of the batch's examples.

    Masks belong to tokens and not to places in a padded tensor: a batch has the same ones however it lies in memory.
    """
    words = -(-tokens * width // 4)
    drawn = np.random.SFC64(seed_of(*key, layer)).random_raw(words).view(np.uint16)[: tokens * width]
    return torch.from_numpy(drawn >= _level(p)).view(tokens, width)


@dataclass(frozen=True)
class Layout:
    """How the T tokens of a batch of n examples lie among the rows that a layer sees."""

    rows: int  # rows of a layer that sees everything, padding counted
    read: Tensor  # (U) the tokens that the head looks at, one of each example or several: what a layer behind it sees
    places: Tensor | None = None  # (T) each token's row; None: the rows are the tokens

    def of_rows(self, keep: Tensor, rows: int) -> Tensor:  # (rows, width) bool
        """The tokens' mask (T, width) as a layer with so many rows needs it; padding is kept."""
        if rows != self.rows:
            return keep[self.read]
        if self.places is None:
            return keep
        return torch.ones(rows, keep.shape[1], dtype=torch.bool).index_copy_(0, self.places, keep)


class KeyedDropout(nn.Module):
    """Inverted dropout on the input of one adapted layer.

    Inactive until `key` is set. The mask is drawn afresh from the key at each call, so gradient checkpointing sees the
    same mask twice. Without a `layout` every row is a token.
    """

    def __init__(self, p: float, layer: str) -> None:
        super().__init__()
        self.p = p
        self.layer = layer
        self.key: Key | None = None
        self.layout: Layout | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., width), with a share p of its entries zeroed and the rest scaled by 1 / (1 - p)."""
        if self.key is None or self.p == 0.0:
            return x
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        tokens = rows if self.layout is None or self.layout.places is None else len(self.layout.places)
        keep = keep_mask(self.key, self.layer, self.p, tokens, width)
        if self.layout is not None:
            keep = self.layout.of_rows(keep, rows)
        scale = 1.0 / (1.0 - dropped_share(self.p))
        return x * keep.view(x.shape).to(x.device, x.dtype).mul_(scale)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"p={self.p}, layer={self.layer!r}"
