"""`fedrot merge A B ... --method fedrot --reference BASE --out MERGED`."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrot.app.cli.parser import CommandParser
from fedrot.core.errors import FedrotError, RecipeError, choices

if TYPE_CHECKING:
    from fedrot.core.adapter import Adapter
    from fedrot.core.aggregate import Combined

DESCRIPTION = """\
Make one PEFT adapter of several, by any method that needs no training round (see fedrot methods), or by one of PEFT's
own combinations: peft_linear, peft_svd, peft_ties, peft_dare_linear, peft_dare_ties. Settings of the method are
options too, e.g. --strength 1 --factor A. Says what was lost of the adapters' weighted sum. A method that changes the
base model gives the change back as extra rank, so that the merged adapter alone is the model."""


def main(words: Sequence[str]) -> int:
    """Merge, save, and say what it cost."""
    parser = CommandParser(prog="fedrot merge", description=DESCRIPTION)
    parser.add_argument(
        "adapters", nargs="+", type=Path, metavar="ADAPTER", help="PEFT adapter folders, or run folders"
    )
    parser.add_argument("--out", type=Path, help="folder of the merged adapter")
    parser.add_argument("--method", default="fedrot_svd", help="the method (default: fedrot_svd)")
    parser.add_argument("--weights", help="a number an adapter, with commas between (default: all alike)")
    parser.add_argument("--reference", type=Path, help="the adapter that all were trained from, for methods that align")
    parser.add_argument("--density", type=float, default=0.5, help="share of values that TIES and DARE keep")
    parser.add_argument("--seed", type=int, default=0, help="seed of DARE's random choice")
    parser.add_argument(
        "--compare", action="store_true", help="print the error of every method that fits; write nothing"
    )
    parser.add_argument(
        "--into-base", action="store_true", help="write the base model with the one adapter merged into its weights"
    )
    parser.add_argument("--base", help="the base model, for --into-base (default: the one that the adapter names)")
    call, rest = parser.parse_known_args(list(words))
    if call.base and not call.into_base:
        raise FedrotError("--base is for --into-base")
    if not call.compare and call.out is None:
        raise FedrotError("give the folder of the merged adapter by --out")
    if call.into_base:
        return _into_base(call.adapters, call.out, call.base, rest)
    adapters = [_load(path) for path in call.adapters]
    weights = _weights(call.weights, call.adapters)
    reference = None if call.reference is None else _load(call.reference)
    if call.compare:
        if rest:
            raise FedrotError(f"{rest[0]}: settings are for one method, --compare shows every method with its defaults")
        return _compare(adapters, weights, reference, call.density, call.seed)
    _refuse_existing(call.out)
    made = _merge(call.method, adapters, weights, reference, _settings(call.method, rest), call.density, call.seed)
    made.adapter.save(call.out)
    print(_words(made))
    print(f"adapter  {call.out}")
    return 0


def _into_base(paths: Sequence[Path], out: Path | None, base: str | None, rest: Sequence[str]) -> int:
    if len(paths) != 1 or rest:
        raise FedrotError("--into-base takes one adapter and no settings of a method; merge several into one first")
    if out is None:
        raise FedrotError("give the folder of the merged model by --out")
    from fedrot.learning.into_base import merge_into_base

    _refuse_existing(out)
    merge_into_base(_folder(paths[0]), out, base)
    print(f"model  {out}")
    return 0


def _refuse_existing(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FedrotError(f"{out}: is there already; choose another folder by --out")


def _folder(path: Path) -> Path:
    """The adapter's folder, also of a run's folder."""
    return path / "adapter" if (path / "versions.json").exists() else path


def _load(path: Path) -> "Adapter":
    from fedrot.core.adapter import Adapter

    return Adapter.load(_folder(path))


def _weights(text: str | None, paths: Sequence[Path]) -> list[float] | None:
    if text is None:
        return None
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError:
        raise FedrotError(f"--weights must be numbers with commas between, got {text!r}") from None
    if len(weights) != len(paths):
        raise FedrotError(f"--weights has {len(weights)} numbers for {len(paths)} adapters")
    return weights


def _settings(method: str, words: Sequence[str]) -> dict[str, Any]:
    """The method's own settings from the words that are left, typed as its fields are."""
    from jsonargparse import ArgumentError, ArgumentParser

    from fedrot.core.methods import get_method
    from fedrot.learning.peft_merge import COMBINATIONS
    from fedrot.running.recipe_file import explain

    if method in COMBINATIONS:
        if words:
            raise FedrotError(f"{words[0]}: {method} has no such setting")
        return {}
    kind = get_method(method)
    parser = ArgumentParser(exit_on_error=False, default_env=False, allow_abbrev=False)
    parser.add_class_arguments(kind, "method")
    known = [f"--{f.name}" for f in fields(kind)]
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in known:
            raise RecipeError(f"{word}: {method} has no such setting; it has {choices(known) or 'none'}")
    try:
        flags = [f"--method.{word.removeprefix('--')}" if word.startswith("--") else word for word in words]
        parsed = parser.parse_args(flags).as_dict().get("method", {})
    except ArgumentError as problem:
        raise RecipeError(explain(str(problem), kind)) from None
    given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    return {key: value for key, value in parsed.items() if key in given}


def _merge(
    method: str,
    adapters: Sequence["Adapter"],
    weights: Sequence[float] | None,
    reference: "Adapter | None",
    settings: dict[str, Any],
    density: float,
    seed: int,
) -> "Combined":
    from fedrot.core.aggregate import Combined, alike, combine, errors_of
    from fedrot.learning.peft_merge import COMBINATIONS, peft_combination

    if method not in COMBINATIONS:
        return combine(adapters, weights, method, reference, **settings)
    shares = [1.0] * len(adapters) if weights is None else weights
    adapter = peft_combination(adapters, shares, method, density, seed)
    return Combined(adapter, errors_of(alike(adapters), shares, adapter))


def _words(made: "Combined") -> str:
    found = made.errors.totals()
    ranks = sorted({pair.rank for pair in made.adapter.layers.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return (
        f"error {found['sent_relative']:.2%} of the weighted sum of the updates; averaging the factors as they are: "
        f"{found['before_relative']:.2%}; the best adapter of the parts' rank: {found['floor_relative']:.2%}; "
        f"the merged adapter has {rank}"
    )


def _compare(
    adapters: Sequence["Adapter"],
    weights: Sequence[float] | None,
    reference: "Adapter | None",
    density: float,
    seed: int,
) -> int:
    from fedrot.core.methods import methods
    from fedrot.learning.peft_merge import COMBINATIONS

    names = [n for n, m in methods().items() if m.capabilities.standalone and not m.capabilities.control]
    print(f"{'method':<18}  {'error':>9}  {'rank':>5}")
    found: dict[str, float] = {}
    for name in (*names, *COMBINATIONS):
        if reference is None and name in methods() and methods()[name].needs_reference:
            print(f"{name:<18}  {'needs --reference':>9}")
            continue
        made = _merge(name, adapters, weights, reference, {}, density, seed)
        found = {key: float(value) for key, value in made.errors.totals().items()}
        rank = max(pair.rank for pair in made.adapter.layers.values())
        print(f"{name:<18}  {found['sent_relative']:>9.3%}  {rank:>5}")
    print(f"{'the floor':<18}  {found['floor_relative']:>9.3%}  the best adapter of the parts' rank")
    return 0
