"""How far clients moved, how much of it only turned their frame, and the rotations that were applied."""

import math

import pytest
import torch
from core_helpers import SHAPES, distance, make_adapter, moved, quick, random_rotations, ranks, seeds, turned
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedrot.core.adapter import LoraPair
from fedrot.core.alignment import find_rotations
from fedrot.core.drift import client_drift, summarise_drift


def dense_gauge2(local: LoraPair, sent: LoraPair) -> float:
    """The squared length of the move's least-squares projection onto the tangents (-K A, B K), K skew."""
    a, b = sent.a.double(), sent.b.double()
    tangents = [torch.zeros(a.numel() + b.numel(), 1, dtype=torch.float64)]
    for i in range(sent.rank):
        for j in range(i):
            k = torch.zeros(sent.rank, sent.rank, dtype=torch.float64)
            k[i, j], k[j, i] = 1.0, -1.0
            tangents.append(torch.cat([(-k @ a).flatten(), (b @ k).flatten()])[:, None])
    move = torch.cat([(local.a.double() - a).flatten(), (local.b.double() - b).flatten()])
    basis = torch.cat(tangents, -1)
    return float((basis @ torch.linalg.pinv(basis, rtol=1e-10) @ move).square().sum())


@quick
@given(seeds, ranks, st.booleans(), st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
def test_drift_and_gauge_share_are_those_of_dense_vectors(seed, rank, zero_b, dtype):
    sent = make_adapter(seed, rank, dtype=dtype, zero_b=zero_b)
    local = moved(sent, seed + 1)
    found = client_drift(local, sent, {})
    assert found.keys() == SHAPES.keys()
    for name, layer in found.items():
        mine, theirs = local.layers[name], sent.layers[name]
        drift_a, drift_b = distance(mine.a, theirs.a), distance(mine.b, theirs.b)
        assert layer["drift_a"] == pytest.approx(drift_a, rel=1e-9)
        assert layer["drift_b"] == pytest.approx(drift_b, rel=1e-9)
        assert layer["move2"] == pytest.approx(drift_a**2 + drift_b**2, rel=1e-9)
        assert layer["gauge2"] == pytest.approx(dense_gauge2(mine, theirs), rel=1e-6, abs=1e-12)
        assert layer["gauge2"] <= layer["move2"] * (1 + 1e-9)
        assert layer["angle"] == layer["turn"] == 0.0


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_the_rotation_s_angle_and_distance_are_reported(rank):
    sent = make_adapter(0, rank, dtype=torch.float64)
    skew = torch.zeros(rank, rank, dtype=torch.float64)
    skew[0, 1], skew[1, 0] = 0.9, -0.9
    basis = random_rotations(3, sent)
    rotations = {n: q @ torch.linalg.matrix_exp(skew) @ q.T for n, q in basis.items()}
    for layer in client_drift(moved(sent, 1), sent, rotations).values():
        assert layer["angle"] == pytest.approx(0.9, abs=1e-9)
        assert layer["turn"] == pytest.approx(2 * math.sqrt(2) * math.sin(0.45), abs=1e-9)


def test_each_layer_has_its_own_rotation():
    local, sent = make_adapter(1, dtype=torch.float64), make_adapter(0, dtype=torch.float64)
    rotations = find_rotations(local, sent, "A", 1.0)
    for name, layer in client_drift(local, sent, rotations).items():
        assert layer["turn"] == pytest.approx(distance(rotations[name], torch.eye(3)), rel=1e-12)


def test_a_turn_of_the_frame_shows_as_drift_that_is_gauge_unlike_by_row_spaces():
    sent = make_adapter(0, 3, dtype=torch.float64)
    small = {n: torch.linalg.matrix_exp(1e-4 * (q - q.T)) for n, q in random_rotations(2, sent).items()}
    for layer in client_drift(turned(sent, small), sent, {}).values():
        assert layer["drift_a"] > 1e-5
        assert layer["gauge2"] / layer["move2"] == pytest.approx(1.0, abs=1e-3)


def test_a_client_that_did_not_move_has_no_drift():
    sent = make_adapter(0)
    assert all(value == 0.0 for layer in client_drift(sent, sent, {}).values() for value in layer.values())


def report(a: float, b: float, gauge2: float = 0.0, angle: float = 0.0, turn: float = 0.0) -> dict[str, float]:
    return {"drift_a": a, "drift_b": b, "move2": a * a + b * b, "gauge2": gauge2, "angle": angle, "turn": turn}


def test_a_round_s_drift_adds_layers_in_squares_and_then_compares_clients():
    clients = {
        "north": {"x": report(3.0, 0.0, 5.0, 0.2, 3.0), "y": report(4.0, 12.0, 8.0, 0.7, 4.0)},
        "south": {"x": report(1.0, 2.0, 1.0, 0.1, 0.0), "y": report(0.0, 0.0, 0.0, 0.0, 0.5)},
    }
    assert summarise_drift(clients) == pytest.approx(
        {
            "a_mean": 3.0, "a_min": 1.0, "b_mean": 7.0, "b_min": 2.0, "gauge_share": (13 / 169 + 1 / 5) / 2,
            "angle_mean": 0.4, "angle_max": 0.7, "turn_mean": 2.75, "turn_per_drift_max": 1.0,
        }
    )  # fmt: skip


def test_clients_that_reported_nothing_are_left_out():
    assert summarise_drift({}) == {}
    assert summarise_drift({"north": {}}) == {}
    one = {"north": {"x": report(1.0, 1.0)}}
    assert summarise_drift(one | {"south": {}}) == summarise_drift(one)


def test_a_round_in_which_nobody_moved_is_no_division_by_zero():
    assert all(value == 0.0 for value in summarise_drift({"north": {"x": report(0.0, 0.0)}}).values())


def test_inputs_may_carry_gradients():
    local = moved(make_adapter(0), 1).map(lambda t: t.requires_grad_())
    layer = client_drift(local, make_adapter(0), {})["enc.0.out"]
    assert all(isinstance(v, float) and not isinstance(v, Tensor) for v in layer.values())
