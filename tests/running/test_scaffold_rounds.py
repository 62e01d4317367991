"""SCAFFOLD in whole rounds, held to arXiv 1910.06378 (algorithm 1, option II) written out on the adapter's tensors."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes import FakeEngine, Silent, first_adapter
from tiny_runs import Tiny, assert_equal, assert_near, begin, flat
from torch import Tensor

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.errors import RecipeError
from fedrot.core.methods import get_method, methods
from fedrot.core.methods.base import ALL_PARTS, Upload
from fedrot.core.methods.factorwise import FedIT
from fedrot.running.draws import draw_clients
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.rounds import play_round

SCAFFOLD = ("--local.scaffold", "true")
RATE, STEPS = 0.3, 3
# Whole batches, no dropout and no clipping: a step is then the gradient of the client's own loss.
EXACT = (
    *SCAFFOLD, "--method.name", "fedit", "--local.optimizer", "sgd", "--local.lr", str(RATE), "--local.steps",
    str(STEPS), "--local.batch", "180", "--local.clip", "null", "--lora.dropout", "0",
)  # fmt: skip
UNEVEN = ("--partition.kind", "size", "--partition.sizes", "[1, 2, 3]")
KEEPING = [name for name, method in methods().items() if method.capabilities.variates]
Point = dict[str, Tensor]


def gradient(tiny: Tiny, point: Point, client: str) -> Point:
    """Of the client's mean loss at `point`."""
    model, data = tiny.ready.model, tiny.data(client)
    model.write(tiny.adapter.with_tensors({name: tensor.float() for name, tensor in point.items()}))
    named = dict(model.parameters(ALL_PARTS))
    inputs, labels = data.data.batch(data.indices)
    for parameter in named.values():
        parameter.requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(model.logits(inputs, "fp32"), labels)
    found = torch.autograd.grad(loss, list(named.values()))
    for parameter in named.values():
        parameter.requires_grad_(False)
    return dict(zip(named, (g.double() for g in found), strict=True))


class Plain:
    """The paper's algorithm: x, c and every client's c_i, in float64."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny, self.x = tiny, flat(tiny.adapter)
        self.c = {name: torch.zeros_like(t) for name, t in self.x.items()}
        self.own = {client: dict(self.c) for client in tiny.engine.clients}

    def round(self, number: int) -> list[str]:
        """One round; who took part."""
        drawn = draw_clients(self.tiny.engine.clients, self.tiny.recipe.federation.participation, 1, number)
        sizes = {client: len(self.tiny.data(client).indices) for client in drawn}
        x = {name: torch.zeros_like(t) for name, t in self.x.items()}
        c = dict(self.c)
        for client in drawn:
            y, mine = dict(self.x), self.own[client]
            for _ in range(STEPS):
                g = gradient(self.tiny, y, client)
                y = {name: t - RATE * (g[name] + self.c[name] - mine[name]) for name, t in y.items()}
            # c_i+ = c_i - c + (x - y_i) / (K lr); c+ = c + |S| / N mean(c_i+ - c_i)
            new = {n: mine[n] - self.c[n] + (self.x[n] - y[n]) / (STEPS * RATE) for n in y}
            x = {n: t + sizes[client] / sum(sizes.values()) * y[n] for n, t in x.items()}
            c = {n: t + (new[n] - mine[n]) / len(self.own) for n, t in c.items()}
            self.own[client] = new
        self.x, self.c = x, c
        return drawn


def variate(tiny: Tiny) -> Point:
    """The server's c."""
    assert tiny.state.broadcast.variate is not None
    return flat(tiny.state.broadcast.variate)


def own(tiny: Tiny, client: str) -> Point:
    """The client's c_i; zeros before it took part."""
    state = tiny.engine.states().get(client, {})
    zero = {name: torch.zeros_like(tensor) for name, tensor in flat(tiny.adapter).items()}
    return zero | {n.removeprefix("variate/"): t.double() for n, t in state.items() if n.startswith("variate/")}


@pytest.mark.parametrize("participation", ["1", "0.67"])
def test_rounds_are_those_of_the_paper(tiny_values: dict[str, Any], participation: str) -> None:
    tiny = begin(tiny_values, *EXACT, *UNEVEN, "--federation.participation", participation)
    plain = Plain(tiny)
    seen: set[str] = set()
    for number in range(3):
        drawn = plain.round(number)
        seen |= set(drawn)
        tiny.play()
        assert tiny.records[-1]["clients"]["used"] == drawn
        assert_near(flat(tiny.adapter), plain.x, rel=1e-4)
        assert_near(variate(tiny), plain.c)
        assert set(tiny.engine.states()) == seen
        for client in tiny.engine.clients:
            assert_near(own(tiny, client), plain.own[client])
    assert min(float(t.norm()) for t in variate(tiny).values()) > 1e-4


