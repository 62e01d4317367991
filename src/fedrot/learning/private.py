"""Local training that is differentially private for each example: DP-SGD (Abadi et al., arXiv 1607.00133).

A step draws its batch by chance, clips the gradient of every example by itself, and adds Gaussian noise to their sum.
What an optimizer, a proximal term or anybody later does with the noisy sums tells no more of an example than they do.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrot.core.privacy import Normals, seeded_normals, system_normals, system_uniforms
from fedrot.core.seeding import generator
from fedrot.learning.dropout import Key


@dataclass(frozen=True)
class ExamplePrivacy:
    """What a step does to the gradients of its examples."""

    clip: float  # C, the largest norm of an example's gradient, over all trained tensors together
    noise: float  # z: the noise on the sum has standard deviation z C
    secure: bool = False  # draws and noise from the operating system's generator, not from the client's key

    def normals(self, key: Key) -> Normals:
        """The noise of a step that `key` names."""
        return system_normals if self.secure else seeded_normals(generator(*key))

    def batches(self, examples: int, batch: int, key: Key) -> Iterator[NDArray[np.int64]]:
        """Endless batches of places among a client's examples, each of which is in a batch with probability
        min(batch, n) / n, whoever else is: any number of them, also none.
        """
        share, rng = expected_batch(examples, batch) / examples, generator(*key, "sample")
        while True:
            if self.secure:
                chances = system_uniforms(examples)
            else:
                chances = torch.rand(examples, generator=rng, dtype=torch.float64)
            yield np.flatnonzero(chances.numpy() < share)


def expected_batch(examples: int, batch: int) -> int:
    """Examples that a step is expected to draw: known beforehand, so a noisy sum can be divided by it."""
    return min(batch, examples)


def clipped_sums(
    gradients: Mapping[str, Tensor],  # by flat name, (E, ...): of each example, client after client
    counts: Sequence[int],  # (C) examples of each client, E in all
    bound: float,
) -> tuple[dict[str, Tensor], list[int]]:  # by flat name, (C, ...) in float64; (C)
    """sum_e min(1, bound / ||g_e||) g_e over each client's examples, ||g_e|| over all of the tensors together; and how
    many of them were left out, since their gradients are not finite: so the bound holds whatever an example is.
    """
    norms = torch.stack([_norms(gradient) for gradient in gradients.values()]).square().sum(0).sqrt()
    finite = norms.isfinite()
    share = torch.where(finite, (bound / norms).clamp(max=1.0), 0.0)
    sums = {}
    for name, gradient in gradients.items():
        rows = torch.where(finite[:, None], gradient.flatten(1), 0.0).double()
        pieces = zip(share.split(list(counts)), rows.split(list(counts)), strict=True)
        sums[name] = torch.stack([mine @ theirs for mine, theirs in pieces]).unflatten(1, gradient.shape[1:])
    return sums, [len(mine) - int(mine.sum()) for mine in finite.split(list(counts))]


def _norms(gradient: Tensor) -> Tensor:  # (E) float64
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)
