"""Settings of the ground floor: plain frozen records that import nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DiagnosticsSettings:
    """What is measured about the aggregation of a round."""

    every: int = 1
    """Measure in every n-th round; 0 switches the measurement off."""
    exact_clients: int = 32
    """Up to this many uploads in a round, errors are exact (the uploads are held until the round ends); above it,
    a streamed random sketch estimates them in memory that does not grow with the clients."""
    sketch_width: int = 32
    """Random test directions of the sketch; the error's norm is estimated to about 1 / sqrt(2 * width) or better."""
    rho: bool = False
    """Search the best rotation of every client numerically and report rho, the share of the avoidable error that is
    rotation's. Exact mode only; takes seconds a round."""


@dataclass(frozen=True)
class CheckSettings:
    """What an upload must be before it may touch the global state, beyond names, shapes, dtypes and finite values."""

    max_norm: float | None = None
    """Largest allowed norm of an upload's change against the broadcast (all factors and head together); null: none."""