def test_of_one_client_both_variates_are_the_same_and_nothing_is_corrected(tiny_values: dict[str, Any]) -> None:
    alone = ("--partition.kind", "iid", "--partition.clients", "1")
    tiny, without = begin(tiny_values, *EXACT, *alone), begin(tiny_values, *EXACT, *alone, "--local.scaffold", "false")
    for number in range(3):
        tiny.play()
        without.play()
        assert_near(variate(tiny), own(tiny, "client-0"), rel=1e-5)
        assert_near(flat(tiny.adapter), flat(without.adapter), rel=1e-5 * (number + 1))


def test_the_first_round_has_nothing_to_correct(tiny_values: dict[str, Any]) -> None:
    """With any optimizer, any batches, dropout and clipping."""
    tiny, without = begin(tiny_values, *SCAFFOLD), begin(tiny_values)
    assert_equal(tiny.play().adapter, without.play().adapter)
    assert min(float(t.norm()) for t in variate(tiny).values()) > 0
    assert float(sum((a - b).norm() for a, b in zip(
        flat(tiny.play().adapter).values(), flat(without.play().adapter).values(), strict=True))) > 1e-6  # fmt: skip


@pytest.mark.parametrize("name", KEEPING)
def test_the_servers_variate_is_the_mean_of_all_clients(name: str, tiny_values: dict[str, Any]) -> None:
    """As sum c_i / N after every round, whoever took part and whichever factors were trained."""
    tiny = begin(tiny_values, *SCAFFOLD, "--method.name", name, "--federation.participation", "0.67")
    for _ in range(3):
        tiny.play()
        every = [own(tiny, client) for client in tiny.engine.clients]
        mean = {n: torch.stack([one[n] for one in every]).mean(0) for n in every[0]}
        assert_near(variate(tiny), mean, rel=1e-5)


@pytest.mark.parametrize("head", ["personal", "frozen"])
def test_a_head_that_does_not_travel_has_no_variate(head: str, tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *SCAFFOLD, "--lora.head", head).play(2)
    for point in (variate(tiny), *(own(tiny, client) for client in tiny.engine.clients)):
        assert all(not t.any() for n, t in point.items() if part_of(n) == "head")
        assert all(t.any() for n, t in point.items() if part_of(n) != "head")


def test_a_factor_that_is_never_trained_has_no_variate(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *SCAFFOLD, "--method.name", "ffa").play(2)
    for point in (variate(tiny), *(own(tiny, client) for client in tiny.engine.clients)):
        assert all(t.any() == (part_of(n) != "a") for n, t in point.items())


def test_a_factor_that_rests_keeps_its_variates(tiny_values: dict[str, Any]) -> None:
    """RoLoRA trains B and A in turn."""
    tiny = begin(tiny_values, *SCAFFOLD, "--method.name", "rolora").play()
    for resting in ("b", "a"):
        before = [variate(tiny), own(tiny, "films")]
        tiny.play()
        for old, new in zip(before, [variate(tiny), own(tiny, "films")], strict=True):
            assert all(torch.equal(new[n], t) == (part_of(n) == resting) for n, t in old.items())


@pytest.mark.parametrize("method", [
    ("fedrot", "--method.strength", "1"), ("random_rotation",), ("stale_reference", "--method.strength", "1"),
], ids=lambda method: method[0])  # fmt: skip
def test_variates_are_turned_as_the_factors_are(method: tuple[str, ...], tiny_values: dict[str, Any]) -> None:
    """(A, B) -> (R^T A, B R) takes their gradients to (R^T G_A, G_B R)."""
    tiny = begin(tiny_values, *SCAFFOLD, "--method.name", *method, "--local.lr", "0.1").play()
    old = own(tiny, "films")
    made, plain = tiny.client("films"), tiny.client("films", replace(tiny.recipe, method=FedIT()))
    rotations = made.upload.rotation
    assert max(float((r - torch.eye(2)).abs().max()) for r in rotations.values()) > 1e-3
    wanted = {n: plain.kept[f"variate/{n}"].double() for n in old}
    for layer, rotation in rotations.items():
        wanted[f"layers/{layer}/a"] = rotation.T @ wanted[f"layers/{layer}/a"]
        wanted[f"layers/{layer}/b"] = wanted[f"layers/{layer}/b"] @ rotation
    assert_near({n: made.kept[f"variate/{n}"] for n in old}, wanted, rel=1e-5)
    assert made.upload.variate is not None
    assert_near(flat(made.upload.variate), {n: t - old[n] for n, t in wanted.items()}, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in KEEPING if methods()[name]().trainable(2) == ALL_PARTS])
def test_variates_belong_to_the_factors_that_are_uploaded(name: str, tiny_values: dict[str, Any]) -> None:
    """In whatever frame or scale an upload is, <G_A, A> and <G_B, B> are those of the factors as they were trained."""
    tiny = begin(tiny_values, *SCAFFOLD, "--method.name", "fedit", "--local.lr", "0.1").play(2)
    made, plain = tiny.client("films", replace(tiny.recipe, method=get_method(name)())), tiny.client("films")
    factors, trained = flat(made.upload.adapter), flat(plain.upload.adapter)
    for n in (n for n in trained if part_of(n) != "head"):
        gradient = plain.kept[f"variate/{n}"].double()
        found = float((made.kept[f"variate/{n}"].double() * factors[n]).sum())
        # A rotation in half precision keeps three digits.
        size = 1e-3 * float(gradient.norm() * trained[n].norm())
        assert found == pytest.approx(float((gradient * trained[n]).sum()), abs=size)


