"""FlexLoRA's aggregation through factors against forming and decomposing the dense product, in turns in one process."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.methods import get_method
from fedrot.core.methods.base import Broadcast, Method, Reduced, ServerState
from fedrot.core.seeding import generator


def uploads(clients: int, width: int, rank: int) -> list[tuple[float, Adapter]]:
    """(weight, adapter) of clients that moved from one start by noise of their own."""
    rng = generator("aggregation benchmark")
    a, b = torch.randn(rank, width, generator=rng), torch.randn(width, rank, generator=rng)
    made = []
    for _ in range(clients):
        pair = LoraPair(
            a + 0.3 * torch.randn(a.shape, generator=rng), b + 0.3 * torch.randn(b.shape, generator=rng), 2.0
        )
        made.append((1 / clients, Adapter({"layer": pair})))
    return made


def serve(method: Method, held: list[tuple[float, Adapter]]) -> Adapter:
    """The server's half of a round."""
    state = ServerState(Broadcast(1, held[0][1]))
    reduced = Reduced(mean=held[0][1], count=len(held), factors=tuple(held))
    return method.server(state, reduced, generator("aggregation benchmark", "server")).broadcast.adapter


def dense(held: list[tuple[float, Adapter]]) -> torch.Tensor:
    """The same optimum by the d x d product and its decomposition, as published code does it, in float32."""
    product = sum((p * one.layers["layer"].delta() for p, one in held), torch.zeros(()))
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    rank = held[0][1].layers["layer"].rank
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def flexlora_against_dense(
    clients: int = 10, width: int = 4096, rank: int = 16, repeats: int = 3
) -> tuple[float, float]:
    """(CPU time of the factors' route / dense route, relative distance of their results)."""
    held = uploads(clients, width, rank)
    flexlora = get_method("flexlora")()
    mine = median(seconds(lambda: serve(flexlora, held)) for _ in range(repeats))
    began = time.process_time()
    theirs = dense(held)
    took = time.process_time() - began
    found = serve(flexlora, held).layers["layer"].delta()
    return mine / took, float((found - theirs).norm() / theirs.norm())
