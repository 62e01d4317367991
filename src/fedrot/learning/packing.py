"""Examples without padding: they lie one after the other in a single row, and only attention tells them apart.

Every layer but attention treats tokens one by one, so it takes the row as it is. For attention the tokens are spread
out into a few small padded blocks of like lengths, which attend within themselves, and collected again: what a mask
of T x T blocks on the diagonal would say, without the T x T. Positions count from the start of each example.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ATTENTION = "fedrot_packed"  # its name among the attention functions of transformers

# A block takes in shorter examples while at least this share of its places holds tokens.
_FILLED = 0.87


@dataclass(frozen=True)
class Block:
    """Some examples, padded to one length."""

    examples: int
    length: int
    mask: Tensor | None  # (examples, 1, 1, length) bool, true where there is a token; None: everywhere


@dataclass(frozen=True)
class Packing:
    """Where the T tokens of a row go among the P >= T places of the blocks."""

    blocks: tuple[Block, ...]
    token: Tensor  # (P) the token at each place; at an empty one its example's first
    empty: Tensor  # places that hold no token
    place: Tensor  # (T) the place of each token
    starts: Tensor  # (n) each example's first token

    def to(self, device: torch.device) -> "Packing":
        """The same on another device."""
        blocks = tuple(Block(b.examples, b.length, None if b.mask is None else b.mask.to(device)) for b in self.blocks)
        moved = [t.to(device) for t in (self.token, self.empty, self.place, self.starts)]
        return Packing(blocks, *moved)


def pack(lengths: NDArray[np.int64]) -> Packing:
    """The packing of examples of these lengths, each at least 1, in this order."""
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    place = np.empty(int(lengths.sum()), dtype=np.int64)
    blocks, tokens, empty, used = [], [], [], 0
    for members in _alike(lengths):
        length = int(lengths[members[0]])
        column = np.arange(length)
        filled = column < lengths[members][:, None]  # (examples, length)
        first = starts[members][:, None]
        # An empty place repeats its own example: 0 x NaN is NaN, so a mask does not keep out what another one holds.
        token = np.where(filled, first + column, first)
        here = used + np.arange(token.size).reshape(token.shape)
        place[token[filled]] = here[filled]
        empty.append(here[~filled])
        tokens.append(token.ravel())
        whole = bool(filled.all())
        blocks.append(Block(len(members), length, None if whole else torch.from_numpy(filled)[:, None, None, :]))
        used += token.size
    arrays = (np.concatenate(tokens), np.concatenate(empty), place, starts)
    return Packing(tuple(blocks), *(torch.from_numpy(a) for a in arrays))


def _alike(lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Examples of like length, longest first: each group wastes little when padded to its first member."""
    order = np.argsort(-lengths, kind="stable")
    groups, first, tokens = [], 0, 0
    for i, example in enumerate(order):
        tokens += int(lengths[example])
        if tokens < _FILLED * int(lengths[order[first]]) * (i + 1 - first):
            groups.append(order[first:i])
            first, tokens = i, int(lengths[example])
    return [*groups, order[first:]]


class _Spread(torch.autograd.Function):
    """(T, ...) tokens -> (examples, length, ...) for every block. The gradient of an empty place is dropped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> tuple[Tensor, ...]:
        ctx.packing = packing
        parts = x.index_select(0, packing.token).split([b.examples * b.length for b in packing.blocks])
        return tuple(p.unflatten(0, (b.examples, b.length)) for p, b in zip(parts, packing.blocks, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _joined([g.flatten(0, 1) for g in grads]).index_select(0, ctx.packing.place), None


class _Collect(torch.autograd.Function):
    """(P, ...) places -> (T, ...) tokens, the inverse of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x.index_select(0, packing.place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.packing.token).index_fill_(0, ctx.packing.empty, 0.0), None


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, T, width)
    key: Tensor,  # (1, key heads, T, width)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    packing: Packing | None = None,
    **_: Any,
) -> tuple[Tensor, None]:  # (1, T, heads, width)
    """Attention of every example to itself alone, in the form that transformers calls it."""
    if packing is None:
        raise ValueError("packed attention needs the packing of the row")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # Under autocast on a CPU: PyTorch's attention is slow in bfloat16 there, its backward pass by six times.
    exact = query.device.type == "cpu" and query.dtype == torch.bfloat16
    spread = [_Spread.apply(t[0].transpose(0, 1), packing) for t in (query, key, value)]  # type: ignore[no-untyped-call]
    groups = query.shape[1] // key.shape[1]
    found = []
    for block, *parts in zip(packing.blocks, *spread, strict=True):
        q, k, v = (part.transpose(1, 2) for part in parts)  # (examples, heads, length, width)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        # Where attention is causal, the empty places are behind every token and need no mask.
        mask = None if causal else block.mask
        with torch.autocast("cpu", enabled=False) if exact else nullcontext():
            q, k, v = (t.float() if exact else t for t in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scaling)
        found.append(out.to(query.dtype).transpose(1, 2).flatten(0, 1))
    return _Collect.apply(_joined(found), packing)[None], None  # type: ignore[no-untyped-call]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def register() -> None:
    """Make the attention function known to transformers under its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
