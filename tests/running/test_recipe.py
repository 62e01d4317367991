"""The recipe: every key checked, every complaint one line that names it, and back to YAML without loss."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedrot.core.errors import RecipeError
from fedrot.core.methods.factorwise import FedIT
from fedrot.running.recipe import SECTIONS, Recipe, flatten
from fedrot.running.recipe_file import changed_key, parse_recipe, read_recipe, recipe_parser, to_yaml


def test_a_resolved_recipe_reads_back_as_itself(tiny_values: dict[str, Any]) -> None:
    recipe = parse_recipe(tiny_values)
    assert parse_recipe(yaml.safe_load(to_yaml(recipe))) == recipe
    assert Recipe.from_values(recipe.to_dict()) == recipe


def test_flags_win_over_the_file(recipe_file: Any) -> None:
    recipe = read_recipe(recipe_file(), ["--rounds", "7", "--local.lr=1e-4", "--lora.targets", "[query]"])
    assert (recipe.rounds, recipe.local.lr, recipe.lora.targets) == (7, 1e-4, ["query"])
    assert recipe.local.steps == 3


def test_scientific_notation_is_a_number(recipe_file: Any) -> None:
    path = recipe_file()
    path.write_text(path.read_text().replace("lr: 0.01", "lr: 1e-3"))
    assert read_recipe(path).local.lr == 1e-3


def test_another_method_by_flag_leaves_the_files_method_settings_behind(tiny_values: dict[str, Any]) -> None:
    values = tiny_values | {"method": {"name": "fedrot", "strength": 0.7}}
    assert parse_recipe(values, ["--method.name", "fedit"]).method == FedIT()
    assert parse_recipe(values, ["--method.name=fedrot"]).method.settings()["strength"] == 0.7


def test_json_recipes_are_read(tmp_path: Path, tiny_values: dict[str, Any]) -> None:
    import json

    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(tiny_values))
    assert read_recipe(path) == parse_recipe(tiny_values)


def test_a_folder_does_not_hide_the_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vader").mkdir()
    assert read_recipe(Path("vader")).data.source == "vader"


BAD_VALUES = {
    "unknown section": ({"lokal": {}}, ["lokal", "did you mean 'local'"]),
    "unknown key": ({"local": {"stesp": 1}}, ["local.stesp", "did you mean 'steps'"]),
    "section is no mapping": ({"local": 3}, ["local must hold keys and values"]),
    "wrong type": ({"local": {"lr": "fast"}}, ["local.lr must be a number", "fast"]),
    "fraction for a whole number": ({"local": {"steps": 1.5}}, ["local.steps must be a whole number or null"]),
    "null for a number": ({"rounds": None}, ["rounds must be a whole number, got null"]),
    "truth for a number": ({"seed": True}, ["seed must be a whole number"]),
    "text for a list": ({"lora": {"targets": "query"}}, ["lora.targets must be a list"]),
    "unknown choice": ({"local": {"optimizer": "adam"}}, ["local.optimizer must be adamw or sgd", "adam"]),
    "unknown method": ({"method": {"name": "fedavg"}}, ["method.name", "fedavg", "fedit"]),
    "setting of another method": ({"method": {"name": "fedit", "strength": 0.5}}, ["method.strength", "fedit"]),
    "strength out of range": ({"method": {"strength": 1.5}}, ["method.strength", "[0, 1]"]),
    "strength not a number": ({"method": {"strength": float("nan")}}, ["method.strength", "[0, 1]"]),
    "unknown factor": ({"method": {"factor": "C"}}, ["method.factor must be A, B, alternate or joint"]),
    "zero rounds": ({"rounds": 0}, ["rounds must be at least 1, got 0"]),
    "negative rate": ({"local": {"lr": -1.0}}, ["local.lr must be positive"]),
    "rate not a number": ({"local": {"lr": float("nan")}}, ["local.lr must be positive"]),
    "dropout of one": ({"lora": {"dropout": 1.0}}, ["lora.dropout must be in [0, 1)"]),
    "steps and epochs": ({"local": {"epochs": 1.0}}, ["exactly one of local.steps and local.epochs"]),
    "momentum for adamw": ({"local": {"momentum": 0.9}}, ["local.momentum"]),
    "no participation": ({"federation": {"participation": 0.0}}, ["federation.participation must be in (0, 1]"]),
    "glue without a task": ({"data": {"source": "glue"}}, ["data.name"]),
    "no number of clients": ({"partition": {"kind": "iid"}}, ["partition.clients"]),
    "one quantile": ({"partition": {"kind": "dirichlet", "by": "length", "bins": 1}}, ["partition.bins", "at least 2"]),
    "unknown stratum": ({"partition": {"by": "topic"}}, ["partition.by must be", "cluster", "topic"]),
    "even by length": ({"partition": {"kind": "iid", "clients": 2, "by": "length"}}, ["partition.by", "dirichlet"]),
    "quantiles of labels": ({"partition": {"bins": 3}}, ["partition.bins", "length or cluster"]),
    "encoder of labels": ({"partition": {"encoder": "fetch:minilm"}}, ["partition.encoder", "partition.by cluster"]),
    "groups without a column": (
        {"partition": {"kind": "dirichlet", "clients": 2, "by": "group"}, "data": {"group": None}},
        ["data.group", "partition.by group"],
    ),
    "name with a slash": ({"name": "a/b"}, ["name must be a name without '/'"]),
    "half base in full precision": ({"model": {"dtype": "bfloat16"}}, ["model.dtype", "bf16"]),
    "unknown tracker": ({"tracking": {"to": ["paper"]}}, ["tracking.to", "tensorboard"]),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_bad_value_is_one_line_that_names_file_and_key(case: str, recipe_file: Any) -> None:
    changes, words = BAD_VALUES[case]
    path = recipe_file(**changes)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message


BAD_FLAGS = {
    "unknown option": (["--local.ratte", "1"], "--local.ratte"),
    "option of another method": (["--method.name", "fedit", "--method.strength", ".5"], "--method.strength"),
    "missing value": (["--local.lr"], "--local.lr"),
    "missing method name": (["--method.name"], "method.name"),
    "stray word": (["extra"], "extra"),
    "wrong type": (["--rounds", "many"], "rounds must be a whole number"),
    "shortened option": (["--local.l", "3"], "--local.l"),
    "shortened method": (["--method.nam", "fedit"], "--method.nam"),
    "section as option": (["--model", "cfg.yaml"], "give its keys, e.g. --model.path"),
    "method as option": (["--method=fedit"], "--method.name"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_is_one_line_that_names_it(case: str, recipe_file: Any) -> None:
    flags, word = BAD_FLAGS[case]
    with pytest.raises(RecipeError) as caught:
        read_recipe(recipe_file(), flags)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "empty"),
        ("# nothing but a remark\n", "empty"),
        ("rounds: [3\nseed: 1\n", "line 2: not valid YAML"),
        ("- a\n- b\n", "list"),
        ("just words", "str"),
        ("rounds: 3\nrounds: 4\n", "'rounds' is given twice"),
        ("local: {lr: 1}\nlocal: {lr: 2}\n", "'local' is given twice"),
        ("lora: {rank: 2, rank: 8}\n", "'rank' is given twice"),
        ("[" * 5000, "broken.yaml"),
        ("rounds: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_a_broken_file_is_one_line(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert word in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_binary_and_broken_json_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file"):
        read_recipe(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(binary)
    broken = tmp_path / "broken.json"
    broken.write_text('{"rounds": 3,}')
    with pytest.raises(RecipeError, match="line 1: not valid JSON"):
        read_recipe(broken)


def test_the_first_changed_key_is_found(tiny_values: dict[str, Any]) -> None:
    old = parse_recipe(tiny_values).to_dict()
    assert changed_key(old, old) is None
    new = parse_recipe(tiny_values, ["--local.lr", "0.5"]).to_dict()
    assert changed_key(old, new) == ("local.lr", 0.01, 0.5)
    other = parse_recipe(tiny_values, ["--method.name", "fedit"]).to_dict()
    assert changed_key(old, other) == ("method.name", "fedrot", "fedit")


def test_every_key_has_a_flag_with_a_help_text(tiny_values: dict[str, Any]) -> None:
    recipe = parse_recipe(tiny_values)
    actions = {action.dest: action.help for action in recipe_parser(type(recipe.method))._actions}
    for key in flatten(recipe.to_dict()):
        assert key in actions, key
        assert actions[key], f"{key} has no help text"
    assert set(SECTIONS) <= set(recipe.to_dict())
