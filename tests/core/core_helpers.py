"""Adapters, rotations and dense formulas that the tests of the ground floor share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.errors import FedrotError
from fedrot.core.methods.base import Upload

# (d_in, d_out). Two layers of one shape, so that a batch holds more than one, and two of others; none is square.
SHAPES = {"enc.0.query": (12, 9), "enc.0.value": (12, 9), "enc.0.out": (7, 16), "enc.1.query": (10, 8)}
HEAD = {"classifier.bias": (3,), "classifier.weight": (3, 8)}

quick = settings(max_examples=25, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
ranks = st.integers(1, 6)
strengths = st.floats(0.0, 1.0)
factors = st.sampled_from(["A", "B"])


def make_adapter(
    seed: int,
    rank: int = 3,
    scale: float = 2.0,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    fan_in_fan_out: bool = False,
    head: bool = True,
    zero_b: bool = False,
) -> Adapter:
    """A random adapter; `zero_b` gives the one that training starts from."""
    rng = torch.Generator().manual_seed(seed)
    layers = {}
    for name, (d_in, d_out) in shapes.items():
        a = torch.randn(rank, d_in, generator=rng, dtype=torch.float64).to(dtype)
        b = torch.randn(d_out, rank, generator=rng, dtype=torch.float64).to(dtype)
        layers[name] = LoraPair(a, torch.zeros_like(b) if zero_b else b, scale, fan_in_fan_out)
    tensors = {n: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for n, shape in HEAD.items()}
    return Adapter(layers, tensors if head else {})


def moved(adapter: Adapter, seed: int, size: float = 0.3) -> Adapter:
    """The adapter with noise on every tensor, as after local training."""
    rng = torch.Generator().manual_seed(seed)

    def shift(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=rng, dtype=torch.float64)
        return (tensor.double() + size * noise).to(tensor.dtype)

    return adapter.map(shift)


def random_rotation(seed: int, rank: int) -> Tensor:
    """A rotation in SO(rank), in float64."""
    rng = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=rng, dtype=torch.float64))
    return q if torch.linalg.det(q) > 0 else torch.cat([q[:, :-1], -q[:, -1:]], dim=-1)


def random_rotations(seed: int, adapter: Adapter) -> dict[str, Tensor]:
    """One rotation a layer."""
    return {name: random_rotation(seed + i, pair.rank) for i, (name, pair) in enumerate(adapter.layers.items())}


def turned(adapter: Adapter, rotations: Mapping[str, Tensor]) -> Adapter:
    """(Q^T A, B Q) in the adapter's own dtype: the same updates in another frame."""
    layers = {
        name: replace(
            pair,
            a=(rotations[name].T @ pair.a.double()).to(pair.a.dtype),
            b=(pair.b.double() @ rotations[name]).to(pair.b.dtype),
        )
        for name, pair in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


def upload(adapter: Adapter, rotation: Mapping[str, Tensor] | None = None, client: str = "c", **fields: Any) -> Upload:
    """An upload as a client sends it."""
    usual = {"held": 5, "used": 4, "metrics": {"loss": 0.5, "steps": 2, "tokens": 40}}
    return Upload(client=client, adapter=adapter, rotation=rotation or {}, **{**usual, **fields})


def product(pair: LoraPair, scaled: bool = True) -> Tensor:
    """Scale * B A as (d_out, d_in) in float64, whatever the base layer's orientation."""
    return (pair.scale if scaled else 1.0) * (pair.b.double() @ pair.a.double())


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i / sum_i w_i in float64."""
    return sum(w * t.double() for w, t in zip(weights, tensors, strict=True)) / sum(weights)


def dense_errors(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, dict[str, float]]:
    """The squared norms that the diagnostics report, from dense (d_out, d_in) matrices."""
    found = {}
    for name, first in adapters[0].layers.items():
        pairs = [adapter.layers[name] for adapter in adapters]
        ideal = weighted([product(p) for p in pairs], weights)
        mean_b = weighted([p.scale * p.b.double() for p in pairs], weights)
        error = ideal - mean_b @ weighted([p.a for p in pairs], weights)
        tail = torch.linalg.svdvals(ideal)[first.rank :]
        found[name] = {
            "ideal2": float(ideal.square().sum()),
            "error2": float(error.square().sum()),
            "floor2": float(tail.square().sum()),
        }
    return found


def distance(x: Tensor, y: Tensor) -> float:
    """||x - y||_F in float64."""
    return float((x.double() - y.double()).norm())


def assert_same(left: Adapter, right: Adapter) -> None:
    """Bit for bit the same tensors under the same names, in the same dtypes."""
    mine, theirs = dict(left.tensors()), dict(right.tensors())
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def assert_close(left: Adapter, right: Adapter, rel: float = 1e-5) -> None:
    """The same tensors to `rel` of each tensor's norm."""
    mine, theirs = dict(left.tensors()), dict(right.tensors())
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert distance(tensor, theirs[name]) <= rel * float(theirs[name].double().norm()), name


@contextmanager
def refused(*words: str, error: type[Exception] = FedrotError) -> Iterator[None]:
    """The block raises `error`, a ValueError with one line that holds every one of `words`."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in message
    for word in words:
        assert word in message
