"""A hundred clients on layers of 4096 x 4096: nothing of a dense matrix's size is ever made."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.methods import get_method
from fedrot.core.reduce import Reduction
from fedrot.core.seeding import generator

CLIENTS, RANK, DIM = 100, 8, 4096
LAYERS = ("q", "v")
METHODS = ("flexlora", "fedrot_svd", "fedex")


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return result


def clients() -> list[Adapter]:
    """Clients that share most of their update."""
    rng = generator("large")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    common = {name: (normal(RANK, DIM), normal(DIM, RANK)) for name in LAYERS}
    return [
        Adapter(
            {n: LoraPair(a + 0.3 * normal(RANK, DIM), b + 0.3 * normal(DIM, RANK), 2.0) for n, (a, b) in common.items()}
        )
        for _ in range(CLIENTS)
    ]


def probed(adapters: list[tuple[float, Adapter]], name: str, probe: Tensor) -> Tensor:
    """(sum of the weighted updates) @ probe."""
    pairs = [(w, one.layers[name]) for w, one in adapters]
    return sum(w * p.scale * (p.b.double() @ (p.a.double() @ probe)) for w, p in pairs)


def measure() -> dict[str, Any]:
    """Run in a process of its own, so that its peak memory is this work's."""
    torch.set_num_threads(1)
    uploads = clients()
    probe = torch.randn(DIM, 4, generator=generator("probe"), dtype=torch.float64)
    ideal = {n: probed([(1 / CLIENTS, one) for one in uploads], n, probe) for n in LAYERS}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, Any] = {}
    images: dict[str, Tensor] = {}
    with Largest() as largest:
        for name in METHODS:
            method = get_method(name)()
            state = method.start(uploads[0])
            reduction = Reduction(uploads[0], method.uploads(0), keep=True)
            for one in uploads:
                reduction.add(one, 1.0)
            sent = method.server(state, reduction.result(), generator("server")).broadcast
            parts = [(1.0, one) for one in (sent.adapter, sent.base_step) if one]
            images[name] = torch.stack([probed(parts, n, probe) for n in LAYERS])
    target = torch.stack([ideal[n] for n in LAYERS])
    found["error"] = {name: float((image - target).norm() / target.norm()) for name, image in images.items()}
    found["apart"] = float((images["flexlora"] - images["fedrot_svd"]).norm() / target.norm())
    found["elements"] = largest.elements
    found["grown"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it")
def test_a_hundred_clients_on_large_layers_need_memory_for_their_factors_only() -> None:
    code = "import json, test_large; print(json.dumps(test_large.measure()))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    dense = DIM * DIM
    # The stacked factors of all clients and layers are the largest thing there is; one dense layer is larger.
    assert found["elements"] <= CLIENTS * RANK * DIM * len(LAYERS) < dense
    assert found["grown"] < 1.2e9 < CLIENTS * dense * 4 / 5  # the dense updates of all clients: 6.7 GB
    assert found["error"]["fedex"] < 1e-5
    assert found["apart"] < 1e-6
    assert 0 < found["error"]["flexlora"] < 0.5


def test_the_measurement_would_see_a_dense_layer() -> None:
    with Largest() as largest:
        torch.ones(60, 3) @ torch.ones(3, 50)
    assert largest.elements == 3000
