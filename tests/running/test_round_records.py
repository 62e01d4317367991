"""What a round's record says of every method: the error of what the server sent, and the bytes of what travelled."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, Silent, first_adapter
from tiny_runs import begin

from fedrot.core.methods import methods
from fedrot.learning.loading import load_model
from fedrot.learning.settings import LoraSettings, ModelSettings
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.rounds import play_round

METHODS = methods()
UNSEEN = ["fedsa", "local", "fedask"]  # no upload is a client's own pair of factors
AVERAGES = ["fedit", "fedrot", "random_rotation", "rescale", "stale_reference", "as_published"]
EXACT = ["ffa", "rolora", "fedex", "flora", "centralised"]
BEST = ["flexlora", "flexlora_regauge", "fedrot_svd"]
BETWEEN = ["fedrot_consensus", "lora_fair", "hetlora"]
PARTS = ("a", "b", "head")
LAYERS = {f"bert.encoder.layer.{i}.attention.self.{name}" for i in range(2) for name in ("query", "value")}


# A run is a function of its recipe: what one test played, the next one may look at.
_played: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}


def rounds(values: dict[str, Any], name: str, count: int, *flags: str) -> list[Mapping[str, Any]]:
    """The records of the first rounds of a tiny run."""
    key = (str(values), name, *flags)
    if len(_played.get(key, ())) < count:
        _played[key] = begin(values, f"--method.name={name}", *flags).play(count).records
    return _played[key][:count]


def test_every_method_is_here() -> None:
    assert sorted([*UNSEEN, *AVERAGES, *EXACT, *BEST, *BETWEEN]) == sorted(METHODS)


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_send_what_averaging_leaves(name: str, tiny_values: dict[str, Any]) -> None:
    for record in rounds(tiny_values, name, 3):
        found = record["aggregation"]
        assert found["sent"] == pytest.approx(found["after"], rel=1e-5)
        assert found["sent_relative"] == pytest.approx(found["sent"] / found["ideal"])
        assert found["sent_relative"] > 1e-3
        for layer in found["layers"].values():
            assert layer["sent2"] == pytest.approx(layer["after2"], rel=1e-4)


@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_send_all_of_it(name: str, tiny_values: dict[str, Any]) -> None:
    for record in rounds(tiny_values, name, 3):
        assert record["aggregation"]["sent_relative"] < 1e-6
        assert record["aggregation"]["ideal"] > 1e-3


@pytest.mark.parametrize("name", BEST)
def test_the_best_of_the_rank_is_at_the_floor(name: str, tiny_values: dict[str, Any]) -> None:
    for record in rounds(tiny_values, name, 3):
        found = record["aggregation"]
        assert found["sent_relative"] == pytest.approx(found["floor_relative"], abs=1e-6)
        assert found["sent"] < found["before"]
        assert found["floor_relative"] > 1e-3


@pytest.mark.parametrize("name", BETWEEN)
def test_refined_averages_are_not_below_the_floor(name: str, tiny_values: dict[str, Any]) -> None:
    for record in rounds(tiny_values, name, 3):
        found = record["aggregation"]
        assert found["sent"] > 0.999 * found["floor"] > 0
        if name != "hetlora":  # its weights are others than those of the ideal update
            assert found["sent"] <= 1.001 * found["before"]


@pytest.mark.parametrize("name", UNSEEN)
def test_where_uploads_are_not_factors_no_error_is_claimed(name: str, tiny_values: dict[str, Any]) -> None:
    for record in rounds(tiny_values, name, 2):
        assert "aggregation" not in record
        assert set(record["drift"]["layers"]) == LAYERS


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])
def test_a_server_optimizer_goes_elsewhere_on_purpose(optimizer: str, tiny_values: dict[str, Any]) -> None:
    """What averaging lost is said all the same."""
    plain = rounds(tiny_values, "fedit", 1)[0]["aggregation"]
    found = rounds(tiny_values, "fedit", 1, "--server.optimizer", optimizer)[0]["aggregation"]
    assert not any("sent" in key for key in found)
    assert not any("sent2" in layer for layer in found["layers"].values())
    assert found["before"] == plain["before"]
    assert set(plain) - set(found) == {"sent", "sent_relative"}


@pytest.mark.parametrize("name", ["fedit", "flexlora", "fedex", "flora"])
def test_above_the_exact_number_of_clients_it_is_estimated(name: str, tiny_values: dict[str, Any]) -> None:
    sizes = {f"c{i}": 5 + i for i in range(8)}
    records = []
    for flags in ([], ["--diagnostics.exact_clients", "4"]):
        recipe = parse_recipe(tiny_values, [f"--method.name={name}", *flags])
        engine = FakeEngine(recipe.method, sizes)
        records.append(play_round(recipe, engine, recipe.method.start(first_adapter()), Silent())[1]["aggregation"])
    exact, estimate = records
    assert estimate["estimated"]
    assert not exact["estimated"]
    assert estimate["sent"] == pytest.approx(exact["sent"], rel=0.5, abs=1e-5)


def test_rounds_that_are_not_measured_have_none(tiny_values: dict[str, Any]) -> None:
    found = ["aggregation" in record for record in rounds(tiny_values, "fedex", 3, "--diagnostics.every", "2")]
    assert found == [True, False, True]


@pytest.fixture(scope="module")
def part(tiny_model: Path) -> dict[str, int]:
    """Bytes of the tiny adapter's parts, and of all together under ''."""
    model = load_model(ModelSettings(str(tiny_model)), LoraSettings(rank=2), ["negative", "positive"], seed=1)
    found = {name: model.read().bytes(frozenset({name})) for name in PARTS}
    return {**found, "": sum(found.values())}