def with_variate(change: Callable[[Adapter], Adapter | None] = lambda adapter: adapter) -> Callable[[Upload], Upload]:
    """A fault of the engine without a model: an upload with a variate of ones, changed."""
    return lambda upload: replace(upload, variate=change(upload.adapter.map(torch.ones_like)))


SIZES = {"a": 10, "b": 20, "c": 40}
BAD_VARIATES: dict[str, tuple[Callable[[Adapter], Adapter | None], str]] = {
    "missing": (lambda v: None, "it has no control variate (local.scaffold)"),
    "not a number": (lambda v: v.map(lambda t: t * float("nan")), "control variate: layers/x/a holds values"),
    "too large": (lambda v: v.map(lambda t: t * float("inf")), "not finite"),
    "no head": (lambda v: replace(v, head={}), "control variate: head tensor 'classifier.weight' is missing"),
    "fewer layers": (lambda v: replace(v, layers={"x": v.layers["x"]}), "control variate: layer 'y' is missing"),
    "other shape": (lambda v: replace(v, head={n: t[:1] for n, t in v.head.items()}), "shape (1, 5)"),
    "other dtype": (lambda v: v.map(torch.Tensor.double), "control variate: layers/x/a has dtype torch.float64"),
}


@pytest.mark.parametrize("case", BAD_VARIATES)
def test_an_upload_with_a_bad_variate_is_dropped_whole(case: str, tiny_values: dict[str, Any]) -> None:
    change, reason = BAD_VARIATES[case]
    recipe = parse_recipe(tiny_values, SCAFFOLD)
    engine, fewer = FakeEngine(recipe.method, SIZES), FakeEngine(recipe.method, {"a": 10, "c": 40})
    engine.faults = dict.fromkeys(SIZES, with_variate()) | {"b": with_variate(change)}
    fewer.faults = dict.fromkeys(SIZES, with_variate())
    seen = Silent()
    state, record = play_round(recipe, engine, recipe.method.start(first_adapter()), seen)
    expected, _ = play_round(recipe, fewer, recipe.method.start(first_adapter()), Silent())
    assert reason in seen.dropped["b"]
    assert record["clients"]["used"] == ["a", "c"] == engine.accepted
    assert_equal(state.broadcast.adapter, expected.broadcast.adapter)
    assert state.broadcast.variate is not None
    for _, tensor in state.broadcast.variate.tensors():  # two of three changes by one
        torch.testing.assert_close(tensor, torch.full_like(tensor, 2 / 3))


def test_a_superfluous_variate_drops_the_upload(tiny_values: dict[str, Any]) -> None:
    recipe, seen = parse_recipe(tiny_values), Silent()
    engine = FakeEngine(recipe.method, SIZES)
    engine.faults = {"b": with_variate()}
    state, record = play_round(recipe, engine, recipe.method.start(first_adapter()), seen)
    assert seen.dropped == {"b": "upload: it has a control variate (local.scaffold)"}
    assert record["clients"]["used"] == ["a", "c"]
    assert state.broadcast.variate is None


def test_a_dropped_client_keeps_its_old_variate(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *SCAFFOLD)
    tiny.engine.faults = {"films": lambda upload: replace(upload, held=0)}
    tiny.play()
    assert sorted(tiny.engine.states()) == ["books", "music"]
    tiny.engine.faults = {}
    old = own(tiny.play(), "films")
    assert any(t.any() for t in old.values())
    tiny.engine.faults = {"films": lambda upload: replace(upload, held=0)}
    assert_near(own(tiny.play(), "films"), old, rel=0.0)


def test_the_norm_bound_is_on_the_adapters_change_alone(tiny_values: dict[str, Any]) -> None:
    recipe = parse_recipe(tiny_values, [*SCAFFOLD, "--checks.max_norm", "50"])
    engine = FakeEngine(recipe.method, SIZES)
    engine.faults = dict.fromkeys(SIZES, with_variate(lambda v: v.map(lambda t: 1e3 * t)))
    _, record = play_round(recipe, engine, recipe.method.start(first_adapter()), Silent())
    assert record["clients"]["used"] == sorted(SIZES)


def test_what_control_variates_do_not_go_with_is_refused(tiny_values: dict[str, Any]) -> None:
    for flags in (["--lora.ranks", '{"books": 1}'], ["--server.optimizer", "adam"]):
        with pytest.raises(RecipeError, match=r"local\.scaffold: it goes with neither lora\.ranks nor server\.opt"):
            parse_recipe(tiny_values, [*SCAFFOLD, *flags])
