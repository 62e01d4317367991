"""Alignment: turn a client's factors into the frame of a reference before they are averaged.

(B R)(R^T A) = B A for every rotation R, so turning changes nothing about a client's update; it changes what the
average of several clients' factors keeps. arXiv 2602.23638.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair, same_form, stacks
from fedrot.core.errors import AdapterError, FedrotError
from fedrot.core.linalg import procrustes, regularised, soften
from fedrot.core.typed import check_type

Factor = Literal["A", "B", "joint"]
Softening = Literal["linear", "regularised"]
Strength = float | Literal["auto"]
Rotations = Mapping[str, Tensor]  # layer name -> (r, r) float64, in SO(r)

# The strengths that 'auto' chooses from, beside 0.
_STRENGTHS = (0.25, 0.5, 0.75, 1.0)


def align(
    adapter: Adapter,
    reference: Adapter,
    factor: Factor = "A",
    strength: Strength = 0.4,
    keep_dtype: bool = False,
    softening: Softening = "linear",
    guard: bool = False,
) -> Adapter:
    """Turn every layer's factors towards the reference's frame; every layer's product B A stays what it was.

    For each layer R = argmin over SO(r) of ||R^T A - A_ref|| (factor 'A'), ||B R - B_ref|| ('B') or both, each over
    its mean squared residual ('joint'), softened to `strength`; the result is (R^T A, B R). The head is not touched.

    Args:
        adapter: the factors to turn, e.g. a client's after local training. No gradient goes through the result.
        reference: the factors to turn towards, with the same layers and shapes, e.g. the last broadcast.
        factor: which factor is matched to the reference's.
        strength: lambda in [0, 1]; 0 leaves the adapter as it is, 1 turns all the way. 'auto' takes, layer by layer,
            the strength that brings both factors together nearest to the reference, under the guard.
        keep_dtype: give the factors back in their own dtype. By default half-precision factors come back as float32,
            because rounding them again would keep B A only to half precision.
        softening: 'linear' is the paper's, the rotation nearest to (1 - lambda) I + lambda R; 'regularised' turns each
            direction only as far as the data say (`linalg.regularised`).
        guard: leave a layer as it is where turning would not bring both factors together nearer to the reference by
            more than noise does (`worth_turning`).

    Raises:
        ValueError: strength outside [0, 1] or not finite, an unknown factor, an argument of another type, other layers,
            shapes or ranks.
    """
    check_type("keep_dtype", keep_dtype, bool)
    adapter, reference = adapter.map(Tensor.detach), reference.map(Tensor.detach)
    same_layers(adapter, reference)
    return rotate(adapter, find_rotations(adapter, reference, factor, strength, softening, guard), keep_dtype)


def same_layers(adapter: Adapter, reference: Adapter) -> None:
    """Raise unless both have the same layers of the same shapes; the heads may differ, they are never rotated."""
    same_form(replace(adapter, head={}), replace(reference, head={}))


def check_finite(adapter: Adapter) -> None:
    """Raise `AdapterError` naming the first tensor that holds NaN or infinite values."""
    for name, tensor in adapter.tensors():
        # One pass: a sum is not finite if a number is not. That of finite ones can overflow, so then it is looked at.
        if not math.isfinite(tensor.sum()) and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{name} holds values that are not finite (NaN or infinite)")


def check_strength(strength: Strength) -> Strength:
    """`strength` as a float in [0, 1] or 'auto', or `FedrotError`."""
    check_type("strength", strength, Strength)
    if strength == "auto":
        return "auto"
    if not 0 <= strength <= 1:
        raise FedrotError(f"strength must be in [0, 1] or 'auto', got {strength!r}")
    return float(strength)


def find_rotations(
    adapter: Adapter,
    reference: Adapter,
    factor: Factor,
    strength: Strength,
    softening: Softening = "linear",
    guard: bool = False,
) -> dict[str, Tensor]:
    """The softened rotation of every layer, (r, r) float64, layers of equal shape in one batched SVD; see `align`.

    The adapter has the reference's layers and shapes.
    """
    strength = check_strength(strength)
    for what, value, kind in (("factor", factor, Factor), ("softening", softening, Softening), ("guard", guard, bool)):
        check_type(what, value, kind)
    for one in (adapter, reference):
        check_finite(one)
    if factor == "joint" or guard or strength == "auto":
        return _weighed_rotations(adapter, reference, factor, strength, softening, guard)
    by_rank: dict[int, list[str]] = {}
    for name, pair in adapter.layers.items():
        by_rank.setdefault(pair.rank, []).append(name)
    found: dict[str, Tensor] = {}
    for names in by_rank.values():
        # Factors are read where they lie: putting them side by side would cost more than all the rest.
        sides = [_sides(adapter.layers[name], reference.layers[name], factor) for name in names]
        m, left2, right2 = (torch.stack(t) for t in zip(*(_inner(*both) for both in sides), strict=True))
        # The level of rounding noise in m, as in `_noise`.
        eps = [max(torch.finfo(t.dtype).eps for t in both) / math.sqrt(both[0].numel()) for both in sides]
        noise = (left2 * right2).sqrt() * torch.tensor(eps, dtype=m.dtype, device=m.device)
        found.update(zip(names, _turned(m, noise, strength, softening), strict=True))
    return found


def _turned(m: Tensor, noise: Tensor, strength: float, softening: Softening) -> Tensor:  # (L, r, r)
    """The softened rotations for the correlations m (L, r, r), whose rounding noise is at the levels `noise` (L)."""
    if softening == "regularised":
        return regularised(m, strength, noise)
    return soften(procrustes(m, noise), strength)


def _sides(pair: LoraPair, reference: LoraPair, factor: Factor) -> tuple[Tensor, Tensor]:
    """The factor and the reference's, (r, d) each, so that M = left right^T."""
    return (pair.a, reference.a) if factor == "A" else (pair.b.mT, reference.b.mT)


