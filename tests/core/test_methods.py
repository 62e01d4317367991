"""The contract that every registered method keeps, and what each of them does."""

import math
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import ClassVar

import pytest
import torch
from core_helpers import (
    SHAPES,
    assert_close,
    assert_same,
    distance,
    make_adapter,
    moved,
    product,
    random_rotations,
    refused,
    turned,
    weighted,
)
from torch import Tensor

from fedrot import aggregate
from fedrot.core.adapter import Adapter, part_of
from fedrot.core.alignment import align, rotate_back
from fedrot.core.errors import RecipeError
from fedrot.core.methods import Method, get_method, methods, register
from fedrot.core.methods.base import ALL_PARTS, Broadcast, Seat, ServerState
from fedrot.core.methods.factorwise import FedIT
from fedrot.core.methods.rotation import FedRot
from fedrot.core.reduce import Reduction
from fedrot.core.seeding import generator

every_method = pytest.mark.parametrize("name", list(methods()))
every_round = pytest.mark.parametrize("number", range(4))
NAMES = ["north", "south", "west"]


def state_at(method: Method, number: int, adapter: Adapter) -> ServerState:
    """The method's first state, with the broadcast put at a later round."""
    state = method.start(adapter)
    return replace(state, broadcast=replace(state.broadcast, round=number))


def seat_of(name: str) -> tuple[Seat, torch.Generator]:
    return Seat(name), generator("test", name)


def trained(method: Method, broadcast: Broadcast, name: str, seed: int, size: float = 0.3) -> Adapter:
    """What local training would give: noise on the parts that the method trains in this round."""
    start = method.begin(broadcast, Seat(name))
    after = dict(moved(start, seed, size).tensors())
    parts = method.trainable(broadcast.round)
    return start.with_tensors({n: after[n] if part_of(n) in parts else t for n, t in start.tensors()})


def play(method: Method, state: ServerState, locals_: list[Adapter], weights: list[float]) -> ServerState:
    """One round as the server and its clients run it."""
    parts = method.uploads(state.broadcast.round)
    reduction = Reduction(state.broadcast.adapter, parts, keep=method.capabilities.reduction == "factors")
    for name, local, weight in zip(NAMES, locals_, weights, strict=True):
        reduction.add(method.client(local, state.broadcast, *seat_of(name)).adapter, weight)
    return method.server(state, reduction.result())


def product_close(left: Adapter, right: Adapter, rel: float = 1e-5) -> bool:
    return all(
        distance(product(p), product(right.layers[n])) <= rel * float(p.b.norm() * p.a.norm()) * p.scale
        for n, p in left.layers.items()
    )


@every_method
def test_a_method_describes_itself_and_its_settings_are_plain_values(name):
    cls = get_method(name)
    method = cls()
    assert cls.name == name
    assert cls.paper
    assert cls.capabilities.reduction in ("sum", "factors")
    assert cls(**method.settings()) == method
    assert all(isinstance(v, str | int | float | bool | None) for v in method.settings().values())
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        method.strength = 1.0


@every_method
@every_round
def test_identical_clients_come_out_as_they_went_in(name, number):
    method = get_method(name)()
    state = state_at(method, number, make_adapter(0, dtype=torch.float64))
    local = trained(method, state.broadcast, "north", seed=1)
    result = play(method, state, [local] * 3, [1.0, 5.0, 2.0]).broadcast.adapter
    assert product_close(result, local)
    assert all(distance(result.head[n], t) < 1e-10 for n, t in local.head.items())


@every_method
@every_round
def test_the_head_is_averaged_by_weight_and_never_turned(name, number):
    method = get_method(name)()
    state = state_at(method, number, make_adapter(0))
    locals_ = [trained(method, state.broadcast, n, seed) for seed, n in enumerate(NAMES, 1)]
    result = play(method, state, locals_, [1.0, 5.0, 2.0]).broadcast.adapter
    for key, tensor in result.head.items():
        mean = weighted([local.head[key] for local in locals_], [1.0, 5.0, 2.0])
        torch.testing.assert_close(tensor, mean.float(), atol=1e-6, rtol=1e-6)


