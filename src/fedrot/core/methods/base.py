"""The contract of an aggregation method, and the registry.

A method is a frozen record of its settings with pure functions on plain records: no input or output, no globals, no
model. In a round the server's `ServerState.broadcast` goes to every client; there `begin` gives the adapter to train
from and `client` makes of the trained one what is uploaded; `rounds.py` checks the uploads and reduces them to a
`Reduced`, of which `server` makes the next state. docs/architecture.md walks through adding one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.alignment import Rotations
from fedrot.core.errors import FedrotError, RecipeError, choices
from fedrot.core.products import joined
from fedrot.core.ranks import Frames, leading_frames, put_back
from fedrot.core.typed import check_type

ALL_PARTS = frozenset({"a", "b", "head"})
Weighting = Literal["held", "used", "uniform"]
ClientState = Mapping[str, Tensor]  # what a client keeps between rounds, by name


@dataclass(frozen=True)
class Capabilities:
    """What a method takes and needs; a recipe that asks for more is refused when it is read."""

    reduction: Literal["sum", "factors"] = "sum"
    """'sum': the weighted mean of the uploads is enough (it then works under secure aggregation); 'factors': the
    server must see each client's own factors."""
    client_state: bool = False
    """Clients keep tensors of the method's between rounds."""
    personal: bool = False
    """Each client's model is its own: they are evaluated and exported by client, there is no one global model."""
    pooled: bool = False
    """All data in one place and one client that holds it: not federated, a reference line."""
    changes_base: bool = False
    """The broadcast carries a change of the base weights beside the adapter."""
    mixed_ranks: bool = True
    """Clients may train at different ranks."""
    second_phase: bool = False
    """The server asks the clients a second question in the same round, and uploads are not the clients' factors."""
    server_optimizer: bool = True
    """The averaged change may go through a server optimizer; only where the reduction is 'sum'."""
    keeps_frame: bool = True
    """The next broadcast is in the frame of this one, so that what a client keeps of its factors keeps its meaning."""
    reports_turn: bool = True
    """What a client did to its factors after training is known from the rotation that it reports."""
    alternates: bool = False
    """The parts that clients train change from round to round."""
    standalone: bool = True
    """Makes sense on adapters alone, without a training round: offered by `fedrot.aggregate`."""
    control: bool = False
    """A control of an experiment, not meant to be good."""

    @property
    def steps(self) -> bool:
        """A server optimizer can step on its averaged change."""
        return self.reduction == "sum" and self.server_optimizer

    @property
    def rules(self) -> frozenset[str]:
        """The rules against hostile clients (`robust.rule`) that it goes with: those that choose or scale uploads, and
        where the mean is enough those that take it number by number. A control's frames must stay as they are.
        """
        if self.second_phase or self.personal or self.pooled or self.control:
            return frozenset()
        return frozenset({"norm", "krum"} | ({"median", "trimmed"} if self.reduction == "sum" else set()))

    @property
    def variates(self) -> bool:
        """SCAFFOLD's control variates keep their meaning: one frame and one set of parameters for all rounds."""
        lost = self.second_phase or self.personal or self.pooled or not self.reports_turn
        return self.reduction == "sum" and not lost

    @property
    def private(self) -> bool:
        """All that the server learns of a client is its term of a sum, which a clip and noise can bound."""
        return self.reduction == "sum" and not (self.second_phase or self.personal or self.pooled)

    @property
    def summed(self) -> bool:
        """The sums of what clients upload and answer are all that the server needs (secure.aggregation)."""
        return self.reduction == "sum" and not self.pooled

    @property
    def buffered(self) -> bool:
        """An upload is a change of the broadcast's factors that can be added to a later broadcast: of the same parts in
        every round, in a frame that stays, and all that the server needs. A control's frames must stay as they are.
        """
        other = self.second_phase or self.personal or self.pooled or self.changes_base or self.control
        return self.reduction == "sum" and self.keeps_frame and not (other or self.alternates)

    def takes(self) -> list[str]:
        """What can be combined with it, in short words."""
        offers = {
            "ranks": self.mixed_ranks,
            "opt": self.steps,
            "variates": self.variates,
            "merge": self.standalone,
        }
        return [word for word, can in offers.items() if can]


@dataclass(frozen=True)
class Broadcast:
    """What the server sends to every client at the start of a round."""

    round: int
    adapter: Adapter  # the global factors and head to train from
    reference: Adapter | None = None  # what to align to, where it is not `adapter` itself
    base_delta: Adapter | None = None  # all change of the base weights so far, low-rank
    base_step: Adapter | None = None  # the part of it that is new: what travels to a client that has the rest
    variate: Adapter | None = None  # SCAFFOLD's control variate of the server, in the adapter's form

    @property
    def frame(self) -> Adapter:
        """The factors whose frame clients align to."""
        return self.reference or self.adapter

    def exported(self, adapter: Adapter) -> Adapter:
        """`adapter`, the global one or a client's own, as all of the model: with the base's change as extra rank."""
        return adapter if self.base_delta is None else joined(adapter, self.base_delta)


@dataclass(frozen=True)
class ServerState:
    """All that the server knows between rounds. Plain tensors: a checkpoint is nothing but these."""

    broadcast: Broadcast
    memory: Mapping[str, Tensor] = field(default_factory=dict)  # what a method keeps, e.g. momentum


