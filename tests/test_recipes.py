"""Every recipe that comes with fedrot reads, whole and small, and runs for a round at reduced size."""

from pathlib import Path

import pytest

from fedrot.core.errors import RecipeError
from fedrot.running.recipe_file import read_recipe
from fedrot.running.recipe_library import FOLDER, recipes

NAMES = sorted(recipes())
TINY = [
    "--rounds",
    "1",
    "--local.steps",
    "1",
    "--local.batch",
    "4",
    "--evaluation.limit",
    "20",
]
SHORT = ["--evaluation.problems", "2", "--evaluation.tokens", "8", "--evaluation.final", "null"]
PAPER = {f"paper/table1-{task}-{n}" for task in ("sst2", "qnli", "qqp", "rte", "mnli") for n in (3, 10, 50)}


def test_the_paper_s_settings_are_there() -> None:
    others = {"paper/generation-gsm8k", "paper/generation-humaneval", "paper/ranks-mnli", "study/trec"}
    assert set(NAMES) >= PAPER | others | {"vader", "gsm8k"}
    assert all(recipes().values()), "each begins with a comment that says what it is"
    for name in PAPER:
        recipe = read_recipe(Path(name))
        task, clients = name.removeprefix("paper/table1-").split("-")
        assert (recipe.data.name, recipe.partition.clients, recipe.name) == (task, int(clients), Path(name).name)
        assert (recipe.lora.rank, recipe.lora.scale(4), recipe.local.batch, recipe.local.steps) == (4, 2.0, 128, 20)
        assert (recipe.rounds, recipe.partition.concentration) == (250, 0.5)


def prepared(name: str) -> list[str]:
    """The command that runs a recipe for a round at reduced size, its model and data being there."""
    from fedrot.learning.fetch import fetch

    recipe = read_recipe(Path(name), small=True)
    if recipe.data.source == "vader":
        fetch("vader")
    assert recipe.model.path.startswith("fetch:")
    fetch(recipe.model.path.removeprefix("fetch:"))
    many = recipe.partition.clients is not None and recipe.partition.clients > 10
    made_up = ["--data.generated", "1000" if many else "300"] if recipe.data.generated is not None else []
    return [name, "--small", *TINY, *SHORT, *made_up]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_for_a_round_at_reduced_size(name: str, tmp_path: Path) -> None:
    from fedrot.app.cli.run import read_call
    from fedrot.app.progress import make_watcher
    from fedrot.running.run import run

    call = read_call(prepared(name))
    recipe = read_recipe(call.recipe, call.flags, call.small)
    with make_watcher() as watcher:
        folder = run(recipe, tmp_path / "run", watcher)
    assert len(folder.metrics()) == 1
    result = folder.read_json("result.json")
    assert result["evaluation"]["examples"] == 20
    assert ("answers" in result) == (recipe.evaluation.answers != "none")


@pytest.mark.parametrize(("name", "made_up"), [("paper/table1-mnli-10", True), ("vader", False)])
def test_a_report_says_whether_examples_are_made_up(name: str, made_up: bool, tmp_path: Path) -> None:
    from fedrot.app.cli.main import main

    assert main(["run", *prepared(name), "--out", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert len(page) > 100_000
    assert ("are made up" in page) == made_up


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


BASE = "data: {train: x.csv}\npartition: {clients: 2}\nlocal: {steps: 1, lr: 0.1}\nlora: {targets: [a, b]}\n"


def test_a_recipe_extends_another_section_by_section(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", BASE + "small: {rounds: 2, local: {lr: 0.5}}\n")
    path = write(tmp_path, "mine.yaml", "extends: base.yaml\nname: mine\nlocal: {steps: 7}\nlora: {targets: [c]}\n")
    found = read_recipe(path)
    assert (found.local.steps, found.local.lr, found.lora.targets, found.rounds) == (7, 0.1, ["c"], 10)
    small = read_recipe(path, small=True)
    assert (small.name, small.rounds, small.local.lr, small.local.steps) == ("mine-small", 2, 0.5, 7)
    assert read_recipe(path, ["--rounds", "3"], small=True).rounds == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nowhere.yaml", "nowhere.yaml: no such recipe file"),
        ("extends: mine.yaml", "extends this file in turn"),
        ("extends: base.yaml", "--small"),
    ],
)
def test_what_cannot_be_composed_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, "base.yaml", BASE)
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(tmp_path, "mine.yaml", text), small=True)


def test_a_name_that_is_nearly_right_is_told_the_right_one() -> None:
    with pytest.raises(RecipeError, match=r"did you mean .*paper/table1-mnli-10"):
        read_recipe(Path("paper/table1-mnli-1O"))


def test_recipes_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from fedrot.app.cli.main import main

    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out.splitlines() for name in NAMES)
    assert str(FOLDER) in out
    assert "_glue" not in out
