"""The recipes that come with fedrot, by name, and what a recipe file may say beside a recipe's keys.

`extends: OTHER.yaml` takes all of another file, in the same folder, and changes what this one says. `small:` holds the
changes of a reduced run, which --small asks for.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedrot.core.errors import RecipeError, choices

FOLDER = Path(__file__).parents[1] / "recipes"
Values = dict[str, Any]


def recipes() -> dict[str, str]:
    """What each recipe is, by the name that `fedrot run` takes: the comment at its beginning."""
    found = {}
    for path in sorted(FOLDER.rglob("*.yaml")):
        if not path.name.startswith("_"):
            found[path.relative_to(FOLDER).with_suffix("").as_posix()] = _about(path)
    return found


def _about(path: Path) -> str:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def find(path: Path) -> Path:
    """The file of a recipe: a path, or the name of one that comes with fedrot. `RecipeError` for neither."""
    if (path.exists() and not path.is_dir()) or path.suffix in (".yaml", ".yml", ".json"):
        return path
    if path.as_posix() in (known := recipes()):
        return FOLDER / f"{path.as_posix()}.yaml"
    near = difflib.get_close_matches(path.as_posix(), known, n=3) or [n for n in known if "/" not in n]
    raise RecipeError(f"{path}: no such recipe file, and none that comes with fedrot: did you mean {choices(near)}?")


def composed(values: Mapping[str, Any], other: Mapping[str, Any]) -> Values:
    """`values` with the changes of `other`, section by section; lists are taken whole."""
    both = dict(values)
    for key, value in other.items():
        old = both.get(key)
        both[key] = composed(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


def reduced(values: Mapping[str, Any], small: bool, source: str) -> Values:
    """Without the key `small`, whose changes are made if `small`; the run's name then says so."""
    whole = {key: value for key, value in values.items() if key != "small"}
    if not small:
        return whole
    changes = values.get("small")
    if not isinstance(changes, Mapping):
        raise RecipeError(f"{source}: --small: the recipe does not say under small: what a reduced run is")
    return composed(composed(whole, {"name": f"{whole.get('name', 'run')}-small"}), changes)
