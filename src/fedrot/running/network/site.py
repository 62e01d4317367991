"""A client's seat at its own site: it holds the base model, the data and what the client keeps, and answers requests.

The recipe comes from the server; where data and model are, and how the arithmetic is done, is the site's own. All that
a site trains and keeps is what the embedded engine would for this one client.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrot import __version__
from fedrot.core.adapter import Adapter
from fedrot.core.checks import RejectedUpload
from fedrot.core.errors import DataError, FedrotError, RecipeError, RunError
from fedrot.core.files import remove_partial
from fedrot.core.methods.base import ALL_PARTS, ClientState, Upload
from fedrot.core.packed import Layout
from fedrot.learning.sources.read import known_labels
from fedrot.running.choices import adopted
from fedrot.running.client import Round, keeps_state
from fedrot.running.network.memory import Memory
from fedrot.running.network.messages import Message, MessageError, Refusal, count_of, shown, value_of
from fedrot.running.network.secure import STAGES, require
from fedrot.running.network.tensors import (
    adapter_message,
    read_adapter,
    read_broadcast,
    upload_message,
)
from fedrot.running.prepare import Prepared, prepare_site
from fedrot.running.privacy import counted, told
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import changed_key, parse_recipe, read_recipe
from fedrot.running.secure import SecureSum
from fedrot.running.simulation import Simulation

if TYPE_CHECKING:
    from fedrot.running.network.secure.site import Participant


@dataclass(frozen=True)
class Here:
    """What a site says itself, whatever the server's recipe says."""

    name: str  # the client's
    data: Path  # its data, as data.path
    model: str | None = None  # its copy of the base model, as model.path
    compute: Mapping[str, Any] | None = None  # keys of the section compute
    secure: bool = False  # whether it takes part in runs with secure.aggregation only
    recipe: str | None = None  # the file of the recipe that was agreed on: it takes part in no other


class Site:
    """Answers a server's requests for one client. `folder` is where what the client keeps survives a restart, in a
    folder for each run, and where a run's result is left.
    """

    def __init__(self, here: Here, folder: Path) -> None:
        self._here, self._folder = here, folder
        self._seat: Seat | None = None

    def handle(self, request: Message) -> Message:
        """The reply to a request; see `replied`."""
        return replied(self._here.name, lambda: self._reply(request))

    def _reply(self, request: Message) -> Message:
        if (kind := kind_of(request)) == "join":
            return self._join(request)
        if self._seat is None:  # its process was started again: the server lets it join and repeats the request
            return Message.refusal(f"{self._here.name}: was not told the recipe yet; it must join first", join=True)
        return ANSWERS[kind](self._seat, request)

    def _join(self, request: Message) -> Message:
        """Take the recipe on, load what it needs, and say what there is."""
        if (version := value_of(request.header, "fedrot", str)) != __version__:
            raise Refusal(
                f"{self._here.name} has fedrot {__version__}, the server {shown(version)}; install the same one"
            )
        recipe = self._recipe(value_of(request.header, "recipe", dict))
        if self._here.secure and not recipe.secure.aggregation:
            raise Refusal(f"{self._here.name} takes part in runs with secure.aggregation only; set it to true")
        run = value_of(request.header, "run", str)
        if not re.fullmatch(r"[A-Za-z0-9]{1,64}", run):
            raise MessageError(f"the run's name must be of letters and digits, got {shown(run)}")
        if self._seat is None or self._seat.asked != (run, recipe):
            ready = prepare_site(recipe, self._here.name)
            # As loaded: rounds may change both.
            form, base = ready.model.read(), ready.model.fingerprint()
            self._seat = Seat((run, recipe), ready, self._folder / run, form, base)
            logging.getLogger("fedrot").info("%s: joined the run %s (%s)", self._here.name, run, recipe.name)
        return self._seat.introduction(known_labels(recipe.data) or ())

    def _recipe(self, values: dict[str, Any]) -> Recipe:
        """The server's recipe with what is the site's own, if it is the one that was agreed on."""
        source = "the server's recipe"
        recipe = parse_recipe(self._own(values), source=source)
        if known_labels(recipe.data) is None:  # what a column holds, every text of it, is not the server's to know
            raise RecipeError(f"{source}: data.labels: a site does not say its labels; name them, in their order")
        for key in ("train", "validation", "test"):
            name = Path(getattr(recipe.data, key) or "")
            if name.is_absolute() or ".." in name.parts:
                raise RecipeError(f"{source}: data.{key}: {str(name)!r} is not in the site's own folder of data")
        if self._here.recipe is not None:
            was, asked = (_that_matters(r) for r in (adopted(self._agreed(self._here.recipe), recipe), recipe))
            if change := changed_key(was, asked):
                key, mine, theirs = change
                raise Refusal(
                    f"{self._here.name} has agreed to {key} {shown(mine)}, {source} has {shown(theirs)}; run it "
                    "as it was agreed on, or agree on another one"
                )
        return recipe

    def _agreed(self, path: str) -> Recipe:
        """The recipe in the site's file, with what is the site's own. `RunError` where it cannot be read."""
        try:
            return parse_recipe(self._own(read_recipe(Path(path), ()).to_dict()))
        except RecipeError as problem:
            raise RunError(f"the recipe that was agreed on: {problem}") from None

    def _own(self, values: dict[str, Any]) -> dict[str, Any]:
        """A recipe's values with what is the site's own."""
        here = self._here
        own: dict[str, dict[str, Any]] = {"data": {"path": str(here.data)}}
        if here.model is not None:
            own["model"] = {"path": here.model}
        changed = dict(values)
        for section, keys in own.items():
            found = values.get(section, {})
            changed[section] = {**found, **keys} if isinstance(found, dict) else found
        changed["compute"] = dict(here.compute or {})
        changed["init"] = None  # the server sends what clients start from
        return changed


