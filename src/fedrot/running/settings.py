"""Settings of the running floor: plain frozen records that import nothing heavy."""

import math
from dataclasses import dataclass, field
from typing import Literal


def drawn_count(clients: int, participation: float) -> int:
    """How many of the clients take part in a round: the nearest whole number, halves up, at least one."""
    return max(1, math.floor(participation * clients + 0.5))


@dataclass(frozen=True)
class FederationSettings:
    """Who takes part in a round and how much each counts."""

    participation: float = 1.0
    """Share of the clients drawn for each round, at least one client."""
    weighting: Literal["held", "used", "uniform"] = "held"
    """A client's weight: the examples that it holds, the rows that it processed in the round, or all alike."""
    quorum: float = 0.5
    """Share of the drawn clients whose uploads must be usable; with fewer the run stops, its last good state kept."""


@dataclass(frozen=True)
class CheckpointSettings:
    """What is kept on disk. Every round is written."""

    keep: int = 2
    """Number of latest rounds kept; at least one."""


@dataclass(frozen=True)
class TrackingSettings:
    """Where metrics go beside metrics.jsonl. Needs the extra `tracking` and the service's own package."""

    to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = field(default_factory=list)
    """Trackers to log to."""
    project: str = "fedrot"
    """Name of the project there."""
