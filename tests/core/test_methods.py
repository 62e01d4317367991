"""The contract that every registered method keeps, whatever it does with the factors."""

import math
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, ClassVar, get_args

import pytest
import torch
from core_helpers import assert_close, assert_same, make_adapter, moved, refused, weighted
from method_helpers import (
    LAYERS,
    NAMES,
    apart,
    clients,
    every_method,
    every_round,
    first_state,
    models,
    noise,
    one_round,
    only,
    play,
    rounds,
    updates,
)
from torch import Tensor

from fedrot import aggregate
from fedrot.core.adapter import Adapter, part_of
from fedrot.core.alignment import rotate_back
from fedrot.core.errors import RecipeError
from fedrot.core.methods import Method, get_method, methods, register
from fedrot.core.methods.base import ALL_PARTS, Broadcast, Seat, ServerState, Weighting
from fedrot.core.methods.factorwise import FedIT
from fedrot.core.seeding import generator

EXPECTED = {
    "as_published", "centralised", "fedask", "fedex", "fedit", "fedrot", "fedrot_consensus", "fedrot_svd", "fedsa",
    "ffa", "flexlora", "flexlora_regauge", "flora", "hetlora", "local", "lora_fair", "random_rotation", "rescale",
    "rolora", "stale_reference",
}  # fmt: skip
STANDALONE = [name for name, cls in methods().items() if cls.capabilities.standalone]


@every_method
def test_a_method_describes_itself_and_its_settings_are_plain_values(name: str) -> None:
    cls = get_method(name)
    method = cls()
    assert cls.name == name
    assert cls.paper
    assert cls.weighting is None or cls.weighting in get_args(Weighting)
    assert cls.__doc__ != Method.__doc__
    assert cls(**method.settings()) == method
    assert all(isinstance(v, str | int | float | bool | None) for v in method.settings().values())
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        method.strength = 1.0


@every_method
def test_capabilities_do_not_contradict_each_other(name: str) -> None:
    needs = get_method(name).capabilities
    assert needs.reduction in ("sum", "factors")
    assert needs.client_state or not needs.personal  # a model of one's own is kept somewhere
    assert not (needs.standalone and (needs.personal or needs.pooled))
    assert not (needs.second_phase and needs.reduction == "factors")


def test_the_methods_of_the_field_are_there() -> None:
    assert set(methods()) >= EXPECTED


@every_method
@every_round
def test_the_head_is_averaged_by_weight_or_kept_where_it_does_not_travel(name: str, number: int) -> None:
    played = one_round(name, number, clients(1, 5, 2))
    before, after = played.before.broadcast.adapter.head, played.after.broadcast.adapter.head
    travels = "head" in get_method(name)().uploads(number)
    for key, tensor in after.items():
        mean = weighted([local.head[key] for local in played.trained], [1.0, 5.0, 2.0])
        if travels:
            torch.testing.assert_close(tensor, mean, atol=1e-12, rtol=1e-12)
        else:
            assert torch.equal(tensor, before[key])
        assert float((mean - before[key]).norm()) > 0.1


@every_method
@every_round
def test_no_method_turns_the_head(name: str, number: int) -> None:
    played = one_round(name, number)
    if "head" in get_method(name)().uploads(number):
        for sent, local in zip(played.sent, played.trained, strict=True):
            assert all(torch.equal(t, local.head[key]) for key, t in sent.head.items())


@every_method
@every_round
def test_the_head_is_trained_and_parts_are_known_ones(name: str, number: int) -> None:
    method = get_method(name)()
    assert "head" in method.trainable(number)
    assert method.trainable(number) <= ALL_PARTS
    assert method.uploads(number) <= ALL_PARTS


@every_method
@every_round
def test_only_parts_that_travel_change_and_the_others_stay_bit_for_bit(name: str, number: int) -> None:
    method = get_method(name)()
    start = make_adapter(0, 3, shapes=LAYERS)
    state = first_state(method, start, number)
    # Even if a client changed more than it may: what does not travel cannot count.
    played = play(method, state, clients(1, 5, 2), noise())
    answered = {"a"} if method.capabilities.second_phase else set()
    parts = method.uploads(number) | answered
    after = dict(played.after.broadcast.adapter.tensors())
    for key, tensor in start.tensors():
        assert torch.equal(after[key], tensor) == (part_of(key) not in parts), key