# Columns that are widened to float64 at a time, so that the copy stays in the processor's cache.
_COLUMNS = 4096


def _inner(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (r, d), (r, d) -> (r, r), (), ()
    """Left right^T and both squared norms, in float64."""
    pieces = []
    for start in range(0, left.shape[1], _COLUMNS):
        one, other = (t[:, start : start + _COLUMNS].double() for t in (left, right))
        pieces.append((one @ other.mT, torch.linalg.vector_norm(one), torch.linalg.vector_norm(other)))
    if len(pieces) == 1:
        m, mine, theirs = pieces[0]
        return m, mine.square_(), theirs.square_()
    m, mine, theirs = (torch.stack(t) for t in zip(*pieces, strict=True))
    return m.sum(0), mine.square().sum(), theirs.square().sum()


def _weighed_rotations(
    adapter: Adapter, reference: Adapter, factor: Factor, strength: Strength, softening: Softening, guard: bool
) -> dict[str, Tensor]:
    """Rotations for which both factors are weighed against each other."""
    found: dict[str, Tensor] = {}
    for stack in stacks([adapter, reference], torch.float64):
        pairs = [one.layers[name] for one in (adapter, reference) for name in stack.names]
        eps = max(torch.finfo(pair.a.dtype).eps for pair in pairs)
        (a, a_ref), (b, b_ref) = stack.a, stack.b
        m, noise = _correlation(a, b, a_ref, b_ref, factor, eps)
        worth = partial(worth_turning, a=a, b=b, a_ref=a_ref, b_ref=b_ref, eps=eps)
        if strength == "auto":
            tried = torch.stack([_turned(m, noise, lam, softening) for lam in _STRENGTHS])
            best = torch.stack([worth(one) for one in tried]).argmax(0)
            rotation = tried.gather(0, best[None, :, None, None].expand(1, *tried.shape[1:]))[0]
        else:
            rotation = _turned(m, noise, strength, softening)
        if guard or strength == "auto":
            eye = torch.eye(a.shape[-2], dtype=a.dtype, device=a.device)
            share = (a.shape[-2] - 1) / (2 * (a.shape[-1] + b.shape[-2]))
            rotation = torch.where((worth(rotation) > 0.5 * share)[:, None, None], rotation, eye)
        found.update(zip(stack.names, rotation, strict=True))
    return found


def worth_turning(
    rotation: Tensor,  # (L, r, r)
    a: Tensor,  # (L, r, d_in)
    b: Tensor,  # (L, d_out, r)
    a_ref: Tensor,
    b_ref: Tensor,
    eps: float,
) -> Tensor:  # (L)
    """By which share turning lowers the squared distance of both factors to the reference, the lesser of two measures.

    In the plain distance ||A - A_ref||^2 + ||B - B_ref||^2 a gradient step is orthogonal to the orbit of frames, so
    after plain gradient descent no turn lowers it: what turns one factor to the reference takes from the other. With
    each factor over its mean squared residual, as for 'joint', a turn that follows one factor's noise costs the other
    more than it gains. Isotropic noise alone would give the turning directions (r - 1) / (2 (d_in + d_out)) of either:
    half of that is what a turn must bring under the guard.
    """
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    inner = [a @ a_ref.mT, b.mT @ b_ref]
    distance2 = [(a - a_ref).square().sum((-2, -1)), (b - b_ref).square().sum((-2, -1))]
    shares = []
    for weights in ([torch.ones_like(d) for d in distance2], _weights(a, b, a_ref, b_ref, eps)):
        # ||R^T A - A_ref||^2 = ||A||^2 + ||A_ref||^2 - 2 tr(R^T A A_ref^T), and likewise for B.
        fall = sum(2 * w * ((rotation - eye) * m).sum((-2, -1)) for w, m in zip(weights, inner, strict=True))
        whole = sum(w * d for w, d in zip(weights, distance2, strict=True))
        shares.append(fall / torch.as_tensor(whole).clamp_min(torch.finfo(a.dtype).tiny))
    return torch.minimum(shares[0], shares[1])


def _weights(a: Tensor, b: Tensor, a_ref: Tensor, b_ref: Tensor, eps: float) -> list[Tensor]:
    """One over the mean squared residual of A and of B, (L) each."""
    found = []
    for x, y in ((a, a_ref), (b, b_ref)):
        # A factor that stayed where it was would count without limit: its residual is taken as rounding's at least.
        least = (eps * y.norm(dim=(-2, -1))).square() / (y.shape[-2] * y.shape[-1])
        found.append(1 / torch.maximum((x - y).square().mean((-2, -1)), least.clamp_min(torch.finfo(y.dtype).tiny)))
    return found


def _correlation(
    a: Tensor, b: Tensor, a_ref: Tensor, b_ref: Tensor, factor: Factor, eps: float
) -> tuple[Tensor, Tensor]:  # (L, r, r), (L)
    """What the rotation maximises its trace with, and the level of rounding noise in it."""
    sides = {"A": (a, a_ref.mT), "B": (b.mT, b_ref)}
    if factor != "joint":
        left, right = sides[factor]
        return left @ right, _noise(eps, left, right)
    m, noise = torch.zeros(()), torch.zeros(())
    for (left, right), weight in zip(sides.values(), _weights(a, b, a_ref, b_ref, eps), strict=True):
        m = m + weight[:, None, None] * (left @ right)
        noise = noise + weight * _noise(eps, left, right)
    return m, noise


def _noise(eps: float, left: Tensor, right: Tensor) -> Tensor:  # (L)
    """The level in left @ right that comes from the factors' own rounding, whose errors average out over the inner
    dimension: below it a direction says nothing.
    """
    return eps * left.norm(dim=(-2, -1)) * right.norm(dim=(-2, -1)) / math.sqrt(left.shape[-2] * left.shape[-1])


def rotate(adapter: Adapter, rotations: Rotations, keep_dtype: bool = False) -> Adapter:
    """(R^T A, B R) for every layer, computed and returned in at least float32 unless `keep_dtype`."""
    layers = {}
    for name, pair in adapter.layers.items():
        dtype = torch.promote_types(pair.a.dtype, torch.float32)
        r = rotations[name].to(dtype)
        a, b = r.mT @ pair.a.to(dtype), pair.b.to(dtype) @ r
        layers[name] = (
            replace(pair, a=a.to(pair.a.dtype), b=b.to(pair.b.dtype)) if keep_dtype else replace(pair, a=a, b=b)
        )
    return replace(adapter, layers=layers)


def rotate_back(adapter: Adapter, rotations: Rotations) -> Adapter:
    """The inverse of `rotate`: the factors as they were before alignment. No rotations: the adapter itself."""
    if not rotations:
        return adapter
    return rotate(adapter, {name: r.mT for name, r in rotations.items()})
