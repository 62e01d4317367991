"""Clients of different rank: a narrow adapter is a part of the global one, in a frame of its own.

A client of rank q < r gets P (q x r) with orthonormal rows and trains (P A, B P^T); what it sends back is
(P^T A_i + (I - P^T P) A, B_i P), whose product is B_i A_i exactly, at the global rank, since B_i P (I - P^T P) = 0.
From there on it is an adapter like any other, which can be turned and averaged. What P leaves out of the update counts
as zero in an average, so the higher ranks of few clients are diluted by the many narrow ones; the rows of A that it
leaves out stay as they are, since where both A and B are zero no later round would learn anything.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter, stacks
from fedrot.core.errors import RecipeError
from fedrot.core.linalg import product_norm2

# An eigenvalue of B^T B below this share of the largest is rounding: float32's, squared, with room.
_NO_PART = 1e-12
Frames = Mapping[str, Tensor]  # layer name -> (q, r) float64 with orthonormal rows


def leading_frames(adapter: Adapter, rank: int) -> dict[str, Tensor]:
    """P by layer such that B P^T P A keeps most of B A.

    The better, layer by layer, of B's leading right singular vectors, which keep everything where B has no higher rank
    (as a narrow client's own B has), and the leading eigenvectors of G^(1/2) B^T B G^(1/2), G = A A^T; both are best
    where the rows of A are orthogonal and alike, as they nearly are at the start. While B = 0 it is the first `rank`
    components. Raises `RecipeError` where the adapter's own rank is smaller.
    """
    frames: dict[str, Tensor] = {}
    for stack in stacks([adapter], torch.float64):
        a, b = stack.a[0], stack.b[0]
        _check(rank, a.shape[-2])
        values, q = torch.linalg.eigh(a @ a.mT)
        root = q @ torch.diag_embed(values.clamp_min(0).sqrt()) @ q.mT
        tried = torch.stack([_leading(b.mT @ b, rank), _leading(root @ (b.mT @ b) @ root, rank)])
        lost = product_norm2(b - b @ tried.mT @ tried, a)  # (2, L)
        found = torch.where((lost[0] <= lost[1])[:, None, None], tried[0], tried[1])
        empty = (b == 0).all(-1).all(-1)[:, None, None]
        frames.update(zip(stack.names, torch.where(empty, _first(rank, a.shape[-2]), found), strict=True))
    return frames


def _leading(gram: Tensor, rank: int) -> Tensor:  # (L, r, r) -> (L, rank, r)
    _, vectors = torch.linalg.eigh(gram)
    found = vectors.flip(-1)[..., :rank].mT
    # Eigenvectors have no sign of their own; this one does not depend on the linear algebra's library.
    return found * torch.where(found.sum(-1, keepdim=True) < 0, -1.0, 1.0)


def first_frames(adapter: Adapter, rank: int) -> dict[str, Tensor]:
    """P by layer that keeps the first `rank` components, as HetLoRA's truncation does."""
    for pair in adapter.layers.values():
        _check(rank, pair.rank)
    return {name: _first(rank, pair.rank) for name, pair in adapter.layers.items()}


def cut(adapter: Adapter, frames: Frames, scale: float) -> Adapter:
    """(P A, B P^T) at the client's own `scale`, into which B's values are converted."""
    layers = {}
    for name, pair in adapter.layers.items():
        p = frames[name].to(pair.a.dtype)
        layers[name] = replace(pair, a=p @ pair.a, b=pair.b @ p.mT * (pair.scale / scale), scale=scale)
    return replace(adapter, layers=layers)


def pad(adapter: Adapter, frames: Frames, form: Adapter) -> Adapter:
    """(P^T A, B P) at the scale of `form`: the same update at the global rank."""
    layers = {}
    for name, pair in adapter.layers.items():
        p, scale = frames[name].to(pair.a.dtype), form.layers[name].scale
        layers[name] = replace(pair, a=p.mT @ pair.a, b=pair.b @ p * (pair.scale / scale), scale=scale)
    return replace(adapter, layers=layers)


def put_back(adapter: Adapter, frames: Frames, start: Adapter, beside: bool = False) -> Adapter:
    """(P^T A + (I - P^T P) A_start, B P) at the scale of `start`, which was cut by these frames: the same update as the
    padded one's, with what was left out of A as it was.

    With `beside`, for an A that is averaged beside the B of `start`: B A_sent must be B P^T A, so of what was left out
    only what B maps to zero stays, N (I - P^T P) A_start with N onto B's null space.
    """
    padded = pad(adapter, frames, start)
    layers = {}
    for name, pair in padded.layers.items():
        p, was = frames[name].to(pair.a.dtype), start.layers[name]
        left_out = was.a - p.mT @ (p @ was.a)
        layers[name] = replace(pair, a=pair.a + (_unread(was.b, left_out) if beside else left_out))
    return replace(padded, layers=layers)


def _unread(b: Tensor, a: Tensor) -> Tensor:  # (d_out, r), (r, d_in) -> (r, d_in)
    """The part of A that B maps to zero."""
    values, vectors = torch.linalg.eigh(b.double().mT @ b.double())
    null = vectors[:, values <= _NO_PART * values[-1]]
    return (null @ (null.mT @ a.double())).to(a.dtype)


def _first(rank: int, of: int) -> Tensor:
    return torch.eye(of, dtype=torch.float64)[:rank]


def _check(rank: int, of: int) -> None:
    if not 1 <= rank <= of:
        raise RecipeError(f"a client's rank must be from 1 to the adapter's own, {of}; got {rank}")
