"""`fedrot run RECIPE [--out DIR] [--resume] [--rounds 5 --method.name fedit ...]`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedrot.app.cli.advice import RESUME, advising
from fedrot.app.cli.parser import CommandParser
from fedrot.core.errors import FedrotError

if TYPE_CHECKING:
    from fedrot.running.folder import RunFolder
    from fedrot.running.recipe import Recipe
    from fedrot.running.rounds import Watcher

ENGINES = ("embedded", "flower-ray")

DESCRIPTION = """\
Run a federated fine-tuning recipe: a file, or one that comes with fedrot (see fedrot recipes). Every key of the recipe
is an option too: --local.lr 0.01 wins over the file.
Settings of the method are shown for fedrot; --method.name NAME --help shows those of another."""


@dataclass(frozen=True)
class Call:
    """What `fedrot run` was asked to do."""

    recipe: Path
    out: Path | None
    resume: bool
    small: bool
    engine: str
    cpus: int
    gpus: float
    flags: list[str]  # recipe keys
    own: list[str]  # the command's own options


def read_call(words: Sequence[str]) -> Call:
    """Split the command's own options from the recipe's keys."""
    if not words or words[0].startswith("-"):
        raise FedrotError("give the recipe first: fedrot run RECIPE [options] (see fedrot recipes, fedrot run --help)")
    parser = CommandParser(prog="fedrot run", add_help=False)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0])
    parser.add_argument("--ray.cpus", type=int, default=1, dest="cpus")
    parser.add_argument("--ray.gpus", type=float, default=0.0, dest="gpus")
    own, flags = parser.parse_known_args(list(words[1:]))
    if own.engine == ENGINES[0] and (own.cpus, own.gpus) != (1, 0.0):
        raise FedrotError(f"--ray.cpus and --ray.gpus are for --engine {ENGINES[1]}")
    if own.cpus < 1 or not 0 <= own.gpus < float("inf"):
        raise FedrotError("--ray.cpus must be at least 1, --ray.gpus at least 0")
    return Call(Path(words[0]), **vars(own), flags=flags, own=parser.own)


def show_help(words: Sequence[str]) -> None:
    """Help for all keys, with the settings of the method that is named, or of the default one."""
    from fedrot.core.methods import get_method
    from fedrot.core.methods.rotation import FedRot
    from fedrot.running.recipe_file import method_named, recipe_parser

    parser = recipe_parser(get_method(method_named(words) or FedRot.name), prog="fedrot run", description=DESCRIPTION)
    parser.usage = "fedrot run RECIPE [--out DIR] [--resume] [--small] [--KEY VALUE ...]"
    own = parser.add_argument_group("the command's own options")
    own.add_argument("--out", help="the run folder (default: runs/NAME)")
    own.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    own.add_argument("--small", action="store_true", help="the reduced run that the recipe describes under small:")
    own.add_argument(
        "--engine",
        choices=ENGINES,
        help="flower-ray: clients are nodes of Flower's simulation, on a Ray cluster (RAY_ADDRESS) or this machine's",
    )
    own.add_argument("--ray.cpus", type=int, help="CPUs that Ray keeps for a client that trains (default: 1)")
    own.add_argument("--ray.gpus", type=float, help="GPUs likewise; 0.5: two clients share one (default: 0)")
    parser.print_help()


def main(words: Sequence[str]) -> int:
    """Run a recipe, then write its report."""
    if "-h" in words or "--help" in words:
        show_help(words)
        return 0
    call = read_call(words)
    from fedrot.app.progress import make_watcher
    from fedrot.running.recipe_file import read_recipe
    from fedrot.running.run import run

    recipe = read_recipe(call.recipe, call.flags, call.small, call.own)
    out = call.out or Path("runs") / recipe.name
    with advising(RESUME, out / "recipe.yaml"):
        with make_watcher() as watcher:
            if call.engine == ENGINES[1]:
                folder = _on_ray(recipe, out, watcher, call)
            else:
                folder = run(recipe, out, watcher, resume=call.resume)
        conclude(folder)
    return 0


def _on_ray(recipe: "Recipe", out: Path, watcher: "Watcher", call: Call) -> "RunFolder":
    from fedrot.running.flower.tether import environment

    os.environ.update({**environment(out / "flower"), "RAY_USAGE_STATS_ENABLED": "0"})  # before they are imported
    from fedrot.running.flower.simulated import Share, run_on_ray

    return run_on_ray(recipe, out, watcher, call.resume, Share(call.cpus, call.gpus))


def conclude(folder: "RunFolder") -> None:
    """Write the report of a run that is over, and print what came of it."""
    from fedrot.app.report.build import build_report

    report, recipe = build_report([folder.path], folder.path), folder.recipe()
    result = folder.read_json("result.json")
    if recipe.evaluation.choose == "best":
        print(f"round {result['round']} of {recipe.rounds} scored best on {recipe.evaluation.split}")
    if private := result.get("privacy"):
        epsilon = "infinite" if private["epsilon"] is None else f"{private['epsilon']:.3g}"
        ended = f", where privacy.budget ended the run of {recipe.rounds}" if private["stopped"] else ""
        print(f"epsilon {epsilon} at delta {private['delta']:g}  (after {private['rounds']} rounds{ended})")
    if scores := result.get("final") or result.get("evaluation"):
        name = scores["metric"].replace("_", " ")
        print(f"{scores['split']} {name} {scores[scores['metric']]:.4f}  ({scores['examples']} examples)")
    if answers := result.get("answers"):
        interval = f"[{answers['low']:.4f}, {answers['high']:.4f}]"
        problems = f"{answers['examples']} problems, {answers['unparsed']:.1%} without an answer"
        print(f"{answers['split']} exact match {answers['exact_match']:.4f} {interval}  ({problems})")
    print(f"adapter  {folder.adapter}")
    print(f"report   {report}")
