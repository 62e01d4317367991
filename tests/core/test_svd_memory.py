"""What `fedrot_svd` remembers, momentum in product space and error feedback, against dense definitions."""

from dataclasses import replace

import pytest
import torch
from core_helpers import make_adapter, moved
from method_helpers import (
    LAYERS,
    Played,
    Train,
    Weights,
    apart,
    clients,
    first_state,
    global_change,
    ideal_change,
    noise,
    play,
)
from method_oracles import best_rank
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.methods.svd import FedRotSVD
from fedrot.core.seeding import seed_of

RANK = 3


def history(method: FedRotSVD, count: int, train: Train | None = None, size: float = 0.3) -> list[Played]:
    """So many rounds; each with noise of its own unless `train` is given."""
    state = method.start(make_adapter(0, RANK, 2.0, LAYERS, torch.float64))
    found = []
    for number in range(count):
        found.append(play(method, state, clients(1, 5, 2), train or noise(size, number)))
        state = found[-1].after
    return found


def kept(played: Played, what: str, name: str) -> Tensor:
    """B A of what the server remembers."""
    memory = played.after.memory
    return memory[f"{what}/{name}/b"] @ memory[f"{what}/{name}/a"]


def close(found: Tensor, expected: Tensor, size: Tensor) -> bool:
    return float((found - expected).norm()) <= 1e-9 * float(size.norm())


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("kept_rank", [None, 1, 5])
@pytest.mark.parametrize("clip", [1.0, 0.05])
def test_the_server_goes_where_the_dense_definition_says(
    momentum: float, feedback: bool, kept_rank: int | None, clip: float
) -> None:
    """V <- T_q(beta V + M - W), to W + V; what T_r cut off, the next q terms of it clipped, is added in the next."""
    method = FedRotSVD(momentum, feedback, clip, kept_rank)
    q = kept_rank or RANK
    velocity: Weights = {}
    rest: Weights = {}
    for played in history(method, 4):
        before, ideal, after = (
            global_change(played.before.broadcast), ideal_change(played), global_change(played.after.broadcast)
        )  # fmt: skip
        for name, mean in ideal.items():
            aim = mean
            if momentum:
                velocity[name] = best_rank(momentum * velocity.get(name, 0 * mean) + mean - before[name], q)
                aim = before[name] + velocity[name]
                assert close(kept(played, "momentum", name), velocity[name], mean)
            if feedback:
                aim = aim + rest.get(name, 0 * mean)
            sent = best_rank(aim, RANK)
            assert close(after[name], sent, mean)
            if feedback:
                cut_off = best_rank(aim, RANK + q) - sent
                cut_off = cut_off * min(1.0, clip * float(sent.norm()) / float(cut_off.norm()))
                assert close(kept(played, "feedback", name), cut_off, mean)
                rest[name] = cut_off
        assert len(played.after.memory) == 2 * len(LAYERS) * (bool(momentum) + feedback)


def test_without_memory_nothing_is_kept() -> None:
    assert all(not played.after.memory for played in history(FedRotSVD(), 2))


@pytest.mark.parametrize("kept_rank", [1, 2, 4])
def test_memory_has_the_rank_it_is_given(kept_rank: int) -> None:
    for played in history(FedRotSVD(0.5, True, 1.0, kept_rank), 2):
        for key, tensor in played.after.memory.items():
            assert tensor.shape[1 if key.endswith("/b") else 0] == kept_rank


def test_a_rank_to_keep_beyond_the_layer_s_own_is_no_error() -> None:
    usual, wide = (history(FedRotSVD(0.5, True, 1e9, q), 3) for q in (13, 100))
    for one, other in zip(usual, wide, strict=True):
        assert apart(global_change(other.after.broadcast), global_change(one.after.broadcast)) < 1e-9


def test_a_state_s_memory_is_left_as_it_was() -> None:
    method = FedRotSVD(0.5, True)
    state = history(method, 1)[0].after
    before = {key: tensor.clone() for key, tensor in state.memory.items()}
    after = play(method, state, clients(1, 5, 2), noise(seed=1)).after
    assert state.memory.keys() == before.keys() == after.memory.keys()
    for key, tensor in state.memory.items():
        assert torch.equal(tensor, before[key])
        assert not torch.equal(after.memory[key], tensor)


def test_other_things_in_the_memory_stay() -> None:
    method = FedRotSVD(0.5)
    state = first_state(method, make_adapter(0, RANK, 2.0, LAYERS, torch.float64))
    other = {"server/m/x": torch.ones(2)}
    after = play(method, replace(state, memory=other), clients(1, 1), noise()).after
    assert after.memory["server/m/x"] is other["server/m/x"]


