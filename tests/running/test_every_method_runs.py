"""Every registered method in a whole run: it resumes to the same bits and exports the model that was scored."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from fakes import Silent, go, outcome

from fedrot.core.methods import methods
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.run import run
from fedrot.running.score import score_adapter

METHODS = methods()


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_resumed_to_the_same_bits(name: str, tiny_values: dict[str, Any], tmp_path: Path) -> None:
    values = {**tiny_values, "method": {"name": name}, "checkpoint": {"keep": 9}}
    whole = go(values, tmp_path / "whole", "--rounds", "4")
    # As if the run had been killed after its second round.
    shutil.copytree(whole.path, tmp_path / "cut")
    for left in ("round-000003", "round-000004"):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / left)
    for left in ("adapter", "clients"):
        shutil.rmtree(tmp_path / "cut" / left, ignore_errors=True)
    (tmp_path / "cut" / "result.json").unlink()
    run(parse_recipe(values, ["--rounds", "4"]), tmp_path / "cut", Silent(), resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not m.capabilities.personal])
def test_the_exported_adapter_alone_has_the_reported_scores(
    name: str, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    folder = go({**tiny_values, "method": {"name": name}}, tmp_path / "run", "--rounds", "3")
    reported = folder.read_json("result.json")["final"]
    found = score_adapter(folder.adapter, folder.recipe(), "test").record()
    assert found["accuracy"] == reported["accuracy"]
    assert found["loss"] == pytest.approx(reported["loss"], rel=1e-5)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.capabilities.personal])
def test_personal_models_are_exported_by_client(name: str, tiny_values: dict[str, Any], tmp_path: Path) -> None:
    folder = go({**tiny_values, "method": {"name": name}}, tmp_path / "run", "--rounds", "3")
    reported = folder.read_json("result.json")["final"]
    assert reported["model"] == "personal"
    names = folder.read_json("clients/names.json")
    for number, client in names.items():
        scores = score_adapter(folder.path / "clients" / number, folder.recipe(), "test").record()
        assert scores["by_client"][client] == reported["by_client"][client]
