"""Runs with state beyond the adapter, at the server, at clients or in the base: cut off and resumed, no bit differs."""

from pathlib import Path
from typing import Any

import pytest
from fakes import go
from tiny_runs import cut_and_resumed

from fedrot.core.errors import RunError
from fedrot.running.folder import RunFolder
from fedrot.running.recipe_file import parse_recipe

RANKS = ("--lora.ranks", '{"books": 1}')
HALF = ("--model.dtype", "bfloat16", "--local.precision", "bf16", "--method.dequantize", "true")
SOME = ("--federation.participation", "0.67")
CASES: dict[str, tuple[str, ...]] = {
    "adam": ("--server.optimizer", "adam"),
    "yogi, b and a in turn": ("--server.optimizer", "yogi", "--method.name", "rolora"),
    "adam, personal factors": ("--server.optimizer", "adam", "--method.name", "fedsa", *SOME),
    "momentum beside a memory": ("--server.optimizer", "momentum", "--method.name", "stale_reference"),
    "variates": ("--local.scaffold", "true", *SOME),
    "variates of factors in turn": ("--local.scaffold", "true", "--method.name", "rolora"),
    "variates and own heads": ("--local.scaffold", "true", "--lora.head", "personal", *SOME),
    "ranks": RANKS,
    "ranks and own factors": (*RANKS, "--method.name", "fedsa", *SOME),
    "ranks in two phases": (*RANKS, "--method.name", "fedask"),
    "ranks into the base": (*RANKS, "--method.name", "flora"),
    "half precision, all": ("--method.name", "flora", *HALF),
    "product memory": ("--method.name", "fedrot_svd", "--method.momentum", "0.5", "--method.feedback", "true"),
    "auto": ("--method.strength", "auto", "--method.factor", "joint"),
    "local, some": ("--method.name=local", *SOME),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(case: str, tiny_values: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = cut_and_resumed(tiny_values, tmp_path, *CASES[case])
    assert [record["round"] for record in whole["metrics"]] == [0, 1, 2, 3]
    assert resumed == whole


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (RANKS, ("--lora.ranks", '{"books": 2}'), r"lora\.ranks \{'books': 1\}, the recipe now has \{'books': 2\}"),
        (RANKS, (), r"lora\.ranks \{'books': 1\}, the recipe now has None"),
        ((), RANKS, r"lora\.ranks None, the recipe now has \{'books': 1\}"),
        (("--server.optimizer", "adam"), (), r"server\.optimizer 'adam', the recipe now has 'none'"),
        (("--local.scaffold", "true"), (), r"local\.scaffold True, the recipe now has False"),
        ((), ("--method.strength", "auto"), r"method\.strength 0\.4, the recipe now has 'auto'"),
    ],
)
def test_what_a_run_was_started_with_stays(
    first: tuple[str, ...], then: tuple[str, ...], message: str, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(parse_recipe(tiny_values, first))
    folder.close()
    with pytest.raises(RunError, match=message) as caught:
        go(tiny_values, tmp_path / "run", *then, resume=True)
    assert "\n" not in str(caught.value)