@every_method
@every_round
def test_the_head_is_trained_and_travels_like_the_other_parts(name, number):
    method = get_method(name)()
    assert "head" in method.trainable(number)
    assert "head" in method.uploads(number)
    assert method.uploads(number) <= ALL_PARTS


@every_method
@every_round
def test_parts_that_do_not_travel_stay_the_broadcast_s_bit_for_bit(name, number):
    method = get_method(name)()
    state = state_at(method, number, make_adapter(0))
    locals_ = [moved(make_adapter(0), seed) for seed in range(3)]  # even if a client changed all of them
    before, after = (dict(s.broadcast.adapter.tensors()) for s in (state, play(method, state, locals_, [1.0] * 3)))
    parts = method.uploads(number)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor) == (part_of(key) not in parts), key


@every_method
def test_rounds_are_counted_and_inputs_are_left_alone(name):
    method = get_method(name)()
    state = method.start(make_adapter(0))
    assert state.broadcast.round == 0
    locals_ = [trained(method, state.broadcast, n, seed) for seed, n in enumerate(NAMES, 1)]
    copies = [local.map(Tensor.clone) for local in locals_]
    later = play(method, state, locals_, [1.0] * 3)
    assert later.broadcast.round == 1
    assert play(method, later, locals_, [1.0] * 3).broadcast.round == 2
    assert_same(state.broadcast.adapter, make_adapter(0))
    for local, copy in zip(locals_, copies, strict=True):
        assert_same(local, copy)


@every_method
@every_round
def test_the_order_of_clients_does_not_matter(name, number):
    method = get_method(name)()
    state = state_at(method, number, make_adapter(0, dtype=torch.float64))
    locals_ = [trained(method, state.broadcast, "north", seed) for seed in range(1, 4)]
    one = play(method, state, locals_, [1.0, 5.0, 2.0]).broadcast.adapter
    other = play(method, state, locals_[::-1], [2.0, 5.0, 1.0]).broadcast.adapter
    assert product_close(one, other, rel=1e-10)


@every_method
@every_round
def test_no_client_is_the_result_by_itself_and_each_one_moves_it(name, number):
    method = get_method(name)()
    state = state_at(method, number, make_adapter(0))
    locals_ = [trained(method, state.broadcast, n, seed) for seed, n in enumerate(NAMES, 1)]
    result = play(method, state, locals_, [1.0] * 3).broadcast.adapter
    for i, local in enumerate(locals_):
        assert not product_close(result, local, rel=1e-2)
        others = [moved(x, 9) if j == i else x for j, x in enumerate(locals_)]
        assert not product_close(play(method, state, others, [1.0] * 3).broadcast.adapter, result, rel=1e-2)


@every_method
def test_every_standalone_method_aggregates_adapters(name):
    cls = get_method(name)
    if not cls.capabilities.standalone:
        pytest.skip("needs rounds")
    adapter = make_adapter(0)
    assert product_close(aggregate([adapter, adapter], method=name, reference=make_adapter(1)), adapter)


def test_fedit_sends_the_local_adapter_itself():
    local = make_adapter(1)
    result = FedIT().client(local, Broadcast(3, make_adapter(0)), *seat_of("north"))
    assert result.adapter is local
    assert not result.rotation


@pytest.mark.parametrize(
    ("factor", "expected"),
    [("alternate", [None, "A", "B", "A", "B"]), ("A", [None, *"AAAA"]), ("B", [None, *"BBBB"])],
)
def test_fedrot_s_schedule_leaves_round_0_and_matches_a_in_odd_and_b_in_even_rounds(factor, expected):
    method = FedRot(strength=0.7, factor=factor)
    local, reference = make_adapter(1), make_adapter(0)
    assert [method.aligned_factor(n) for n in range(5)] == expected
    for number, by in enumerate(expected):
        result = method.client(local, Broadcast(number, reference), *seat_of("north"))
        if by is None:
            assert_same(result.adapter, local)
            assert not result.rotation
        else:
            assert_same(result.adapter, align(local, reference, by, 0.7))


