"""What a report is made of: the files of run folders, read once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedrot.app.live.summary import expected_sites
from fedrot.core.errors import RunError
from fedrot.running.folder import RunFolder
from fedrot.running.network.journal import Exchange, read_exchanges
from fedrot.running.recipe import Recipe


@dataclass(frozen=True)
class RunData:
    """A run folder's content, and the name it goes by in the report."""

    label: str
    path: Path
    recipe: Recipe
    metrics: list[dict[str, Any]]
    partition: dict[str, Any]
    result: dict[str, Any]  # empty where the run has not finished
    versions: dict[str, Any]
    exchanges: list[Exchange] = field(default_factory=list)  # none in a simulation
    sites: list[str] = field(default_factory=list)  # the clients that were expected

    def series(self, pick: Callable[[dict[str, Any]], Any]) -> tuple[list[int], list[float]]:
        """(rounds, values) for the rounds in which `pick` finds a value."""
        found = [(record["round"], value) for record in self.metrics if (value := _try(pick, record)) is not None]
        return [r for r, _ in found], [v for _, v in found]

    @property
    def scores(self) -> dict[str, Any]:
        """The scores that count, as `scores_that_count` finds them."""
        return scores_that_count(self.result, self.metrics)

    @property
    def round(self) -> int:
        """The round whose adapter has these scores."""
        scored = [record["round"] for record in self.metrics if "evaluation" in record]
        return int(self.result.get("round", scored[-1] if scored else self.metrics[-1]["round"]))


def scores_that_count(result: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A run's answers, or its final scores, or those of the round that gave the result; of a run that has not finished,
    those of the last round that was scored. Empty where nothing was scored.
    """
    return result.get("answers") or result.get("final") or result.get("evaluation") or last_in_rounds(metrics)


def last_in_rounds(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The scores of the last round that was scored; empty where none was."""
    return next((record["evaluation"] for record in reversed(metrics) if "evaluation" in record), {})


def _try(pick: Callable[[dict[str, Any]], Any], record: dict[str, Any]) -> Any:
    try:
        return pick(record)
    except (KeyError, TypeError):
        return None


def load_runs(paths: Sequence[Path]) -> list[RunData]:
    """Read run folders; `RunError` naming one that holds no finished round."""
    runs = []
    for path in paths:
        folder = RunFolder(path)
        recipe = folder.recipe()
        metrics = folder.metrics()
        if not metrics:
            raise RunError(f"{path}: no round has finished yet, there is nothing to report")
        runs.append(
            RunData(
                label=_label(recipe),
                path=path,
                recipe=recipe,
                metrics=metrics,
                partition=folder.read_json("partition.json") or {},
                result=folder.read_json("result.json") or {},
                versions=folder.read_json("versions.json") or {},
                exchanges=read_exchanges(path),
                sites=expected_sites(folder) or [],
            )
        )
    return _distinct(runs)


def _label(recipe: Recipe) -> str:
    settings = recipe.method.settings()
    return recipe.method.name + (f" {settings['strength']}" if "strength" in settings else "")


def _distinct(runs: list[RunData]) -> list[RunData]:
    """Runs of one method and strength are told apart by the ends of their paths, as long as it takes."""
    labels = [run.label for run in runs]
    parts = [run.path.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        if len(set(labels)) == len(labels):
            break
        labels = [f"{run.label} ({Path(*own[-length:])})" for run, own in zip(runs, parts, strict=True)]
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]
