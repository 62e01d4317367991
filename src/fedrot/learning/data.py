"""Labelled texts and conversations: one `Dataset` of named splits, wherever they come from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from fedrot.core.errors import DataError, choices

ASSISTANT = "assistant"
Turn = tuple[str, str]  # (role, content); what the role `ASSISTANT` says is what a language model learns


@dataclass(frozen=True)
class Rows:
    """Examples as columns of equal length. `label` holds indices into the dataset's label names; texts that a language
    model learns to write have none, and zeros stand there.
    """

    text: Sequence[str]  # of a conversation: what is asked, all that the assistant does not say
    label: Sequence[int]
    pair: Sequence[str] | None = None
    group: Sequence[str] | None = None
    turns: Sequence[Sequence[Turn]] | None = None  # conversations

    def __len__(self) -> int:
        return len(self.text)

    def take(self, indices: Sequence[int]) -> "Rows":
        """The examples at these places, in this order."""
        return Rows(
            text=[self.text[i] for i in indices],
            label=[self.label[i] for i in indices],
            pair=None if self.pair is None else [self.pair[i] for i in indices],
            group=None if self.group is None else [self.group[i] for i in indices],
            turns=None if self.turns is None else [self.turns[i] for i in indices],
        )

    def whole(self) -> list[str]:
        """All that is written in each example: both texts, or every turn."""
        if self.turns is not None:
            return ["\n".join(content for _, content in turns) for turns in self.turns]
        if self.pair is not None:
            return [f"{text}\n{pair}" for text, pair in zip(self.text, self.pair, strict=True)]
        return list(self.text)


def conversations(turns: Sequence[Sequence[Turn]], group: Sequence[str] | None = None) -> Rows:
    """Rows of conversations."""
    asked = ["\n".join(content for role, content in one if role != ASSISTANT) for one in turns]
    return Rows(asked, [0] * len(turns), group=group, turns=turns)


@dataclass(frozen=True)
class Dataset:
    """Splits by name, 'train' among them, and the names of the labels: none where the examples are conversations."""

    splits: dict[str, Rows]
    labels: tuple[str, ...] = ()

    def split(self, name: str) -> Rows:
        """One split; `DataError` with the choices where there is none of this name."""
        if name not in self.splits:
            raise DataError(f"the data has no split {name!r}; choose {choices(self.splits)}")
        return self.splits[name]


def bucket(text: str, buckets: int = 100) -> int:
    """A number in [0, buckets) that depends on the text alone: equal texts are never on both sides of a split."""
    return int.from_bytes(hashlib.sha256(text.strip().lower().encode()).digest()[:8], "big") % buckets


def hold_out(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """(kept, held out), divided by the texts' own hash."""
    out = [bucket(text, 10_000) < share * 10_000 for text in rows.text]
    return (
        rows.take([i for i, held in enumerate(out) if not held]),
        rows.take([i for i, held in enumerate(out) if held]),
    )
