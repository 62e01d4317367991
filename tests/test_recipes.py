"""Every recipe in recipes/ reads, and runs at reduced size."""

from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))
SMALL = ["--rounds", "2", "--local.steps", "1", "--local.batch", "4", "--evaluation.limit", "40", "--data.limit", "200"]


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_at_reduced_size(path: Path, tmp_path: Path) -> None:
    from fedrot.app.cli.main import main
    from fedrot.learning.fetch import fetch
    from fedrot.running.folder import RunFolder
    from fedrot.running.recipe_file import read_recipe

    recipe = read_recipe(path)
    if recipe.data.source == "vader":
        fetch("vader")
    if recipe.model.path.startswith("fetch:"):
        fetch(recipe.model.path.removeprefix("fetch:"))
    made_up = ["--data.generated", "400"] if recipe.data.source in ("glue", "gsm8k") else []
    answers = ["--evaluation.problems", "2", "--evaluation.tokens", "8"]
    flags = [*SMALL, *made_up, *answers, "--evaluation.final", "null"]
    assert main(["run", str(path), "--out", str(tmp_path / "run"), *flags]) == 0
    folder = RunFolder(tmp_path / "run")
    assert len(folder.metrics()) == 2
    assert (folder.path / "report.html").stat().st_size > 100_000
    result = folder.read_json("result.json")
    assert 20 <= result["evaluation"]["examples"] <= 40
    if recipe.evaluation.answers != "none":
        assert result["answers"]["examples"] == 2
