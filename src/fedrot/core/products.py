"""Weighted sums of clients' updates, kept as factors: sum_i p_i s_i B_i A_i is never formed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedrot.core.adapter import Adapter, LoraPair, stacks


@dataclass(frozen=True)
class Products:
    """Layers of one shape, each a weighted sum of N updates of rank r: `b @ a`, scales and weights folded in."""

    names: tuple[str, ...]  # L layer names
    b: Tensor  # (L, d_out, N r) float64
    a: Tensor  # (L, N r, d_in) float64
    rank: int  # r


def weighted_products(factors: Sequence[tuple[float, Adapter]]) -> Iterator[Products]:
    """sum_i p_i s_i B_i A_i of all layers. The adapters have one form but for their scales; weights may be negative."""
    adapters = [adapter for _, adapter in factors]
    weights = torch.tensor([p for p, _ in factors], dtype=torch.float64)
    for stack in stacks(adapters, torch.float64):
        p = weights.to(stack.a.device).reshape(-1, 1, 1, 1)
        size = p.abs().sqrt()
        b = stack.b * stack.scale[..., None, None] * size * p.sign()
        yield Products(stack.names, wide(b, -1), wide(stack.a * size, -2), stack.a.shape[-2])


def wide(stacked: Tensor, dim: int) -> Tensor:
    """(N, L, m, n) -> (L, m, N n) for dim -1, (L, N m, n) for dim -2: the clients' factors as one wide factor."""
    return torch.cat(list(stacked), dim=dim)


Pairs = Mapping[str, tuple[Tensor, Tensor]]  # layer name -> (b (d_out, k), a (k, d_in)), whose product is the update


def widened(
    b: Tensor,  # (..., d_out, k)
    a: Tensor,  # (..., k, d_in)
    rank: int,
) -> tuple[Tensor, Tensor]:  # (..., d_out, rank), (..., rank, d_in)
    """The same product with columns and rows of zeros up to `rank`, where a layer's sides are smaller than it."""
    more = rank - a.shape[-2]
    return (b, a) if more <= 0 else (pad(b, (0, more)), pad(a, (0, 0, 0, more)))


def refill(form: Adapter, pairs: Pairs) -> Adapter:
    """`form` with the updates `b @ a`: its scales taken out of b, its dtypes, its head."""
    layers = {}
    for name, pair in form.layers.items():
        b, a = widened(*pairs[name], pair.rank)
        layers[name] = replace(pair, a=a.to(pair.a.dtype), b=(b / pair.scale).to(pair.b.dtype))
    return replace(form, layers=layers)


def change_of(form: Adapter, pairs: Pairs) -> Adapter:
    """The updates `b @ a` as an adapter of their own: scale 1, no head, at whatever rank they have."""
    layers = {
        name: LoraPair(a.to(pair.a.dtype), b.to(pair.b.dtype), 1.0, pair.fan_in_fan_out)
        for name, pair in form.layers.items()
        for b, a in [pairs[name]]
    }
    return Adapter(layers)


def joined(first: Adapter, *others: Adapter) -> Adapter:
    """The sum of updates as one adapter of the summed rank, with the first one's scale, head and settings.

    A rank above min(d_out, d_in) buys nothing: there the sum is held as (identity, product) or (product, identity).
    """
    layers = {}
    for name, pair in first.layers.items():
        parts = [pair, *(other.layers[name] for other in others)]
        a = torch.cat([part.a for part in parts])
        b = torch.cat([part.b * (part.scale / pair.scale) for part in parts], dim=1)
        if a.shape[0] > min(b.shape[0], a.shape[1]):
            product = (b.double() @ a.double()).to(a.dtype)
            small = torch.eye(min(product.shape), dtype=a.dtype, device=a.device)
            b, a = (small, product) if product.shape[0] <= product.shape[1] else (product, small)
        layers[name] = replace(pair, a=a, b=b)
    return replace(first, layers=layers)
