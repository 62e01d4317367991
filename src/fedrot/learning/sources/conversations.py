"""Prompts with responses, and conversations, from local table files: what language models are fine-tuned on."""

from pathlib import Path
from typing import Any

from fedrot.core.errors import DataError
from fedrot.learning.data import ASSISTANT, Dataset, Rows, Turn, conversations, hold_out
from fedrot.learning.settings import DataSettings
from fedrot.learning.sources.tables import Table, column, read_table, text_column, text_of

_ROLES = ("system", "user", ASSISTANT, "tool")


def read(settings: DataSettings) -> Dataset:
    """The files `data.train`, `data.validation` and `data.test`, with `data.response` or `data.messages`."""
    names = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    base = Path(settings.path) if settings.path else Path()
    splits = {split: _rows(base / name, settings) for split, name in names.items() if name}
    if "validation" not in splits:
        splits["train"], splits["validation"] = hold_out(splits["train"], settings.holdout)
    return Dataset(splits)


def _rows(path: Path, settings: DataSettings) -> Rows:
    table = read_table(path, settings.columns)
    group = text_column(table, settings.group, path, "data.group", empty=False) if settings.group else None
    if settings.messages:
        found = column(table, settings.messages, path, "data.messages")
        return conversations([_chat(value, row, path) for row, value in enumerate(found, start=1)], group)
    return conversations(_answered(table, settings, path), group)


def _answered(table: Table, settings: DataSettings, path: Path) -> list[tuple[Turn, ...]]:
    """A prompt and its response a row; a second text, where there is one, follows the first after an empty line."""
    prompts = text_column(table, settings.text, path, "data.text")
    responses = text_column(table, settings.response or "", path, "data.response", empty=False)
    if settings.pair:
        given = {settings.pair: ["" if v is None else v for v in column(table, settings.pair, path, "data.pair")]}
        seconds = text_column(given, settings.pair, path, "data.pair")
        prompts = [f"{a}\n\n{b}" if b else a for a, b in zip(prompts, seconds, strict=True)]
    for row, response in enumerate(responses, start=1):
        if not response.strip():
            raise DataError(f"{path}: row {row} has an empty response (data.response)")
    return [(("user", p), (ASSISTANT, r)) for p, r in zip(prompts, responses, strict=True)]


def _chat(value: Any, row: int, path: Path) -> tuple[Turn, ...]:
    where = f"{path}: row {row}"
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} has no list of messages (data.messages)")
    turns: list[Turn] = []
    for number, message in enumerate(value, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in _ROLES or not isinstance(content, str):
            raise DataError(
                f"{where}: message {number} has not a role ({', '.join(_ROLES)}) and a text as content (data.messages)"
            )
        if role == ASSISTANT and not content.strip():
            raise DataError(f"{where}: message {number}, the assistant's, is empty")
        turns.append((role, text_of(content, f"{where}: message {number} (data.messages)")))
    if all(role != ASSISTANT for role, _ in turns):
        raise DataError(f"{where}: the assistant says nothing, so there is nothing to learn")
    return tuple(turns)
