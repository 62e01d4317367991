"""Tokenised examples, kept once and shared by every client: flat arrays and offsets, no padding."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """N examples. Example i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: NDArray[np.int32]  # (T)
    segments: NDArray[np.uint8] | None  # (T) token type ids, for models that have them
    offsets: NDArray[np.int64]  # (N + 1)
    labels: NDArray[np.int64]  # (N)
    pad: int  # token id that fills a batch up
    learnt: NDArray[np.bool_] | None = None  # (T) tokens that a language model learns to write; None: labels instead
    cut: int = 0  # examples that were longer than allowed

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N) tokens of each example."""
        return np.diff(self.offsets)

    def mapped(self) -> "Encoded":
        """The same examples in a file that is mapped into memory and has no name: it goes when the process does.

        The system can drop its pages and read them again; nothing of the examples stays on disk. The file lies where
        temporary files do (TMPDIR).
        """
        with tempfile.TemporaryFile(prefix="fedrot-") as file:
            return replace(
                self,
                tokens=_mapped(file, self.tokens),
                segments=None if self.segments is None else _mapped(file, self.segments),
                offsets=_mapped(file, self.offsets),
                labels=_mapped(file, self.labels),
                learnt=None if self.learnt is None else _mapped(file, self.learnt),
            )

    def lengths_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of these examples, without looking at the others."""
        return self.offsets[indices + 1] - self.offsets[indices]

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[dict[str, Tensor], Tensor]:
        """These examples, padded to the longest of them: (model inputs of shape (n, longest), labels (n))."""
        rows = np.asarray(indices)
        longest = int(self.lengths[rows].max())
        ids = np.full((len(rows), longest), self.pad, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        types = np.zeros((len(rows), longest), dtype=np.int64)
        for place, row in enumerate(rows):
            start, stop = self.offsets[row], self.offsets[row + 1]
            ids[place, : stop - start] = self.tokens[start:stop]
            mask[place, : stop - start] = 1
            if self.segments is not None:
                types[place, : stop - start] = self.segments[start:stop]
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if self.segments is not None:
            inputs["token_type_ids"] = torch.from_numpy(types)
        return inputs, torch.from_numpy(self.labels[rows])

    def flat(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """These examples' tokens one after the other, (T), and their token type ids, where the model has them."""
        places = self._places(indices)
        segments = None if self.segments is None else self.segments[places].astype(np.int64)
        return self.tokens[places].astype(np.int64), segments

    def targets(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """What a language model learns of these examples: (places, tokens, counts). Places (U) among the examples' flat
        tokens are those before each learnt token, tokens (U) the learnt ones, counts (n) how many each example has.
        """
        if self.learnt is None:
            raise ValueError("these examples have labels and no tokens to learn")
        learnt = self.learnt[self._places(indices)]
        lengths = self.lengths_of(indices)
        counts = np.add.reduceat(learnt.astype(np.int64), np.cumsum(lengths) - lengths)
        after = np.flatnonzero(learnt)  # never an example's first token, see tasks/generation.py
        return after - 1, self.flat(indices)[0][after], counts

    def _places(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the tokens of these examples are, one example after the other."""
        lengths = self.lengths_of(indices)
        before = np.cumsum(lengths) - lengths
        return np.repeat(self.offsets[indices] - before, lengths) + np.arange(int(lengths.sum()))

    def fingerprint(self) -> str:
        """A hash of all that training sees of these examples."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.tokens, self.segments, self.offsets, self.labels, self.learnt):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _mapped(file: IO[bytes], array: NDArray[Any]) -> NDArray[Any]:
    """`array` appended to the file and mapped from there."""
    start = file.seek(0, os.SEEK_END)
    start += -start % array.itemsize
    file.seek(start)
    file.write(array.tobytes())
    file.flush()
    return np.memmap(file, array.dtype, "r", start, array.shape)
