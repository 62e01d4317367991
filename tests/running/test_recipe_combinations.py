"""What can be combined and what cannot: refused in one line that names the key, the reason and the methods that can."""

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedrot.core.errors import RecipeError
from fedrot.core.methods import methods
from fedrot.running.recipe import SECTIONS, Recipe, value_at
from fedrot.running.recipe_file import parse_recipe, read_recipe, to_yaml

METHODS = methods()
CONTROLS = [name for name, method in METHODS.items() if method.capabilities.control]
HALF = {"model": {"dtype": "bfloat16"}, "local": {"precision": "bf16"}}


def refused(values: dict[str, Any], flags: list[str], *words: str) -> str:
    """The message: one line with all of the words."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values, flags)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for word in words:
        assert word in message
    return message


def merged(values: dict[str, Any], *changes: dict[str, Any]) -> dict[str, Any]:
    """The values with keys of their sections updated."""
    values = {key: dict(v) if isinstance(v, dict) else v for key, v in values.items()}
    for change in changes:
        for key, value in change.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return values


def as_flags(changes: dict[str, dict[str, Any]]) -> list[str]:
    """The same changes as a user types them."""
    flags = []
    for section, keys in changes.items():
        for key, value in keys.items():
            text = str(value).lower() if isinstance(value, bool) else yaml.safe_dump(value, default_flow_style=True)
            flags.append(f"--{section}.{key}={text.removesuffix(chr(10)).removesuffix('...').strip()}")
    return flags


@pytest.fixture
def base(tiny_values: dict[str, Any]) -> dict[str, Any]:
    """The tiny recipe's resolved values but for the method: reading them again is quick, types being right."""
    return {key: value for key, value in parse_recipe(tiny_values).to_dict().items() if key != "method"}


# asked -> (what the recipe says, the methods that take it, part of the reason)
COMBINATIONS: dict[str, tuple[dict[str, dict[str, Any]], set[str], str]] = {
    "lora.ranks": (
        {"lora": {"ranks": {"books": 1}}},
        set(METHODS) - {"as_published", "centralised"},
        "takes clients of one rank only",
    ),
    "server.optimizer": (
        {"server": {"optimizer": "adam"}},
        {
            "fedit", "ffa", "rolora", "fedsa", "fedrot",
            "random_rotation", "rescale", "stale_reference", "as_published",
        },
        "not an averaged change",
    ),
    "local.scaffold": (
        {"local": {"scaffold": True}},
        {"fedit", "ffa", "rolora", "fedrot", *(n for n in CONTROLS if METHODS[n].capabilities.variates)},
        "control variates",
    ),
    "secure.aggregation": (
        {"secure": {"aggregation": True}},
        {
            "fedit", "ffa", "rolora", "fedsa", "fedrot", "fedask", "local",
            "random_rotation", "rescale", "stale_reference", "as_published",
        },
        "more of its clients than the sum",
    ),
    "checks.max_norm": ({"checks": {"max_norm": 9.0}}, set(METHODS) - {"fedask"}, "sketches"),
    "model.dtype": (HALF, set(METHODS) - {"fedex", "flora"}, "bfloat16 would round away"),
}  # fmt: skip


@pytest.mark.parametrize("asked", COMBINATIONS)
def test_every_method_takes_what_it_can_and_refuses_the_rest(asked: str, base: dict[str, Any]) -> None:
    changes, able, reason = COMBINATIONS[asked]
    for name in METHODS:
        values = merged(base, changes, {"method": {"name": name}})
        if name in able:
            assert Recipe.from_values(values).method == METHODS[name]()
            continue
        with pytest.raises(RecipeError) as caught:
            Recipe.from_values(values)
        message = str(caught.value)
        assert message.startswith(f"{asked}: method {name} ")
        assert reason in message
        listed = set(message.rpartition("methods that work: ")[2].replace(" or ", ", ").split(", "))
        assert listed == able - set(CONTROLS)


@pytest.mark.parametrize("asked", COMBINATIONS)
def test_a_combination_is_refused_in_a_file_and_by_flags_alike(asked: str, tiny_values: dict[str, Any]) -> None:
    changes, able, reason = COMBINATIONS[asked]
    name = sorted(set(METHODS) - able)[0]
    values = merged(tiny_values, {"method": {"name": name}})
    message = refused(merged(values, changes), [], f"recipe: {asked}: method {name} ", reason, "methods that work: ")
    assert refused(tiny_values, [f"--method.name={name}", *as_flags(changes)]) == message


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_a_half_precision_base_changes_where_the_method_widens_it(name: str, tiny_values: dict[str, Any]) -> None:
    asked = merged(tiny_values, HALF, {"method": {"name": name}})
    refused(asked, [], "model.dtype: ", "method.dequantize", "model.dtype float32")
    recipe = parse_recipe(asked, ["--method.dequantize", "true"])
    assert recipe.method.settings() == {"dequantize": True}
    assert parse_recipe(merged(asked, {"method": {"dequantize": True}})) == recipe


