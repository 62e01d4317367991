"""Text classification of one or two sentences.

An example is a text, perhaps a second one, and a label: "it 's a charming and often affecting journey ." -> positive.
It is encoded as the tokenizer joins texts ([CLS] text [SEP] second [SEP] for BERT), cut to a maximum length, and
scored by accuracy and macro F1 of the most likely label.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrot.core.errors import DataError
from fedrot.learning.batching import Batch
from fedrot.learning.data import Rows
from fedrot.learning.encoding import Encoded
from fedrot.learning.models import ResidentModel

METRIC = "accuracy"
# Examples tokenised at once: a tokenizer's own lists take forty times the memory of what is kept of them.
_AT_ONCE = 1_000


def encode(tokenizer: Any, rows: Rows, max_length: int, where: str = "the examples") -> Encoded:
    """Tokenise every example once; the longer text of a pair is cut first.

    Raises `DataError` that begins with `where` for an example without tokens: an empty text, where the tokenizer adds
    none of its own.
    """
    options = {"truncation": "longest_first" if rows.pair is not None else True, "max_length": max_length}
    lengths: list[int] = []
    tokens: list[NDArray[np.int32]] = []
    segments: list[NDArray[np.uint8]] = []
    for start in range(0, len(rows), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        pair = list(rows.pair[part]) if rows.pair is not None else None
        encoded = tokenizer(list(rows.text[part]), pair, return_attention_mask=False, **options)
        lengths += [len(ids) for ids in encoded["input_ids"]]
        tokens.append(_flat(encoded["input_ids"], np.int32))
        if "token_type_ids" in encoded:
            segments.append(_flat(encoded["token_type_ids"], np.uint8))
    if 0 in lengths:
        raise DataError(
            f"{where}: row {lengths.index(0) + 1} of {len(rows)} has no tokens, its text is empty and the model's "
            "tokenizer adds none; leave rows without text out of the data"
        )
    return Encoded(
        tokens=np.concatenate(tokens),
        segments=np.concatenate(segments) if segments else None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=np.asarray(rows.label, dtype=np.int64),
        pad=tokenizer.pad_token_id,
    )


def _flat(lists: Sequence[Sequence[int]], dtype: type[Any]) -> NDArray[Any]:
    """All of them one after the other."""
    return np.fromiter(chain.from_iterable(lists), dtype)


def losses(model: ResidentModel, batch: Batch, precision: str) -> Tensor:  # (n)
    """The cross-entropy of every example of a batch."""
    logits = model.forward(batch, precision)
    return loss(logits, batch.labels.to(logits.device))


def measure(model: ResidentModel, batch: Batch, precision: str) -> Tensor:  # (n, 2)
    """The likeliest label of every example of a batch, and its loss."""
    logits = model.forward(batch, precision).float().cpu()
    return torch.stack([logits.argmax(-1).double(), loss(logits, batch.labels).double()], dim=1)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (n) in float32 or better; `logits` (n, labels), `labels` (n)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, labels, reduction="none")


def score(found: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, macro F1 and mean loss of n examples; `found` (n, 2) is what `measure` gives, `labels` (n)."""
    from sklearn.metrics import accuracy_score, f1_score

    truth, guess = labels.numpy(), found[:, 0].long().numpy()
    return {
        "accuracy": float(accuracy_score(truth, guess)),
        "macro_f1": float(f1_score(truth, guess, average="macro", zero_division=0)),
        "loss": float(found[:, 1].mean()),
    }
