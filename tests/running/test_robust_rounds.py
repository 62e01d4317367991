"""Rules against hostile clients in rounds: one of five is hostile; what the record says; what is refused."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeEngine, Silent, first_adapter, poisoned
from tiny_runs import assert_equal, assert_near, begin, cut_and_resumed, flat

from fedrot.core.adapter import Adapter
from fedrot.core.diagnostics import exact_errors
from fedrot.core.errors import RecipeError, RunError
from fedrot.core.methods import methods
from fedrot.core.methods.base import ALL_PARTS, Upload
from fedrot.core.robust import in_frame
from fedrot.core.seeding import generator
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.rounds import play_round

RULES = ["norm", "median", "trimmed", "krum"]
SIZES = {"a": 10, "b": 20, "c": 40, "d": 5, "e": 15}
FIVE = {"partition": {"kind": "iid", "clients": 5}, "local": {"lr": 0.01, "batch": 8, "steps": 4}}
BAD = "client-1"


def noise(upload: Upload) -> Upload:
    """A hostile client: noise, and the claim to hold nearly all examples."""
    rng = generator("hostile", upload.client)
    spoiled = upload.adapter.map(lambda t: t + 30 * torch.randn(t.shape, generator=rng))
    return replace(upload, adapter=spoiled, held=1_000_000)


def backwards(start: Adapter) -> Callable[[Upload], Upload]:
    """A hostile client of another kind: what it learnt, backwards and tenfold."""
    base = dict(start.tensors())

    def fault(upload: Upload) -> Upload:
        moved = {n: base[n] - 10 * (t - base[n]) for n, t in upload.adapter.tensors()}
        return replace(upload, adapter=start.with_tensors(moved))

    return fault


# A run is a function of its recipe: what one test played, the next one may look at.
_played: dict[tuple[str, ...], Mapping[str, Any]] = {}


def last(values: Mapping[str, Any], attack: str, *flags: str) -> Mapping[str, Any]:
    """The last record of six rounds of five clients, one of them hostile if asked."""
    key = (str(values), attack, *flags)
    if key not in _played:
        tiny = begin({**values, **FIVE}, *flags)
        for _ in range(6):
            if attack != "none":
                tiny.engine.faults[BAD] = noise if attack == "noise" else backwards(tiny.adapter)
            tiny.play()
        _played[key] = tiny.records[-1]
    return _played[key]


CASES = [
    *[("fedrot", rule, "noise") for rule in RULES],
    *[("fedrot", rule, "backwards") for rule in RULES],
    ("rolora", "median", "noise"),
    ("ffa", "krum", "backwards"),
    ("fedrot_svd", "norm", "noise"),
    ("fedrot_svd", "krum", "backwards"),
    ("fedex", "krum", "noise"),
]


@pytest.mark.parametrize(("method", "rule", "attack"), CASES)
def test_one_hostile_client_of_five_ruins_a_run_but_not_under_a_rule(
    method: str, rule: str, attack: str, tiny_values: dict[str, Any]
) -> None:
    # Norm keeps the weights that clients claim.
    flags = (f"--method.name={method}", "--federation.weighting=uniform")
    runs = [last(tiny_values, *how) for how in (("none", *flags), (attack, *flags))]
    runs.append(last(tiny_values, attack, *flags, f"--robust.rule={rule}"))
    honest, ruined, held = (run["evaluation"] for run in runs)
    assert ruined["loss"] > 4 * honest["loss"]
    assert ruined["accuracy"] < honest["accuracy"] - 0.2
    if (rule, attack) == ("norm", "backwards"):
        # It bounds what the client does and does not find it: two of its changes against four of the others'.
        assert held["loss"] < 0.3 * ruined["loss"]
        return
    assert held["accuracy"] > honest["accuracy"] - 0.1
    assert held["loss"] < honest["loss"] + 0.25
    least = min(runs[-1]["clients"]["kept"], key=runs[-1]["clients"]["kept"].get)
    assert least == BAD or rule == "krum"
    assert runs[-1]["clients"]["kept"][BAD] < 0.2


def fakes(values: Mapping[str, Any], *flags: str, **more: Any) -> tuple[Recipe, FakeEngine]:
    """A recipe, and five clients that move by noise."""
    recipe = parse_recipe(values, ["--method.name", "fedit", *flags])
    return recipe, FakeEngine(recipe.method, SIZES, **more)


def one_round(recipe: Recipe, engine: FakeEngine) -> tuple[Adapter, dict[str, Any]]:
    state, record = play_round(recipe, engine, recipe.method.start(first_adapter()), Silent())
    return state.broadcast.adapter, record


def held_uploads(engine: FakeEngine) -> dict[str, Adapter]:
    """The clients' factors of round 0 in the broadcast's frame."""
    form = first_adapter()
    found = {}
    for client in sorted(SIZES):
        upload = Upload(client=client, adapter=engine.locals[0, client], held=1, used=1)
        found[client] = in_frame(upload, form, ALL_PARTS).adapter
    return found


@pytest.mark.parametrize("rule", ["median", "trimmed"])
def test_the_mean_by_number_is_that_of_the_turned_uploads(rule: str, tiny_values: dict[str, Any]) -> None:
    recipe, engine = fakes(tiny_values, f"--robust.rule={rule}")
    adapter, record = one_round(recipe, engine)
    columns = [flat(a) for a in held_uploads(engine).values()]
    wanted = {}
    for name in columns[0]:
        values = torch.stack([c[name] for c in columns]).sort(0).values
        wanted[name] = values[2] if rule == "median" else values[1:4].mean(0)
    assert_near(flat(adapter), wanted, rel=1e-6)
    assert record["clients"]["used"] == sorted(SIZES)
    assert set(record["clients"]["kept"]) == set(SIZES)
    # Three of five lie between the least and the largest.
    assert sum(record["clients"]["kept"].values()) == pytest.approx(3, abs=1e-6)


def test_norm_keeps_the_weights_and_krum_does_not(tiny_values: dict[str, Any]) -> None:
    recipe, engine = fakes(tiny_values, "--robust.rule=norm", "--robust.multiple=100")
    adapter, record = one_round(recipe, engine)
    held = {c: flat(a) for c, a in held_uploads(engine).items()}
    total = sum(SIZES.values())
    assert_near(flat(adapter), {n: sum(SIZES[c] / total * held[c][n] for c in SIZES) for n in held["a"]}, rel=1e-6)
    assert record["clients"]["kept"] == dict.fromkeys(SIZES, 1.0)

    recipe, engine = fakes(tiny_values, "--robust.rule=krum")
    adapter, record = one_round(recipe, engine)
    chosen = [c for c, share in record["clients"]["kept"].items() if share == 1]
    assert len(chosen) == 2
    assert record["clients"]["used"] == chosen
    assert_near(flat(adapter), {n: sum(held[c][n] for c in chosen) / 2 for n in held["a"]}, rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_the_error_is_that_of_what_was_accepted(rule: str, tiny_values: dict[str, Any]) -> None:
    """A hostile client's numbers are in none of it."""
    found = {}
    for bad in (False, True):
        recipe, engine = fakes(tiny_values, f"--robust.rule={rule}", "--federation.weighting=uniform")
        engine.faults = {"b": noise} if bad else {}
        found[bad] = one_round(recipe, engine)[1]["aggregation"]
    assert found[True]["clients"] == (2 if rule == "krum" else 5)
    assert found[True]["ideal"] < 4 * found[False]["ideal"]
    if rule == "krum":
        recipe, engine = fakes(tiny_values, "--robust.rule=krum")
        _, record = one_round(recipe, engine)
        held = held_uploads(engine)
        wanted = exact_errors([held[c] for c in record["clients"]["used"]], [1.0, 1.0])
        for name, layer in record["aggregation"]["layers"].items():
            assert layer["after2"] == pytest.approx(wanted[name]["after2"], rel=1e-5)
            assert layer["sent2"] == pytest.approx(wanted[name]["after2"], rel=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_a_sketch_of_many_sees_what_was_accepted(rule: str, tiny_values: dict[str, Any]) -> None:
    recipe, engine = fakes(tiny_values, f"--robust.rule={rule}", "--diagnostics.exact_clients=3")
    engine.faults = {"b": noise}
    found = one_round(recipe, engine)[1]["aggregation"]
    exact, engine = fakes(tiny_values, f"--robust.rule={rule}")
    engine.faults = {"b": noise}
    assert found["estimated"]
    assert found["ideal"] == pytest.approx(one_round(exact, engine)[1]["aggregation"]["ideal"], rel=0.5)


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_arrival_changes_no_bit(rule: str, tiny_values: dict[str, Any]) -> None:
    found = [one_round(*fakes(tiny_values, f"--robust.rule={rule}", order=order)) for order in (None, "dbeac")]
    assert_equal(found[0][0], found[1][0])
    assert found[0][1]["clients"] == found[1][1]["clients"]


def test_without_a_rule_nothing_is_said(tiny_values: dict[str, Any]) -> None:
    assert set(one_round(*fakes(tiny_values))[1]["clients"]) == {"drawn", "used", "dropped"}


def test_a_rejected_upload_is_not_held(tiny_values: dict[str, Any]) -> None:
    recipe, engine = fakes(tiny_values, "--robust.rule=median")
    engine.faults["b"] = poisoned(float("nan"))
    _, record = one_round(recipe, engine)
    assert list(record["clients"]["dropped"]) == ["b"]
    assert sorted(record["clients"]["kept"]) == ["a", "c", "d", "e"] == record["clients"]["used"]


def test_a_round_that_a_rule_cannot_hold_stops_the_run(tiny_values: dict[str, Any]) -> None:
    recipe, engine = fakes(tiny_values, "--robust.rule=krum")
    engine.faults["b"] = "power cut"
    with pytest.raises(RunError, match=r"round 0: robust\.rule krum needs 5 uploads .*, there are 4; the last good"):
        one_round(recipe, engine)


def test_clients_do_not_train_where_too_few_are_drawn(tiny_values: dict[str, Any]) -> None:
    recipe, engine = fakes(tiny_values, "--robust.rule=median", "--federation.participation=0.4")
    with pytest.raises(RunError, match=r"median needs 3 uploads to hold against 1 hostile of 2 clients"):
        one_round(recipe, engine)
    assert engine.trained == []


def test_a_server_optimizer_steps_on_the_rules_change(tiny_values: dict[str, Any]) -> None:
    plain = one_round(*fakes(tiny_values, "--robust.rule=trimmed"))[0]
    flags = ("--server.optimizer=momentum", "--server.lr=0.5")
    found = one_round(*fakes(tiny_values, "--robust.rule=trimmed", *flags))[0]
    start, whole = flat(first_adapter()), flat(plain)
    assert_near(flat(found), {n: start[n] + 0.5 * (whole[n] - start[n]) for n in start}, rel=1e-5)


@pytest.mark.parametrize("head", ["personal", "frozen"])
def test_a_head_that_stays_at_home_is_in_no_rule(head: str, tiny_values: dict[str, Any]) -> None:
    name = "head/classifier.weight"
    for rule in RULES:
        recipe, engine = fakes(tiny_values, f"--robust.rule={rule}", f"--lora.head={head}")
        adapter, _ = one_round(recipe, engine)
        assert torch.equal(dict(adapter.tensors())[name], dict(first_adapter().tensors())[name])


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_the_uninterrupted_one(rule: str, tiny_values: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = cut_and_resumed({**tiny_values, **FIVE}, tmp_path, f"--robust.rule={rule}")
    assert resumed == whole
    assert all(len(record["clients"]["kept"]) == 5 for record in whole["metrics"])


# What goes together

METHODS = methods()
CONTROLS = {name for name, method in METHODS.items() if method.capabilities.control}
CHOOSING = set(METHODS) - CONTROLS - {"fedask", "fedsa", "local", "centralised"}
COUNTING = {"fedit", "ffa", "rolora", "fedrot"}


@pytest.mark.parametrize("rule", RULES)
def test_every_method_takes_the_rules_it_can_and_refuses_the_rest(rule: str, tiny_values: dict[str, Any]) -> None:
    able = CHOOSING if rule in ("norm", "krum") else COUNTING
    base = {key: value for key, value in parse_recipe(tiny_values).to_dict().items() if key != "method"}
    for name in METHODS:
        values = {**base, "method": {"name": name}, "robust": {"rule": rule}}
        if name in able:
            assert Recipe.from_values(values).robust.rule == rule
            continue
        with pytest.raises(RecipeError) as caught:
            Recipe.from_values(values)
        message = str(caught.value)
        assert message.startswith(f"robust.rule: method {name} ")
        assert ("norm or krum" in message) == (name in CHOOSING)
        listed = set(message.rpartition("methods that work: ")[2].replace(" or ", ", ").split(", "))
        assert listed == (able if name in CHOOSING else CHOOSING)


REFUSED: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "variates": (("--robust.rule=krum", "--local.scaffold=true"), ["robust.rule", "local.scaffold"]),
    "ranks": (("--robust.rule=norm", '--lora.ranks={"books": 1}'), ["robust.rule", "lora.ranks"]),
    "unknown rule": (("--robust.rule=mean",), ["robust.rule must be krum, median, none, norm or trimmed", "mean"]),
    "no share": (("--robust.share=0",), ["robust.share must be between 0 and 0.5"]),
    "half": (("--robust.share=0.5",), ["robust.share must be between 0 and 0.5"]),
    "share no number": (("--robust.share=nan",), ["robust.share"]),
    "bound 0": (("--robust.rule=norm", "--robust.bound=0"), ["robust.bound must be positive, or null"]),
    "bound of krum": (("--robust.rule=krum", "--robust.bound=1"), ["robust.bound", "robust.rule norm"]),
    "bound of none": (("--robust.bound=1",), ["robust.bound", "robust.rule norm"]),
    "multiple below 1": (("--robust.multiple=0.9",), ["robust.multiple must be at least 1"]),
    "chosen 0": (("--robust.rule=krum", "--robust.chosen=0"), ["robust.chosen must be at least 1, or null"]),
    "chosen of median": (("--robust.rule=median", "--robust.chosen=1"), ["robust.chosen", "robust.rule krum"]),
    "few clients": (
        ("--robust.rule=krum", "--partition.kind=iid", "--partition.clients=4"),
        ["krum needs 5 uploads", "1 hostile of 4 clients", "ask more clients"],
    ),
    "few a round": (
        ("--robust.rule=trimmed", "--partition.kind=iid", "--partition.clients=10", "--federation.participation=0.2"),
        ["trimmed needs 3 uploads", "1 hostile of 2 clients"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(case: str, tiny_values: dict[str, Any]) -> None:
    flags, words = REFUSED[case]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(tiny_values, flags)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
