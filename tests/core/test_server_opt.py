"""Server optimizers against a plain scalar implementation of what their docstring says."""

import math

import pytest
import torch
from core_helpers import assert_same, make_adapter, moved, quick, seeds
from hypothesis import given
from hypothesis import strategies as st
from method_helpers import only
from torch import Tensor

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.server_opt import PREFIX, server_step
from fedrot.core.settings import ServerSettings

ALL = frozenset({"a", "b", "head"})
SHAPES = {"q": (4, 3), "o": (3, 5)}
optimizers = pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])


def small(seed: int, dtype: torch.dtype = torch.float64) -> Adapter:
    return make_adapter(seed, 2, shapes=SHAPES, dtype=dtype)


class Scalar:
    """One number under a server optimizer (Reddi et al., algorithm 2), in plain Python."""

    def __init__(self, settings: ServerSettings) -> None:
        self.s, self.m, self.v = settings, 0.0, settings.epsilon**2
        self.lr = settings.lr or {"momentum": 1.0, "adam": 0.01, "yogi": 0.01}[settings.optimizer]

    def step(self, old: float, mean: float) -> float:
        delta = mean - old
        if self.s.optimizer == "momentum":
            self.m = self.s.beta1 * self.m + delta
            return old + self.lr * self.m
        self.m = self.s.beta1 * self.m + (1 - self.s.beta1) * delta
        if self.s.optimizer == "adam":
            self.v = self.s.beta2 * self.v + (1 - self.s.beta2) * delta**2
        else:
            sign = (self.v > delta**2) - (self.v < delta**2)
            self.v = self.v - (1 - self.s.beta2) * delta**2 * sign
        return old + self.lr * self.m / (math.sqrt(self.v) + self.s.epsilon)


@optimizers
@quick
@given(
    seed=seeds,
    lr=st.sampled_from([None, 0.5, 1e-3]),
    beta1=st.sampled_from([0.0, 0.9]),
    beta2=st.sampled_from([0.5, 0.99]),
    epsilon=st.sampled_from([1e-3, 0.5]),
)
def test_every_number_moves_as_the_plain_formula_says_over_several_rounds(
    optimizer: str, seed: int, lr: float | None, beta1: float, beta2: float, epsilon: float
) -> None:
    settings = ServerSettings(optimizer, lr, beta1, beta2, epsilon)
    state, memory = small(seed), {}
    flat = [float(x) for _, t in state.tensors() for x in t.flatten()]
    scalars = [Scalar(settings) for _ in flat]
    for number in range(4):
        mean = moved(state, seed + number, 0.5)
        state, memory = server_step(settings, state, mean, ALL, memory)
        means = [float(x) for _, t in mean.tensors() for x in t.flatten()]
        flat = [one.step(old, new) for one, old, new in zip(scalars, flat, means, strict=True)]
        found = [float(x) for _, t in state.tensors() for x in t.flatten()]
        assert found == pytest.approx(flat, rel=1e-10, abs=1e-12)


@optimizers
def test_parts_that_were_frozen_keep_their_values_and_their_moments(optimizer: str) -> None:
    settings = ServerSettings(optimizer)
    state, memory = small(0), {}
    trained = [frozenset({"a", "head"}), frozenset({"b"}), frozenset({"a"})]
    for number, parts in enumerate(trained):
        mean, before, sent = only(moved(state, number), state, parts), dict(memory), dict(state.tensors())
        after, memory = server_step(settings, state, mean, parts, memory)
        for name, tensor in after.tensors():
            names = [key for key in memory if key.endswith(f"/{name}")]
            assert torch.equal(tensor, sent[name]) == (part_of(name) not in parts)
            if part_of(name) in parts:
                assert names
                assert all(key not in before or not torch.equal(memory[key], before[key]) for key in names)
            else:
                assert all(memory[key] is before[key] for key in names)
        state = after
    assert all(name.startswith(PREFIX) for name in memory)


@optimizers
def test_a_factor_that_rests_every_other_round_goes_on_with_the_moments_it_had(optimizer: str) -> None:
    """RoLoRA: what A's rounds do must not depend on B's rounds between them."""
    settings = ServerSettings(optimizer, beta1=0.9)

    def run(with_b: bool) -> dict[str, Tensor]:
        state, memory = small(0), {}
        for number in range(3):
            for parts in ({"a"}, {"b"}) if with_b else ({"a"},):
                mean = only(small(10 + number), state, frozenset(parts))
                state, memory = server_step(settings, state, mean, frozenset(parts), memory)
        return {n: t for n, t in state.tensors() if part_of(n) == "a"}

    alone, between = run(False), run(True)
    assert all(torch.equal(t, between[n]) for n, t in alone.items())
    assert not torch.equal(alone["layers/q/a"], small(12).layers["q"].a)  # momentum had something to add


@quick
@given(seeds)
def test_momentum_of_rate_one_and_no_memory_is_plain_averaging(seed: int) -> None:
    old, mean = small(seed), small(seed + 1)
    after, memory = server_step(ServerSettings("momentum", 1.0, 0.0), old, mean, ALL, {})
    for (name, found), (_, expected) in zip(after.tensors(), mean.tensors(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(memory[f"{PREFIX}m/{name}"], expected - dict(old.tensors())[name])


def test_without_an_optimizer_the_average_itself_goes_out() -> None:
    mean, memory = small(1), {"server/m/x": torch.ones(1)}
    after, kept = server_step(ServerSettings(), small(0), mean, ALL, memory)
    assert after is mean
    assert kept == memory


@optimizers
def test_memory_and_inputs_are_not_changed_in_place(optimizer: str) -> None:
    settings = ServerSettings(optimizer)
    state, mean = small(0), small(1)
    _, memory = server_step(settings, state, mean, ALL, {})
    copies = {name: t.clone() for name, t in memory.items()}
    server_step(settings, state, mean, ALL, memory)
    assert all(torch.equal(t, copies[name]) for name, t in memory.items())
    assert_same(state, small(0))
    assert_same(mean, small(1))


@optimizers
def test_a_round_without_a_change_leaves_everything_where_it_was(optimizer: str) -> None:
    after, _ = server_step(ServerSettings(optimizer), small(0), small(0), ALL, {})
    assert_same(after, small(0))


@optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_in_double_precision_and_factors_in_their_own(optimizer: str, dtype: torch.dtype) -> None:
    after, memory = server_step(ServerSettings(optimizer), small(0, dtype), small(1, dtype), ALL, {})
    assert all(t.dtype == dtype for _, t in after.tensors())
    assert all(t.dtype == torch.float64 for t in memory.values())
    assert len(memory) == (1 if optimizer == "momentum" else 2) * len(list(after.tensors()))


@pytest.mark.parametrize("optimizer", ["adam", "yogi"])
def test_adaptive_steps_are_bounded_by_the_rate_whatever_the_size_of_the_change(optimizer: str) -> None:
    settings = ServerSettings(optimizer, lr=0.01, beta1=0.0, beta2=0.0, epsilon=1e-3)
    old = small(0)
    far = old.map(lambda t: t + 1e6)
    after, _ = server_step(settings, old, far, ALL, {})
    for (_, x), (_, y) in zip(after.tensors(), old.tensors(), strict=True):
        assert float((x - y).abs().max()) == pytest.approx(0.01, rel=1e-3)
