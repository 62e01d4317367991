"""Labelled texts: one `Dataset` of named splits, wherever they come from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from fedrot.core.errors import DataError, choices


@dataclass(frozen=True)
class Rows:
    """Examples as columns of equal length. `label` holds indices into the dataset's label names."""

    text: Sequence[str]
    label: Sequence[int]
    pair: Sequence[str] | None = None
    group: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.text)

    def take(self, indices: Sequence[int]) -> "Rows":
        """The examples at these places, in this order."""
        return Rows(
            text=[self.text[i] for i in indices],
            label=[self.label[i] for i in indices],
            pair=None if self.pair is None else [self.pair[i] for i in indices],
            group=None if self.group is None else [self.group[i] for i in indices],
        )


@dataclass(frozen=True)
class Dataset:
    """Splits by name, 'train' among them, and the names of the labels."""

    splits: dict[str, Rows]
    labels: tuple[str, ...]

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
