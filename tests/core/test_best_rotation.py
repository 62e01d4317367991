"""The numerical optimum over all clients' rotations: the yardstick must not be beaten, nor beat the floor."""

import math

import pytest
import torch
from core_helpers import SHAPES, dense_errors, make_adapter, moved, random_rotations, turned, upload

from fedrot.core.adapter import Adapter
from fedrot.core.alignment import find_rotations, rotate
from fedrot.core.best_rotation import best_rotation_error2, common_frame, search_rotations
from fedrot.core.diagnostics import AggregationErrors, ExactErrors, exact_errors
from fedrot.core.linalg import procrustes

SMALL = {"q": (9, 8), "v": (9, 8), "o": (7, 10)}


def errors_of(adapters: list[Adapter], weights: list[float]) -> dict[str, dict[str, float]]:
    return exact_errors(adapters, weights, rho=True)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_best_rotation_is_between_the_floor_and_the_frames_as_they_are(rank, count):
    adapters = [make_adapter(10 * rank + i, rank, shapes=SMALL) for i in range(count)]
    weights = [float(i + 1) for i in range(count)]
    dense = dense_errors(adapters, weights)
    for name, layer in errors_of(adapters, weights).items():
        slack = 1e-12 * layer["ideal2"]
        assert dense[name]["floor2"] - slack <= layer["best2"] <= dense[name]["error2"] * (1 + 1e-9) + slack


