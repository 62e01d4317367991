"""Compressed uploads: a client sends the change of its factors against the broadcast in fewer bits.

The change is small beside the factors, so a given number of bits says more of it than of them. What rounding loses may
be kept by the client and added to its next change (error feedback: Seide et al. 2014; Karimireddy et al., arXiv
1901.09847): sums over rounds then miss the last round's loss alone. Changes and what was lost of them are in the frame
of the broadcast; an upload that was turned by R is turned towards that frame, so what is kept from round to round keeps
its meaning as far as the broadcast's frame does (`Capabilities.keeps_frame`).

A payload is one flat uint8 tensor without a header: layout and codec say what each byte is. Numbers are little-endian.

none    the values themselves as float32, bit for bit; nothing is lost
bf16    the change, rounded to the nearest bfloat16 (ties to even): 2 bytes a number
int8    scales as float32, then one code a number: the change is scale * code with a code from -127 to 127. Rounding is
        stochastic, so the expected value is the change itself (QSGD: Alistarh et al., arXiv 1610.02132)

Each component of the rank, a row of A or a column of B, has a scale of its own, its largest change / 127: components
differ much in size, and a large entry then costs its own component alone precision. A tensor of the head has one for
each of its rows, a vector one in all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.errors import AdapterError
from fedrot.core.packed import Layout

Codec = Literal["none", "bf16", "int8"]

_LEVELS = 127  # codes are symmetric; -128 is none
_LARGEST = 2.0**121  # of a scale: 127 of it are a float32
_MOST_BF16 = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True)
class Compressed:
    """What a client sends, what the server makes of it, and what is lost between them."""

    payload: Tensor  # (payload_bytes,) uint8
    adapter: Adapter  # as `decompress` gives it
    lost: Mapping[str, Tensor]  # flat name -> what the server's adapter lacks; of the parts that travel


def payload_bytes(layout: Layout, codec: Codec) -> int:
    """The exact size of a payload."""
    if codec == "int8":
        return sum(4 * prod(shape) for shape in _scale_shapes(layout).values()) + layout.size
    return {"none": 4, "bf16": 2}[codec] * layout.size


def compress(
    adapter: Adapter,
    broadcast: Adapter,
    layout: Layout,
    codec: Codec,
    rng: torch.Generator,
    lost: Mapping[str, Tensor] | None = None,
) -> Compressed:
    """What a client sends of `adapter`, all of it at the server's precision.

    `lost` is what earlier payloads lost, by flat name; it is added to the change (`none` has no use for it). Raises
    `AdapterError` where the adapter has another form than the broadcast, or the change is not finite.
    """
    flat, base = layout.pack(adapter), layout.pack(broadcast)
    if codec == "none":
        payload = _bytes(flat)
        return Compressed(payload, decompress(payload, broadcast, layout, codec), {})
    change = flat.sub_(base)
    for name, view in layout.split(change).items():
        if lost is not None and name in lost:
            view.add_(lost[name])
    if not bool(torch.isfinite(change).all()):
        raise AdapterError("the change against the broadcast is not finite (NaN or infinite): it cannot be compressed")
    payload = encode(change, layout, codec, rng)
    arrived = decompress(payload, broadcast, layout, codec)
    # What arrived, not what was sent: adding to the broadcast rounds too.
    left = change.sub_(layout.pack(arrived).sub_(base))
    return Compressed(payload, arrived, {name: view.clone() for name, view in layout.split(left).items()})


def decompress(payload: Tensor, broadcast: Adapter, layout: Layout, codec: Codec) -> Adapter:
    """The adapter that a payload stands for; parts that do not travel are the broadcast's own, bit for bit.

    Nothing in the payload is trusted: `AdapterError` where its size, dtype or numbers cannot be a codec's.
    """
    numbers = decode(payload, layout, codec)
    return layout.unpack(numbers if codec == "none" else numbers.add_(layout.pack(broadcast)), broadcast)


def encode(change: Tensor, layout: Layout, codec: Codec, rng: torch.Generator) -> Tensor:  # (bytes,) uint8
    """The payload of a flat float32 tensor of finite numbers, (layout.size,)."""
    if codec == "none":
        return _bytes(change)
    if codec == "bf16":
        return _bytes(change.clamp(-_MOST_BF16, _MOST_BF16).to(torch.bfloat16))
    noise = torch.rand(layout.size, generator=rng)
    codes = torch.empty(layout.size, dtype=torch.int8)
    uniform, out = layout.split(noise), layout.split(codes, torch.int8)
    scales = [torch.empty(0)]
    for name, x in layout.split(change).items():
        shared = [axis for axis in range(x.ndim) if axis != _own_axis(name, x.ndim)]
        scale = x.abs().amax(shared, keepdim=True).div_(_LEVELS).clamp_(max=_LARGEST)
        # floor(x + u) is x in the mean; a number that is zero stays zero.
        steps = (x / torch.where(scale > 0, scale, 1.0)).add_(uniform[name]).floor_()
        out[name].copy_(steps.clamp_(-_LEVELS, _LEVELS))
        scales.append(scale.flatten())
    return torch.cat([_bytes(torch.cat(scales)), _bytes(codes)])


def decode(payload: Tensor, layout: Layout, codec: Codec) -> Tensor:  # (layout.size,) float32
    """What `encode` wrote. `AdapterError` where the payload is not of the codec's exact size, or holds numbers that the
    codec does not write.
    """
    expected = payload_bytes(layout, codec)
    if payload.dtype != torch.uint8 or tuple(payload.shape) != (expected,):
        raise AdapterError(
            f"{codec} payload: it must be {expected} bytes (uint8), got {payload.dtype} {tuple(payload.shape)}"
        )
    if codec == "none":
        return _numbers(payload, torch.float32)
    if codec == "bf16":
        change = _numbers(payload, torch.bfloat16).float()
        if not bool(torch.isfinite(change).all()):
            raise AdapterError("bf16 payload: it holds values that are not finite (NaN or infinite)")
        return change
    shapes = _scale_shapes(layout)
    split = expected - layout.size
    scales, codes = _numbers(payload[:split], torch.float32), payload[split:].view(torch.int8)
    if not bool(((scales >= 0) & (scales <= _LARGEST)).all()):  # NaN is neither
        raise AdapterError("int8 payload: a scale is negative, too large or not finite")
    if bool((codes < -_LEVELS).any()):
        raise AdapterError(f"int8 payload: a code is below -{_LEVELS}")
    change = codes.float()
    sizes = [prod(shape) for shape in shapes.values()]
    for (name, x), scale in zip(layout.split(change).items(), scales.split(sizes), strict=True):
        x.mul_(scale.view(shapes[name]))
    return change


def _scale_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor's scales, which spread over the tensor: all axes but its own are one."""
    return {
        name: tuple(n if axis == _own_axis(name, len(shape)) else 1 for axis, n in enumerate(shape))
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    }


def _own_axis(name: str, ndim: int) -> int | None:
    """The axis along which a tensor has scales of its own: the rank's for a factor, the rows for a head."""
    if part_of(name) == "b":
        return 1
    return 0 if ndim > 1 else None


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)


def _numbers(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy: bytes off a wire need not lie where numbers may."""
    return payload.clone(memory_format=torch.contiguous_format).view(dtype)
