"""Rounds over a network, whatever carries the messages: the engine that asks sites instead of training itself."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedrot import __version__
from fedrot.core.adapter import Adapter
from fedrot.core.checks import RejectedUpload
from fedrot.core.errors import AdapterError, RunError
from fedrot.core.methods.base import ALL_PARTS, Broadcast, ClientState, Upload
from fedrot.core.packed import Layout
from fedrot.learning.evaluation import Evaluation
from fedrot.learning.scores import AVERAGED
from fedrot.running.engine import Failure
from fedrot.running.network.messages import Message, MessageError, numbers_of, value_of
from fedrot.running.network.tensors import adapter_message, broadcast_message, read_adapter, read_upload
from fedrot.running.recipe import Recipe
from fedrot.running.simulation import personal


class Post(Protocol):
    """Carries requests to sites and brings their replies. Who a reply is from, the post knows; a reply cannot say."""

    def clients(self) -> Sequence[str]:
        """The sites that can be asked now, by their clients' names."""

    def ask(self, requests: Mapping[str, Message], seconds: float | None) -> Iterator[tuple[str, Message | str]]:
        """Every client's reply as it comes, or why there is none, until all are there or the time is over."""


@dataclass(frozen=True)
class Expected:
    """What a site must have to take part: the server's own."""

    form: Adapter  # the adapter of round 0
    model: str  # hash of the base weights
    labels: Sequence[str]

    def differs(self, reply: Message) -> str | None:
        """Why a site cannot take part, from what it says of itself; None where it can. Raises `MessageError`."""
        schema = Layout.of(self.form, ALL_PARTS).schema
        for key, mine, what in (
            ("fedrot", __version__, "another version of fedrot"),
            ("model", self.model, "another base model (the hash of its weights differs)"),
            ("schema", schema, "an adapter of another form (layers, ranks, scales or dtypes)"),
            ("labels", list(self.labels), "other labels"),
        ):
            theirs = value_of(reply.header, key, type(mine))
            if theirs != mine:
                shown = f": {str(theirs)[:80]}, not {str(mine)[:80]}"
                return f"has {what}{shown if key in ('fedrot', 'labels') else ''}"
        return None


class Network:
    """The engine of a run between sites; see `engine.Engine`. What clients keep stays with them."""

    def __init__(self, recipe: Recipe, expected: Expected, post: Post) -> None:
        self._recipe, self._expected, self._post = recipe, expected, post
        self._joined: dict[str, Mapping[str, Any]] = {}  # client -> examples by split
        self._settled: dict[str, dict[str, Any]] = {}  # client -> what became of its last upload
        self._asked: tuple[int, list[str]] = 0, []
        self.refused: dict[str, str] = {}  # why a site does not take part

    def join(self) -> None:
        """Let the sites that can be asked take part, if they have what the run needs; the others are in `refused`."""
        fresh = [client for client in self._post.clients() if client not in self._joined]
        values = self._recipe.to_dict()
        values["data"] |= {"path": None}  # where data lies is each site's own
        request = Message.of(kind="join", fedrot=__version__, recipe=values)
        for client, reply in self._replies(dict.fromkeys(fresh, request)):
            try:
                reason = reply if isinstance(reply, str) else self._expected.differs(reply)
                if reason is None and isinstance(reply, Message):
                    self._joined[client] = numbers_of(reply.header, "examples")
                    self.refused.pop(client, None)
                    continue
            except MessageError as problem:
                reason = str(problem)
            self.refused[client] = str(reason)

    @property
    def clients(self) -> Sequence[str]:
        """Every site that takes part, sorted."""
        return sorted(self._joined)

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Upload | Failure]:
        """One round of local training at these sites."""
        self._asked = broadcast.round, list(clients)
        request = broadcast_message(broadcast, self._recipe, "train")
        for client, reply in self._replies(self._told(request, clients)):
            if isinstance(reply, str):
                yield Failure(client, reply)
                continue
            try:
                yield read_upload(reply, client, broadcast, self._recipe)
            except RejectedUpload as problem:
                yield Failure(client, str(problem))

    def remember(self, records: Iterable[Mapping[str, Any]]) -> None:
        """What became of every site's last upload, by the records of the rounds so far: for a server that restarts."""
        for record in records:
            used, dropped = record["clients"]["used"], record["clients"]["dropped"]
            for client in (*used, *dropped):
                self._settled[client] = {"round": record["round"], "accepted": client in used}

    def settle(self, accepted: Collection[str]) -> None:
        """Remember what became of the uploads: sites are told with the next request."""
        number, clients = self._asked
        self._settled |= {client: {"round": number, "accepted": client in accepted} for client in clients}

    def answer(self, question: Adapter, clients: Sequence[str]) -> Iterator[Upload | Failure]:
        """The second phase of a round."""
        request = adapter_message(question, frozenset({"b"}), kind="answer", round=self._asked[0])
        for client, reply in self._replies(dict.fromkeys(clients, request)):
            if isinstance(reply, str):
                yield Failure(client, reply)
                continue
            try:
                found = read_adapter(reply, question, frozenset({"a"}))
            except (MessageError, AdapterError) as problem:
                yield Failure(client, f"answer: {problem}")
                continue
            # What an upload says beside its tensors was checked in the first phase.
            metrics = {"loss": 0.0, "steps": 0.0, "tokens": 0.0}
            yield Upload(client, found, held=1, used=1, metrics=metrics)

    def evaluate(self, broadcast: Broadcast, split: str, limit: int | None = None) -> Evaluation:
        """The sites' own scores of their own examples, and their mean by numbers of examples."""
        clients = self.clients
        each = None if limit is None else math.ceil(limit / len(clients))
        request = broadcast_message(broadcast, self._recipe, "evaluate", split=split, limit=each)
        found: dict[str, tuple[int, dict[str, float]]] = {}
        metric = ""
        for client, reply in self._replies(self._told(request, clients)):
            if isinstance(reply, str):
                continue
            try:
                count, scores = value_of(reply.header, "examples", int), numbers_of(reply.header, "scores")
                named = value_of(reply.header, "metric", str)
                if count < 1 or named not in scores or (metric and named != metric):
                    raise MessageError("its scores are not those that the others give")
            except MessageError:
                continue
            metric, found[client] = named, (count, {k: v for k, v in scores.items() if k in AVERAGED})
        if not found:
            raise RunError(f"no site gave its scores of {split}")
        total = sum(count for count, _ in found.values())
        means = {key: sum(count * one[key] for count, one in found.values()) / total for key in found[min(found)][1]}
        kind = "personal" if personal(self._recipe) else "global"
        return Evaluation(split, total, metric, means, kind, {client: one for client, (_, one) in found.items()})

    def states(self) -> Mapping[str, ClientState]:
        """Nothing: clients keep what they keep."""
        return {}

    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Nothing is to be put back."""

    def _told(self, request: Message, clients: Sequence[str]) -> dict[str, Message]:
        """The request to each client, with what became of its last upload."""
        return {
            client: Message({**request.header, "settled": self._settled.get(client)}, request.payload)
            for client in clients
        }

    def _replies(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Message | str]]:
        """Replies as they come; a refusal as its reason."""
        for client, reply in self._post.ask(requests, self._recipe.federation.deadline):
            refused = reply.refused if isinstance(reply, Message) else reply
            yield client, reply if refused is None else refused
