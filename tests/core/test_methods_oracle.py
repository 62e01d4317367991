"""Every registered method against dense matrices: W0 + s B A (+ what was added to W0) is what its formula says."""

import math

import pytest
import torch
from core_helpers import make_adapter, moved
from method_helpers import (
    LAYERS,
    Client,
    Played,
    Weights,
    assert_changes,
    clients,
    every_method,
    first_state,
    models,
    noise,
    play,
    rounds,
    sizes,
    updates,
)
from method_oracles import BOUNDS, GLOBAL, PERSONAL, Layer
from torch import Tensor

from fedrot import aggregate
from fedrot.core.adapter import Adapter
from fedrot.core.methods import Method, get_method, methods
from fedrot.core.methods.base import Broadcast, Seat
from fedrot.core.seeding import generator

ranks = pytest.mark.parametrize("rank", [1, 4])
scales = pytest.mark.parametrize("scale", [2.0, 0.5, 16 / math.sqrt(4)], ids=["2", "half", "rslora"])
orientations = pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["linear", "conv1d"])
federations = pytest.mark.parametrize("weights", [(3,), (1, 1, 1), (1, 5, 2)], ids=["one client", "alike", "weighted"])
STANDALONE = [name for name, cls in methods().items() if cls.capabilities.standalone]


def facts(
    name: str,
    broadcast: Broadcast,
    trained: list[Adapter],
    shares: list[float],
    rotations: list[dict[str, Tensor]],
) -> Layer:
    """What an oracle may know of one layer."""
    sent, frame = broadcast.adapter.layers[name], broadcast.frame.layers[name]
    base = updates(broadcast.base_delta).get(name, torch.zeros(1, 1, dtype=torch.float64))
    return Layer(
        number=broadcast.round,
        s=sent.scale,
        p=shares,
        a=[local.layers[name].a.double() for local in trained],
        b=[local.layers[name].b.double() for local in trained],
        a0=sent.a.double(),
        b0=sent.b.double(),
        ref_a=frame.a.double(),
        ref_b=frame.b.double(),
        base=base.T if sent.fan_in_fan_out else base,
        rotations=[found[name].double() for found in rotations if found],
    )


def assert_formula(method: Method, played: Played, rel: float = 1e-9) -> None:
    """What came out of the round is what the method's oracle says, layer by layer, model by model."""
    found, broadcast = models(method, played), played.before.broadcast
    expected: list[Weights] = [{} for _ in found]
    for name, pair in broadcast.adapter.layers.items():
        layer = facts(name, broadcast, list(played.trained), played.shares, list(played.rotations))
        turn = (lambda m: m.T) if pair.fan_in_fan_out else (lambda m: m)
        if method.name in BOUNDS:
            BOUNDS[method.name](layer, turn(found[0][name]))
            expected[0][name] = found[0][name]
            continue
        should = PERSONAL[method.name](layer) if method.name in PERSONAL else [GLOBAL[method.name](layer)]
        for one, matrix in zip(expected, should, strict=True):
            one[name] = turn(matrix)
    for mine, theirs in zip(found, expected, strict=True):
        assert_changes(mine, theirs, sizes(played), rel)


@every_method
def test_every_method_has_one_oracle(name: str) -> None:
    assert sum(name in table for table in (GLOBAL, PERSONAL, BOUNDS)) == 1, "add a formula to method_oracles.py"
    assert (name in PERSONAL) == get_method(name).capabilities.personal


@every_method
@ranks
@scales
@orientations
@federations
def test_three_rounds_give_the_dense_formula(
    name: str, rank: int, scale: float, fan_in_fan_out: bool, weights: tuple[float, ...]
) -> None:
    method = get_method(name)()
    start = make_adapter(0, rank, scale, LAYERS, torch.float64, fan_in_fan_out)
    for played in rounds(method, start, clients(*weights), 3):
        assert_formula(method, played)


