"""Alignment alone, at the sizes of real adapters: `fedrot.align` against one layer at a time, and against a copy.

The loop is the published way: for every layer the correlation, an SVD for the rotation, the softened mixture, an SVD
for the nearest rotation, and two products, all in the factors' own precision.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.alignment import align


@dataclass(frozen=True)
class Size:
    """The adapted layers of a model: (d_out, d_in) of each kind, how many blocks, and the rank."""

    name: str
    rank: int
    blocks: int
    kinds: tuple[tuple[int, int], ...]

    @property
    def pairs(self) -> int:
        """How many pairs of factors there are."""
        return self.blocks * len(self.kinds)


_LLAMA_ALL = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
SIZES = (
    Size("RoBERTa-large, query and value", 4, 24, ((1024, 1024), (1024, 1024))),
    Size("Llama-3-8B, query and value", 8, 32, ((4096, 4096), (1024, 4096))),
    Size("Llama-3-8B, all seven projections", 64, 32, _LLAMA_ALL),
)


def adapters(size: Size) -> tuple[Adapter, Adapter]:
    """(an adapter, the reference that it left by a small step)."""
    rng = torch.Generator().manual_seed(0)
    found: list[dict[str, LoraPair]] = [{}, {}]
    for block in range(size.blocks):
        for kind, (d_out, d_in) in enumerate(size.kinds):
            a = torch.randn(size.rank, d_in, generator=rng) / d_in**0.5
            b = 0.1 * torch.randn(d_out, size.rank, generator=rng)
            moved = [t + 0.02 * torch.randn(t.shape, generator=rng) for t in (a, b)]
            found[0][f"{block}.{kind}"] = LoraPair(moved[0], moved[1], 2.0)
            found[1][f"{block}.{kind}"] = LoraPair(a, b, 2.0)
    return Adapter(found[0]), Adapter(found[1])


def layer_by_layer(
    adapter: Adapter, reference: Adapter, strength: float = 0.4
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the published code does, a layer at a time."""
    found = []
    for name, pair in adapter.layers.items():
        u, _, vh = torch.linalg.svd(pair.a @ reference.layers[name].a.T)
        flip = torch.ones(len(u))
        flip[-1] = torch.det(u @ vh).sign()
        hard = u @ torch.diag(flip) @ vh
        u, _, vh = torch.linalg.svd((1 - strength) * torch.eye(len(u)) + strength * hard)
        flip[-1] = torch.det(u @ vh).sign()
        soft = u @ torch.diag(flip) @ vh
        found.append((soft.T @ pair.a, pair.b @ soft))
    return found


def copied(adapter: Adapter) -> Adapter:
    """Every tensor read and written once."""
    return adapter.map(torch.clone)


def measured(size: Size, repeats: int) -> dict[str, float]:
    """Median CPU seconds of the loop, of `align` and of a copy, in turns, and how far the results are apart."""
    adapter, reference = adapters(size)
    ways: dict[str, Callable[[], object]] = {
        "loop": lambda: layer_by_layer(adapter, reference),
        "align": lambda: align(adapter, reference, factor="A", strength=0.4),
        "copy": lambda: copied(adapter),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            if turn:
                times[name].append(time.process_time() - began)
    apart = max(
        float((a - pair.a).abs().max())
        for (a, _), pair in zip(
            layer_by_layer(adapter, reference),
            align(adapter, reference, factor="A", strength=0.4).layers.values(),
            strict=True,
        )
    )
    return {name: median(values) for name, values in times.items()} | {"apart": apart}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size in SIZES:
        print(size.name, size.pairs, measured(size, 3))
