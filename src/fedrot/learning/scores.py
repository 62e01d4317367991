"""Which score of an evaluation counts, and which way is better."""

from collections.abc import Mapping
from typing import Any

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


def main_score(record: Mapping[str, Any]) -> float:
    """The score that counts, of an evaluation's record."""
    return float(record[record["metric"]])
