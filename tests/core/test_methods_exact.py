"""Methods that lose nothing, those that lose no more than one adapter must, and what each leaves in the broadcast."""

import math

import pytest
import torch
from core_helpers import assert_close, distance, make_adapter, moved, random_rotations, turned, weighted
from method_helpers import (
    LAYERS,
    Client,
    Played,
    apart,
    clients,
    first_state,
    global_change,
    ideal_change,
    models,
    noise,
    one_round,
    play,
    rounds,
    updates,
)
from method_oracles import best_rank
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.methods import get_method, methods
from fedrot.core.methods.svd import gauged

EXACT = sorted({"ffa", "rolora"} | {n for n, m in methods().items() if m.capabilities.changes_base})
ONE_ADAPTER = [n for n, m in methods().items() if not (m.capabilities.changes_base or m.capabilities.personal)]
OPTIMAL = ["flexlora", "flexlora_regauge", "fedrot_svd"]
orientations = pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["linear", "conv1d"])


def error(played: Played) -> float:
    """What came out against the mean of the clients' own models, relative."""
    return apart(global_change(played.after.broadcast), ideal_change(played))


def floor(played: Played) -> float:
    """The least that any adapter of this rank loses, over all layers."""
    rank = next(iter(played.trained[0].layers.values())).rank
    tails = [torch.linalg.svdvals(change)[rank:] / change.norm() for change in ideal_change(played).values()]
    return max(float(tail.norm()) for tail in tails)


def test_the_exact_methods_are_these() -> None:
    assert EXACT == ["fedex", "ffa", "flora", "rolora"]


@pytest.mark.parametrize("name", EXACT)
@orientations
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_an_exact_method_loses_nothing_but_rounding_round_after_round(
    name: str, fan_in_fan_out: bool, rank: int, dtype: torch.dtype, rel: float
) -> None:
    start = make_adapter(0, rank, 2.0, LAYERS, dtype, fan_in_fan_out)
    for played in rounds(get_method(name)(), start, clients(1, 5, 2), 4):
        assert error(played) < rel
        assert apart(updates(*played.trained[:1]), updates(*played.trained[1:2])) > 0.1


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_method_stays_exact_with_clients_of_smaller_ranks(name: str) -> None:
    mixed = (Client("north", 1, rank=1, scale=5.0), Client("south", 5), Client("west", 2, rank=3, scale=0.5))
    for played in rounds(get_method(name)(), make_adapter(0, 4, 2.0, LAYERS, torch.float64), mixed, 3):
        own = [updates(local, played.before.broadcast.base_delta) for local in played.trained]
        if name in ("ffa", "rolora"):  # the frozen factor is whole at the server, a part of it at the client
            frozen = "a" if played.before.broadcast.round % 2 == 0 or name == "ffa" else "b"
            whole = dict(played.before.broadcast.adapter.tensors())
            filled = [
                local.with_tensors({n: whole[n] if n.endswith(f"/{frozen}") else t for n, t in local.tensors()})
                for local in played.trained
            ]
            for mine, theirs in zip(own, [updates(local) for local in filled], strict=True):
                assert apart(mine, theirs) < 1e-12
        assert error(played) < 1e-12


@pytest.mark.parametrize("name", OPTIMAL)
@orientations
@pytest.mark.parametrize("rank", [1, 4])
def test_the_svd_s_product_is_the_dense_optimum_of_its_rank(name: str, fan_in_fan_out: bool, rank: int) -> None:
    start = make_adapter(0, rank, 0.5, LAYERS, torch.float64, fan_in_fan_out)
    for played in rounds(get_method(name)(), start, clients(1, 5, 2), 3):
        ideal = ideal_change(played)
        best = {layer: best_rank(change, rank) for layer, change in ideal.items()}
        assert apart(global_change(played.after.broadcast), best) < 1e-10
        assert error(played) == pytest.approx(floor(played), rel=1e-9)
        assert floor(played) > 0.01


@pytest.mark.parametrize("name", ONE_ADAPTER)
def test_no_method_of_one_adapter_is_below_the_floor(name: str) -> None:
    for played in rounds(get_method(name)(), make_adapter(0, 4, shapes=LAYERS, dtype=torch.float64), clients(1, 5), 3):
        found, ideal = global_change(played.after.broadcast), ideal_change(played)
        for layer, change in ideal.items():
            least = float(torch.linalg.svdvals(change)[4:].norm())
            assert float((found[layer] - change).norm()) >= least * (1 - 1e-9) - 1e-12 * float(change.norm())


