"""Scoring an adapter from disk on the data of a recipe: `fedrot eval`."""

from dataclasses import replace
from pathlib import Path

from fedrot.core.adapter import Adapter
from fedrot.core.errors import RunError
from fedrot.learning.evaluation import Evaluation, How, chosen_rows, evaluate
from fedrot.running.prepare import prepare
from fedrot.running.recipe import Recipe
from fedrot.running.workers import Workers


def score_adapter(path: Path, recipe: Recipe, split: str | None, limit: int | None = None) -> Evaluation:
    """Score the PEFT adapter in `path` on a split of the recipe's data, in all and by client; on at most `limit` rows.

    Raises `FedrotError` where the adapter does not fit the recipe's model or the split is not there.
    """
    if recipe.lora.head == "personal":
        raise RunError(
            f"{path}: the run's heads are personal, so no one adapter has its scores: result.json does; to score one "
            "client's adapter, give its folder below clients/ with --lora.head shared"
        )
    if limit is not None and limit < 1:
        raise RunError(f"--limit must be at least 1, got {limit}")
    adapter = Adapter.load(path)
    chosen = split or recipe.evaluation.final or recipe.evaluation.split
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, split=chosen, final=None))
    ready = prepare(recipe)
    data, settings = ready.encoded[chosen], recipe.evaluation
    rows = chosen_rows(len(data), limit, recipe.seed, chosen)
    return evaluate(
        Workers(ready.model, ready.recipe.compute).map,
        {"": ready.model.fit(adapter, where=str(path), any_rank=True)},
        data,
        chosen,
        ready.partition.indices[chosen],
        rows,
        How(settings.batch, ready.recipe.local.precision, bool(ready.recipe.compute.packing)),
    )
