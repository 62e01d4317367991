"""Text classification of one or two sentences.

An example is a text, perhaps a second one, and a label: "it 's a charming and often affecting journey ." -> positive.
It is encoded as the tokenizer joins texts ([CLS] text [SEP] second [SEP] for BERT), cut to a maximum length, and
scored by accuracy and macro F1 of the most likely label.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrot.learning.batching import Batch
from fedrot.learning.data import Rows
from fedrot.learning.encoding import Encoded
from fedrot.learning.models import ResidentModel

METRIC = "accuracy"


def encode(tokenizer: Any, rows: Rows, max_length: int) -> Encoded:
    """Tokenise every example once; the longer text of a pair is cut first."""
    pair = list(rows.pair) if rows.pair is not None else None
    cut = "longest_first" if pair else True
    encoded = tokenizer(list(rows.text), pair, truncation=cut, max_length=max_length, return_attention_mask=False)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    types = encoded.get("token_type_ids")
    return Encoded(
        tokens=np.concatenate([np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]),
        segments=None if types is None else np.concatenate([np.asarray(t, dtype=np.uint8) for t in types]),
        offsets=offsets,
        labels=np.asarray(rows.label, dtype=np.int64),
        pad=tokenizer.pad_token_id,
    )


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