def test_flexlora_s_factors_are_u_s_over_scale_and_v() -> None:
    played = one_round("flexlora", scale=0.5)
    for name, pair in played.after.broadcast.adapter.layers.items():
        torch.testing.assert_close(pair.a @ pair.a.T, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
        gram = 0.25 * pair.b.T @ pair.b
        s2 = torch.linalg.svdvals(ideal_change(played)[name])[:3].square()
        torch.testing.assert_close(gram, torch.diag(s2), atol=1e-9, rtol=1e-9)


def test_the_regauged_factors_are_the_svd_s_in_the_last_frame_and_at_its_size() -> None:
    played = one_round("flexlora_regauge", scale=0.5)
    for name, pair in played.after.broadcast.adapter.layers.items():
        last = played.before.broadcast.adapter.layers[name].a
        c = float(last.square().sum(1).mean().sqrt())  # root mean square row norm
        torch.testing.assert_close(pair.a @ pair.a.T, c**2 * torch.eye(3, dtype=torch.float64), atol=1e-11, rtol=0)
        # No other rotation of these factors is nearer to the last ones.
        m = pair.a @ last.T
        assert distance(m, m.T) < 1e-9 * float(m.norm())
        assert float(torch.linalg.eigvalsh(m + m.T)[0] + torch.linalg.eigvalsh(m + m.T)[1]) > -1e-9
        u, s, _ = torch.linalg.svd(ideal_change(played)[name])
        assert distance(u[:, :3] @ u[:, :3].T @ pair.b, pair.b) < 1e-9
        torch.testing.assert_close(torch.linalg.svdvals(pair.b) * c * 0.5, s[:3], rtol=1e-9, atol=1e-12)


def test_regauging_keeps_the_frame_where_plain_svd_jumps() -> None:
    """Clients that hardly move: the factors must hardly move either."""
    start = make_adapter(0, 4, shapes=LAYERS, dtype=torch.float64)
    rows = {n: torch.linalg.qr(p.a.T)[0].T for n, p in start.layers.items()}  # a frame that one size fits
    start = start.with_tensors({n: rows[n.split("/")[1]] if n.endswith("/a") else t for n, t in start.tensors()})
    jumps = {}
    for name in ("flexlora", "flexlora_regauge", "fedrot_svd"):
        jumps[name] = 0.0
        for played in rounds(get_method(name)(), start, clients(1, 1, 1), 4, size=1e-3):
            before, after = played.before.broadcast.adapter, played.after.broadcast.adapter
            turns = [distance(p.a, before.layers[n].a) / float(p.a.norm()) for n, p in after.layers.items()]
            jumps[name] = max(jumps[name], *turns)
    assert jumps["flexlora"] > 0.5
    assert jumps["flexlora_regauge"] < 0.01
    assert jumps["fedrot_svd"] < 0.01


@pytest.mark.parametrize("number", [0, 1])
def test_fedrot_svd_gives_clients_that_agree_their_very_factors_back(number: int) -> None:
    def same(start: Adapter, client: str) -> Adapter:
        return moved(start, 5)

    played = one_round("fedrot_svd", number, clients(1, 5, 2), same)
    assert_close(played.after.broadcast.adapter, played.trained[0], rel=1e-9)


@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_fedrot_svd_s_gauge_is_the_formula_s(spread: float) -> None:
    played = one_round("fedrot_svd", train=noise(spread), scale=0.5)
    for name, pair in played.after.broadcast.adapter.layers.items():
        mean = weighted([local.layers[name].a for local in played.trained], [1.0, 5.0, 2.0])
        rows = torch.linalg.svd(ideal_change(played)[name])[2][:3]
        g = rows @ mean.T @ torch.linalg.inv(mean @ mean.T)
        torch.testing.assert_close(g @ pair.a, rows, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_hardly_any_factors_of_the_optimum_have_an_a_nearer_to_fedit_s(spread: float) -> None:
    """All A with this product are X V^T for some invertible X: the nearest one is the mean's projection."""
    played = one_round("fedrot_svd", train=noise(spread))
    for name, pair in played.after.broadcast.adapter.layers.items():
        mean = weighted([local.layers[name].a for local in played.trained], [1.0, 5.0, 2.0])
        rows = torch.linalg.svd(ideal_change(played)[name])[2][:3]
        assert distance(pair.a, mean) <= distance(mean @ rows.T @ rows, mean) * 1.01


@pytest.mark.parametrize("to", ["usual", "nearly singular", "singular", "zero", "elsewhere"])
def test_the_gauge_keeps_the_product_and_blows_nothing_up(to: str) -> None:
    rng = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(12, 8, generator=rng, dtype=torch.float64))
    a, b = q[:, :4].T, torch.randn(9, 4, generator=rng, dtype=torch.float64)
    target = torch.randn(4, 12, generator=rng, dtype=torch.float64)
    if to in ("nearly singular", "singular"):
        target[3] = target[2] + (1e-7 * target[1] if to == "nearly singular" else 0)
    target = {"zero": torch.zeros(4, 12, dtype=torch.float64), "elsewhere": q[:, 4:].T}.get(to, target)
    new_b, new_a = gauged(b[None], a[None], target[None])
    assert distance(new_b[0] @ new_a[0], b @ a) < 1e-10 * float((b @ a).norm())
    values = torch.linalg.svdvals(new_a[0])
    assert float(values[0] / values[-1]) < 1e4
    size = math.sqrt(float(target.square().sum()) / 4) if to != "zero" else 1.0
    assert 0.1 * size < float(new_a.norm() / 2) < 1e3 * size


def test_the_gauge_of_no_update_at_all_is_the_target_itself() -> None:
    target = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.linalg.qr(target[0].T)[0].T
    b = torch.stack([torch.zeros(5, 3), torch.ones(5, 3)]).double()
    new_b, new_a = gauged(b, torch.stack([rows, rows]), target)
    assert not bool(new_b[0].any())
    assert torch.equal(new_a[0], target[0])
    torch.testing.assert_close(new_b[1] @ new_a[1], b[1] @ rows)


def test_fedex_s_adapter_is_fedit_s_and_its_step_the_cross_covariance() -> None:
    played, plain = one_round("fedex", scale=0.5), one_round("fedit", scale=0.5)
    assert_close(played.after.broadcast.adapter, plain.after.broadcast.adapter, rel=1e-12)
    for name, pair in played.after.broadcast.base_step.layers.items():
        p = torch.tensor(played.shares, dtype=torch.float64).reshape(-1, 1, 1)
        a, b = (torch.stack([getattr(local.layers[name], s) for local in played.trained]) for s in "ab")
        covariance = (p * ((b - (p * b).sum(0)) @ (a - (p * a).sum(0)))).sum(0)
        assert pair.rank == min(9, *LAYERS[name])
        torch.testing.assert_close(pair.scale * pair.b @ pair.a, 0.5 * covariance)


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_the_base_s_change_is_the_sum_of_the_steps_and_grows_no_wider_than_the_layer(name: str) -> None:
    total: dict[str, Tensor] = {}
    start = make_adapter(0, 3, 2.0, LAYERS, torch.float64, True)
    for played in rounds(get_method(name)(), start, clients(1, 5, 2), 3):
        after = played.after.broadcast
        for layer, step in updates(after.base_step).items():
            total[layer] = total[layer] + step if layer in total else step
        assert apart(updates(after.base_delta), total) < 1e-12
        for change in (after.base_delta, after.base_step):
            assert all(pair.rank <= min(LAYERS[n]) for n, pair in change.layers.items())
        assert not after.base_delta.head


def test_flora_starts_every_round_from_fresh_factors_that_are_the_server_s_alone() -> None:
    played = rounds(get_method("flora")(), make_adapter(0, 3, shapes=LAYERS), clients(1, 5, 2), 3)
    starts = [p.after.broadcast.adapter for p in played]
    for start in starts:
        for name, pair in start.layers.items():
            bound = LAYERS[name][0] ** -0.5
            assert not bool(pair.b.any())
            assert 0.6 * bound < float(pair.a.abs().max()) <= bound
            assert abs(float(pair.a.mean())) < 0.5 * bound
    assert distance(starts[0].layers["enc.1.out"].a, starts[1].layers["enc.1.out"].a) > 0.1
    assert distance(starts[0].layers["enc.0.query"].a, starts[0].layers["enc.0.value"].a) > 0.1


def test_lora_fair_keeps_the_mean_a_and_its_b_cannot_be_bettered() -> None:
    method = get_method("lora_fair")(mu=0.3)
    start = make_adapter(0, 3, 0.5, LAYERS, torch.float64)
    played = play(method, first_state(method, start), clients(1, 5, 2), noise())
    for name, pair in played.after.broadcast.adapter.layers.items():
        a, b = (weighted([getattr(x.layers[name], s) for x in played.trained], [1.0, 5.0, 2.0]) for s in "ab")
        torch.testing.assert_close(pair.a, a)
        mu = 0.3 * float(torch.diagonal(a @ a.T).mean())
        free = (pair.b - b).requires_grad_()
        miss = 2 * (b + free) @ a * 0.25 - ideal_change(played)[name]  # s = 1 / 2
        loss = (4 * miss.square().sum()) + mu * free.square().sum()
        (gradient,) = torch.autograd.grad(loss, free)
        assert float(gradient.norm()) < 1e-9 * float(loss.detach())
        assert distance(pair.b, b) > 0.01


def test_lora_fair_without_a_penalty_projects_and_with_a_huge_one_is_fedit() -> None:
    start = make_adapter(0, 3, shapes=LAYERS, dtype=torch.float64)
    free, tied = (get_method("lora_fair")(mu=mu) for mu in (0.0, 1e12))
    played = play(free, first_state(free, start), clients(1, 5, 2), noise())
    for name, pair in played.after.broadcast.adapter.layers.items():
        rows = torch.linalg.qr(pair.a.T)[0]
        ideal = ideal_change(played)[name]
        torch.testing.assert_close(2.0 * pair.b @ pair.a, ideal @ rows @ rows.T)
    fedit = one_round("fedit", 0)
    tied_after = play(tied, first_state(tied, start), clients(1, 5, 2), noise()).after
    assert_close(tied_after.broadcast.adapter, fedit.after.broadcast.adapter, rel=1e-9)


def test_fedask_is_exact_where_the_ideal_update_has_the_adapter_s_rank() -> None:
    def only_b(start: Adapter, client: str) -> Adapter:
        after = dict(noise()(start, client).tensors())
        return start.with_tensors({n: t if n.endswith("/a") else after[n] for n, t in start.tensors()})

    def only_a(start: Adapter, client: str) -> Adapter:
        after = dict(noise()(start, client).tensors())
        return start.with_tensors({n: t if n.endswith("/b") else after[n] for n, t in start.tensors()})

    for train in (only_a, only_b):
        assert error(one_round("fedask", train=train)) < 1e-12
    assert error(one_round("fedask")) > 1e-3


def test_fedask_s_uploads_in_both_phases_are_as_large_as_fedit_s() -> None:
    played = one_round("fedask")
    method, adapter = get_method("fedask")(), played.before.broadcast.adapter
    second = adapter.bytes(frozenset({"a"}))
    assert adapter.bytes(method.uploads(1)) + second == adapter.bytes(get_method("fedit")().uploads(1))


def test_consensus_of_two_planes_is_what_trying_all_angles_finds() -> None:
    shapes = {"q": (5, 4)}
    method = get_method("fedrot_consensus")(steps=60)
    start = make_adapter(3, 2, 1.0, shapes, torch.float64)
    played = play(method, first_state(method, start), clients(1, 1), noise(1.0))
    (a1, b1), (a2, b2) = ((c.layers["q"].a, c.layers["q"].b) for c in played.trained)
    ideal = 0.5 * (b1 @ a1 + b2 @ a2)
    angle = torch.linspace(-math.pi, math.pi, 4001, dtype=torch.float64)
    c, s = angle.cos(), angle.sin()
    r = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
    tried = (ideal - 0.25 * (b1 + b2 @ r) @ (a1 + r.mT @ a2)).norm(dim=(-2, -1))
    found = float((models(method, played)[0]["q"] - ideal).norm())
    assert found == pytest.approx(float(tried.min()), rel=1e-3)
    assert found < 0.95 * float(tried[2000])  # the frames as they were


@pytest.mark.parametrize("steps", [0, 20])
def test_consensus_undoes_frames_that_hide_one_update(steps: int) -> None:
    method = get_method("fedrot_consensus")(steps=steps)
    start = make_adapter(0, 3, shapes=LAYERS, dtype=torch.float64)

    def own_frame(adapter: Adapter, client: str) -> Adapter:
        return turned(adapter, random_rotations(len(client) * 7, adapter))

    played = play(method, first_state(method, start, 1), clients(1, 5, 2), own_frame)
    assert error(played) < 1e-6
    assert error(play(get_method("fedit")(), first_state(method, start, 1), clients(1, 5, 2), own_frame)) > 0.1


def test_the_more_steps_consensus_searches_the_less_is_lost() -> None:
    def lost(steps: int) -> float:
        method = get_method("fedrot_consensus")(steps=steps)
        start = make_adapter(0, 4, shapes=LAYERS, dtype=torch.float64)
        return error(play(method, first_state(method, start), clients(1, 5, 2), noise(1.5)))

    errors = [lost(steps) for steps in (0, 3, 40)]
    assert errors[2] < 0.98 * errors[1]
    assert errors[1] < 0.98 * errors[0]
