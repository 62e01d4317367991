"""Settings of the ground floor: plain frozen records that import nothing heavy."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DiagnosticsSettings:
    """What is measured about the aggregation of a round."""

    every: int = 1
    """Measure in every n-th round; 0 switches the measurement off. In rounds that are measured clients send drift and
    rotations too, which serve nothing else."""
    exact_clients: int = 32
    """Up to this many uploads in a round, errors are exact (the uploads are held until the round ends); above it,
    a streamed random sketch estimates them in memory that does not grow with the clients."""
    sketch_width: int = 32
    """Random test directions of the sketch; the error's norm is estimated to about 1 / sqrt(2 * width) or better."""
    rho: bool = False
    """Search the best rotation of every client numerically and report rho, the share of the avoidable error that is
    rotation's. Exact mode only; takes seconds a round."""


@dataclass(frozen=True)
class ServerSettings:
    """What the server does with the averaged change (Reddi et al., arXiv 2003.00295)."""

    optimizer: Literal["none", "momentum", "adam", "yogi"] = "none"
    """none: the average is the next broadcast; the others step on its change, for the factors that were trained."""
    lr: float | None = None
    """The server's learning rate; null is 1 for momentum and 0.01 for adam and yogi."""
    beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""
    beta2: float = 0.99
    """Decay of the second moment, in [0, 1)."""
    epsilon: float = 1e-3
    """Added to the root of the second moment, which starts at its square: how adaptive the step is."""


@dataclass(frozen=True)
class CheckSettings:
    """What an upload must be before it may touch the global state, beyond names, shapes, dtypes and finite values."""

    max_norm: float | None = None
    """Largest allowed norm of an upload's change against the broadcast (all factors and head together); null: none."""


@dataclass(frozen=True)
class RobustSettings:
    """What the server does against hostile clients.

    It turns every upload to the broadcast's frame itself, holds all of a round's uploads and lets the rule say what
    reaches the mean. All rules but norm weigh uploads alike: the examples that a client claims to hold can be false.
    """

    rule: Literal["none", "norm", "median", "trimmed", "krum"] = "none"
    """norm: changes are scaled down to a bound; median, trimmed: of every number the median, or the mean without the
    least and the largest values; krum: the mean of the uploads whose updates lie closest to the others'."""
    share: float = 0.2
    """Share of a round's clients that may be hostile, between 0 and 0.5; one client at least."""
    bound: float | None = None
    """norm: the largest norm of a change, factors and head together; null: robust.multiple times the round's median."""
    multiple: float = 2.0
    """The largest norm of a change as a multiple of the round's median. krum chooses no upload above it."""
    chosen: int | None = None
    """krum: how many uploads it takes; 1 is Krum's own rule. null: n - f - 2 of n with f hostile, which is the most."""
