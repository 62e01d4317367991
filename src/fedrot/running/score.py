"""Scoring an adapter from disk, on a recipe's data or on problems that a language model answers: `fedrot eval`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedrot.core.adapter import Adapter
from fedrot.core.errors import RunError
from fedrot.learning.capacity import available_threads
from fedrot.learning.evaluation import Evaluation, How, chosen_rows, evaluate
from fedrot.learning.fetch import fetched
from fedrot.learning.generation import prompt_room, warn_of_cut
from fedrot.learning.loading import load_model
from fedrot.learning.tasks.answers import by_answers
from fedrot.running.choices import for_machine
from fedrot.running.prepare import prepare, problems
from fedrot.running.recipe import Recipe
from fedrot.running.workers import Workers


def score_adapter(
    path: Path, recipe: Recipe, split: str | None, limit: int | None = None, answers: bool = False
) -> Evaluation:
    """Score the PEFT adapter in `path` on a split of the recipe's data, in all and by client; on at most `limit` rows.
    With `answers`, by what the model writes, as `evaluation.answers` says.

    Raises `FedrotError` where the adapter does not fit the recipe's model or the split is not there.
    """
    if recipe.lora.head == "personal":
        raise RunError(
            f"{path}: the run's heads are personal, so no one adapter has its scores: result.json does; to score one "
            "client's adapter, give its folder below clients/ with --lora.head shared"
        )
    _check_limit(limit)
    adapter = Adapter.load(path)
    chosen = split or recipe.evaluation.final or recipe.evaluation.split
    settings = replace(recipe.evaluation, split=chosen, final=None, every=1)
    recipe = replace(recipe, evaluation=settings if answers else replace(settings, answers="none", shots=0))
    ready = prepare(recipe)
    data, precision = ready.encoded[chosen], ready.recipe.local.precision
    rows = chosen_rows(len(data), limit, recipe.seed, chosen)
    how = How(settings.batch, precision, bool(ready.recipe.compute.packing))
    scored = None
    if answers:
        scored = by_answers(problems(recipe, ready.dataset, chosen), how)
    found = evaluate(
        Workers(ready.model, ready.recipe.compute).map,
        {"": ready.model.fit(adapter, where=str(path), any_rank=True)},
        data,
        chosen,
        ready.partition.indices[chosen],
        rows,
        how,
        scored,
    )
    if answers:
        warn_of_cut(round(found.scores["cut"] * found.examples), found.examples)
    return found


def gsm8k_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values with GSM8K's test problems as its data, whatever it was trained on."""
    values = recipe.to_dict()
    longest = max(512, recipe.data.max_length)
    values["data"] = {"source": "gsm8k", "max_length": longest, "template": recipe.data.form}
    values["partition"] = {"kind": "iid", "clients": 1}
    values["evaluation"] |= {"split": "test", "final": None, "answers": "number"}
    return values


def score_programs(
    path: Path, recipe: Recipe, problems: Path | None, limit: int | None, say: Callable[[str], None]
) -> dict[str, object]:
    """pass@1 of the adapter in `path` on HumanEval's problems, in `problems` or as fetched; runs generated code.

    Raises `FedrotError` where programs cannot be contained on this machine, or the model has no place for a prompt
    beside `evaluation.tokens`, before anything slow is done.
    """
    from fedrot.learning.sandbox import SandboxUnavailable, available
    from fedrot.learning.tasks.programs import completions, pass_at_1, read_problems

    _check_limit(limit)
    if (reason := available()) is not None:
        raise SandboxUnavailable(f"generated programs are not run: there is no sandbox here ({reason})")
    asked = read_problems(problems or fetched("humaneval"))
    asked = [asked[i] for i in chosen_rows(len(asked), limit, recipe.seed, "humaneval")]
    adapter = Adapter.load(path)
    recipe = for_machine(recipe)
    model = load_model(recipe.model, recipe.lora, (), recipe.seed)
    prompt_room(model, recipe.evaluation.tokens)
    model.write(model.fit(adapter, where=str(path), any_rank=True))
    say(f"writing {len(asked)} programs")
    settings = recipe.evaluation
    written = completions(model, asked, settings.tokens, settings.batch, recipe.local.precision)
    say(f"running {len(asked)} programs")
    return pass_at_1(asked, written, workers=available_threads()).record()


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise RunError(f"--limit must be at least 1, got {limit}")
