"""Problems with an answer: the model writes on after each prompt, and what it answers is compared with the right one.

"number" is GSM8K's: what stands behind "####" (Cobbe et al., arXiv 2110.14168); a text without one has no answer and is
wrong, counted apart. "text" compares all that is written, up to white space at the ends.
"""

import re
from collections.abc import Sequence
from decimal import Decimal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.learning.data import ASSISTANT, Rows
from fedrot.learning.encoding import Encoded
from fedrot.learning.evaluation import How, Scored
from fedrot.learning.generation import write_on
from fedrot.learning.models import ResidentModel

METRIC = "exact_match"
# A number as people write it: 1,200.50, -3, $5
_NUMBER = re.compile(r"####\s*\$?\s*(-?)\$?(\d[\d,]*(?:\.\d+)?|\.\d+)")


def answer_of(text: str, kind: str) -> str | None:
    """The answer in a text in a form that can be compared; None where there is none."""
    if kind == "text":
        return text.strip() or None
    found = _NUMBER.search(text)
    if found is None:
        return None
    return format((Decimal(found[1] + found[2].replace(",", "")) + 0).normalize(), "f")


def by_answers(data: Encoded, rows: Rows, kind: str, tokens: int, how: How) -> Scored:
    """Scoring by answers of at most so many `tokens`; `rows` are the split that `data` encodes."""

    if kind not in ("number", "text"):
        raise ValueError(f"answers of kind {kind!r} cannot be compared")

    def measure(model: ResidentModel, adapter: Adapter, places: NDArray[np.int64]) -> Tensor:  # (n, 2)
        model.write(adapter)
        prompts = [prompt_of(data, int(place)) for place in places]
        found = [answer_of(text, kind) for text in write_on(model, prompts, tokens, how.batch, how.precision)]
        right = [answer_of(_reference(rows, int(place)), kind) for place in places]
        pairs = zip(found, right, strict=True)
        return torch.tensor([(float(a is not None and a == b), float(a is not None)) for a, b in pairs]).double()

    return Scored(METRIC, measure, lambda numbers, _: score(numbers))


def prompt_of(data: Encoded, place: int) -> NDArray[np.int32]:
    """An example's tokens before the first one that is learnt."""
    if data.learnt is None:
        raise ValueError("these examples have labels and nothing to write")
    start, stop = data.offsets[place], data.offsets[place + 1]
    return np.asarray(data.tokens[start : start + int(np.argmax(data.learnt[start:stop]))])


def _reference(rows: Rows, place: int) -> str:
    """What the assistant says first in a conversation."""
    turns: Sequence[tuple[str, str]] = (rows.turns or ())[place]
    return next(content for role, content in turns if role == ASSISTANT)


def score(numbers: Tensor) -> dict[str, float]:
    """The share of right answers with its 95 % interval (Wilson 1927), and the share without an answer; `numbers`
    (n, 2) says of each example whether its answer is right and whether there is one.
    """
    from scipy.stats import binomtest

    right, count = int(numbers[:, 0].sum()), len(numbers)
    interval = binomtest(right, count).proportion_ci(method="wilson")
    return {
        METRIC: right / count,
        "low": float(interval.low),
        "high": float(interval.high),
        "unparsed": 1.0 - float(numbers[:, 1].mean()),
    }
