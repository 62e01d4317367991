"""A client's seat at its own site: it holds the base model, the data and what the client keeps, and answers requests.

The recipe comes from the server; where data and model are, and how the arithmetic is done, is the site's own. All that
a site trains and keeps is what the embedded engine would for this one client.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fedrot import __version__
from fedrot.core.errors import FedrotError, RunError
from fedrot.core.files import tensor_bytes, write_atomic
from fedrot.core.methods.base import ALL_PARTS, Broadcast, ClientState
from fedrot.core.packed import Layout
from fedrot.running.client import Round
from fedrot.running.network.messages import Message, MessageError, value_of
from fedrot.running.network.tensors import (
    adapter_message,
    read_adapter,
    read_broadcast,
    upload_message,
)
from fedrot.running.prepare import Prepared, prepare_site
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.simulation import Simulation


@dataclass(frozen=True)
class Here:
    """What a site says itself, whatever the server's recipe says."""

    name: str  # the client's
    data: Path  # its data, as data.path
    model: str | None = None  # its copy of the base model, as model.path
    compute: Mapping[str, Any] | None = None  # keys of the section compute


class Site:
    """Answers a server's requests for one client. `folder` is where what the client keeps survives a restart."""

    def __init__(self, here: Here, folder: Path) -> None:
        self._here, self._memory = here, Memory(folder)
        self._seat: _Seat | None = None

    def handle(self, request: Message) -> Message:
        """The reply to a request: a refusal with the reason where there is no other."""
        try:
            kind = value_of(request.header, "kind", str)
            if kind == "join":
                return self._join(request)
            if self._seat is None:
                raise RunError(f"{self._here.name}: was not told the recipe yet; it must join first")
            if kind not in _ANSWERS:
                raise MessageError(f"a request of kind {kind!r} is not known to this version of fedrot")
            return _ANSWERS[kind](self._seat, request)
        except FedrotError as problem:
            return Message.refusal(str(problem))

    def _join(self, request: Message) -> Message:
        """Take the recipe on, load what it needs, and say what there is."""
        if (version := value_of(request.header, "fedrot", str)) != __version__:
            raise RunError(f"{self._here.name} has fedrot {__version__}, the server {version}; install the same one")
        recipe = self._recipe(value_of(request.header, "recipe", dict))
        if self._seat is None or self._seat.asked != recipe:
            self._seat = _Seat(recipe, prepare_site(recipe, self._here.name), self._memory)
        return self._seat.introduction()

    def _recipe(self, values: dict[str, Any]) -> Recipe:
        """The server's recipe with what is the site's own."""
        here = self._here
        changed = {section: dict(v) if isinstance(v, dict) else v for section, v in values.items()}
        changed.setdefault("data", {})["path"] = str(here.data)
        if here.model is not None:
            changed.setdefault("model", {})["path"] = here.model
        changed["compute"] = dict(here.compute or {})
        changed["init"] = None  # the server sends what clients start from
        return parse_recipe(changed, source="the server's recipe")


class _Seat:
    """A site that has joined a run."""

    def __init__(self, asked: Recipe, ready: Prepared, memory: "Memory") -> None:
        self.asked, self._ready, self._memory = asked, ready, memory
        self._engine = Simulation(ready)
        (self._name,) = self._engine.clients
        self._form = ready.model.read()
        self._engine.restore({self._name: memory.kept()})
        self._last: tuple[int, Round] | None = None

    def introduction(self) -> Message:
        """What the server must know before it lets the site take part."""
        ready = self._ready
        return Message.of(
            fedrot=__version__,
            client=self._name,
            schema=Layout.of(self._form, ALL_PARTS).schema,
            model=ready.model.fingerprint(),
            labels=list(ready.dataset.labels),
            examples={split: len(rows) for split, rows in ready.dataset.splits.items()},
        )

    def train(self, request: Message) -> Message:
        """A round of local training. Its result counts once the server has said that it went into the sum."""
        self._settle(request.header.get("settled"))
        broadcast = self._broadcast(request)
        ((_, made),) = self._engine.rounds(broadcast, [self._name])
        if not isinstance(made, Round):
            return Message.refusal(made.reason)
        self._memory.hold(broadcast.round, made.kept)
        self._last = broadcast.round, made
        return upload_message(made, broadcast, self._ready.recipe)

    def answer(self, request: Message) -> Message:
        """The second phase of the round that was trained last."""
        number = value_of(request.header, "round", int)
        if self._last is None or self._last[0] != number:
            raise RunError(f"{self._name}: has nothing of round {number} to answer from")
        question = read_adapter(request, self._form, frozenset({"b"}))
        found = self._ready.recipe.method.answer(self._last[1].trained, question)
        return adapter_message(found, frozenset({"a"}))

    def evaluate(self, request: Message) -> Message:
        """The scores of the broadcast, or of the client's own model, on the site's own examples."""
        self._settle(request.header.get("settled"))
        split, limit = value_of(request.header, "split", str), request.header.get("limit")
        if split not in self._ready.encoded:
            raise RunError(f"{self._name}: has no split {split!r} to score")
        found = self._engine.evaluate(self._broadcast(request), split, limit if isinstance(limit, int) else None)
        return Message.of(metric=found.metric, scores=dict(found.scores), examples=found.examples)

    def _broadcast(self, request: Message) -> Broadcast:
        return read_broadcast(request, self._form, self._ready.recipe)

    def _settle(self, settled: Any) -> None:
        """Keep what a round left, or forget it, as the server says of its upload."""
        if settled is None:
            return
        number, accepted = value_of(settled, "round", int), value_of(settled, "accepted", bool)
        self._memory.settle(number, accepted, self._name)
        self._engine.restore({self._name: self._memory.kept()})


_ANSWERS = {"train": _Seat.train, "answer": _Seat.answer, "evaluate": _Seat.evaluate}


class Memory:
    """What a client keeps between rounds, on disk: of the last accepted round, and of one that is not settled yet."""

    def __init__(self, folder: Path) -> None:
        self._kept, self._held = folder / "kept.safetensors", folder / "held.safetensors"

    def kept(self) -> ClientState:
        """The state that counts; empty before the first accepted round."""
        return _load(self._kept)[1] if self._kept.exists() else {}

    def hold(self, round: int, state: ClientState) -> None:
        """Put a round's state by until the server has said what became of its upload; on disk when this returns."""
        write_atomic(self._held, tensor_bytes(state, {"round": str(round)}))

    def settle(self, round: int, accepted: bool, who: str) -> None:
        """The upload of this round went into the sum, or did not. Saying the same again changes nothing.

        Raises `RunError` where an accepted round's state is lost.
        """
        held = _load(self._held)[0] if self._held.exists() else None
        if accepted and held == round:
            self._held.replace(self._kept)
        elif accepted and (not self._kept.exists() or _load(self._kept)[0] != round):
            raise RunError(
                f"{who}: the server took the upload of round {round} in, and what was kept of it is gone here; bring "
                f"{self._kept.parent} back as it was"
            )
        elif not accepted and held == round:
            self._held.unlink()


def _load(path: Path) -> tuple[int, dict[str, Tensor]]:
    """(round, state) of a file. `RunError` where it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            number = int((file.metadata() or {})["round"])
            return number, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as problem:
        raise RunError(f"{path}: what the client keeps cannot be read ({' '.join(str(problem).split())})") from None
