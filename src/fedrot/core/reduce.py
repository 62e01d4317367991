"""The reduction between clients and server: a streamed weighted mean, and the uploads themselves where needed."""

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.errors import FedrotError
from fedrot.core.methods.base import Reduced

# Beyond these, sums of weights and products with them could leave float64's range.
_LEAST, _MOST = 1e-100, 1e100


class Reduction:
    """sum_i w_i x_i / sum_i w_i over adapters as they come, in float64: memory does not grow with the clients.

    Only `parts` are averaged; the other tensors are `form`'s own, bit for bit. With `keep` the adapters are held too.
    """

    def __init__(self, form: Adapter, parts: frozenset[str], keep: bool = False) -> None:
        self._form = form
        self._sums: dict[str, Tensor] = {
            name: torch.zeros(t.shape, dtype=torch.float64, device=t.device)
            for name, t in form.tensors()
            if part_of(name) in parts
        }
        self._kept: list[tuple[float, Adapter]] | None = [] if keep else None
        self._weight = 0.0
        self.count = 0

    def add(self, adapter: Adapter, weight: float) -> None:
        """Fold one adapter in. `weight` is positive: a zero would silently drop a client."""
        if not _LEAST <= weight <= _MOST:
            raise FedrotError(f"a weight must be positive, from {_LEAST:g} to {_MOST:g}, got {weight!r}")
        for name, tensor in adapter.tensors():
            if name in self._sums:
                self._sums[name].add_(tensor.detach().double(), alpha=weight)
        if self._kept is not None:
            self._kept.append((weight, adapter))
        self._weight += weight
        self.count += 1

    def add_mean(self, mean: Adapter, weight: float, count: int) -> None:
        """Fold in the weighted mean of `count` adapters of which nothing else is known."""
        self.add(mean, weight)
        self.count += count - 1

    def result(self) -> Reduced:
        """The reduced round; the mean comes back in `form`'s dtypes."""
        if not self.count:
            raise FedrotError("there is nothing to average: no upload was added")
        tensors = dict(self._form.tensors())
        means = {n: (s / self._weight).to(tensors[n].dtype) for n, s in self._sums.items()}
        factors = tuple((w / self._weight, adapter) for w, adapter in self._kept or ())
        return Reduced(mean=self._form.with_tensors(tensors | means), count=self.count, factors=factors)


def as_float32(adapter: Adapter) -> Adapter:
    """The adapter with half-precision tensors widened to float32; float32 and float64 stay."""
    return adapter.map(lambda t: t.to(torch.promote_types(t.dtype, torch.float32)))