@every_method
def test_from_zero_b_on_as_every_training_starts(name: str) -> None:
    method = get_method(name)()
    start = make_adapter(0, 4, 2.0, LAYERS, torch.float64, zero_b=True)
    for played in rounds(method, start, clients(1, 5, 2), 3):
        assert_formula(method, played)


@every_method
@pytest.mark.parametrize("number", range(3))
def test_clients_whose_b_stays_zero_change_no_model(name: str, number: int) -> None:
    def only_a(start: Adapter, client: str) -> Adapter:
        after = noise()(start, client)
        return after.with_tensors({n: t * 0 if n.endswith("/b") else t for n, t in after.tensors()})

    method = get_method(name)()
    start = make_adapter(0, 4, 2.0, LAYERS, torch.float64, zero_b=True)
    played = play(method, first_state(method, start, number), clients(1, 5, 2), only_a)
    for change in models(method, played):
        assert all(float(m.abs().max()) < 1e-12 for m in change.values())
    assert all(bool(torch.isfinite(t).all()) for _, t in played.after.broadcast.adapter.tensors())


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_round_is_as_exact_as_the_factors(name: str, dtype: torch.dtype) -> None:
    method = get_method(name)()
    start = make_adapter(0, 4, 2.0, LAYERS, dtype)
    for played in rounds(method, start, clients(1, 5, 2), 3):
        assert_formula(method, played, rel=1e-5 if dtype == torch.float32 else 1e-9)
        assert all(t.dtype == dtype for _, t in played.after.broadcast.adapter.tensors())


@pytest.mark.parametrize("name", [name for name, cls in methods().items() if cls.capabilities.mixed_ranks])
@orientations
@pytest.mark.parametrize("own_scale", [2.0, 5.0], ids=["one scale", "scales of their own"])
def test_clients_of_smaller_ranks_count_with_their_padded_factors(
    name: str, fan_in_fan_out: bool, own_scale: float
) -> None:
    method = get_method(name)()
    start = make_adapter(0, 4, 2.0, LAYERS, torch.float64, fan_in_fan_out)
    mixed = (Client("north", 1, rank=1, scale=own_scale), Client("south", 5), Client("west", 2, 2, own_scale))
    for played in rounds(method, start, mixed, 3):
        assert_formula(method, played)
        pairs = [local.layers["enc.1.out"] for local in played.trained]
        assert [int(torch.linalg.matrix_rank(pair.b @ pair.a)) for pair in pairs] == [1, 4, 2]


@pytest.mark.parametrize("name", STANDALONE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@orientations
def test_half_precision_goes_through_aggregate_at_full_precision(
    name: str, dtype: torch.dtype, fan_in_fan_out: bool
) -> None:
    reference = make_adapter(9, 4, 0.5, LAYERS, dtype, fan_in_fan_out)
    adapters, weights = [moved(reference, seed) for seed in (1, 2, 3)], [1.0, 5.0, 2.0]
    method = get_method(name).standalone()
    factor = {} if not hasattr(method, "factor") else {"factor": "A"}  # the odd rounds' one
    merged = aggregate(adapters, weights, name, reference, **factor)
    assert all(t.dtype == torch.float32 for _, t in merged.tensors())
    broadcast = Broadcast(1, reference.map(Tensor.float))
    wide = [adapter.map(Tensor.float) for adapter in adapters]
    results = [method.client(one, broadcast, Seat(str(i)), generator("aggregate", i)) for i, one in enumerate(wide)]
    found = updates(merged)
    for layer_name, pair in merged.layers.items():
        layer = facts(layer_name, broadcast, wide, [w / 8 for w in weights], [dict(r.rotation) for r in results])
        change = found[layer_name].T if pair.fan_in_fan_out else found[layer_name]
        if name in BOUNDS:
            BOUNDS[name](layer, change.double())
            continue
        should = GLOBAL[name](layer)
        size = max(float((b @ a).norm()) for a, b in zip(layer.a, layer.b, strict=True)) * layer.s
        assert float((change - should).norm()) <= 1e-5 * size
