"""The round that scored best gives the result, where the recipe asks for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import go, outcome
from tiny_runs import assert_equal, cut_and_resumed

from fedrot.core.adapter import Adapter
from fedrot.core.errors import RecipeError
from fedrot.core.methods.base import Broadcast
from fedrot.learning.evaluation import Evaluation
from fedrot.running.checkpoint import load_latest, load_round
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.records import best_round
from fedrot.running.simulation import Simulation

BEST = ("--evaluation.choose", "best", "--evaluation.final", "test")
SIX = ("--rounds", "6")


def records(metric: str, *values: float | None) -> list[dict[str, Any]]:
    """A line a round; None: no evaluation."""
    scored = [{} if v is None else {"evaluation": {"metric": metric, metric: v}} for v in values]
    return [{"round": number, **one} for number, one in enumerate(scored)]


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("accuracy", (0.5, 0.9, 0.7), 1),
        ("accuracy", (0.5, 0.9, 0.9), 1),
        ("loss", (0.5, 0.9, 0.2, None), 2),
        ("loss", (float("nan"), 0.9, float("inf")), 1),
        ("exact_match", (None, None, 0.0), 2),
        ("loss", (float("nan"), None), None),
        ("accuracy", (), None),
    ],
)
def test_the_best_round_is_the_first_of_the_best_scores(
    metric: str, values: tuple[float | None, ...], best: int | None
) -> None:
    assert best_round(records(metric, *values)) == best


def test_a_score_that_was_not_finite_is_null_on_disk_and_never_the_best() -> None:
    lines = records("loss", 0.4, 0.3)
    lines[1]["evaluation"]["loss"] = None
    assert best_round(lines) == 0


@pytest.fixture
def worse_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores during a run are 0 from the fourth round on."""
    usual = Simulation.evaluate

    def evaluate(engine: Simulation, broadcast: Broadcast, split: str, limit: int | None = None) -> Evaluation:
        found = usual(engine, broadcast, split, limit)
        spoiled = {**found.scores, found.metric: 0.0}
        return replace(found, scores=spoiled) if split == "validation" and broadcast.round > 3 else found

    monkeypatch.setattr(Simulation, "evaluate", evaluate)


@pytest.mark.usefixtures("worse_later")
@pytest.mark.parametrize("method", ["fedrot", "fedsa", "flora"])
def test_the_result_is_that_round_s_adapter(method: str, tiny_values: dict[str, Any], tmp_path: Path) -> None:
    flags = (*SIX, "--method.name", method, *BEST)
    chosen = go({**tiny_values, "checkpoint": {"keep": 1}}, tmp_path / "best", *flags)
    best = best_round(chosen.metrics())
    assert best in (0, 1, 2)
    # A run that ends there has the same adapters and scores.
    short = go(tiny_values, tmp_path / "short", *flags, "--rounds", str(best + 1), "--evaluation.choose", "last")
    mine, other = (outcome(folder.path) for folder in (chosen, short))
    assert mine["result"] == {**other["result"], "rounds": 6}
    assert mine["result"]["round"] == best
    for path in [p.relative_to(short.path) for p in short.path.rglob("adapter_model.safetensors")]:
        assert (chosen.path / path).read_bytes() == (short.path / path).read_bytes()
    # What a run goes on from is the last round still.
    latest = load_latest(chosen.checkpoints)
    assert latest is not None
    assert latest.rounds == 6
    kept = {path.name for path in chosen.checkpoints.iterdir()}
    assert kept == {"round-000006", f"round-{best + 1:06d}"}


def test_without_it_the_last_round_gives_the_result(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    folder = go(tiny_values, tmp_path / "run", *SIX)
    assert folder.read_json("result.json")["round"] == 5
    last = load_round(folder.checkpoints, 6).server.broadcast.adapter
    assert_equal(Adapter.load(folder.adapter), last.map(lambda t: t.to(torch.float32)))


@pytest.mark.usefixtures("worse_later")
def test_a_run_that_was_killed_chooses_the_same_round(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = cut_and_resumed(tiny_values, tmp_path, *SIX, "--rounds", "4", *BEST)
    assert resumed == whole


def test_a_split_is_not_both_chosen_by_and_reported(tiny_values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"evaluation\.choose: the best round on 'validation'.*evaluation\.final"):
        parse_recipe(tiny_values, ["--evaluation.choose=best", "--evaluation.final=validation"])