def _that_matters(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe has an effect at a site."""
    servers = ("name", "partition", "checkpoint", "tracking")
    return {key: value for key, value in recipe.to_dict().items() if key not in servers}


class Seat:
    """A site that has joined a run.

    Args:
        asked: the run's name and recipe, as the site was told.
        ready: what is loaded, with a partition of one client.
        folder: where it keeps what it keeps.
        form: the adapter of round 0.
        base: the hash of the base model's weights.
    """

    def __init__(self, asked: tuple[str, Recipe], ready: Prepared, folder: Path, form: Adapter, base: str) -> None:
        self.asked, self._ready, self._folder = asked, ready, folder
        remove_partial(folder)
        self._memory = Memory(folder)
        self._engine = Simulation(ready)
        (self._name,) = self._engine.clients
        self._form, self._base = form, base
        self._last: tuple[int, Round] | None = None
        self._sum: Participant | None = None
        if ready.recipe.secure.aggregation:
            require()

    def introduction(self, labels: Sequence[str]) -> Message:
        """What the server must know before it lets the site take part; `labels` are those that the server knows."""
        ready = self._ready
        counts = {split: len(mine.get(self._name, ())) for split, mine in ready.partition.indices.items()}
        return Message.of(
            fedrot=__version__,
            client=self._name,
            schema=Layout.of(self._form, ALL_PARTS).schema,
            model=self._base,
            labels=list(labels),
            examples={split: counts[split] for split in counted(ready.recipe, counts)},
        )

    def train(self, request: Message) -> Message:
        """A round of local training. What it leaves counts once the server says that its upload went into the sum."""
        broadcast = read_broadcast(request, self._form, self._ready.recipe)
        accepted, state = self._take_up(request)
        ((_, made),) = self._engine.rounds(broadcast, [self._name])
        if not isinstance(made, Round):
            return Message.refusal(made.reason)
        if keeps_state(self._ready.recipe):
            self._memory.hold(broadcast.round, made.kept or state, accepted)
        self._last = broadcast.round, made
        if self._ready.recipe.secure.aggregation:
            total = count_of(request.header, "total", least=1)
            return self._open(SecureSum.of_uploads(self._ready.recipe, broadcast, total), made.upload)
        return upload_message(made, broadcast, self._ready.recipe)

    def answer(self, request: Message) -> Message:
        """The second phase of the round that was trained last."""
        number = count_of(request.header, "round")
        if self._last is None or self._last[0] != number:
            raise Refusal(f"{self._name}: has nothing of round {number} to answer from")
        question = read_adapter(request, self._form, frozenset({"b"}))
        found = self._ready.recipe.method.answer(self._last[1].trained, question)
        if self._ready.recipe.secure.aggregation:
            total = count_of(request.header, "total", least=1)
            of = SecureSum.of_answers(self._ready.recipe, number, question, total)
            return self._open(of, replace(self._last[1].upload, adapter=found, rotation={}))
        return adapter_message(found, frozenset({"a"}), round=number)

    def _open(self, of: SecureSum, upload: Upload) -> Message:
        """Begin a secure sum, in the place of sending an upload."""
        from fedrot.running.network.secure.site import Consents, Participant

        self._sum = Participant(self._name, of, of.summand(upload), Consents(self._folder))
        return self._sum.opening()

    def stage(self, request: Message) -> Message:
        """A stage of the secure sum that was begun last."""
        if self._sum is None:
            raise Refusal(f"{self._name}: has begun no secure sum")
        return self._sum.handle(request)

    def evaluate(self, request: Message) -> Message:
        """The scores of the broadcast, or of the client's own model, on the site's own examples."""
        if not told(self._ready.recipe)[0]:
            raise Refusal(f"{self._name}: its examples' scores have no noise, and privacy.mode says to give none")
        split, limit = value_of(request.header, "split", str), None
        if request.header.get("limit") is not None:
            limit = count_of(request.header, "limit", least=1)
        if split not in self._ready.encoded:
            raise Refusal(f"{self._name}: has no split {shown(split)} to score")
        broadcast = read_broadcast(request, self._form, self._ready.recipe)
        self._take_up(request)
        found = self._engine.evaluate(broadcast, split, limit)
        return Message.of(round=broadcast.round, metric=found.metric, scores=dict(found.scores))

    def finish(self, request: Message) -> Message:
        """Keep the run's result as a PEFT adapter: the global one, or the client's own where models are personal."""
        broadcast = read_broadcast(request, self._form, self._ready.recipe)
        self._take_up(request)
        own = self._engine.finish(broadcast).get(self._name, broadcast.adapter)
        path = self._folder / "adapter"
        broadcast.exported(own).save(path)
        logging.getLogger("fedrot").info("%s: the run is over, its adapter is %s", self._name, path)
        return Message.of(round=broadcast.round)

    def _take_up(self, request: Message) -> tuple[int | None, ClientState]:
        """Go on from the last round whose upload the server took in: its number, and what the client kept of it.

        Nothing is forgotten here: a server may stop before the round that it speaks of counts, and play it again.
        """
        accepted = None
        if request.header.get("accepted") is not None:
            accepted = count_of(request.header, "accepted")
        state = self._memory.of(accepted, self._name) if keeps_state(self._ready.recipe) else {}
        self._engine.restore({self._name: state})
        return accepted, state


ANSWERS = {"train": Seat.train, "answer": Seat.answer, "evaluate": Seat.evaluate, "finish": Seat.finish}
ANSWERS |= dict.fromkeys(STAGES, Seat.stage)


def kind_of(request: Message) -> str:
    """What is asked. `MessageError` for what no site answers."""
    kind: str = value_of(request.header, "kind", str)
    if kind != "join" and kind not in ANSWERS:
        raise MessageError(f"a request of kind {shown(kind)} is not known to this version of fedrot")
    return kind


# Errors whose text is made of what the server sent, or may know. Texts of others may quote examples, or name files.
_FOR_THE_SERVER = (MessageError, Refusal, RecipeError, RejectedUpload)


def replied(name: str, reply: Callable[[], Message]) -> Message:
    """The reply, or a refusal where there is none, with the reason if the server may know it; else that is in the
    site's own log. Never raises an `Exception`.
    """
    try:
        found = reply()
        found.header_bytes()  # what cannot travel is refused here, where the reason is known
    except _FOR_THE_SERVER as problem:
        return Message.refusal(str(problem))
    except FedrotError as problem:
        logging.getLogger("fedrot").error("%s: %s", name, problem)
        what = "read its data or model as the recipe says" if isinstance(problem, DataError) else "do what is asked"
        return Message.refusal(f"{name}: cannot {what}; the site's own log says why")
    except Exception as problem:  # the site is there for the next request
        logging.getLogger("fedrot").exception("%s: a request could not be answered", name)
        return Message.refusal(f"{name}: {type(problem).__name__}; the site's own log says where")
    return found