def traffic(values: dict[str, Any], name: str, count: int, *flags: str, clients: int = 3) -> list[tuple[float, float]]:
    """(down, up) bytes a client, round by round."""
    records = rounds(values, name, count, *flags)
    return [(r["bytes"]["down"] / clients, r["bytes"]["up"] / clients) for r in records]


# method -> the parts that a client uploads in rounds 0, 1 and 2
UPLOADS: dict[str, list[tuple[str, ...]]] = {
    "fedit": [PARTS] * 3,
    "ffa": [("b", "head")] * 3,
    "rolora": [("b", "head"), ("a", "head"), ("b", "head")],
    "fedsa": [("a", "head")] * 3,
    "local": [()] * 3,
    "fedask": [PARTS] * 3,  # in two phases
    "flexlora": [PARTS] * 3,
    "fedex": [PARTS] * 3,
    "flora": [PARTS] * 3,
    "as_published": [PARTS] * 3,
}


@pytest.mark.parametrize("name", UPLOADS)
def test_uploads_are_what_the_method_sends(name: str, tiny_values: dict[str, Any], part: dict[str, int]) -> None:
    wanted = [sum(part[p] for p in parts) for parts in UPLOADS[name]]
    assert [up for _, up in traffic(tiny_values, name, 3)] == wanted


@pytest.mark.parametrize("head", ["personal", "frozen"])
def test_a_head_that_stays_is_not_counted(head: str, tiny_values: dict[str, Any], part: dict[str, int]) -> None:
    flags = ("--lora.head", head)
    assert traffic(tiny_values, "fedit", 2, *flags) == [(part["a"] + part["b"],) * 2] * 2
    assert [up for _, up in traffic(tiny_values, "rolora", 2, *flags)] == [part["b"], part["a"]]
    assert [up for _, up in traffic(tiny_values, "local", 2, *flags)] == [0, 0]


def test_rotations_travel_beside_the_factors_that_they_turned(
    tiny_values: dict[str, Any], part: dict[str, int]
) -> None:
    whole = part[""]
    rotations = 4 * 2 * 2 * 4  # four layers, float32
    assert [up for _, up in traffic(tiny_values, "fedrot", 3)] == [whole, whole + rotations, whole + rotations]
    assert [up for _, up in traffic(tiny_values, "fedrot", 2, "--method.strength", "0")] == [whole, whole]


@pytest.mark.parametrize("name", ["fedit", "fedrot", "fedrot_svd", "flexlora"])
def test_what_comes_down_is_the_adapter(name: str, tiny_values: dict[str, Any], part: dict[str, int]) -> None:
    whole = part[""]
    assert [down for down, _ in traffic(tiny_values, name, 3)] == [whole] * 3


@pytest.mark.parametrize("name", ["fedex", "flora"])
@pytest.mark.parametrize("clients", [2, 4])
def test_the_change_of_the_base_comes_down_once_and_grows_with_the_clients(
    name: str, clients: int, tiny_values: dict[str, Any], part: dict[str, int]
) -> None:
    """In round 0 there is none yet, later only that of the last round, of rank N r."""
    flags = ("--partition.kind", "iid", "--partition.clients", str(clients))
    step = clients * (part["a"] + part["b"])
    found = [down for down, _ in traffic(tiny_values, name, 4, *flags, clients=clients)]
    assert found == [part[""], *[part[""] + step] * 3]


def test_an_older_reference_comes_down_beside_the_adapter(tiny_values: dict[str, Any], part: dict[str, int]) -> None:
    whole = part[""]
    assert [down for down, _ in traffic(tiny_values, "stale_reference", 3)] == [whole, 2 * whole, 2 * whole]


def test_the_second_question_comes_down_too(tiny_values: dict[str, Any], part: dict[str, int]) -> None:
    assert [down for down, _ in traffic(tiny_values, "fedask", 2)] == [part[""] + part["b"]] * 2


def test_variates_double_the_traffic(tiny_values: dict[str, Any], part: dict[str, int]) -> None:
    """Down from round 1 on: in round 0 all know that they are zero."""
    whole, scaffold = part[""], ("--local.scaffold", "true")
    assert traffic(tiny_values, "fedit", 3, *scaffold) == [(whole, 2 * whole), *[(2 * whole, 2 * whole)] * 2]
    assert [up for _, up in traffic(tiny_values, "ffa", 2, *scaffold)] == [2 * (part["b"] + part["head"])] * 2


def test_narrow_clients_traffic_is_counted(tiny_values: dict[str, Any], part: dict[str, int]) -> None:
    """At the global rank, at which they send."""
    whole = part[""]
    assert traffic(tiny_values, "fedit", 1, "--lora.ranks", '{"books": 1}') == [(whole, whole)]


def test_clients_that_are_not_drawn_cost_nothing(tiny_values: dict[str, Any], part: dict[str, int]) -> None:
    some = ("--federation.participation", "0.34")
    whole = part[""]
    assert traffic(tiny_values, "fedit", 2, *some, clients=1) == [(whole, whole)] * 2


def test_pooled_training_has_one_client(tiny_values: dict[str, Any], part: dict[str, int]) -> None:
    record = rounds(tiny_values, "centralised", 1)[0]
    whole = part[""]
    assert record["clients"] == {"drawn": 1, "used": ["everyone"], "dropped": {}}
    assert record["bytes"] == {"down": whole, "up": whole}
    assert math.isclose(record["aggregation"]["sent_relative"], 0, abs_tol=1e-6)