@pytest.mark.parametrize("rank", [2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_frames_that_hide_one_common_update_are_found_and_rho_is_1(rank, seed):
    adapter = make_adapter(seed, rank, shapes=SMALL)
    clients = [turned(adapter, random_rotations(seed + k, adapter)) for k in (10, 20, 30)]
    found = errors_of(clients, [1.0, 4.0, 2.0])
    for layer in found.values():
        assert layer["before2"] > 1e-3 * layer["ideal2"]
        assert layer["best2"] <= 1e-9 * layer["ideal2"]
    assert AggregationErrors(found, False, 3).totals()["rho"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_where_the_frames_are_common_there_is_nothing_to_gain(seed):
    adapter = make_adapter(seed, 3, shapes=SMALL, dtype=torch.float64)
    clients = [moved(adapter, seed + k, 0.02) for k in (1, 2, 3)]
    turned_away = [turned(c, random_rotations(seed + 9 * i, c)) for i, c in enumerate(clients)]
    near, far = errors_of(clients, [1.0] * 3), errors_of(turned_away, [1.0] * 3)
    for name in SMALL:
        assert far[name]["best2"] <= near[name]["before2"] * (1 + 1e-6)  # at least as good as the frames once were
        assert near[name]["best2"] >= near[name]["floor2"] * (1 - 1e-9)


def test_in_the_plane_the_search_finds_what_trying_all_angles_finds():
    adapters = [make_adapter(i, 2, 1.0, shapes={"q": (5, 4)}, dtype=torch.float64) for i in (3, 4)]
    (a1, b1), (a2, b2) = ((c.layers["q"].a, c.layers["q"].b) for c in adapters)
    ideal = 0.5 * (b1 @ a1 + b2 @ a2)
    angle = torch.linspace(-math.pi, math.pi, 4001, dtype=torch.float64)
    c, s = angle.cos(), angle.sin()
    r = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
    tried = (ideal - 0.25 * (b1 + b2 @ r) @ (a1 + r.mT @ a2)).square().sum((-2, -1))
    assert errors_of(adapters, [1.0, 1.0])["q"]["best2"] == pytest.approx(float(tried.min()), rel=1e-4)


def test_the_optimum_does_not_depend_on_the_frames_the_clients_hold():
    adapters = [make_adapter(i, 2, shapes=SMALL, dtype=torch.float64) for i in range(2)]
    other = [turned(a, random_rotations(50 + i, a)) for i, a in enumerate(adapters)]
    one, two = errors_of(adapters, [1.0, 1.0]), errors_of(other, [1.0, 1.0])
    for name in SMALL:
        assert two[name]["best2"] == pytest.approx(one[name]["best2"], rel=1e-3)


def test_layers_of_a_batch_do_not_spoil_each_other():
    stacked = [torch.stack([getattr(make_adapter(i).layers[n], s) for n in ("enc.0.query", "enc.0.value")])
               for s in "ab" for i in range(3)]  # fmt: skip
    a, b = torch.stack(stacked[:3]).double(), torch.stack(stacked[3:]).double()
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    together = best_rotation_error2(a, b, p)
    alone = torch.cat([best_rotation_error2(a[:, i : i + 1], b[:, i : i + 1], p) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0.02, atol=0)
    huge = best_rotation_error2(torch.cat([a[:, :1], 1e4 * a[:, 1:]], 1), b, p)
    assert float(huge[0]) == pytest.approx(float(alone[0]), rel=0.02)


def searched(adapters: list[Adapter]) -> float:
    """A search of one layer in float64 that measures its progress by the error itself."""
    a, b = (torch.stack([getattr(c.layers["q"], s) for c in adapters]) for s in "ab")
    ideal, free = (b @ a).mean(0), torch.zeros(len(a), a.shape[1], a.shape[1], dtype=torch.float64, requires_grad=True)

    def error2() -> torch.Tensor:
        r = torch.linalg.matrix_exp(free - free.mT)
        return (ideal - (b @ r).mean(0) @ (r.mT @ a).mean(0)).square().sum()

    start = float(error2().detach())
    search = torch.optim.LBFGS([free], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = error2() / start
        torch.autograd.backward(loss)
        return loss

    search.step(closure)
    return float(error2().detach())


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.01, 1e-3])
def test_the_search_does_not_stop_early_where_the_error_is_small(spread):
    base = make_adapter(0, 4, 1.0, shapes={"q": (20, 18)}, dtype=torch.float64)
    clients = []
    for k in range(4):
        skew = random_rotations(7 * k, base)["q"]
        rotation = torch.linalg.matrix_exp(0.3 * spread * (skew - skew.T))
        clients.append(turned(moved(base, k, spread), {"q": rotation}))
    assert errors_of(clients, [1.0] * 4)["q"]["best2"] <= searched(clients) * 1.02


@pytest.mark.parametrize("spread", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("seed", range(2))
def test_a_layer_with_a_tiny_error_beside_one_with_a_large_one_is_not_made_worse(seed, spread):
    base = make_adapter(seed, shapes={"near": (9, 8)}, dtype=torch.float64)
    clients = []
    for k in range(3):
        far = make_adapter(1000 * seed + k, shapes={"far": (9, 8)}, dtype=torch.float64)
        clients.append(Adapter({**moved(base, 100 * seed + k, spread).layers, **far.layers}))
    for layer in errors_of(clients, [1.0] * 3).values():
        assert layer["best2"] <= layer["before2"] * (1 + 1e-6)


def test_a_client_without_an_update_does_no_harm():
    adapters = [make_adapter(0, zero_b=True), make_adapter(1, zero_b=True), make_adapter(2)]
    for layer in errors_of(adapters, [1.0] * 3).values():
        assert math.isfinite(layer["best2"])
        assert layer["best2"] <= layer["before2"] * (1 + 1e-9)


@pytest.mark.parametrize("seed", [0, 2, 7, 14, 23])
def test_the_best_rotation_is_above_neither_the_frames_sent_nor_the_clients_own(seed):
    """Turning towards a strange reference makes matters worse; the search must not start from there alone."""
    base, reference = (make_adapter(seed + k, 3, shapes={"q": (9, 8), "o": (7, 10)}, dtype=torch.float64)
                       for k in (0, 500))  # fmt: skip
    errors = ExactErrors(rho=True)
    for k in range(3):
        local = moved(base, 100 * seed + k, 0.01)
        rotation = find_rotations(local, reference, "B", 1.0)
        errors.add(upload(rotate(local, rotation), rotation), 1.0)
    for layer in errors.result().layers.values():
        assert layer["best2"] <= layer["after2"] * (1 + 1e-6)
        assert layer["best2"] <= layer["before2"] * (1 + 1e-6)


@pytest.mark.parametrize("seed", [0, 9, 34])
def test_rho_is_zero_where_there_is_no_error_but_rounding(seed):
    adapter = make_adapter(seed, rank=1, shapes=SMALL)  # at rank one there is not even anything to turn
    totals = AggregationErrors(errors_of([adapter] * 3, [1, 2, 4]), False, 3).totals()
    assert totals["before_relative"] < 1e-12
    assert totals["rho"] == pytest.approx(0.0, abs=1e-6)


def test_the_caller_s_gradients_are_left_alone():
    adapters = [make_adapter(i).map(lambda t: t.requires_grad_()) for i in range(2)]
    with torch.no_grad():
        found = errors_of(adapters, [1.0, 1.0])
    assert found.keys() == SHAPES.keys()
    assert all(t.grad is None for a in adapters for _, t in a.tensors())


def stacked(adapters: list[Adapter], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 1, r, d_in) and (N, 1, d_out, r)."""
    pairs = [adapter.layers[name] for adapter in adapters]
    return torch.stack([p.a for p in pairs])[:, None], torch.stack([p.b for p in pairs])[:, None]


def error_under(a: torch.Tensor, b: torch.Tensor, p: torch.Tensor, r: torch.Tensor) -> float:
    weight = p.reshape(-1, 1, 1, 1)
    averaged = (weight * (b @ r)).sum(0) @ (weight * (r.mT @ a)).sum(0)
    return float(((weight * (b @ a)).sum(0) - averaged).square().sum())


@pytest.mark.parametrize("iterations", [0, 5, 60])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_rotations_that_are_searched_are_rotations_and_never_worse_than_none(
    iterations: int, rank: int, seed: int
) -> None:
    clients = [make_adapter(10 * seed + i, rank, shapes=SMALL, dtype=torch.float64) for i in range(3)]
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    for name in SMALL:
        a, b = stacked(clients, name)
        r = search_rotations(a, b, p, iterations)
        torch.testing.assert_close(r @ r.mT, torch.eye(rank).double().expand(r.shape), atol=1e-9, rtol=0)
        torch.testing.assert_close(torch.linalg.det(r), torch.ones(3, 1).double(), atol=1e-9, rtol=0)
        eye = torch.eye(rank, dtype=torch.float64).expand(r.shape)
        found, none = error_under(a, b, p, r), error_under(a, b, p, eye)
        assert found <= none * (1 + 1e-12)
        if iterations == 60 and rank > 1:
            assert found < none
            # The yardstick starts from several places, this search from one.
            assert float(best_rotation_error2(a, b, p)[0]) * (1 - 1e-6) <= found


def test_more_steps_of_the_search_lose_less() -> None:
    clients = [make_adapter(i, 4, shapes=SMALL, dtype=torch.float64) for i in range(4)]
    p = torch.full((4,), 0.25, dtype=torch.float64)
    a, b = stacked(clients, "q")
    errors = [error_under(a, b, p, search_rotations(a, b, p, steps)) for steps in (0, 5, 40)]
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("seed", range(3))
def test_a_common_frame_is_found_for_turned_copies_and_is_a_fixed_point_of_procrustes(seed: int) -> None:
    base = make_adapter(seed, 4, shapes={"q": (9, 8)}, dtype=torch.float64)
    copies = [turned(base, random_rotations(seed + k, base)) for k in (10, 20, 30)]
    weight = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).reshape(-1, 1, 1, 1)
    a, b = stacked(copies, "q")
    r = common_frame(a, b, weight)
    together = r.mT @ a
    torch.testing.assert_close(together[1:], together[:1].expand(together[1:].shape), atol=1e-7, rtol=0)
    noisy = [moved(copy, seed + 5 * i, 0.05) for i, copy in enumerate(copies)]
    a, b = stacked(noisy, "q")
    r = common_frame(a, b, weight, sweeps=50)
    mean_a, mean_b = (weight * (r.mT @ a)).sum(0), (weight * (b @ r)).sum(0)
    spread_a, spread_b = ((weight * (x - m).square()).sum(0).mean() for x, m in ((r.mT @ a, mean_a), (b @ r, mean_b)))
    again = procrustes(a @ mean_a.mT / spread_a + b.mT @ mean_b / spread_b)
    torch.testing.assert_close(again, r, atol=1e-4, rtol=0)