@every_method
def test_rounds_are_counted_and_inputs_are_left_alone(name: str) -> None:
    method = get_method(name)()
    start, copy = make_adapter(0, shapes=LAYERS), make_adapter(0, shapes=LAYERS)
    assert method.start(start).broadcast.round == 0
    played = rounds(method, start, clients(1, 5, 2), 3)
    assert [p.after.broadcast.round for p in played] == [1, 2, 3]
    assert_same(start, copy)
    snapshot = {k: t.clone() for k, t in _tensors(played[1].after).items()}
    locals_ = [local.map(Tensor.clone) for local in played[1].trained]
    again = play(method, played[1].after, clients(1, 5, 2), noise(seed=9), played[1].kept)
    assert again.after.broadcast.round == 3
    for key, tensor in _tensors(played[1].after).items():
        assert torch.equal(tensor, snapshot[key]), key
    for local, before in zip(played[1].trained, locals_, strict=True):
        assert_same(local, before)


def _tensors(state: ServerState) -> dict[str, Tensor]:
    """All that a checkpoint of this state holds."""
    found: dict[str, Tensor] = dict(state.memory)
    for role in ("adapter", "reference", "base_delta", "base_step"):
        adapter = getattr(state.broadcast, role)
        found |= {f"{role}/{key}": t for key, t in adapter.tensors()} if adapter else {}
    return found


@every_method
def test_the_state_is_finite_tensors_in_the_form_of_the_first_broadcast(name: str) -> None:
    start = make_adapter(0, shapes=LAYERS, scale=0.7, fan_in_fan_out=True)
    for played in rounds(get_method(name)(), start, clients(1, 5, 2), 3):
        state = played.after
        assert all(isinstance(t, Tensor) and bool(torch.isfinite(t).all()) for t in _tensors(state).values())
        for client_state in played.kept.values():
            assert all(isinstance(t, Tensor) for t in client_state.values())
        sent = state.broadcast.adapter
        assert [(n, t.shape, t.dtype) for n, t in sent.tensors()] == [(n, t.shape, t.dtype) for n, t in start.tensors()]
        assert all(pair.scale == 0.7 and pair.fan_in_fan_out for pair in sent.layers.values())
        for change in (state.broadcast.base_delta, state.broadcast.base_step):
            assert (change is not None) == get_method(name).capabilities.changes_base
            assert all(pair.fan_in_fan_out for pair in (change.layers if change else {}).values())


@every_method
def test_a_rank_above_a_layer_s_smallest_side_keeps_the_adapter_s_form(name: str) -> None:
    narrow = {"wide": (12, 9), "few outputs": (5, 3), "few inputs": (3, 12)}
    start = make_adapter(0, 4, shapes=narrow, dtype=torch.float64)
    for played in rounds(get_method(name)(), start, clients(1, 5, 2), 2):
        after = played.after.broadcast.adapter
        assert [(n, t.shape) for n, t in after.tensors()] == [(n, t.shape) for n, t in start.tensors()]


@every_method
def test_the_same_round_gives_the_same_bits(name: str) -> None:
    one, two = (rounds(get_method(name)(), make_adapter(0, shapes=LAYERS), clients(1, 5, 2), 2) for _ in range(2))
    for mine, theirs in zip(one, two, strict=True):
        assert {k: t.tolist() for k, t in _tensors(mine.after).items()} == {
            k: t.tolist() for k, t in _tensors(theirs.after).items()
        }


@every_method
@every_round
def test_a_client_without_a_state_of_the_method_s_keeps_what_it_had(name: str, number: int) -> None:
    method = get_method(name)()
    seat = Seat("north", {"x": torch.ones(2)})
    local, broadcast = make_adapter(1), Broadcast(number, make_adapter(0))
    state = method.client(local, broadcast, seat, generator(0)).state
    if method.capabilities.client_state:
        assert state
        assert "x" not in state
    else:
        assert state is seat.state
        assert method.begin(broadcast, seat) is broadcast.adapter


@every_method
def test_what_a_client_did_after_training_is_known_from_its_rotation_or_the_method_says_it_is_not(name: str) -> None:
    needs = get_method(name).capabilities
    unexplained = 0
    for number in range(3):
        played = one_round(name, number)
        for local, sent, rotation in zip(played.trained, played.sent, played.rotations, strict=True):
            parts = get_method(name)().uploads(number)
            expected = dict(only(local, played.before.broadcast.adapter, parts).tensors())
            found = dict(rotate_back(sent, rotation).tensors())
            unexplained += any(float((found[key] - t).norm()) > 1e-9 for key, t in expected.items())
    if needs.second_phase:
        return  # what is uploaded there are no factors
    assert (unexplained == 0) == needs.reports_turn
    assert needs.reports_turn or not needs.variates


