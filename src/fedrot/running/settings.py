"""Settings of the running floor: plain frozen records that import nothing heavy."""

import math
from dataclasses import dataclass, field
from typing import Literal


def drawn_count(clients: int, participation: float) -> int:
    """How many of the clients take part in a round: the nearest whole number, halves up, at least one."""
    return max(1, math.floor(participation * clients + 0.5))


def least_uploads(quorum: float, drawn: int) -> int:
    """How many of the drawn clients' uploads must be usable."""
    return max(min(1, drawn), math.ceil(quorum * drawn - 1e-9))


@dataclass(frozen=True)
class FederationSettings:
    """Who takes part in a round and how much each counts."""

    participation: float = 1.0
    """Share of the clients drawn for each round, at least one client."""
    weighting: Literal["held", "used", "uniform"] = "held"
    """A client's weight: the examples that it holds, the rows that it processed in the round, or all alike."""
    quorum: float = 0.5
    """Share of the drawn clients whose uploads must be usable, of K with a buffer; with fewer the run stops, its last
    good state kept."""
    deadline: float | None = None
    """Seconds that a round waits for its uploads where clients are at sites of their own; null: until all are there."""
    compression: Literal["none", "bf16", "int8"] = "none"
    """How a client sends the change of its factors and head: bf16 rounds it to 2 bytes a number; int8 to one byte,
    without bias by stochastic rounding, with a scale for each component of the rank. Nothing else is compressed."""
    feedback: bool = True
    """Error feedback where uploads are compressed: a client keeps what rounding lost and adds it to its next change."""
    buffer: int | None = None
    """K: the server goes on when K clients have uploaded, and the others go on training from what they were sent
    (FedBuff, docs/methods.md). null: a round waits for all of its clients."""
    concurrency: int | None = None
    """With a buffer, how many clients train at once; null: all."""
    staleness: Literal["none", "sqrt", "linear"] = "sqrt"
    """With a buffer, what a change counts that is tau rounds late: all of it, 1 / sqrt(1 + tau) or 1 / (1 + tau)."""
    speeds: dict[str, float] | None = None
    """In simulation, local steps that a client takes in a simulated second, by its name; the others take 1, or what
    `spread` says. Every round's simulated time is then in metrics.jsonl (clock)."""
    spread: float | None = None
    """The same for all clients that `speeds` does not name: log-normal around 1, of this standard deviation of the
    logarithm, by the recipe's seed and the client's name. null: they all take 1."""


@dataclass(frozen=True)
class PrivacySettings:
    """Differential privacy of whole clients, or of single examples (docs/privacy.md). Needs the extra `privacy` for the
    accounting.
    """

    mode: Literal["none", "central", "local", "example"] = "none"
    """central: the server clips each client's change and adds noise to their sum, so what it releases, the adapters,
    says little of any one client. The server itself is trusted: it sees uploads, and metrics.jsonl and the report are
    for its eyes. local: each client adds noise to its own change and sends nothing else, so nobody need be trusted;
    far more noise reaches the mean, and there are no diagnostics and no training loss. example: every local step of a
    client clips the gradient of each of its examples and adds noise to their sum (DP-SGD), so its factors say little of
    any one example, to whoever sees them; local.batch is then the number of examples that a step draws on average."""
    clip: float | None = None
    """C, the bound on the L2 norm of a client's change of factors and head together, after alignment; of an example's
    gradient (example)."""
    noise: float | None = None
    """z, the noise multiplier: the noise's standard deviation is z C, on the sum of all changes (central), on each
    client's own (local) or on the sum of a step's gradients (example). 0: nothing but clipping is done, and nothing is
    promised."""
    delta: float | None = None
    """The probability, about, with which epsilon may fail to hold: well below one over the number of clients, or of a
    client's examples (example)."""
    budget: float | None = None
    """The run ends before the round that would bring epsilon above this; null: after the rounds that were asked for."""
    secure: bool = False
    """true: noise, and what takes part by chance, come from the operating system's generator; the run cannot be
    repeated. false: from the recipe's seed, as everything in a simulation does; whoever has the recipe can take such
    noise off, so a deployment must set it to true."""


@dataclass(frozen=True)
class SecureSettings:
    """Secure aggregation (docs/privacy.md): the server learns the sum of the clients' changes and none of them. Between
    sites it needs the extra `flower`; a simulation sums the same numbers in the clear.
    """

    aggregation: bool = False
    """Whether it is used. There are then no diagnostics and no losses by client: nobody sees an upload."""
    threshold: float = 0.6
    """Share of the clients that began a sum who must be left for it to be opened, above one half: as many must join
    their shares to take a mask off."""
    fewest: int = 3
    """No sum of fewer clients is opened. Of two, each would learn what the other sent."""
    range: float = 4.0
    """A number's change is moved into [-range, range]; rounding it loses about range / 10^8."""
    neighbours: int | None = None
    """How many others a client shares masks with, an even number; null: all. Fewer make large rounds cheaper, and fewer
    clients that break the rules together can do harm."""


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
