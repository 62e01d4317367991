"""Alignment: turn a client's factors into the frame of a reference before they are averaged.

(B R)(R^T A) = B A for every rotation R, so turning changes nothing about a client's update; it changes what the
average of several clients' factors keeps. arXiv 2602.23638.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter, same_form, stacks
from fedrot.core.errors import AdapterError, FedrotError, choices
from fedrot.core.linalg import procrustes, soften

Factor = Literal["A", "B"]
Rotations = Mapping[str, Tensor]  # layer name -> (r, r) float64, in SO(r)


def align(
    adapter: Adapter,
    reference: Adapter,
    factor: Factor = "A",
    strength: float = 0.4,
    keep_dtype: bool = False,
) -> Adapter:
    """Turn every layer's factors towards the reference's frame; every layer's product B A stays what it was.

    For each layer R = argmin over SO(r) of ||R^T A - A_ref|| (factor 'A') or ||B R - B_ref|| (factor 'B'), softened to
    `strength`, and the result is (R^T A, B R). The head is not touched.

    Args:
        adapter: the factors to turn, e.g. a client's after local training.
        reference: the factors to turn towards, with the same layers and shapes, e.g. the last broadcast.
        factor: which factor is matched to the reference's.
        strength: lambda in [0, 1]; 0 leaves the adapter as it is, 1 turns all the way.
        keep_dtype: give the factors back in their own dtype. By default half-precision factors come back as float32,
            because rounding them again would keep B A only to half precision.

    Raises:
        ValueError: strength outside [0, 1] or not finite, an unknown factor, other layers, shapes or ranks.
    """
    same_layers(adapter, reference)
    return rotate(adapter, find_rotations([adapter], reference, factor, strength)[0], keep_dtype)


def same_layers(adapter: Adapter, reference: Adapter) -> None:
    """Raise unless both have the same layers of the same shapes; the heads may differ, they are never rotated."""
    same_form(replace(adapter, head={}), replace(reference, head={}))


def check_finite(adapter: Adapter) -> None:
    """Raise `AdapterError` naming the first tensor that holds NaN or infinite values."""
    for name, tensor in adapter.tensors():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{name} holds values that are not finite (NaN or infinite)")


def check_strength(strength: float) -> float:
    """`strength` as a float in [0, 1], or `FedrotError`."""
    try:
        value = float(strength)
    except (TypeError, ValueError):
        raise FedrotError(f"strength must be a number in [0, 1], got {strength!r}") from None
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise FedrotError(f"strength must be in [0, 1], got {strength!r}")
    return value


def find_rotations(
    adapters: Sequence[Adapter], reference: Adapter, factor: Factor, strength: float
) -> list[dict[str, Tensor]]:
    """The softened Procrustes rotation of every adapter and layer, layers of equal shape in one batched SVD.

    All adapters have the reference's layers and shapes. Returns one mapping layer -> (r, r) float64 an adapter.
    """
    strength = check_strength(strength)
    for adapter in (*adapters, reference):
        check_finite(adapter)
    if factor not in get_args(Factor):
        raise FedrotError(f"factor must be {choices(get_args(Factor))}, got {factor!r}")
    found: list[dict[str, Tensor]] = [{} for _ in adapters]
    for stack in stacks([*adapters, reference], torch.float64):
        pairs = [adapter.layers[name] for adapter in (*adapters, reference) for name in stack.names]
        eps = max(torch.finfo(pair.a.dtype).eps for pair in pairs)
        # The reference is the last of the stack; slicing keeps its dimension, so it broadcasts over the adapters.
        a, b, a_ref, b_ref = stack.a[:-1], stack.b[:-1], stack.a[-1:], stack.b[-1:]
        left, right = (a, a_ref.mT) if factor == "A" else (b.mT, b_ref)
        rotation = soften(procrustes(left @ right, _noise(eps, left, right)), strength)
        for one, rotations in zip(found, rotation, strict=True):
            one.update(zip(stack.names, rotations, strict=True))
    return found


def _noise(eps: float, left: Tensor, right: Tensor) -> Tensor:  # (N, L)
    """The level in left @ right that comes from the factors' own rounding, whose errors average out over the inner
    dimension: below it a direction says nothing.
    """
    return eps * left.norm(dim=(-2, -1)) * right.norm(dim=(-2, -1)) / math.sqrt(left.shape[-2] * left.shape[-1])


def rotate(adapter: Adapter, rotations: Rotations, keep_dtype: bool = False) -> Adapter:
    """(R^T A, B R) for every layer, computed and returned in at least float32 unless `keep_dtype`."""
    layers = {}
    for name, pair in adapter.layers.items():
        r = rotations[name]
        a, b = _times(r.mT, pair.a), _times(pair.b, r)
        if keep_dtype:
            a, b = a.to(pair.a.dtype), b.to(pair.b.dtype)
        layers[name] = replace(pair, a=a, b=b)
    return replace(adapter, layers=layers)


def rotate_back(adapter: Adapter, rotations: Rotations) -> Adapter:
    """The inverse of `rotate`: the factors as they were before alignment. No rotations: the adapter itself."""
    if not rotations:
        return adapter
    return rotate(adapter, {name: r.mT for name, r in rotations.items()})


def _times(left: Tensor, right: Tensor) -> Tensor:
    """Left @ right in the wider of float32 and the factor's own dtype; one of both is a float64 rotation."""
    factor = right if left.dtype == torch.float64 and right.dtype != torch.float64 else left
    dtype = torch.promote_types(factor.dtype, torch.float32)
    return left.to(dtype) @ right.to(dtype)
