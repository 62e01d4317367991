"""CodeSearchNet: functions with their documentation in six programming languages (Husain et al., arXiv 1909.09436).

A model learns to write the function, as it was published, for the text of its documentation. (In Python the docstring
is a part of the function, so it is written too.) The language is the group: a natural federation of six clients.

Files are read line by line, and of a function these two texts are kept alone: about 3 GB of memory and a minute or
two for all two million. `data.limit` is drawn from all of them, so it saves what comes after reading.
"""

import gzip
import logging
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from fedrot.core.errors import DataError, choices
from fedrot.learning.data import ASSISTANT, Dataset, Rows, Turn, conversations
from fedrot.learning.settings import DataSettings
from fedrot.learning.sources import hub
from fedrot.learning.sources.tables import json_objects, text_of

HUB = "code-search-net/code_search_net"
# As the data names them and as people do.
LANGUAGES = {"go": "Go", "java": "Java", "javascript": "JavaScript", "php": "PHP", "python": "Python", "ruby": "Ruby"}
Function = tuple[str, str, str]  # language, documentation, code
# The keys of a function's parts: the archives', and the hub's.
_KEYS = (("language",), ("docstring", "func_documentation_string"), ("code", "func_code_string"))
_SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # our split -> the archives' folder


def read(settings: DataSettings) -> Dataset:
    """train, validation and test as published, with the language as group. `data.path` is the folder of the unpacked
    archives, LANGUAGE/final/jsonl/{train,valid,test}/*.jsonl.gz, or the same without final/jsonl or unzipped; null: the
    hub. Languages without a folder are left out.
    """
    found = _local(Path(settings.path)) if settings.path else _hub()
    return Dataset({split: rows(each, f"{settings.path or HUB}, {split}") for split, each in found.items()})


def rows(functions: Iterable[Function], where: str) -> Rows:
    """A conversation for each function; those without documentation or code are left out and counted in the log."""
    turns: list[tuple[Turn, ...]] = []
    groups: list[str] = []
    empty = 0
    for language, documentation, code in functions:
        if not documentation.strip() or not code.strip():
            empty += 1
            continue
        asked = f"Write a function in {LANGUAGES[language]} for this documentation:\n{documentation.strip()}\n\n"
        turns.append((("user", asked), (ASSISTANT, code)))
        groups.append(sys.intern(language))  # one string a language, not one a function
    if empty:
        logging.getLogger("fedrot").warning("%s: left out %d functions without documentation or code", where, empty)
    return conversations(turns, groups)


def _local(folder: Path) -> dict[str, Iterator[Function]]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (data.path)")
    there = [language for language in LANGUAGES if (folder / language).is_dir()]
    if not there:
        raise DataError(f"{folder}: there is no folder of a language, {choices(LANGUAGES)} (data.path)")
    if len(there) < len(LANGUAGES):
        missing = choices(set(LANGUAGES) - set(there))
        logging.getLogger("fedrot").warning("%s: there are no functions in %s", folder, missing)
    files = {split: [path for one in there for path in _files(folder / one, name)] for split, name in _SPLITS.items()}
    return {split: chain.from_iterable(map(_lines, paths)) for split, paths in files.items()}


def _files(folder: Path, name: str) -> list[Path]:
    """A language's files of a split. One that was unzipped beside its archive is taken once."""
    for place in (folder / "final" / "jsonl" / name, folder / name):
        both = [*place.glob("*.jsonl.gz"), *place.glob("*.jsonl")]
        if both:
            once = {path.name.removesuffix(".gz"): path for path in both}
            return [once[file] for file in sorted(once)]
    raise DataError(f"{folder}: there is no final/jsonl/{name}/*.jsonl.gz or {name}/*.jsonl.gz (data.path)")


def _lines(path: Path) -> Iterator[Function]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, one in json_objects(path, file):
                yield _function(one, f"{path}: line {number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: cannot be read ({problem})") from None


def _hub() -> dict[str, Iterator[Function]]:
    loaded = hub.load(HUB, "all", "a folder with go/final/jsonl/train/*.jsonl.gz and so on")
    if missing := [split for split in _SPLITS if split not in loaded]:
        raise DataError(f"{HUB}: there is no {missing[0]} split")
    return {split: _table(loaded[split], f"{HUB}, {split}") for split in _SPLITS}


def _table(table: Any, where: str) -> Iterator[Function]:
    wanted = [name for name in table.column_names if name in chain(*_KEYS)]  # the others hold most of the data
    for number, one in enumerate(table.select_columns(wanted), start=1):
        yield _function(one, f"{where}: row {number}")


def _function(one: Mapping[str, Any], where: str) -> Function:
    language, documentation, code = (_text(one, names, where) for names in _KEYS)
    if language not in LANGUAGES:
        raise DataError(f"{where} is in the language {language!r}; expected {choices(LANGUAGES)}")
    return language, documentation, code


def _text(one: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    """What stands under the first of these keys that is there; null is an empty text."""
    for name in names:
        if name in one:
            value = one[name] if one[name] is not None else ""
            if not isinstance(value, str):
                raise DataError(f"{where}: {name!r} is of type {type(value).__name__}, not a text")
            return text_of(value, f"{where}: {name!r}")
    raise DataError(f"{where} has no {choices(names)}; it has {choices(one)}")
