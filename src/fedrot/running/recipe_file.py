"""YAML, JSON and command-line flags to a checked `Recipe`, and back to YAML."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from fedrot.core.errors import RecipeError, choices
from fedrot.core.methods import Method, get_method, methods
from fedrot.core.methods.rotation import FedRot
from fedrot.core.typed import describe
from fedrot.running.recipe import SECTIONS, Recipe, flatten
from fedrot.running.recipe_library import composed, find, reduced

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def recipe_parser(method: type[Method], **options: Any) -> ArgumentParser:
    """A parser whose flags are the recipe's keys, with the settings of one method under `method`."""
    parser = ArgumentParser(exit_on_error=False, default_env=False, allow_abbrev=False, **options)
    parser.add_class_arguments(Recipe, skip={"method", *SECTIONS}, fail_untyped=True)
    for name, settings in SECTIONS.items():
        parser.add_class_arguments(settings, name)
    parser.add_argument("--method.name", type=Literal[tuple(methods())], default=method.name, help="aggregation method")
    parser.add_class_arguments(method, "method")
    return parser


def read_recipe(path: Path, flags: Sequence[str] = (), small: bool = False, own: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or one that comes with fedrot by its name; flags win over the file, and over the changes of a
    reduced run that `small` asks for. `own` are the command's own options, which a mistyped flag may mean. Raises
    `RecipeError` naming the file and the key.
    """
    path = find(path)
    return parse_recipe(reduced(_values(path), small, str(path)), flags, str(path), own)


def _values(path: Path, below: tuple[Path, ...] = ()) -> Mapping[str, Any]:
    """What a file says, put on top of what the file that it extends says."""
    values = _read(path)
    if "extends" not in values:
        return values
    other = path.parent / str(values["extends"])
    if other in (*below, path):
        raise RecipeError(f"{path}: extends: {other.name} extends this file in turn")
    mine = {key: value for key, value in values.items() if key != "extends"}
    return composed(_values(other, (*below, path)), mine)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise RecipeError(f"{path}: cannot be read ({problem})") from None
    try:
        values = json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else yaml.load(text, _OnceLoader)
    except yaml.YAMLError as problem:
        where = getattr(problem, "problem_mark", None)
        line = f"line {where.line + 1}: " if where else ""
        raise RecipeError(f"{path}: {line}not valid YAML ({getattr(problem, 'problem', None) or problem})") from None
    except json.JSONDecodeError as problem:
        raise RecipeError(f"{path}: line {problem.lineno}: not valid JSON ({problem.msg})") from None
    except (ValueError, RecursionError) as problem:
        raise RecipeError(f"{path}: {problem}") from None
    if values is None:
        raise RecipeError(f"{path}: the file is empty; a recipe needs model, data and local at least")
    if not isinstance(values, Mapping):
        raise RecipeError(f"{path}: holds a {type(values).__name__}, not keys and values")
    return values


def parse_recipe(
    values: Mapping[str, Any], flags: Sequence[str] = (), source: str = "recipe", own: Sequence[str] = ()
) -> Recipe:
    """Check nested values and flags (`--local.lr 0.01`) and make the recipe of them; `own` as in `read_recipe`."""
    values = {key: dict(v) if isinstance(v, Mapping) else v for key, v in values.items()}
    method = _choose_method(values, flags, source)
    _known_keys(values, method, source)
    for flag in flags:
        section = flag.partition("=")[0].removeprefix("--")
        if flag.startswith("--") and (keys := sections_of(method).get(section)):
            raise RecipeError(f"{source}: {flag}: this is a section; give its keys, e.g. --{section}.{keys[0]}")
    parser = recipe_parser(method)
    try:
        parsed = parser.parse_args(list(flags), namespace=parser.parse_object(values))
    except ArgumentError as problem:
        raise RecipeError(f"{source}: {explain(str(problem), method, own)}") from None
    plain = plain_values(parsed)
    for key, value in flatten(plain).items():
        if value is None and NoneType not in get_args(_type_of(key, method)):
            raise RecipeError(f"{source}: {key} must be {describe(_type_of(key, method))}, got null")
    try:
        return Recipe.from_values(plain)
    except RecipeError as problem:
        raise RecipeError(f"{source}: {problem}") from None


class _OnceLoader(yaml.SafeLoader):
    """YAML's safe loader, but a key that is given twice is an error and not a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _once([(self.construct_object(key, deep=True), None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def _once(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    keys = [str(key) for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise RecipeError(f"the key {twice[0]!r} is given twice")
    return dict(pairs)


def plain_values(parsed: Namespace) -> dict[str, Any]:
    """A parsed namespace as nested plain values."""
    return {key: value for key, value in parsed.as_dict().items() if key in {*SECTIONS, "method", *_TOP}}


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)