def same_uploads(start: Adapter, client: str) -> Adapter:
    """Clients whose factors do not depend on what they are sent."""
    return moved(make_adapter(0, RANK, 2.0, LAYERS, torch.float64), seed_of(client), 1.0)


def summed(method: FedRotSVD, count: int) -> tuple[Weights, Weights, list[Played]]:
    """The sums, over rounds of equal uploads, of what was sent and of what would have been ideal."""
    played = history(method, count, same_uploads)
    sent, ideal = ([f(p) for p in played] for f in (lambda p: global_change(p.after.broadcast), ideal_change))
    sums = [{n: sum(one[n] for one in each) for n in LAYERS} for each in (sent, ideal)]
    return sums[0], sums[1], played


def test_with_feedback_what_is_cut_off_is_sent_later() -> None:
    """The sums' difference is what is still kept, however many rounds there were; without, it grows with them."""
    clip, rounds = 1e9, 40
    with_it, ideal, played = summed(FedRotSVD(feedback=True, feedback_clip=clip, kept_rank=9), rounds)
    without, same_ideal, _ = summed(FedRotSVD(), rounds)
    few, few_ideal, _ = summed(FedRotSVD(feedback=True, feedback_clip=clip, kept_rank=9), 10)
    for name in LAYERS:
        assert torch.equal(ideal[name], same_ideal[name])
        missing = ideal[name] - with_it[name]
        assert close(missing, kept(played[-1], "feedback", name), ideal[name])
        lost = float((same_ideal[name] - without[name]).norm())
        once = float(torch.linalg.svdvals(ideal[name] / rounds)[RANK:].norm())
        assert lost == pytest.approx(rounds * once, rel=1e-9)
        assert float(missing.norm()) < 0.5 * lost
        assert float(missing.norm()) < 2 * float((few_ideal[name] - few[name]).norm())


@pytest.mark.parametrize("clip", [0.0, 0.01, 0.1])
def test_what_is_fed_back_is_never_above_its_bound_and_never_blown_up_to_it(clip: float) -> None:
    bounded = 0
    for played in history(FedRotSVD(feedback=True, feedback_clip=clip), 5, same_uploads):
        sent = global_change(played.after.broadcast)
        for name in LAYERS:
            size = float(kept(played, "feedback", name).norm())
            assert size <= clip * float(sent[name].norm()) * (1 + 1e-9)
            bounded += size >= clip * float(sent[name].norm()) * (1 - 1e-9)
    assert bounded > 0
    for played in history(FedRotSVD(feedback=True, feedback_clip=1e6), 1, same_uploads):
        for name, mean in ideal_change(played).items():
            assert close(kept(played, "feedback", name), best_rank(mean, 2 * RANK) - best_rank(mean, RANK), mean)


def test_a_bound_of_nothing_is_no_feedback() -> None:
    plain, bound = history(FedRotSVD(), 3), history(FedRotSVD(feedback=True, feedback_clip=0.0), 3)
    for one, other in zip(plain, bound, strict=True):
        assert apart(global_change(other.after.broadcast), global_change(one.after.broadcast)) < 1e-10


def test_momentum_goes_on_in_the_direction_it_had() -> None:
    """Clients stay where they were sent: the broadcast would stand too; with momentum it goes on, ever slower."""

    seen: set[str] = set()

    def still_after_the_first(start: Adapter, client: str) -> Adapter:
        first = client not in seen
        seen.add(client)
        return noise()(start, client) if first else start

    played = history(FedRotSVD(0.5, kept_rank=9), 4, still_after_the_first)
    steps = [
        {n: global_change(p.after.broadcast)[n] - global_change(p.before.broadcast)[n] for n in LAYERS} for p in played
    ]
    for name in LAYERS:
        sizes = [float(step[name].norm()) for step in steps]
        assert 0.05 < sizes[1] / sizes[0] < 0.75
        assert sizes[3] < sizes[2] < sizes[1]


def test_all_zero_updates_leave_memory_finite_and_the_broadcast_at_the_clients_mean_a() -> None:
    method = FedRotSVD(0.5, True)
    start = make_adapter(0, RANK, 2.0, LAYERS, torch.float64, zero_b=True)

    def only_a(adapter: Adapter, client: str) -> Adapter:
        after = noise()(adapter, client)
        return after.with_tensors({n: t * 0 if n.endswith("/b") else t for n, t in after.tensors()})

    played = play(method, first_state(method, start), clients(1, 5, 2), only_a)
    assert all(bool(torch.isfinite(t).all()) for t in played.after.memory.values())
    for name, pair in played.after.broadcast.adapter.layers.items():
        assert not bool(pair.b.any())
        mean = sum(p * local.layers[name].a for p, local in zip(played.shares, played.trained, strict=True))
        torch.testing.assert_close(pair.a, mean)