BAD: dict[str, tuple[dict[str, dict[str, Any]], list[str]]] = {
    "rank above": ({"lora": {"ranks": {"books": 3}}}, ["lora.ranks must be from 1 to lora.rank, 2", "{'books': 3}"]),
    "one of two ranks above": ({"lora": {"ranks": {"a": 1, "b": 9}}}, ["lora.ranks must be from 1", "'b': 9"]),
    "rank 0": ({"lora": {"ranks": {"books": 0}}}, ["lora.ranks must be from 1 to lora.rank, 2"]),
    "rank below 0": ({"lora": {"ranks": {"books": -1}}}, ["lora.ranks must be from 1"]),
    "rank a fraction": ({"lora": {"ranks": {"books": 1.5}}}, ["lora.ranks must be"]),
    "rank a truth": ({"lora": {"ranks": {"books": True}}}, ["lora.ranks must be"]),
    "rank null": ({"lora": {"ranks": {"books": None}}}, ["lora.ranks"]),
    "ranks a number": ({"lora": {"ranks": 1}}, ["lora.ranks must be"]),
    "ranks a list": ({"lora": {"ranks": [1, 2]}}, ["lora.ranks must be"]),
    "unknown optimizer": ({"server": {"optimizer": "sgd"}}, ["server.optimizer must be adam, momentum, none or yogi"]),
    "server rate 0": ({"server": {"lr": 0.0}}, ["server.lr must be positive, or null, got 0.0"]),
    "server rate below 0": ({"server": {"lr": -1.0}}, ["server.lr must be positive, or null"]),
    "server rate no number": ({"server": {"lr": float("nan")}}, ["server.lr must be positive"]),
    "server rate without end": ({"server": {"lr": float("inf")}}, ["server.lr must be positive"]),
    "beta1 of 1": ({"server": {"beta1": 1.0}}, ["server.beta1 must be in [0, 1), got 1.0"]),
    "beta1 below 0": ({"server": {"beta1": -0.1}}, ["server.beta1 must be in [0, 1)"]),
    "beta2 of 1": ({"server": {"beta2": 1.0}}, ["server.beta2 must be in [0, 1)"]),
    "beta2 no number": ({"server": {"beta2": float("nan")}}, ["server.beta2 must be in [0, 1)"]),
    "epsilon of 0": ({"server": {"epsilon": 0.0}}, ["server.epsilon must be positive"]),
    "unknown server key": ({"server": {"momentum": 0.9}}, ["server.momentum"]),
    "negative prox": ({"local": {"prox": -0.1}}, ["local.prox must be at least 0, got -0.1"]),
    "prox no number": ({"local": {"prox": float("nan")}}, ["local.prox must be at least 0"]),
    "prox without end": ({"local": {"prox": float("inf")}}, ["local.prox must be at least 0"]),
    "scaffold a number": ({"local": {"scaffold": 2}}, ["local.scaffold must be true or false"]),
    "strength in words": ({"method": {"strength": "much"}}, ["method.strength must be a number or auto", "much"]),
    "strength above 1": ({"method": {"strength": 1.1}}, ["method.strength", "[0, 1]"]),
    "strength below 0": ({"method": {"strength": -0.1}}, ["method.strength", "[0, 1]"]),
    "unknown softening": ({"method": {"softening": "hard"}}, ["method.softening must be linear or regularised"]),
    "unknown factor": ({"method": {"factor": "both"}}, ["method.factor must be A, B, alternate or joint"]),
    "guard a number": ({"method": {"guard": 3}}, ["method.guard must be true or false"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_value_out_of_range_is_refused_in_a_file_and_as_a_flag(case: str, tiny_values: dict[str, Any]) -> None:
    changes, words = BAD[case]
    refused(merged(tiny_values, changes), [], *words)
    refused(tiny_values, as_flags(changes), *words[:1])


def test_types_are_said_in_words(tiny_values: dict[str, Any]) -> None:
    message = refused(merged(tiny_values, {"lora": {"ranks": 3}}), [], "lora.ranks must be", "or null")
    assert "[" not in message.partition(", got")[0]


METHOD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "momentum of 1": ({"name": "fedrot_svd", "momentum": 1.0}, "method.momentum must be in [0, 1)"),
    "clip below 0": ({"name": "fedrot_svd", "feedback_clip": -1.0}, "method.feedback_clip must be at least 0"),
    "kept rank 0": ({"name": "fedrot_svd", "kept_rank": 0}, "method.kept_rank must be at least 1, or null"),
    "mu below 0": ({"name": "lora_fair", "mu": -1.0}, "method.mu must be at least 0"),
    "steps below 0": ({"name": "fedrot_consensus", "steps": -1}, "method.steps must be at least 0"),
    "lag 0": ({"name": "stale_reference", "lag": 0}, "method.lag must be at least 1"),
}


@pytest.mark.parametrize("case", METHOD_VALUES)
def test_a_methods_own_setting_out_of_range_is_refused(case: str, base: dict[str, Any]) -> None:
    settings, words = METHOD_VALUES[case]
    with pytest.raises(RecipeError, match=re.escape(words)):
        Recipe.from_values({**base, "method": settings})


def test_scaffold_goes_with_neither_ranks_nor_a_server_optimizer(tiny_values: dict[str, Any]) -> None:
    scaffold = {"local": {"scaffold": True}}
    for other in ({"lora": {"ranks": {"books": 1}}}, {"server": {"optimizer": "yogi"}}):
        refused(tiny_values, as_flags(scaffold | other), "local.scaffold", "neither lora.ranks nor server.optimizer")


def test_pooled_data_have_one_client(tiny_values: dict[str, Any]) -> None:
    values = merged(tiny_values, {"method": {"name": "centralised"}})
    for change in ({"lora": {"head": "personal"}}, {"federation": {"participation": 0.5}}):
        words = ("method.name", "centralised", "lora.head shared", "federation.participation 1")
        refused(values, as_flags(change), *words)


@pytest.mark.parametrize("name", sorted({"fedit", "fedask", *set(METHODS) & set(SECTIONS)}))
def test_every_method_can_be_named_by_a_flag(name: str, tiny_values: dict[str, Any]) -> None:
    assert parse_recipe(tiny_values, ["--method.name", name]).method == METHODS[name]()


@pytest.mark.parametrize("key", ["name", "data.path"])
def test_a_value_may_be_called_as_a_section_is(key: str, tiny_values: dict[str, Any]) -> None:
    """A folder called data, a run called local."""
    for value in ("data", "local"):
        recipe = parse_recipe(tiny_values, [f"--{key}", value])
        assert value_at(recipe.to_dict(), key) == value


# as a shell passes it -> (key, value)
TYPED: dict[str, tuple[str, Any]] = {
    "--method.strength auto": ("method.strength", "auto"),
    "--method.strength=0.5": ("method.strength", 0.5),
    "--method.strength 1": ("method.strength", 1.0),
    "--method.factor joint": ("method.factor", "joint"),
    "--method.guard true": ("method.guard", True),
    """--lora.ranks '{"books": 1}'""": ("lora.ranks", {"books": 1}),
    "--lora.ranks '{books: 1, films: 2}'": ("lora.ranks", {"books": 1, "films": 2}),
    "--lora.ranks null": ("lora.ranks", None),
    "--server.lr null": ("server.lr", None),
    "--server.optimizer yogi": ("server.optimizer", "yogi"),
    "--local.prox 0.1": ("local.prox", 0.1),
    "--local.scaffold true": ("local.scaffold", True),
}


@pytest.mark.parametrize("line", TYPED)
def test_a_flag_says_what_it_says_and_survives_the_way_to_disk(
    line: str, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    key, value = TYPED[line]
    recipe = parse_recipe(tiny_values, shlex.split(line))
    assert value_at(recipe.to_dict(), key) == value
    assert_survives(recipe, tmp_path)


def assert_survives(recipe: Recipe, folder: Path) -> None:
    """The way through a YAML file and back."""
    path = folder / "resolved.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert read_recipe(path) == recipe
    assert Recipe.from_values(yaml.safe_load(to_yaml(recipe))) == recipe


@pytest.mark.parametrize("client", ["site.a", "Köln 1", "3", "-", "true", "null"])
def test_ranks_take_any_clients_name(client: str, tiny_values: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe(merged(tiny_values, {"lora": {"ranks": {client: 1}}}))
    assert recipe.lora.ranks == {client: 1}
    assert_survives(recipe, tmp_path)


@pytest.mark.parametrize("flag", [True, False], ids=["flag", "file"])
def test_a_client_whose_name_is_a_number_is_taken_or_refused(flag: bool, tiny_values: dict[str, Any]) -> None:
    """YAML reads {3: 1} as a number for a name; the client of the column's value 3 is '3'."""
    values = tiny_values if flag else merged(tiny_values, {"lora": {"ranks": {3: 1}}})
    with suppress(RecipeError):
        assert parse_recipe(values, ["--lora.ranks", "{3: 1}"] if flag else []).lora.ranks == {"3": 1}
