"""`fedrot eval ADAPTER [--recipe RECIPE.yaml] [--split test]`."""

import json
from collections.abc import Sequence
from pathlib import Path

from fedrot.app.cli.parser import CommandParser
from fedrot.core.errors import FedrotError


def main(words: Sequence[str]) -> int:
    """Score an adapter and print the scores."""
    parser = CommandParser(
        prog="fedrot eval",
        description="Score a PEFT adapter on a recipe's data. Keys of the recipe can be given as options too.",
    )
    parser.add_argument("adapter", type=Path, help="an adapter folder, or a run folder for its result")
    parser.add_argument("--recipe", type=Path, help="model and data (default: the recipe of the adapter's run folder)")
    parser.add_argument(
        "--split", help="the split to score (default: the recipe's final split, or the one of its rounds)"
    )
    parser.add_argument("--limit", type=int, help="score a fixed subset of this many examples (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    call, flags = parser.parse_known_args(list(words))
    from fedrot.running.folder import RunFolder
    from fedrot.running.recipe_file import parse_recipe, read_recipe
    from fedrot.running.score import score_adapter

    adapter: Path = call.adapter
    if (adapter / "versions.json").exists():
        adapter = adapter / "adapter"
    if call.recipe is not None:
        recipe = read_recipe(call.recipe, flags)
    elif (home := _home(adapter)) is not None:
        recipe = parse_recipe(RunFolder(home).recipe().to_dict(), flags, source=str(home / "recipe.yaml"))
    else:
        raise FedrotError(f"{adapter}: not in a run folder; say by --recipe which model and data to score it with")
    scores = score_adapter(adapter, recipe, call.split, call.limit).record()
    if call.json:
        print(json.dumps(scores))
        return 0
    print(f"{scores['split']}  {scores['examples']} examples")
    for key, value in scores.items():
        if isinstance(value, float):
            print(f"{key:<14} {value:.4f}")
    by_client = scores["by_client"]
    if isinstance(by_client, dict):
        for client, score in by_client.items():
            print(f"  {client:<20} {score:.4f}")
    return 0


def _home(adapter: Path) -> Path | None:
    """The run folder that the adapter lies in: RUN/adapter, or RUN/clients/NUMBER."""
    near = list(adapter.absolute().parents)[:2]
    return next((folder for folder in near if (folder / "versions.json").exists()), None)
