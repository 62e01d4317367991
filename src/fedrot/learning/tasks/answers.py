"""Problems with an answer: the model writes on after each prompt, and what it answers is compared with the right one.

"number" is GSM8K's: what stands behind "####" (Cobbe et al., arXiv 2110.14168); a text without one has no answer and is
wrong, counted apart. "text" compares all that is written, up to white space at the ends. Prompts are whole whatever
`data.max_length` is; only the model's own context may cut them, which is counted too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.errors import DataError
from fedrot.learning.data import ASSISTANT, Rows
from fedrot.learning.evaluation import How, Scored
from fedrot.learning.generation import cut_prompts, text_before, write_on
from fedrot.learning.models import ResidentModel
from fedrot.learning.tasks.generation import Template, prompt_of
from fedrot.learning.tasks.shots import Turns, end_of_answer, end_of_turn, with_shots

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


@dataclass(frozen=True)
class Problems:
    """What a model is asked and how its answers are read. `DataError` where a right answer could never be written."""

    rows: Rows
    kind: str  # of the answers: "number" or "text"
    tokens: int  # most of an answer
    template: Template = "plain"
    shots: Sequence[Turns] = ()  # worked examples before each problem

    def __post_init__(self) -> None:
        if self.kind not in ("number", "text"):
            raise ValueError(f"answers of kind {self.kind!r} cannot be compared")
        ends = self.ends()
        for place in range(len(self.rows)):
            text = self.right(place)
            right = answer_of(text, self.kind)
            if right is None:
                lacks = 'has no number behind "####"' if self.kind == "number" else "is empty"
                raise DataError(
                    f"evaluation.answers is {self.kind}, and the right answer of problem {place + 1} {lacks}: "
                    f"{text[:60]!r}; mend the data or choose another kind"
                )
            if answer_of(text_before(text, ends), self.kind) != right:
                raise DataError(
                    f"evaluation.shots: the right answer of problem {place + 1} has an empty line in it, at which an "
                    "answer ends where examples come before the problem; set evaluation.shots to 0 or data.template to "
                    "chat"
                )

    def prompt(self, tokenizer: Any, place: int) -> NDArray[np.int32]:
        """A problem's tokens, with those of the worked examples."""
        turns = with_shots((self.rows.turns or ())[place], self.shots, self.template)
        return prompt_of(tokenizer, turns, self.template)

    def right(self, place: int) -> str:
        """What the assistant says first in a conversation, without white space at the ends."""
        return next(text for role, text in (self.rows.turns or ())[place] if role == ASSISTANT).strip()

    def ends(self) -> tuple[str, ...]:
        """The strings at which an answer ends."""
        return end_of_answer(self.kind, self.rows.turns or (), self.shots, self.template)

    def end_tokens(self, tokenizer: Any) -> tuple[int, ...]:
        """The tokens at which an answer ends, beside the end of the text."""
        return end_of_turn(tokenizer, (self.rows.turns or ())[0], self.template)


def by_answers(asked: Problems, how: How) -> Scored:
    """Scoring by what a model answers to problems."""
    kind, tokens, ends = asked.kind, asked.tokens, asked.ends()

    def measure(model: ResidentModel, adapter: Adapter, places: NDArray[np.int64]) -> Tensor:  # (n, 3)
        model.write(adapter)
        prompts = [asked.prompt(model.tokenizer, int(place)) for place in places]
        turn = asked.end_tokens(model.tokenizer)
        written = write_on(model, prompts, tokens, how.batch, how.precision, ends, turn)
        found = [answer_of(text, kind) for text in written]
        right = [answer_of(asked.right(int(place)), kind) for place in places]
        pairs = zip(found, right, cut_prompts(model, prompts, tokens), strict=True)
        return torch.tensor([(a is not None and a == b, a is not None, cut) for a, b, cut in pairs]).double()

    return Scored(METRIC, measure, lambda numbers, _: score(numbers))


def score(numbers: Tensor) -> dict[str, float]:
    """The share of right answers with its 95 % interval (Wilson 1927), the share without an answer, and that of prompts
    that lost their beginning; `numbers` (n, 3) says of each example whether its answer is right, whether there is one,
    and whether its prompt was cut.
    """
    from scipy.stats import binomtest

    right, count = int(numbers[:, 0].sum()), len(numbers)
    interval = binomtest(right, count).proportion_ci(method="wilson")
    return {
        METRIC: right / count,
        "low": float(interval.low),
        "high": float(interval.high),
        "unparsed": 1.0 - float(numbers[:, 1].mean()),
        "cut": float(numbers[:, 2].mean()),
    }
