"""Which score of an evaluation counts, and which way is better."""

from collections.abc import Mapping
from typing import Any

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
# By the score that counts, those whose mean over sites, by numbers of examples, is a score of all (of tokens, nearly).
AVERAGED = {"accuracy": ("accuracy", "loss"), "loss": ("loss", "token_accuracy")}


def main_score(record: Mapping[str, Any]) -> float:
    """The score that counts, of an evaluation's record."""
    return float(record[record["metric"]])
