"""What a comparison runs: every method (and swept value) with every seed, each in a folder of its own."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from fedrot.core.errors import RecipeError, RunError
from fedrot.core.methods import get_method
from fedrot.running.choices import adopted
from fedrot.running.folder import RunFolder
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import changed_key, read_recipe

# Keys that a comparison sets itself, and by what it is told them.
_OWN = {"seed": "--seeds", "method.name": "--methods", "method": "--methods"}


@dataclass(frozen=True)
class Variant:
    """A row of the table: a method with its settings, and the swept values."""

    method: str  # its name with its settings
    flags: tuple[str, ...]
    swept: Mapping[str, str]  # key -> value, as given
    setting: str = ""  # the swept values of keys that are not the method's: rows of one setting are compared

    @property
    def label(self) -> str:
        """What the row is called."""
        return f"{self.method} {self.setting}".strip()

    @property
    def folder(self) -> str:
        """The label as a folder's name."""
        return re.sub(r"[^\w.=+-]+", "_", self.label)


@dataclass(frozen=True)
class Planned:
    """One run."""

    variant: Variant
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def done(self) -> bool:
        """The run has finished."""
        return (self.folder / "result.json").exists()

    @property
    def started(self) -> bool:
        """The run is there, finished or not."""
        return (self.folder / "recipe.yaml").exists()


def read_variants(methods: str, sweeps: Sequence[str]) -> list[Variant]:
    """`methods` is 'fedit,fedrot,fedrot:factor=joint:strength=1'; a sweep is 'method.strength=0,.2,.4' or of any other
    key. A sweep of a setting that a method does not have leaves that method as one row.

    Raises `RecipeError` for an unknown method, a setting that no method has, a key that cannot be swept, or a row that
    comes twice.
    """
    listed = [_swept(sweep) for sweep in sweeps]
    used: set[str] = set()
    variants: list[Variant] = []
    for word in (w.strip() for w in methods.split(",")):
        name, *settings = word.split(":")
        kind = get_method(name)
        own = {f"method.{f.name}" for f in fields(kind)}
        flags = [f"--method.name={name}"]
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals or f"method.{key}" not in own:
                raise RecipeError(
                    f"--methods: {word!r}: {setting!r} is no setting of {name}; give key=value, e.g. fedrot:strength=1"
                )
            flags.append(f"--method.{key}={value}")
        fits = [(key, values) for key, values in listed if not key.startswith("method.") or key in own]
        used |= {key for key, _ in fits}
        for values in itertools.product(*(values for _, values in fits)):
            swept = dict(zip((key for key, _ in fits), values, strict=True))
            mine = {k.removeprefix("method."): v for k, v in swept.items() if k.startswith("method.")}
            method = " ".join([name, *settings, *(f"{k}={v}" for k, v in mine.items())])
            setting = " ".join(f"{k}={v}" for k, v in swept.items() if not k.startswith("method."))
            variants.append(Variant(method, (*flags, *(f"--{k}={v}" for k, v in swept.items())), swept, setting))
    if unused := [key for key, _ in listed if key not in used]:
        raise RecipeError(f"--sweep: {unused[0]} is a setting of none of the methods {methods}")
    labels = [variant.label for variant in variants]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise RecipeError(f"--methods: {twice!r} is given twice")
    return variants


def _swept(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    listed = [value.strip() for value in values.split(",") if value.strip()]
    if not equals or not listed:
        raise RecipeError(f"--sweep must be key=value,value,..., e.g. method.strength=0,.4,1, got {text!r}")
    key = key.strip().removeprefix("--")
    if key == "name":
        raise RecipeError("--sweep: name only names the run; sweep a key that changes what is run")
    if key in _OWN:
        raise RecipeError(f"--sweep: {key}: a comparison sets it for each run; give {_OWN[key]}")
    return key, listed


def read_seeds(text: str) -> list[int]:
    """'0,1,2' -> [0, 1, 2]."""
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        raise RecipeError(f"--seeds must be whole numbers with commas between, e.g. 0,1,2, got {text!r}") from None
    if len(set(seeds)) != len(seeds):
        raise RecipeError(f"--seeds: a seed is given twice in {text!r}")
    return seeds


def plan(
    path: Path,
    flags: Sequence[str],
    variants: Sequence[Variant],
    seeds: Sequence[int],
    out: Path | None,
    small: bool = False,
    own: Sequence[str] = (),
) -> list[Planned]:
    """Every run, seed by seed, so that what is there after a while can be compared; in runs/NAME-compared if not `out`.
    `own` are the command's own options, to suggest.

    Raises `RecipeError` for a combination that cannot work, `RunError` where a run of another recipe is in the way:
    both before anything is run.
    """
    for key in (flag.removeprefix("--").partition("=")[0] for flag in flags if flag.startswith("--")):
        if key in _OWN:
            raise RecipeError(f"--{key}: a comparison sets it for each run; give {_OWN[key]}")
    planned: list[Planned] = []
    for seed in seeds:
        for variant in variants:
            recipe = read_recipe(path, [*flags, *variant.flags, f"--seed={seed}"], small, own)
            if not recipe.evaluation.every:
                raise RecipeError("evaluation.every: a comparison is of scores in rounds; set it to 1 or more")
            root = out or Path("runs") / f"{recipe.name}-compared"
            planned.append(Planned(variant, seed, recipe, root / variant.folder / f"seed-{seed}"))
    for one in planned:
        if not one.started:
            continue
        resolved = RunFolder(one.folder).recipe()
        if change := changed_key(resolved.to_dict(), adopted(one.recipe, resolved).to_dict()):
            key, old, new = change
            raise RunError(
                f"{one.folder}: was run with {key} {old!r}, now it is {new!r}; compare into another folder by --out"
            )
    return planned