@dataclass(frozen=True)
class Seat:
    """The client that a method's client-side functions run for."""

    name: str
    state: ClientState = field(default_factory=dict)


@dataclass(frozen=True)
class ClientResult:
    """What `Method.client` makes of the locally trained adapter."""

    adapter: Adapter
    rotation: Rotations = field(default_factory=dict)  # already applied to `adapter`; sent so that it can be undone
    state: ClientState = field(default_factory=dict)


@dataclass(frozen=True)
class Upload:
    """What a client sends back. `adapter` is complete: parts that did not travel are the broadcast's."""

    client: str
    adapter: Adapter
    held: int  # training examples that the client has
    used: int  # training rows that it processed in this round
    rotation: Rotations = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # layer -> drift, angle, ...
    seconds: Mapping[str, float] = field(default_factory=dict)  # phase -> time spent at the client
    variate: Adapter | None = None  # SCAFFOLD: the change of the client's control variate
    unturned: Adapter | None = None  # of a late upload (`late.py`), `adapter` as it would be without the rotation


@dataclass(frozen=True)
class Reduced:
    """The uploads of a round, reduced. `factors` is filled only for methods whose reduction is 'factors'."""

    mean: Adapter  # sum_i p_i x_i for every tensor x that travelled; the broadcast's own for the others
    count: int
    factors: tuple[tuple[float, Adapter], ...] = ()  # (p_i, adapter_i), p_i summing to one
    answer: Adapter | None = None  # of the second phase, its mean


@dataclass(frozen=True)
class Method:
    """Base of all methods: FedIT's behaviour where a method says nothing else.

    A subclass names itself in `name`, cites its source in `paper`, and declares its settings as dataclass fields with
    defaults, each documented by the string below it; they become the recipe keys `method.<field>`.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    capabilities: ClassVar[Capabilities] = Capabilities()
    needs_reference: ClassVar[bool] = False  # cannot aggregate without a frame to align to
    weighting: ClassVar[Weighting | None] = None  # a rule of its own, whatever the recipe says

    def __post_init__(self) -> None:
        """Raises `RecipeError` naming a setting that is not of its field's type; a subclass adds the ranges."""
        kinds = get_type_hints(type(self))
        for key, value in self.settings().items():
            try:
                check_type(key, value, kinds[key])
            except FedrotError as problem:
                raise RecipeError(f"method.{problem}") from None

    @classmethod
    def standalone(cls, **settings: Any) -> "Method":
        """The method as `fedrot.aggregate` uses it, outside rounds."""
        return cls(**settings)

    def start(self, adapter: Adapter) -> ServerState:
        """The state before round 0."""
        return ServerState(Broadcast(round=0, adapter=adapter))

    def begin(self, broadcast: Broadcast, seat: Seat) -> Adapter:
        """The adapter that this client trains from."""
        return broadcast.adapter

    def trainable(self, round: int) -> frozenset[str]:
        """The parts that clients train in this round, of 'a', 'b' and 'head'."""
        return ALL_PARTS

    def uploads(self, round: int) -> frozenset[str]:
        """The parts that travel to the server in this round."""
        return self.trainable(round)

    def client(self, local: Adapter, broadcast: Broadcast, seat: Seat, rng: torch.Generator) -> ClientResult:
        """What the client sends of its trained adapter, and what it keeps."""
        return ClientResult(local, state=seat.state)

    def narrow(self, adapter: Adapter, rank: int) -> Frames:
        """The frame, by layer, in which a client of a smaller rank takes its part of the adapter."""
        return leading_frames(adapter, rank)

    def widen(self, local: Adapter, frames: Frames, start: Adapter) -> Adapter:
        """A narrow client's trained adapter at the global rank, with the same update; `frames` are those in which it
        took its part of `start`.
        """
        return put_back(local, frames, start)

    def ask(self, state: ServerState, reduced: Reduced) -> Adapter:
        """Second phase: the server's question, in the adapter's form, from the first phase's mean."""
        raise NotImplementedError(f"{self.name} has no second phase")

    def answer(self, local: Adapter, question: Adapter) -> Adapter:
        """Second phase: a client's answer, in the adapter's form, from its trained factors; reduced as a mean."""
        raise NotImplementedError(f"{self.name} has no second phase")

    def server(self, state: ServerState, reduced: Reduced, rng: torch.Generator) -> ServerState:
        """The next state, whose broadcast opens the next round."""
        return ServerState(Broadcast(round=state.broadcast.round + 1, adapter=reduced.mean), state.memory)

    def settings(self) -> dict[str, Any]:
        """The settings as plain values, as a recipe holds them under `method`."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


M = TypeVar("M", bound=type[Method])
_REGISTRY: dict[str, type[Method]] = {}


def register(cls: M) -> M:
    """Class decorator: make a method known under its `name`."""
    if not cls.name or cls.name in _REGISTRY:
        raise ValueError(f"a method needs a name of its own, got {cls.name!r} for {cls.__name__}")
    _REGISTRY[cls.name] = cls
    return cls


def methods() -> Mapping[str, type[Method]]:
    """Every registered method by name."""
    return dict(sorted(_REGISTRY.items()))


def get_method(name: str) -> type[Method]:
    """The method of this name; `RecipeError` with the choices if there is none."""
    if name not in _REGISTRY:
        raise RecipeError(f"method.name: there is no method {name!r}; choose {choices(_REGISTRY)}")
    return _REGISTRY[name]