def _choose_method(values: dict[str, Any], flags: Sequence[str], source: str) -> type[Method]:
    """The method whose settings the recipe holds. Settings in the file belong to the method named in the file: where
    a flag names another one, they are left out.
    """
    section = values.get("method", {})
    if not isinstance(section, dict):
        raise RecipeError(f"{source}: method must hold keys and values, got {section!r}")
    in_file = section.get("name", FedRot.name)
    asked = method_named(flags)
    try:
        method = get_method(str(in_file if asked is None else asked))
    except RecipeError as problem:
        raise RecipeError(f"{source}: {problem}") from None
    if method.name != in_file:
        values["method"] = {"name": method.name}
    return method


def method_named(flags: Sequence[str]) -> str | None:
    """The NAME of the last `--method.name NAME` or `--method.name=NAME`; '' where none follows, None without it."""
    asked = [
        flag.partition("=")[2] if "=" in flag else ([*flags, ""])[i + 1]
        for i, flag in enumerate(flags)
        if flag == "--method.name" or flag.startswith("--method.name=")
    ]
    return asked[-1] if asked else None


_TOP = tuple(f.name for f in fields(Recipe) if f.name not in SECTIONS and f.name != "method")


def sections_of(method: type[Method]) -> dict[str, list[str]]:
    """The recipe's sections with their keys."""
    sections = {name: list(get_type_hints(kind)) for name, kind in SECTIONS.items()}
    return sections | {"method": ["name", *(f.name for f in fields(method))]}


def _known_keys(values: Mapping[str, Any], method: type[Method], source: str) -> None:
    sections = sections_of(method)
    for key, value in values.items():
        if key in _TOP:
            continue
        if key not in sections:
            raise RecipeError(f"{source}: {key}: there is no such recipe key{_nearest(str(key), [*_TOP, *sections])}")
        if not isinstance(value, Mapping):
            raise RecipeError(f"{source}: {key} must hold keys and values ({choices(sections[key])}), got {value!r}")
        for inner in value:
            if inner not in sections[key]:
                of = f" of method {method.name}" if key == "method" else ""
                hint = _nearest(str(inner), sections[key])
                raise RecipeError(f"{source}: {key}.{inner}: there is no such recipe key{of}{hint}")


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; choose {choices(known)}"


def explain(message: str, method: type[Method], own: Sequence[str] = ()) -> str:
    """A parser's message as one line that names the key, what it must be and what it was."""
    match = re.search(r'[Pp]arser key "([\w.]+)"', message)
    value = re.search(r"(?:Got value|Given value): (.*)", message)
    if match and value:
        return f"{match[1]} must be {describe(_type_of(match[1], method))}, got {value[1].strip()!r}"
    unknown = re.search(r"[Uu]nrecognized arguments: --([^\s=]+)", message)
    if unknown:
        known = [*(option.removeprefix("--") for option in own), *_flag_names(method)]
        close = difflib.get_close_matches(unknown[1], known, n=1)
        hint = f"did you mean '--{close[0]}'?" if close else "see fedrot run --help"
        return f"--{unknown[1]}: there is no such option; {hint}"
    return " ".join(message.split())


def _flag_names(method: type[Method]) -> list[str]:
    inner = [f"{name}.{key}" for name, kind in SECTIONS.items() for key in get_type_hints(kind)]
    return [*_TOP, *inner, "method.name", *(f"method.{f.name}" for f in fields(method))]


def _type_of(key: str, method: type[Method]) -> Any:
    section, _, inner = key.partition(".")
    if key == "method.name":
        return Literal[tuple(methods())]
    holder = Recipe if not inner else method if section == "method" else SECTIONS.get(section, Recipe)
    return get_type_hints(holder).get(inner or section, Any)


def changed_key(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """(key, old value, new value) of the first difference between two resolved recipes, or None."""
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            for inner in dict.fromkeys([*before, *after]):
                if before.get(inner) != after.get(inner):
                    return f"{key}.{inner}", before.get(inner), after.get(inner)
        elif before != after:
            return key, before, after
    return None
