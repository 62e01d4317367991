"""What a method's result must not depend on: the clients' own frames, their order; and what it must depend on."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from core_helpers import (
    assert_close,
    assert_same,
    distance,
    make_adapter,
    moved,
    quick,
    random_rotations,
    seeds,
    turned,
)
from hypothesis import given
from hypothesis import strategies as st
from method_helpers import (
    LAYERS,
    Played,
    Train,
    Weights,
    apart,
    clients,
    every_method,
    every_round,
    first_state,
    global_change,
    ideal_change,
    models,
    noise,
    one_round,
    play,
    rounds,
)

from fedrot.core.adapter import Adapter
from fedrot.core.alignment import align, rotate_back
from fedrot.core.errors import RecipeError
from fedrot.core.methods import Method, get_method, methods
from fedrot.core.methods.base import Broadcast, Seat
from fedrot.core.methods.controls import RandomRotation, random_rotation
from fedrot.core.methods.factorwise import FedIT
from fedrot.core.methods.rotation import FedRot
from fedrot.core.seeding import generator, seed_of

# (method, settings, round): whatever frames the clients hold, the model that comes out is the same.
FRAME_FREE = [
    ("flexlora", {}, 1),
    ("flexlora_regauge", {}, 1),
    ("fedrot_svd", {}, 1),
    ("fedrot_svd", {"momentum": 0.5, "feedback": True}, 1),
    ("fedex", {}, 1),
    ("flora", {}, 1),
    ("fedask", {}, 1),
    ("fedrot", {"strength": 1.0, "factor": "A"}, 1),
    ("fedrot", {"strength": 1.0, "factor": "B"}, 1),
    ("fedrot", {"strength": 1.0, "factor": "alternate"}, 2),
]
# Local training that leaves each client in a frame of its own breaks these.
FRAME_BOUND = ["fedit", "lora_fair", "hetlora", "rescale", "ffa", "rolora"]
GLOBAL = [n for n, m in methods().items() if not m.capabilities.personal]
SHAPES_OF_FULL_RANK = {"enc.0.query": (24, 20), "enc.0.value": (24, 20), "enc.1.out": (18, 30)}


def in_own_frame(train: Train, seed: int) -> Train:
    """The same training, and then every client turns its frame in a way of its own."""

    def trained(start: Adapter, client: str) -> Adapter:
        local = train(start, client)
        return turned(local, random_rotations(seed_of(seed, client) % 10**6, local))

    return trained


def played(method: Method, number: int, train: Train, rank: int = 3, weights: tuple[float, ...] = (1, 5, 2)) -> Played:
    start = make_adapter(0, rank, 2.0, SHAPES_OF_FULL_RANK, torch.float64)
    return play(method, first_state(method, start, number), clients(*weights), train)


def global_model(method: Method, number: int, train: Train, rank: int = 3) -> Weights:
    return global_change(played(method, number, train, rank).after.broadcast)


@pytest.mark.parametrize(("name", "settings", "number"), FRAME_FREE)
@quick
@given(seed=seeds, rank=st.integers(1, 5))
def test_the_clients_own_frames_do_not_matter(name: str, settings: dict, number: int, seed: int, rank: int) -> None:
    method, train = get_method(name)(**settings), noise(0.3, seed)
    one = global_model(method, number, train, rank)
    assert apart(global_model(method, number, in_own_frame(train, seed), rank), one) < 1e-8


@pytest.mark.parametrize("name", FRAME_BOUND)
def test_other_methods_are_bound_to_the_frames(name: str) -> None:
    method = get_method(name)()
    one = global_model(method, 1, noise())
    assert apart(global_model(method, 1, in_own_frame(noise(), 3)), one) > 0.05


@pytest.mark.parametrize("seed", range(4))
def test_the_consensus_error_hardly_depends_on_the_clients_own_frames(seed: int) -> None:
    def error(train: Train) -> float:
        found = played(get_method("fedrot_consensus")(steps=60), 1, train)
        return apart(global_change(found.after.broadcast), ideal_change(found))

    plain, other = error(noise(0.3, seed)), error(in_own_frame(noise(0.3, seed), seed))
    assert other == pytest.approx(plain, rel=0.02)
    # FedIT's differs many times over.
    assert apart(global_model(FedIT(), 1, in_own_frame(noise(0.3, seed), seed)), ideal_change(
        played(FedIT(), 1, noise(0.3, seed)))) > 5 * plain  # fmt: skip


@every_method
@every_round
def test_the_order_of_clients_does_not_matter(name: str, number: int) -> None:
    method = get_method(name)()
    start = make_adapter(0, 3, 2.0, LAYERS, torch.float64)
    taking_part = clients(1, 5, 2)
    one, other = (
        play(method, first_state(method, start, number), order, noise()) for order in (taking_part, taking_part[::-1])
    )
    mine, theirs = models(method, one), models(method, other)
    if method.capabilities.personal:
        theirs = theirs[::-1]
    # The search of the best rotations ends where it ends: only its error is its own.
    rel = 0.1 if name == "fedrot_consensus" else 1e-10
    assert all(apart(x, y) < rel for x, y in zip(mine, theirs, strict=True))
    assert_close(Adapter({}, one.after.broadcast.adapter.head), Adapter({}, other.after.broadcast.adapter.head), 1e-12)


@pytest.mark.parametrize("name", GLOBAL)
@every_round
def test_clients_that_agree_get_what_they_agree_on(name: str, number: int) -> None:
    def same(start: Adapter, client: str) -> Adapter:
        return moved(start, 5)

    found = one_round(name, number, clients(1, 5, 2), same)
    if name == "random_rotation" and number:
        assert apart(global_change(found.after.broadcast), ideal_change(found)) > 0.05
        return
    # as_published rounds its rotations to half precision.
    rel = 2e-3 if name == "as_published" else 1e-10
    agreed = ideal_change(found)
    assert apart(global_change(found.after.broadcast), agreed) < rel


@every_method
@every_round
def test_one_client_alone_gets_its_own_model_back(name: str, number: int) -> None:
    found = one_round(name, number, clients(3))
    method = get_method(name)()
    rel = 2e-3 if name == "as_published" else 1e-10
    assert apart(models(method, found)[0], ideal_change(found)) < rel


@pytest.mark.parametrize("name", GLOBAL)
@every_round
def test_no_client_is_the_result_by_itself_and_each_one_moves_it(name: str, number: int) -> None:
    usual = noise()
    found = global_change(one_round(name, number, clients(1, 1, 1), usual).after.broadcast)
    for changed in range(3):
        other_client = clients(1, 1, 1)[changed].name

        def train(start: Adapter, client: str, other: str = other_client) -> Adapter:
            return moved(usual(start, client), 9) if client == other else usual(start, client)

        other = one_round(name, number, clients(1, 1, 1), train)
        assert apart(global_change(other.after.broadcast), found) > 1e-2
        alone = one_round(name, number, clients(1, 1, 1)[changed : changed + 1], usual)
        assert apart(global_change(alone.after.broadcast), found) > 1e-2


@pytest.mark.parametrize("name", GLOBAL)
def test_weights_count_by_their_ratio_alone(name: str) -> None:
    one, scaled, other = (
        global_change(one_round(name, 1, clients(*weights)).after.broadcast)
        for weights in ((1, 5, 2), (1e3, 5e3, 2e3), (5, 1, 2))
    )
    assert apart(scaled, one) < 1e-9
    if name == "hetlora":  # its weights are the updates' own
        assert apart(other, one) < 1e-12
    else:
        assert apart(other, one) > 0.01


def test_personal_models_are_each_client_s_own() -> None:
    for name in ("fedsa", "local"):
        first, second = rounds(get_method(name)(), make_adapter(0, 3, shapes=LAYERS, dtype=torch.float64),
                               clients(1, 5, 2), 2)  # fmt: skip
        for i, client in enumerate(first.clients):
            start = get_method(name)().begin(first.after.broadcast, Seat(client.name, first.kept[client.name]))
            for layer, pair in start.layers.items():
                assert torch.equal(pair.b, first.trained[i].layers[layer].b)
                own_a = torch.equal(pair.a, first.trained[i].layers[layer].a)
                assert own_a == (name == "local")
        # A client that was not there keeps what it had; one never seen starts at the broadcast.
        absent = play(get_method(name)(), first.after, clients(1, 5), noise(seed=1), first.kept)
        assert absent.kept["west"] is first.kept["west"]
        new = get_method(name)().begin(second.after.broadcast, Seat("new"))
        assert_same(new, second.after.broadcast.adapter)


def test_local_clients_do_not_touch_each_other() -> None:
    usual = noise()

    def train(start: Adapter, client: str) -> Adapter:
        return moved(usual(start, client), 9) if client == "south" else usual(start, client)

    one, other = one_round("local", 1, train=usual), one_round("local", 1, train=train)
    mine, theirs = models(get_method("local")(), one), models(get_method("local")(), other)
    assert [apart(x, y) < 1e-12 for x, y in zip(mine, theirs, strict=True)] == [True, False, True]
    assert_same(one.after.broadcast.adapter, one.before.broadcast.adapter)
    head = get_method("local")().begin(one.after.broadcast, Seat("north", one.kept["north"])).head
    assert all(torch.equal(t, one.trained[0].head[key]) for key, t in head.items())


def test_fedit_and_centralised_send_the_local_adapter_itself() -> None:
    local = make_adapter(1)
    for name in ("fedit", "centralised"):
        result = get_method(name)().client(local, Broadcast(3, make_adapter(0)), Seat("north"), generator(0))
        assert result.adapter is local
        assert not result.rotation


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        ("alternate", [None, "A", "B", "A", "B"]),
        ("A", [None, *"AAAA"]),
        ("B", [None, *"BBBB"]),
        ("joint", [None, *["joint"] * 4]),
    ],
)
@pytest.mark.parametrize("softening", ["linear", "regularised"])
@pytest.mark.parametrize("guard", [False, True])
def test_fedrot_s_schedule_leaves_round_0_and_matches_a_in_odd_and_b_in_even_rounds(
    factor: str, expected: list, softening: str, guard: bool
) -> None:
    method = FedRot(strength=0.7, factor=factor, softening=softening, guard=guard)
    local, reference = make_adapter(1), make_adapter(0)
    assert [method.aligned_factor(n) for n in range(5)] == expected
    for number, by in enumerate(expected):
        result = method.client(local, Broadcast(number, reference), Seat("north"), generator(0))
        if by is None:
            assert_same(result.adapter, local)
            assert not result.rotation
        else:
            assert_same(result.adapter, align(local, reference, by, 0.7, False, softening, guard))


@every_round
def test_fedrot_of_strength_0_is_fedit_bit_for_bit(number: int) -> None:
    plain, still = (
        play(m, first_state(m, make_adapter(0), number), clients(1, 5, 2), noise())
        for m in (FedIT(), FedRot(strength=0.0))
    )
    assert_same(still.after.broadcast.adapter, plain.after.broadcast.adapter)
    assert not any(still.rotations)


@pytest.mark.parametrize("strength", [0.4, 1.0, "auto"])
@pytest.mark.parametrize("number", [1, 2])
def test_an_upload_s_rotations_undo_to_the_local_factors(strength: float, number: int) -> None:
    local = make_adapter(1)
    broadcast = Broadcast(number, make_adapter(0))
    result = FedRot(strength=strength).client(local, broadcast, Seat("north"), generator(0))
    assert result.rotation.keys() == local.layers.keys()
    assert_close(rotate_back(result.adapter, result.rotation), local, rel=1e-6)
    assert result.adapter.bytes() == local.bytes()


def test_fedrot_aligns_to_what_the_client_was_sent_and_not_to_a_stale_adapter() -> None:
    method, local = FedRot(strength=1.0, factor="A"), make_adapter(3)
    sent, current = make_adapter(0), make_adapter(1)
    for broadcast, frame in ((Broadcast(5, current, reference=sent), sent), (Broadcast(5, current), current)):
        result = method.client(local, broadcast, Seat("north"), generator(0))
        assert_same(result.adapter, align(local, frame, "A", 1.0))


@pytest.mark.parametrize("number", [1, 2])
def test_fedrot_at_full_strength_undoes_the_clients_frames_where_fedit_cancels_them(number: int) -> None:
    method = FedRot(strength=1.0)

    def turn(start: Adapter, client: str) -> Adapter:
        return turned(start, random_rotations(len(client) * 10, start))

    found = played(method, number, turn)
    assert_close(found.after.broadcast.adapter, found.before.broadcast.adapter, rel=1e-9)
    plain = played(FedIT(), number, turn)
    assert apart(global_change(plain.after.broadcast), global_change(plain.before.broadcast)) > 0.1


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_the_stale_reference_is_the_broadcast_of_so_many_rounds_earlier(lag: int) -> None:
    method = get_method("stale_reference")(lag=lag)
    history = rounds(method, make_adapter(0, 3, shapes=LAYERS), clients(1, 5, 2), 6)
    sent = [one.before.broadcast.adapter for one in history]
    for number, one in enumerate(history[1:], 1):
        assert_same(one.before.broadcast.frame, sent[max(0, number - lag)])
        assert len(one.before.memory) == min(number, lag) * len(list(sent[0].tensors()))
    assert method.start(make_adapter(0)).broadcast.frame is not None


def test_the_control_s_rotations_are_uniform_and_each_client_s_and_layer_s_own() -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_rotation(3, rng) for _ in range(2000)])
    torch.testing.assert_close(drawn @ drawn.mT, torch.eye(3, dtype=torch.float64).expand(2000, 3, 3))
    torch.testing.assert_close(torch.linalg.det(drawn), torch.ones(2000, dtype=torch.float64))
    trace = torch.diagonal(drawn, dim1=-2, dim2=-1).sum(-1)
    # Under Haar measure on SO(3): E R = 0, E tr R = 0, E (tr R)^2 = 1, E R_ij^2 = 1/3.
    assert float(drawn.mean(0).abs().max()) < 0.06
    assert abs(float(trace.mean())) < 0.1
    assert float(trace.square().mean()) == pytest.approx(1.0, abs=0.12)
    assert float((drawn.square().mean(0) - 1 / 3).abs().max()) < 0.04
    assert torch.equal(random_rotation(1, rng), torch.ones(1, 1, dtype=torch.float64))
    method, local = RandomRotation(), make_adapter(0)
    results = [
        method.client(local, Broadcast(1, local), Seat(name), generator(name)) for name in ("north", "south", "north")
    ]
    turns = [result.rotation for result in results]
    assert distance(turns[0]["enc.0.query"], turns[1]["enc.0.query"]) > 0.1
    assert distance(turns[0]["enc.0.query"], turns[0]["enc.0.value"]) > 0.1
    assert_same(results[0].adapter, results[2].adapter)


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("number", [1, 2])
def test_as_published_rounds_its_rotations_to_half_precision_and_does_not_report_them(
    strength: float, number: int
) -> None:
    local, sent = make_adapter(1, dtype=torch.float64), make_adapter(0, dtype=torch.float64)
    result = get_method("as_published")(strength=strength).client(local, Broadcast(number, sent), Seat("x"), None)
    assert not result.rotation
    for name, pair in local.layers.items():
        r = torch.linalg.lstsq(pair.a.T, result.adapter.layers[name].a.T).solution  # (R^T A)^T = A^T R
        assert distance(r, r.half().double()) < 1e-12
        assert distance(r @ r.T, torch.eye(3, dtype=torch.float64)) > 1e-6
        assert distance(pair.b @ r, result.adapter.layers[name].b) < 1e-12


def test_as_published_turns_hard_in_o_r_where_fedrot_stays_in_so_r() -> None:
    sent = make_adapter(0, 3, dtype=torch.float64)
    flip = torch.diag(torch.tensor([1.0, 1.0, -1.0])).double()
    local = turned(sent, dict.fromkeys(sent.layers, flip))
    published: Callable[..., Method] = get_method("as_published")
    hard = published(strength=1.0, factor="A").client(local, Broadcast(1, sent), Seat("x"), generator(0)).adapter
    assert_close(hard, sent, rel=1e-3)
    proper = FedRot(strength=1.0, factor="A").client(local, Broadcast(1, sent), Seat("x"), generator(0)).adapter
    assert distance(proper.layers["enc.0.out"].a, sent.layers["enc.0.out"].a) > 0.5


@pytest.mark.parametrize("factor", ["A", "B", "joint"])
@pytest.mark.parametrize(
    "settings",
    [{"strength": 1.0}, {"strength": 0.4}, {"strength": 0.4, "softening": "regularised"}, {"guard": True}],
    ids=["hard", "soft", "regularised", "guard"],
)
def test_as_published_takes_every_setting_of_fedrot_s_seriously(factor: str, settings: dict) -> None:
    """But for half precision, and O(r), its rotation is FedRot-LoRA's by the same settings."""
    sent = make_adapter(0, 3, dtype=torch.float64)
    own_frame = settings != {"guard": True}  # plain noise is what a guard leaves alone
    train = in_own_frame(noise(), 5) if own_frame else noise()
    local = train(sent, "north")
    try:
        published = get_method("as_published")(factor=factor, **settings)
    except RecipeError:
        return  # what the published code has not got may be refused, but not passed over
    one, other = (
        method.client(local, Broadcast(1, sent), Seat("x"), generator(0)).adapter
        for method in (published, FedRot(factor=factor, **settings))
    )
    assert_close(one, other, rel=2e-3)


def test_rescale_s_scalar_is_the_best_one_and_keeps_the_update() -> None:
    for number, side in ((1, "a"), (2, "b")):
        local, sent = make_adapter(1, dtype=torch.float64), make_adapter(0, dtype=torch.float64)
        local = replace(local, layers={n: replace(p, a=p.a + 3 * sent.layers[n].a, b=p.b + 3 * sent.layers[n].b)
                                       for n, p in local.layers.items()})  # fmt: skip
        result = get_method("rescale")().client(local, Broadcast(number, sent), Seat("x"), generator(0)).adapter
        for name, pair in result.layers.items():
            own, ref = local.layers[name], getattr(sent.layers[name], side)
            assert distance(pair.b @ pair.a, own.b @ own.a) < 1e-10
            best = distance(getattr(pair, side), ref)
            for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
                assert best <= distance(factor * getattr(pair, side), ref)
        away = result.map(torch.neg)
        still = get_method("rescale")().client(away, Broadcast(number, sent), Seat("x"), generator(0)).adapter
        assert_same(still, away)  # no positive scalar brings it nearer than none
