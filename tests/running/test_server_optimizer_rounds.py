"""Server optimizers in rounds: the recurrences of arXiv 2003.00295 (algorithm 2), parts that rest, dropped uploads."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from fakes import FakeEngine, Silent, first_adapter, poisoned
from tiny_runs import assert_equal, assert_near, begin, flat
from torch import Tensor

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.methods import methods
from fedrot.core.methods.base import ServerState
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.rounds import play_round

SIZES = {"a": 10, "b": 20, "c": 40}
STEPPING = [name for name, method in methods().items() if method.capabilities.steps]
MOMENTUM = ("--server.optimizer", "momentum")
ADAM = ("--server.optimizer", "adam", "--server.lr", "0.05", "--server.beta1", "0.6", "--server.epsilon", "0.02")
YOGI = ("--server.optimizer", "yogi", "--server.lr", "0.05", "--server.beta2", "0.8")


def fakes(values: dict[str, Any], rounds: int, *flags: str) -> tuple[list[ServerState], FakeEngine]:
    """The states before every round and after the last one, of clients that move by noise."""
    recipe = parse_recipe(values, ["--method.name", "fedit", *flags])
    engine = FakeEngine(recipe.method, SIZES)
    states = [recipe.method.start(first_adapter())]
    for _ in range(rounds):
        states.append(play_round(recipe, engine, states[-1], Silent())[0])
    return states, engine


def mean_of(engine: FakeEngine, number: int) -> dict[str, Tensor]:
    """What FedIT makes of the round's clients."""
    total = sum(SIZES.values())
    locals_ = {client: flat(engine.locals[number, client]) for client in SIZES}
    return {n: sum(SIZES[c] / total * locals_[c][n] for c in SIZES) for n in locals_["a"]}


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (MOMENTUM, ("momentum", 1.0, 0.9, 0.0, 0.0)),
        ((*MOMENTUM, "--server.lr", "0.3", "--server.beta1", "0.5"), ("momentum", 0.3, 0.5, 0.0, 0.0)),
        (("--server.optimizer", "adam"), ("adam", 0.01, 0.9, 0.99, 1e-3)),
        (ADAM, ("adam", 0.05, 0.6, 0.99, 0.02)),
        (YOGI, ("yogi", 0.05, 0.9, 0.8, 1e-3)),
    ],
    ids=["momentum", "slow momentum", "adam", "adam set", "yogi"],
)
def test_rounds_are_the_recurrence_of_the_paper(
    flags: tuple[str, ...], rule: tuple[str, float, float, float, float], tiny_values: dict[str, Any]
) -> None:
    kind, rate, beta1, beta2, epsilon = rule
    states, engine = fakes(tiny_values, 4, *flags)
    x = flat(first_adapter())
    m = {n: torch.zeros_like(t) for n, t in x.items()}
    v = {n: torch.full_like(t, epsilon**2) for n, t in x.items()}
    for number in range(4):
        # The clients move what they were sent, so their mean is that of the run itself.
        delta = {n: t - x[n] for n, t in mean_of(engine, number).items()}
        for n, d in delta.items():
            if kind == "momentum":
                m[n] = beta1 * m[n] + d
                x[n] = x[n] + rate * m[n]
                continue
            m[n] = beta1 * m[n] + (1 - beta1) * d
            old = v[n]
            v[n] = (
                beta2 * old + (1 - beta2) * d**2 if kind == "adam" else old - (1 - beta2) * d**2 * (old - d**2).sign()
            )
            x[n] = x[n] + rate * m[n] / (v[n].sqrt() + epsilon)
        assert_near(flat(states[number + 1].broadcast.adapter), x, rel=1e-5)


def same(one: Adapter, other: Adapter) -> None:
    """Equal but for the last bit: a difference that is added again is rounded once more."""
    theirs = dict(other.tensors())
    for name, tensor in one.tensors():
        torch.testing.assert_close(tensor, theirs[name], rtol=2**-22, atol=1e-9)


def test_momentum_without_memory_is_the_average(tiny_values: dict[str, Any]) -> None:
    plain, _ = fakes(tiny_values, 1)
    found, _ = fakes(tiny_values, 1, *MOMENTUM, "--server.beta1", "0", "--server.lr", "1")
    same(found[-1].broadcast.adapter, plain[-1].broadcast.adapter)


@pytest.mark.parametrize("name", STEPPING)
def test_momentum_without_memory_is_no_optimizer_for_any_method(name: str, tiny_values: dict[str, Any]) -> None:
    values = {**tiny_values, "method": {"name": name}}
    plain = begin(values).play()
    found = begin(values, *MOMENTUM, "--server.beta1", "0").play()
    same(found.adapter, plain.adapter)


