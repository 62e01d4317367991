"""Privacy of single examples in runs: what it costs each client, what leaves a client, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, Silent, first_adapter, go
from model_folders import SIZES, write_model
from network_sites import ONE_BY_ONE, LocalPost, deployed, divide_files
from opacus.accountants import PRVAccountant, RDPAccountant
from test_private_runs import change, size, spread
from tiny_runs import assert_equal, assert_near, begin, cut_and_resumed, flat

from fedrot.app.report.build import build_report
from fedrot.app.report.load import load_runs
from fedrot.app.report.promise import promise
from fedrot.core.errors import RecipeError, RunError
from fedrot.core.methods import methods
from fedrot.core.methods.base import Upload
from fedrot.learning.local import step_count
from fedrot.running.accounting import _ORDERS, Accountant
from fedrot.running.draws import draw_clients
from fedrot.running.privacy import silent
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.rounds import play_round

HELD = {"a": 400, "b": 60, "c": 5}
CLIENTS = ["books", "films", "music"]  # of 60 examples each


def private(noise: float, *flags: str, clip: float = 0.5, delta: float = 1e-3) -> tuple[str, ...]:
    given = ("--privacy.mode", "example", "--privacy.noise", str(noise), "--privacy.clip", str(clip))
    usual = ("--federation.weighting", "uniform", "--local.clip", "null", "--privacy.delta", str(delta))
    return (*usual, *given, *flags)


# What it costs.


def opacus_epsilon(kind: Any, noise: float, chance: float, steps: int, delta: float, **more: Any) -> float:
    accountant = kind()
    accountant.history = [(noise, chance, steps)]
    return float(accountant.get_epsilon(delta, **more))


@pytest.mark.parametrize("epochs", [False, True])
def test_epsilon_is_opacus_for_the_steps_that_a_client_took(epochs: bool, tiny_values: dict[str, Any]) -> None:
    flags = ("--local.steps", "null", "--local.epochs", "1.5") if epochs else ("--local.steps", "7")
    recipe = parse_recipe(tiny_values, private(1.1, *flags, "--rounds", "4", "--local.batch", "16"))
    accountant = Accountant(recipe)
    by_round, by_client = accountant.by_round(list(HELD), HELD), accountant.by_client(list(HELD), HELD)
    assert by_round == [max(each.values()) for each in by_client]
    for number, each in enumerate(by_client, start=1):
        for client, chance, steps in (("a", 16 / 400, 38), ("b", 16 / 60, 6), ("c", 1.0, 2)):
            taken = number * (steps if epochs else 7)
            assert each[client] == opacus_epsilon(RDPAccountant, 1.1, chance, taken, 1e-3, alphas=_ORDERS)
    exact = opacus_epsilon(PRVAccountant, 1.1, 16 / 400, 4 * (38 if epochs else 7), 1e-3)
    assert exact < by_client[-1]["a"] < 1.5 * exact
    assert accountant.records(list(HELD), HELD)[2] == {"epsilon": by_round[2], "delta": 1e-3, "by_client": by_client[2]}


def test_a_client_pays_for_the_rounds_that_it_was_drawn_for(tiny_values: dict[str, Any]) -> None:
    share = ("--federation.participation", "0.34", "--rounds", "10")
    recipe = parse_recipe(tiny_values, private(1.1, *share))
    accountant, times = Accountant(recipe), dict.fromkeys(HELD, 0)
    for number, each in enumerate(accountant.by_client(list(HELD), HELD)):
        for client in draw_clients(list(HELD), 0.34, recipe.seed, number):
            times[client] += 1
        for client, held in HELD.items():
            steps = times[client] * step_count(held, recipe.local)
            assert each[client] == accountant.epsilon(steps, min(8, held) / held)
    assert 0 < min(times.values()) < max(times.values()) < 10


def test_a_budget_is_for_the_client_that_pays_most(tiny_values: dict[str, Any]) -> None:
    free = Accountant(parse_recipe(tiny_values, private(2.0, "--rounds", "5"))).by_round(list(HELD), HELD)
    budget = str((free[2] + free[3]) / 2)
    recipe = parse_recipe(tiny_values, private(2.0, "--rounds", "5", "--privacy.budget", budget))
    assert Accountant(recipe).by_round(list(HELD), HELD) == free[:3]
    small = parse_recipe(tiny_values, private(2.0, "--privacy.budget", str(free[0] / 2)))
    with pytest.raises(RecipeError, match=r"privacy\.budget: one round costs 'c' epsilon"):
        Accountant(small).by_round(list(HELD), HELD)


def test_a_delta_that_allows_giving_an_example_away_is_refused(tiny_values: dict[str, Any]) -> None:
    recipe = parse_recipe(tiny_values, private(1.0, delta=1 / 400))
    with pytest.raises(RecipeError, match=r"privacy\.delta is 0\.0025: .*examples of 'a'"):
        Accountant(recipe).by_round(list(HELD), HELD)


def test_what_rounds_cost_is_not_said_before_all_clients_are_known(tiny_values: dict[str, Any]) -> None:
    accountant = Accountant(parse_recipe(tiny_values, private(1.0)))
    assert accountant.by_round(list(HELD), {}) == []
    with pytest.raises(RunError, match="'b' has not joined"):
        accountant.by_round(list(HELD), {"a": 4, "c": 2})
    assert Accountant(parse_recipe(tiny_values, private(0))).by_round(list(HELD), HELD) == [math.inf] * 3


def test_the_table_of_the_documentation_is_what_the_accounting_says(tiny_values: dict[str, Any]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| z = ")]
    assert len(rows) == 5
    for noise, *cells in rows:
        z = float(noise.replace("z =", ""))
        recipe = parse_recipe(tiny_values, private(z, "--local.steps", "20", "--rounds", "8", delta=1e-5))
        for cell, (batch, held) in zip(cells, [(16, 5000), (64, 5000), (16, 1000), (64, 1000), (16, 200)], strict=True):
            accountant = Accountant(replace(recipe, local=replace(recipe.local, batch=batch)))
            assert float(cell) == round(accountant.by_round(["c"], {"c": held})[-1], 2)


# What leaves a client.


def test_an_upload_says_its_factors_and_what_follows_from_them(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *private(0.5)).play(2)
    for upload in tiny.engine.uploads[3:]:
        assert (upload.held, upload.used, upload.metrics, upload.seconds) == (0, 0, {}, {})
        assert upload.rotation
        assert upload.layers
    record = tiny.records[-1]
    assert "train" not in record
    assert record["drift"]["a_mean"] > 0
    assert record["aggregation"]["before"] > 0
    assert record["clients"]["used"] == CLIENTS


@pytest.mark.parametrize(
    ("what", "value"), [("held", 3), ("used", 3), ("metrics", {"loss": 1.0}), ("seconds", {"x": 1})]
)
def test_uploads_that_say_more_are_dropped(what: str, value: Any, tiny_values: dict[str, Any]) -> None:
    recipe = parse_recipe(tiny_values, private(1.0))
    engine, seen = FakeEngine(recipe.method, dict.fromkeys("abc", 50)), Silent()

    def quiet(upload: Upload) -> Upload:
        return silent(upload, recipe)

    engine.faults = {"a": quiet, "b": quiet, "c": lambda upload: replace(quiet(upload), **{what: value})}
    play_round(recipe, engine, recipe.method.start(first_adapter()), seen)
    assert list(seen.dropped) == ["c"]
    assert f"beside its change ({what})" in seen.dropped["c"]


def test_without_clip_and_noise_it_is_the_run_of_all_examples(tiny_values: dict[str, Any]) -> None:
    whole = ("--local.batch", "100", "--lora.dropout", "0", "--local.optimizer", "sgd", "--local.lr", "0.1")
    plain = begin(tiny_values, "--federation.weighting", "uniform", "--local.clip", "null", *whole).play(2)
    clear = begin(tiny_values, *private(0, *whole, clip=1e9)).play(2)
    assert_near(flat(clear.adapter), flat(plain.adapter), rel=1e-3)


def test_a_step_moves_a_client_by_its_noise(tiny_values: dict[str, Any]) -> None:
    """One SGD step of rate 1 and of 8 expected examples; the clip leaves next to nothing of their gradients."""
    step = ("--local.optimizer", "sgd", "--local.lr", "1", "--local.steps", "1", "--method.name", "fedit")
    tiny = begin(tiny_values, *private(4e4, *step, clip=1e-4))
    before = tiny.adapter
    for upload in tiny.play().engine.uploads:
        assert spread(change(upload.adapter, before)) == pytest.approx(4 / 8, rel=0.1)
    quiet = begin(tiny_values, *private(0, *step, clip=1e-4)).play()
    assert all(size(change(u.adapter, before)) <= 1e-4 * 60 / 8 for u in quiet.engine.uploads)


WITH = [
    ("--method.name", "fedsa"),
    ("--method.name", "fedask", "--lora.rank", "4"),
    ("--method.name", "fedex"),
    ("--local.scaffold", "true", "--local.prox", "0.1"),
    ("--lora.head", "personal", "--federation.compression", "int8"),
    ("--robust.rule", "median", "--server.optimizer", "adam"),
    ("--secure.aggregation", "true"),
]


@pytest.mark.parametrize("flags", WITH, ids=lambda flags: flags[1] if flags[0] == "--method.name" else flags[0][2:])
def test_what_is_made_of_private_factors_needs_no_more_noise(
    flags: tuple[str, ...], tiny_values: dict[str, Any]
) -> None:
    tiny = begin(tiny_values, *private(0.5, *flags))
    before = tiny.adapter
    tiny.play(2)
    assert size(change(tiny.adapter, before)) > 0
    assert [record["clients"]["used"] for record in tiny.records] == [CLIENTS] * 2
    assert all("train" not in record for record in tiny.records)


def test_sites_train_as_the_simulation_does_and_are_not_asked_for_more(
    tiny_values: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    flags = private(0.5, *ONE_BY_ONE, "--evaluation.every", "0")
    sites = LocalPost(divide_files(tiny_data, tmp_path / "data"), tmp_path / "memory")
    between = deployed(tiny_values, sites, *flags)
    assert between.engine.held == dict.fromkeys(CLIENTS, 60)
    between.play(2)
    assert_equal(between.adapter, begin(tiny_values, *flags).play(2).adapter)
    for _, request, reply in sites.carried:
        if request.header["kind"] == "train":
            assert [reply.header[key] for key in ("held", "used", "metrics", "seconds")] == [0, 0, {}, {}]


# Whole runs.


def test_a_killed_run_goes_on_to_the_same_bits_and_says_what_each_client_paid(
    tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    flags = private(1.5, "--federation.participation", "0.67")
    whole, resumed = cut_and_resumed(tiny_values, tmp_path, *flags)
    assert resumed == whole
    held = dict.fromkeys(CLIENTS, 60)
    spent = Accountant(parse_recipe(tiny_values, [*flags, "--rounds", "4"])).records(CLIENTS, held)
    assert [record["privacy"] for record in whole["metrics"]] == spent
    last = whole["result"]["privacy"]
    assert last == {**spent[-1], "rounds": 4, "stopped": False}
    assert last["epsilon"] == max(last["by_client"].values()) > min(last["by_client"].values())


def test_the_report_says_for_whom_and_a_budget_ends_the_run(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    free = Accountant(parse_recipe(tiny_values, private(1.5))).by_round(CLIENTS, dict.fromkeys(CLIENTS, 60))
    folder = go(tiny_values, tmp_path / "run", *private(1.5, "--privacy.budget", str((free[0] + free[1]) / 2)))
    assert json.loads((folder.path / "result.json").read_text())["privacy"]["stopped"]
    page = build_report([folder.path], tmp_path / "report").read_text()
    assert f"Differential privacy, example: epsilon {free[0]:.3g} at delta 0.001 after 1 rounds" in page
    assert f"each single training example of theirs (the least of any client: {free[0]:.3g})" in page
    assert "ended it after 1 of 3 rounds" in page
    clear = go(tiny_values, tmp_path / "clear", *private(0, "--rounds", "1"))
    assert "gradients of examples were clipped at 0.5" in str(promise(load_runs([clear.path])[0]))


def test_a_language_model_s_conversations_are_examples(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "llama", "llama", tiny_model, causal=True, **SIZES["llama"])
    words = ["good", "bad", "film", "book", "warm", "dull"]
    pairs = [(a, b) for a in words[:2] for b in words for _ in "12"]
    rows = [{"text": f"the {a} {b}", "response": f"very {b}", "site": a} for a, b in pairs]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path), "train": "train.jsonl", "validation": "train.jsonl", "response": "response"}
    values = {
        "name": "words",
        "rounds": 2,
        "compute": {"threads": 1},
        "model": {"path": str(folder)},
        "lora": {"rank": 2},
        "data": {**data, "group": "site", "max_length": 32},
        "partition": {"kind": "column"},
        "local": {"lr": 0.02, "batch": 4, "steps": 3},
    }
    result = go(values, tmp_path / "run", *private(1.0)).read_json("result.json")
    assert result["privacy"]["by_client"].keys() == {"good", "bad"}
    chance, steps = 4 / 12, 6
    assert result["privacy"]["epsilon"] == opacus_epsilon(RDPAccountant, 1.0, chance, steps, 1e-3, alphas=_ORDERS)


# What is refused.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--local.clip", "1"), ("local.clip", "null")),
        (("--federation.weighting", "held"), ("federation.weighting", "private examples", "uniform")),
        (("--method.name", "as_published"), ("privacy.mode", "private examples")),
        (("--method.name", "centralised"), ("privacy.mode", "centralised", "holds everything")),
        (("--evaluation.final", "train"), ("evaluation", "train", "another split")),
        (("--evaluation.split", "train"), ("evaluation", "train", "another split")),
        (("--evaluation.choose", "best"), ("evaluation.choose", "last")),
        (("--privacy.clip", "null"), ("privacy.clip", "example")),
        (("--privacy.noise", "0", "--privacy.budget", "3"), ("privacy.budget", "infinite")),
        (("--federation.buffer", "2"), ("privacy.mode", "federation.buffer")),
    ],
)
def test_what_would_not_be_private_is_refused(
    flags: tuple[str, ...], words: tuple[str, ...], tiny_values: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError) as found:
        parse_recipe(tiny_values, [*private(1.0), *flags])
    assert "\n" not in str(found.value)
    assert all(word in str(found.value) for word in words), str(found.value)


@pytest.mark.parametrize("name", [n for n, m in methods().items() if not m.capabilities.pooled and m.weighting is None])
def test_every_method_that_does_not_weigh_by_examples_is_taken(name: str, tiny_values: dict[str, Any]) -> None:
    assert parse_recipe(tiny_values, [*private(1.0), "--method.name", name]).privacy.mode == "example"