@every_method
@every_round
def test_a_reported_rotation_is_the_one_that_was_applied(name: str, number: int) -> None:
    played = one_round(name, number)
    for local, sent, rotation in zip(played.trained, played.sent, played.rotations, strict=True):
        assert set(rotation) in (set(), set(LAYERS))
        for key, r in rotation.items():
            torch.testing.assert_close(r @ r.T, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
            assert float(torch.linalg.det(r)) == pytest.approx(1.0)
            torch.testing.assert_close(sent.layers[key].a, r.T @ local.layers[key].a)
            torch.testing.assert_close(sent.layers[key].b, local.layers[key].b @ r)


@pytest.mark.parametrize("name", STANDALONE)
def test_aggregate_is_a_first_round_s_server_and_clients(name: str) -> None:
    reference = make_adapter(0, shapes=LAYERS, dtype=torch.float64)
    adapters = [moved(reference, seed) for seed in (1, 2, 3)]
    merged = aggregate(adapters, [1, 5, 2], name, reference)
    method = get_method(name).standalone()
    by_name = dict(zip(NAMES, adapters, strict=True))
    played = play(method, first_state(method, reference, 1), clients(1, 5, 2), lambda _, client: by_name[client])
    if name == "random_rotation":  # drawn anew: the frames differ, what is averaged is one and the same
        assert_close(Adapter({}, merged.head), Adapter({}, played.after.broadcast.adapter.head), rel=1e-9)
        assert apart(updates(merged), models(method, played)[0]) > 0.01
        return
    assert apart(updates(merged), models(method, played)[0]) < 1e-9
    assert_close(Adapter({}, merged.head), Adapter({}, played.after.broadcast.adapter.head), rel=1e-9)


@pytest.mark.parametrize("name", sorted(set(methods()) - set(STANDALONE)))
def test_what_needs_rounds_is_refused_outside_of_them(name: str) -> None:
    with refused(repr(name), "needs training rounds", error=RecipeError):
        aggregate([make_adapter(0), make_adapter(1)], method=name)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("fedrot", "strength", -0.1),
        ("fedrot", "strength", math.nan),
        ("fedrot", "strength", "strong"),
        ("fedrot", "strength", None),
        ("fedrot", "factor", "C"),
        ("fedrot", "factor", "b"),
        ("fedrot", "factor", None),
        ("fedrot", "softening", "hard"),
        ("stale_reference", "strength", 1.1),
        ("stale_reference", "lag", 0),
        ("as_published", "strength", math.inf),
        ("fedrot_svd", "momentum", 1.0),
        ("fedrot_svd", "momentum", -0.1),
        ("fedrot_svd", "momentum", math.nan),
        ("fedrot_svd", "feedback_clip", -1.0),
        ("fedrot_svd", "feedback_clip", math.inf),
        ("fedrot_svd", "feedback_clip", math.nan),
        ("fedrot_svd", "kept_rank", 0),
        ("fedrot_consensus", "steps", -1),
        ("lora_fair", "mu", -0.1),
        ("lora_fair", "mu", math.inf),
        ("lora_fair", "mu", math.nan),
    ],
)
def test_a_setting_s_bad_value_is_refused_as_a_recipe_s_fault(name: str, setting: str, value: Any) -> None:
    with refused(f"method.{setting}", repr(value), error=RecipeError):
        get_method(name)(**{setting: value})


def test_an_unknown_factor_or_softening_is_refused_with_the_choices() -> None:
    with refused("A, B, alternate or joint", error=RecipeError):
        get_method("fedrot")(factor="C")
    with refused("linear or regularised", error=RecipeError):
        get_method("fedrot")(softening="hard")


def test_an_unknown_method_is_refused_with_the_choices() -> None:
    with refused("'fedrto'", *methods(), error=RecipeError):
        get_method("fedrto")


@pytest.mark.parametrize("taken", ["fedit", ""])
def test_a_method_needs_a_name_of_its_own(taken: str) -> None:
    @dataclass(frozen=True)
    class Another(Method):
        name: ClassVar[str] = taken

    before = dict(methods())
    with pytest.raises(ValueError, match="name of its own"):
        register(Another)
    assert methods() == before


def test_the_listing_of_methods_is_a_copy_in_order() -> None:
    listed = methods()
    assert isinstance(listed, Mapping)
    assert list(listed) == sorted(listed)
    del listed["fedit"]
    assert get_method("fedit") is FedIT


def test_a_method_without_a_second_phase_says_so() -> None:
    with pytest.raises(NotImplementedError, match="fedit has no second phase"):
        FedIT().answer(make_adapter(0), make_adapter(0))
    reduced = one_round("fedit").after
    with pytest.raises(NotImplementedError, match="fedit has no second phase"):
        FedIT().ask(reduced, None)


def test_the_server_of_two_phases_does_not_go_on_without_the_second() -> None:
    from fedrot.core.reduce import Reduction

    method = get_method("fedask")()
    reduction = Reduction(make_adapter(0), method.uploads(0))
    reduction.add(make_adapter(1), 1.0)
    with pytest.raises(ValueError, match="second phase"):
        method.server(method.start(make_adapter(0)), reduction.result(), generator(0))