@every_round
def test_fedrot_of_strength_0_is_fedit_bit_for_bit(number):
    state = state_at(FedIT(), number, make_adapter(0))
    locals_ = [trained(FedIT(), state.broadcast, n, seed) for seed, n in enumerate(NAMES, 1)]
    plain, still = (play(m, state, locals_, [1.0, 5.0, 2.0]) for m in (FedIT(), FedRot(strength=0.0)))
    assert_same(still.broadcast.adapter, plain.broadcast.adapter)
    assert not FedRot(strength=0.0).client(locals_[0], state.broadcast, *seat_of("north")).rotation


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("number", [1, 2])
def test_an_upload_s_rotations_undo_to_the_local_factors(strength, number):
    local = make_adapter(1)
    result = FedRot(strength=strength).client(local, Broadcast(number, make_adapter(0)), *seat_of("north"))
    assert result.rotation.keys() == SHAPES.keys()
    assert_close(rotate_back(result.adapter, result.rotation), local, rel=1e-6)
    assert product_close(result.adapter, local, rel=1e-6)
    assert result.adapter.bytes() == local.bytes()


def test_fedrot_aligns_to_what_the_client_was_sent_and_not_to_a_stale_adapter():
    method, local = FedRot(strength=1.0, factor="A"), make_adapter(3)
    sent, current = make_adapter(0), make_adapter(1)
    stale = method.client(local, Broadcast(5, current, reference=sent), *seat_of("north"))
    assert_same(stale.adapter, align(local, sent, "A", 1.0))
    fresh = method.client(local, Broadcast(5, current), *seat_of("north"))
    assert_same(fresh.adapter, align(local, current, "A", 1.0))


@pytest.mark.parametrize("number", [1, 2])
def test_fedrot_at_full_strength_undoes_the_clients_frames_where_fedit_cancels_them(number):
    state = state_at(FedRot(strength=1.0), number, make_adapter(0, dtype=torch.float64))
    adapter = state.broadcast.adapter
    locals_ = [turned(adapter, random_rotations(seed, adapter)) for seed in (10, 20, 30)]
    aligned, plain = (play(m, state, locals_, [1.0] * 3).broadcast.adapter for m in (FedRot(strength=1.0), FedIT()))
    assert_close(aligned, adapter, rel=1e-9)
    assert not product_close(plain, adapter, rel=0.1)


def test_a_client_keeps_the_state_it_had():
    seat = Seat("north", {"x": torch.ones(2)})
    for method in (FedIT(), FedRot(), FedRot(strength=0.0)):
        assert method.client(make_adapter(1), Broadcast(1, make_adapter(0)), seat, generator(0)).state is seat.state


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan, math.inf, "strong", None])
def test_a_strength_outside_0_to_1_is_refused_as_a_recipe_s_fault(strength):
    with refused("method.strength", repr(strength), error=RecipeError):
        FedRot(strength=strength)


@pytest.mark.parametrize("factor", ["C", "b", "", None])
def test_an_unknown_factor_is_refused_with_the_choices(factor):
    with refused("method.factor", repr(factor), "A, B or alternate", error=RecipeError):
        FedRot(factor=factor)


def test_fedrot_refuses_a_local_adapter_of_another_form():
    with refused("enc.0.out"):
        FedRot().client(make_adapter(1, rank=2), Broadcast(1, make_adapter(0)), *seat_of("north"))


def test_an_unknown_method_is_refused_with_the_choices():
    with refused("'fedrto'", *methods(), error=RecipeError):
        get_method("fedrto")


@pytest.mark.parametrize("taken", ["fedit", ""])
def test_a_method_needs_a_name_of_its_own(taken):
    @dataclass(frozen=True)
    class Another(Method):
        name: ClassVar[str] = taken

    before = dict(methods())
    with pytest.raises(ValueError, match="name of its own"):
        register(Another)
    assert methods() == before


def test_the_listing_of_methods_is_a_copy_in_order():
    listed = methods()
    assert list(listed) == sorted(listed)
    assert {"fedit", "fedrot"} <= set(listed)
    del listed["fedit"]
    assert get_method("fedit") is FedIT
