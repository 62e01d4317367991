"""Differential privacy of whole clients: a client's change clipped in norm, and Gaussian noise (McMahan et al., arXiv
1710.06963).

A change is what an upload differs from the broadcast in, factors and head together as one vector. It is taken after
alignment: turning a client's factors towards the broadcast makes their distance to it smaller and their product no
other, so the same bound cuts less. Changes are float64 until noise is in them, so that the bound is not lost in
rounding; what follows is rounding of something that is private already.
"""

import math
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.errors import FedrotError
from fedrot.core.methods.base import Reduced
from fedrot.core.reduce import Reduction

Normals = Callable[[torch.Size], Tensor]  # shape -> independent standard normal numbers, float64


def seeded_normals(rng: torch.Generator) -> Normals:
    """Noise that can be had again: for simulations. Whoever knows the seed can take it off."""
    return lambda shape: torch.randn(shape, generator=rng, dtype=torch.float64)


def system_normals(shape: torch.Size) -> Tensor:
    """Noise that nobody can foresee: from the operating system's generator, by Box and Muller's transform."""
    radius, angle = (system_uniforms(shape.numel()) for _ in range(2))
    # In (0, 1], so that its logarithm is finite.
    uniform = radius + 2.0**-53
    return ((-2 * uniform.log()).sqrt() * (2 * math.pi * angle).cos()).reshape(shape)


def system_uniforms(count: int) -> Tensor:  # (count,) float64
    """Numbers in [0, 1), of 53 bits each, that nobody can foresee: from the operating system's generator."""
    bits = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64) if count else torch.empty(0).long()
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def clipped_change(
    adapter: Adapter, broadcast: Adapter, parts: frozenset[str], bound: float
) -> dict[str, Tensor]:  # by flat name, float64
    """min(1, bound / ||x||) x for the change x = adapter - broadcast of `parts`, ||x|| over all of their tensors."""
    sent = dict(broadcast.tensors())
    change = {
        name: tensor.detach().double() - sent[name].double()
        for name, tensor in adapter.tensors()
        if part_of(name) in parts
    }
    norm = math.sqrt(sum(float(x.square().sum()) for x in change.values()))
    return {name: x * (bound / norm) for name, x in change.items()} if norm > bound else change


def with_noise(change: Mapping[str, Tensor], deviation: float, normals: Normals) -> dict[str, Tensor]:
    """The change plus independent Gaussian noise of this standard deviation on every number; 0: none is drawn."""
    if deviation == 0:
        return dict(change)
    return {name: x + deviation * normals(x.shape) for name, x in change.items()}


def with_change(broadcast: Adapter, change: Mapping[str, Tensor]) -> Adapter:
    """The broadcast plus a change, in its dtypes; tensors without a change are the broadcast's own, bit for bit."""
    tensors = dict(broadcast.tensors())
    moved = {name: (tensors[name].double() + x).to(tensors[name].dtype) for name, x in change.items()}
    return broadcast.with_tensors(tensors | moved)


class NoisyMean(Reduction):
    """broadcast + (sum_i clip(x_i - broadcast) + noise) / expected, in the place of a weighted mean.

    The divisor is the number of uploads that are expected, whatever number came: one that counted the clients would
    change with each of them, and with it what all others contribute. A client that gives nothing counts as one that
    did not move. `result` without any upload is noise alone.
    """

    def __init__(
        self, form: Adapter, parts: frozenset[str], bound: float, deviation: float, expected: float, normals: Normals
    ) -> None:
        super().__init__(form, parts)
        self._parts, self._bound, self._expected = parts, bound, expected
        self._deviation, self._normals = deviation, normals

    def add(self, adapter: Adapter, weight: float) -> None:
        """Clip one upload's change and fold it in. `weight` is 1: clients count alike."""
        if weight != 1.0:
            raise FedrotError(f"with noise for privacy every client's weight is 1, got {weight!r}")
        change = clipped_change(adapter, self._form, self._parts, self._bound)
        for name, x in change.items():
            self._sums[name].add_(x)
        self.count += 1

    def result(self) -> Reduced:
        """The reduced round; noise is drawn once, on the sum."""
        noisy = with_noise(self._sums, self._deviation, self._normals)
        mean = with_change(self._form, {name: x / self._expected for name, x in noisy.items()})
        return Reduced(mean=mean, count=self.count)