def test_the_first_round_of_momentum_is_the_average_and_the_next_goes_on(tiny_values: dict[str, Any]) -> None:
    plain, found = fakes(tiny_values, 2)[0], fakes(tiny_values, 2, *MOMENTUM)[0]
    same(found[1].broadcast.adapter, plain[1].broadcast.adapter)
    first = flat(found[1].broadcast.adapter)
    start, second = flat(found[0].broadcast.adapter), flat(plain[2].broadcast.adapter)
    wanted = {n: second[n] + 0.9 * (first[n] - start[n]) for n in first}
    assert_near(flat(found[2].broadcast.adapter), wanted, rel=1e-5)


def of_parts(tensors: dict[str, Tensor], parts: set[str]) -> dict[str, Tensor]:
    """Those of these parts, by name; moments too."""
    return {name: t for name, t in tensors.items() if part_of(name.split("/m/")[-1].split("/v/")[-1]) in parts}


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])
def test_the_factor_that_rests_in_rolora_keeps_its_values_and_its_moments(
    optimizer: str, tiny_values: dict[str, Any]
) -> None:
    """Clients here move and send everything: what is not trained in a round must count for nothing."""
    states, _ = fakes(tiny_values, 4, "--method.name", "rolora", "--server.optimizer", optimizer)
    for number, (before, after) in enumerate(pairwise(states)):
        trained, resting = ("a", "b") if number % 2 else ("b", "a")
        old, new = (dict(state.broadcast.adapter.tensors()) for state in (before, after))
        assert all(torch.equal(new[n], t) for n, t in of_parts(old, {resting}).items())
        assert not any(torch.equal(new[n], t) for n, t in of_parts(old, {trained, "head"}).items())
        memory = of_parts(dict(after.memory), {resting})
        assert memory.keys() == of_parts(dict(before.memory), {resting}).keys()
        assert bool(memory) == (number > 0)
        assert all(torch.equal(t, before.memory[n]) for n, t in memory.items())
        moved = of_parts(dict(after.memory), {trained, "head"})
        assert moved
        assert not any(n in before.memory and torch.equal(t, before.memory[n]) for n, t in moved.items())


def test_a_head_that_does_not_travel_is_not_stepped(tiny_values: dict[str, Any]) -> None:
    for policy in ("personal", "frozen"):
        states, _ = fakes(tiny_values, 2, "--server.optimizer", "adam", "--lora.head", policy)
        head = "head/classifier.weight"
        assert torch.equal(*(dict(s.broadcast.adapter.tensors())[head] for s in (states[0], states[-1])))
        assert not any("head" in name for name in states[-1].memory)
        assert any(name.endswith("/a") for name in states[-1].memory)


def test_only_what_travels_has_moments(tiny_values: dict[str, Any]) -> None:
    parts = {name: set() for name in ("ffa", "fedsa")}
    for name, found in parts.items():
        tiny = begin({**tiny_values, "method": {"name": name}}, "--server.optimizer", "adam").play(2)
        found |= {part_of(key.split("/m/")[-1]) for key in tiny.state.memory if "/m/" in key}
    assert parts == {"ffa": {"b", "head"}, "fedsa": {"a", "head"}}


def test_a_dropped_upload_is_in_no_moment(tiny_values: dict[str, Any]) -> None:
    recipe = parse_recipe(tiny_values, ["--method.name", "fedit", *ADAM])
    states = []
    for sizes, faults in ((SIZES, {"b": poisoned(float("nan"))}), ({"a": 10, "c": 40}, {})):
        engine = FakeEngine(recipe.method, sizes)
        engine.faults = faults
        states.append(play_round(recipe, engine, recipe.method.start(first_adapter()), Silent())[0])
    assert_equal(states[0].broadcast.adapter, states[1].broadcast.adapter)
    assert states[0].memory.keys() == states[1].memory.keys()
    assert all(torch.equal(t, states[1].memory[n]) for n, t in states[0].memory.items())


def test_a_methods_own_memory_and_the_moments_live_side_by_side(tiny_values: dict[str, Any]) -> None:
    flags = ("--method.name", "stale_reference")
    plain, found = fakes(tiny_values, 3, *flags)[0], fakes(tiny_values, 3, *flags, *MOMENTUM)[0]
    past = {name for name in plain[-1].memory if name.startswith("past/")}
    assert past
    assert past == {name for name in found[-1].memory if not name.startswith("server/")}
    moments = {name.removeprefix("server/m/") for name in found[-1].memory if name.startswith("server/")}
    assert moments == set(flat(first_adapter()))
