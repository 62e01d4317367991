"""The round loop on an engine without a model: order, weights, checks, quorum, diagnostics, bytes."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes import FakeEngine, Silent, cut, first_adapter, poisoned

from fedrot.core.adapter import Adapter
from fedrot.core.errors import RunError
from fedrot.core.methods.base import ServerState
from fedrot.running.draws import draw_clients
from fedrot.running.engine import Failure
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.rounds import in_order, play

SIZES = {"a": 10, "b": 20, "c": 40, "d": 5}


@pytest.fixture
def make(tiny_values: dict[str, Any]) -> Any:
    def recipe(*flags: str, method: str = "fedrot") -> Recipe:
        return parse_recipe(tiny_values, ["--method.name", method, *flags])

    return recipe


def run(recipe: Recipe, engine: FakeEngine) -> tuple[ServerState, Silent]:
    seen = Silent()
    return play(recipe, engine, recipe.method.start(first_adapter()), seen, seen), seen


def equal(one: Adapter, other: Adapter) -> bool:
    mine, theirs = dict(one.tensors()), dict(other.tensors())
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("method", ["fedit", "fedrot"])
@pytest.mark.parametrize("weighting", ["held", "used", "uniform"])
def test_rounds_are_the_dense_recurrence(make: Any, method: str, weighting: str) -> None:
    recipe = make("--federation.weighting", weighting, "--rounds", "4", method=method)
    engine = FakeEngine(recipe.method, SIZES)
    state, _ = run(recipe, engine)

    weights = {"held": SIZES, "used": {c: 2 * n + 1 for c, n in SIZES.items()}, "uniform": dict.fromkeys(SIZES, 1)}
    total = sum(weights[weighting].values())
    current = first_adapter()
    for number in range(4):
        sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in current.tensors()}
        for client in sorted(SIZES):
            local = engine.locals[number, client]
            pairs = {}
            for layer, pair in local.layers.items():
                rotation = torch.eye(2, dtype=torch.float64)
                if method == "fedrot" and number > 0:
                    ref = current.layers[layer]
                    m = pair.a.double() @ ref.a.double().T if number % 2 else pair.b.double().T @ ref.b.double()
                    rotation = dense_soft_rotation(m, 0.4)
                pairs[layer] = rotation.T @ pair.a.double(), pair.b.double() @ rotation
            p = weights[weighting][client] / total
            for layer, (a, b) in pairs.items():
                sums[f"layers/{layer}/a"] += p * a
                sums[f"layers/{layer}/b"] += p * b
            sums["head/classifier.weight"] += p * local.head["classifier.weight"].double()
        current = current.with_tensors({name: t.float() for name, t in sums.items()})
    for name, tensor in state.broadcast.adapter.tensors():
        torch.testing.assert_close(tensor, dict(current.tensors())[name], rtol=1e-4, atol=1e-5)


def dense_soft_rotation(m: torch.Tensor, strength: float) -> torch.Tensor:
    def nearest(x: torch.Tensor) -> torch.Tensor:
        u, _, vh = torch.linalg.svd(x)
        return u @ torch.diag(torch.tensor([1.0, float(torch.det(u @ vh))], dtype=torch.float64)) @ vh

    return nearest((1 - strength) * torch.eye(2, dtype=torch.float64) + strength * nearest(m))


def test_strength_zero_is_fedit_bit_for_bit(make: Any) -> None:
    fedit, fedrot = make(method="fedit"), make("--method.strength", "0")
    one, _ = run(fedit, FakeEngine(fedit.method, SIZES))
    other, _ = run(fedrot, FakeEngine(fedrot.method, SIZES))
    assert equal(one.broadcast.adapter, other.broadcast.adapter)


@pytest.mark.parametrize("order", list(itertools.permutations("abcd"))[1::7])
def test_the_order_of_arrival_changes_no_bit(make: Any, order: tuple[str, ...]) -> None:
    recipe = make()
    straight, first = run(recipe, FakeEngine(recipe.method, SIZES))
    mixed, second = run(recipe, FakeEngine(recipe.method, SIZES, order=order))
    assert equal(straight.broadcast.adapter, mixed.broadcast.adapter)
    assert [r["aggregation"] for r in first.records] == [r["aggregation"] for r in second.records]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (poisoned(float("nan")), "not finite"),
        (poisoned(float("inf")), "not finite"),
        (poisoned(-3e38), "layers/x/a holds a value of size 3e+38"),
        (cut, "shape"),
        (lambda u: replace(u, adapter=replace(u.adapter, head={})), "missing"),
        (lambda u: replace(u, held=0), "positive whole number"),
        (lambda u: replace(u, rotation={"x": torch.full((2, 2), float("nan"))}), "rotations"),
        (lambda u: replace(u, metrics={"loss": float("nan"), "steps": 1, "tokens": 1}), "loss must be a finite number"),
        (lambda u: replace(u, metrics={"loss": 1.0, "steps": 1}), "tokens must be a finite number"),
        (lambda u: replace(u, layers={"x": {"drift_a": 1.0}}), "drift"),
        (lambda u: replace(u, layers={"x": {}, "y": {}}), "drift_a must be a finite number"),
        (lambda u: replace(u, seconds={"train": -1.0}), "seconds of train"),
        ("out of memory", "out of memory"),
        (None, "no answer"),
    ],
)
def test_a_bad_upload_is_dropped_with_its_reason_and_leaves_no_trace(make: Any, fault: Any, reason: str) -> None:
    recipe = make("--rounds", "2")
    engine = FakeEngine(recipe.method, SIZES)
    engine.faults["b"] = fault
    state, seen = run(recipe, engine)
    without = FakeEngine(recipe.method, {c: n for c, n in SIZES.items() if c != "b"})
    expected, _ = run(recipe, without)
    assert equal(state.broadcast.adapter, expected.broadcast.adapter)
    assert reason in seen.dropped["b"]
    assert [list(r["clients"]["dropped"]) for r in seen.records] == [["b"], ["b"]]
    assert seen.records[0]["clients"]["used"] == ["a", "c", "d"] == engine.accepted


def test_a_bound_on_the_norm_drops_a_huge_upload(make: Any) -> None:
    recipe = make("--checks.max_norm", "50", "--rounds", "1")
    engine = FakeEngine(recipe.method, SIZES)
    engine.faults["a"] = poisoned(1e6)
    state, seen = run(recipe, engine)
    assert "checks.max_norm" in seen.dropped["a"]
    assert float(state.broadcast.adapter.layers["x"].a.abs().max()) < 50


@pytest.mark.parametrize("exact_clients", ["32", "0"])
@pytest.mark.parametrize(
    "method", ["fedit", "fedrot", "flexlora", "flexlora_regauge", "fedrot_svd", "lora_fair", "fedex"]
)
def test_the_largest_upload_that_is_let_in_leaves_a_state_that_rounds_go_on_from(
    make: Any, method: str, exact_clients: str
) -> None:
    recipe = make("--rounds", "1", "--diagnostics.exact_clients", exact_clients, method=method)
    engine = FakeEngine(recipe.method, SIZES)
    most = 2.0**53 - 2.0**30
    engine.faults["a"] = lambda u: replace(u, adapter=u.adapter.map(lambda t: torch.full_like(t, most)), rotation={})
    if method in ("flexlora", "flexlora_regauge"):  # B holds a product of two such numbers
        with pytest.raises(RunError, match=r"adapter/layers/x/b holds a value of size .* last good state is kept"):
            run(recipe, engine)
        return
    state, seen = run(recipe, engine)
    assert all(float(t.abs().max()) < 2**53 for _, t in state.broadcast.adapter.tensors())
    assert float(state.broadcast.adapter.layers["x"].b.abs().max()) > 1e12  # it was let in
    assert all("aggregation" in record and "unmeasured" not in record for record in seen.records)


def test_a_state_that_is_not_finite_is_none(make: Any) -> None:
    recipe = make("--server.optimizer", "momentum", "--server.lr", "1e39")
    seen = Silent()
    with pytest.raises(RunError, match=r"round 0: adapter/\S+ is not finite .* the last good state is kept"):
        play(recipe, FakeEngine(recipe.method, SIZES), recipe.method.start(first_adapter()), seen, seen)
    assert seen.records == []


def test_what_cannot_be_measured_ends_no_run(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make("--rounds", "2")
    expected, _ = run(recipe, FakeEngine(recipe.method, SIZES))

    def breaks(*_: object) -> None:
        raise RuntimeError("no convergence\nin 9 steps")

    monkeypatch.setattr("fedrot.core.diagnostics.exact_errors", breaks)
    state, seen = run(recipe, FakeEngine(recipe.method, SIZES))
    assert equal(state.broadcast.adapter, expected.broadcast.adapter)
    assert [r["unmeasured"] for r in seen.records] == ["RuntimeError: no convergence"] * 2
    assert not any("aggregation" in r for r in seen.records)
    assert "round 1: diagnostics are left out: RuntimeError" in caplog.text


def test_drift_that_is_not_finite_is_left_out(make: Any) -> None:
    """Every number that a client reports is finite here; their ratio is none."""
    recipe = make("--rounds", "1")
    engine = FakeEngine(recipe.method, SIZES)
    engine.faults["a"] = lambda u: replace(
        u, layers={n: {**drift, "gauge2": 1e15, "move2": 5e-324} for n, drift in u.layers.items()}
    )
    _, seen = run(recipe, engine)
    assert "drift" not in seen.records[0]
    assert "drift is not finite" in seen.records[0]["unmeasured"]
    assert "aggregation" in seen.records[0]


def test_too_few_uploads_stop_the_run_and_keep_what_was_done(make: Any) -> None:
    recipe = make("--rounds", "3", "--federation.quorum", "0.75")
    engine = FakeEngine(recipe.method, SIZES)
    seen = Silent()

    class Breaks(Silent):
        def round_finished(self, record: Any) -> None:
            engine.faults.update(a="power cut", b="power cut")

    with pytest.raises(RunError, match=r"round 1: 2 of 4 uploads were usable, the quorum is 3 .*a: power cut"):
        play(recipe, engine, recipe.method.start(first_adapter()), seen, Breaks())
    assert [r["round"] for r in seen.records] == [0]


def test_participation_draws_the_asked_share_by_seed_and_round_alone(make: Any) -> None:
    clients = [f"c{i}" for i in range(10)]
    draws = [draw_clients(clients, 0.3, seed=1, round=r) for r in range(40)]
    assert all(len(d) == 3 and d == sorted(set(d)) for d in draws)
    assert len({tuple(d) for d in draws}) > 20
    assert {c for d in draws for c in d} == set(clients)
    assert draws == [draw_clients(list(reversed(clients)), 0.3, seed=1, round=r) for r in range(40)]
    assert draw_clients(clients, 0.01, 1, 0) == draw_clients(clients, 0.1, 1, 0)
    recipe = make("--federation.participation", "0.5")
    engine = FakeEngine(recipe.method, SIZES)
    run(recipe, engine)
    assert [len(names) for names in engine.trained] == [2, 2, 2]


def test_repeated_and_uninvited_answers_are_passed_over() -> None:
    answers = [Failure("b", "1"), Failure("z", "?"), Failure("a", "2"), Failure("b", "again"), Failure("a", "again")]
    assert list(in_order(answers, ["a", "b", "c"])) == [
        Failure("a", "2"),
        Failure("b", "1"),
        Failure("c", "gave no answer"),
    ]


def test_bytes_and_errors_are_counted(make: Any) -> None:
    recipe = make("--rounds", "2")
    engine = FakeEngine(recipe.method, SIZES)
    _, seen = run(recipe, engine)
    size = sum(t.numel() * 4 for _, t in first_adapter().tensors())
    assert seen.records[0]["bytes"] == {"down": 4 * size, "up": 4 * size}
    rotations = 2 * 2 * 2 * 4  # two layers of a 2 x 2 rotation, float32
    assert seen.records[1]["bytes"]["up"] == 4 * (size + rotations)
    assert seen.records[0]["aggregation"]["before"] == seen.records[0]["aggregation"]["after"]
    assert seen.records[1]["aggregation"]["before"] != seen.records[1]["aggregation"]["after"]
    assert seen.records[1]["drift"]["angle_max"] > 0
    assert not seen.records[1]["aggregation"]["estimated"]


def test_many_clients_are_measured_by_a_sketch_and_said_so(make: Any) -> None:
    exact, sketched = make("--rounds", "2"), make("--rounds", "2", "--diagnostics.exact_clients", "3")
    _, one = run(exact, FakeEngine(exact.method, SIZES))
    _, other = run(sketched, FakeEngine(sketched.method, SIZES))
    truth, estimate = one.records[1]["aggregation"], other.records[1]["aggregation"]
    assert estimate["estimated"]
    assert estimate["before"] == pytest.approx(truth["before"], rel=0.5)
    assert estimate["floor"] <= estimate["after"]


def test_diagnostics_can_be_thinned_and_switched_off(make: Any) -> None:
    for every, measured in (("2", [0, 2]), ("0", [])):
        recipe = make("--diagnostics.every", every)
        _, seen = run(recipe, FakeEngine(recipe.method, SIZES))
        assert [r["round"] for r in seen.records if "aggregation" in r] == measured


def test_evaluation_comes_at_its_interval_and_at_the_end(make: Any) -> None:
    recipe = make("--rounds", "5", "--evaluation.every", "2")
    _, seen = run(recipe, FakeEngine(recipe.method, SIZES))
    assert [r["round"] for r in seen.records if "evaluation" in r] == [1, 3, 4]


def test_a_head_that_is_not_shared_does_not_travel(make: Any) -> None:
    recipe = make("--lora.head", "frozen", "--rounds", "1")
    state, seen = run(recipe, FakeEngine(recipe.method, SIZES))
    start = first_adapter()
    assert torch.equal(state.broadcast.adapter.head["classifier.weight"], start.head["classifier.weight"])
    assert seen.records[0]["bytes"]["up"] == 4 * start.bytes(frozenset({"a", "b"}))
