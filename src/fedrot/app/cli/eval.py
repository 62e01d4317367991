"""`fedrot eval ADAPTER [--recipe RECIPE.yaml] [--split test]`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedrot.app.cli.parser import CommandParser
from fedrot.core.errors import FedrotError

if TYPE_CHECKING:
    from fedrot.running.recipe import Recipe


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
    parser.add_argument(
        "--task",
        choices=("gsm8k", "humaneval"),
        help="problems to answer in place of the recipe's data: gsm8k, exact match on its test split (in --data.path); "
        "humaneval, pass@1 (in --data.path, or as fetched)",
    )
    parser.add_argument(
        "--run-generated-code",
        action="store_true",
        help="needed for humaneval: run the programs that the model writes, each in a sandbox",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    call, flags = parser.parse_known_args(list(words))
    from fedrot.running.recipe_file import parse_recipe
    from fedrot.running.score import gsm8k_values, score_adapter, score_programs

    adapter: Path = call.adapter
    if (adapter / "versions.json").exists():
        adapter = adapter / "adapter"
    if call.task == "humaneval":
        if not call.run_generated_code:
            raise FedrotError("humaneval runs programs that the model writes: say so by --run-generated-code")
        problems, flags = _data_path(flags)
        recipe = _recipe(adapter, call.recipe, flags, parser.own)
        scores = score_programs(adapter, recipe, problems, call.limit, lambda text: print(text, file=sys.stderr))
    elif call.task == "gsm8k":
        recipe = parse_recipe(gsm8k_values(_recipe(adapter, call.recipe)), flags, "gsm8k", parser.own)
        scores = score_adapter(adapter, recipe, call.split, call.limit, answers=True).record()
    else:
        recipe = _recipe(adapter, call.recipe, flags, parser.own)
        scores = score_adapter(adapter, recipe, call.split, call.limit).record()
    if call.json:
        print(json.dumps(scores))
        return 0
    print(f"{scores['split']}  {scores['examples']} examples")
    for key, value in scores.items():
        if isinstance(value, float):
            print(f"{key:<14} {value:.4f}")
        elif isinstance(value, int) and key != "examples":
            print(f"{key:<14} {value}")
    by_client = scores.get("by_client")
    if isinstance(by_client, dict):
        for client, score in by_client.items():
            print(f"  {client:<20} {score:.4f}")
    return 0


def _recipe(adapter: Path, path: Path | None, flags: Sequence[str] = (), own: Sequence[str] = ()) -> "Recipe":
    """The recipe that was named, or that of the adapter's run folder."""
    from fedrot.running.folder import RunFolder
    from fedrot.running.recipe_file import parse_recipe, read_recipe

    if path is not None:
        return read_recipe(path, flags, own=own)
    if (home := _home(adapter)) is not None:
        return parse_recipe(RunFolder(home).recipe().to_dict(), flags, str(home / "recipe.yaml"), own)
    raise FedrotError(f"{adapter}: not in a run folder; say by --recipe which model and data to score it with")


def _data_path(flags: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The value of --data.path, which is where the problems are and not the recipe's data, and the other flags."""
    parser = CommandParser(prog="fedrot eval", add_help=False)
    parser.add_argument("--data.path", dest="path", type=Path)
    call, rest = parser.parse_known_args(list(flags))
    return call.path, rest


def _home(adapter: Path) -> Path | None:
    """The run folder that the adapter lies in: RUN/adapter, or RUN/clients/NUMBER."""
    near = list(adapter.absolute().parents)[:2]
    return next((folder for folder in near if (folder / "versions.json").exists()), None)
