"""Rounds over a network, whatever carries the messages: the engine that asks sites instead of training itself."""

import logging
import math
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from fedrot import __version__
from fedrot.core.adapter import Adapter
from fedrot.core.checks import RejectedUpload
from fedrot.core.errors import RunError
from fedrot.core.methods.base import ALL_PARTS, Broadcast, ClientState, Upload
from fedrot.core.packed import Layout
from fedrot.core.secure_sum import MOST_WEIGHT
from fedrot.learning.evaluation import Evaluation
from fedrot.learning.local import most_rows
from fedrot.learning.tasks import classification, generation
from fedrot.running.engine import Failure, Summed
from fedrot.running.network.journal import Exchange, Journal, now
from fedrot.running.network.messages import Message, MessageError, count_of, of_round, shown, value_of
from fedrot.running.network.scores import averaged, read_scores
from fedrot.running.network.secure import require
from fedrot.running.network.tensors import adapter_message, broadcast_message, read_adapter, read_upload
from fedrot.running.privacy import counted, told
from fedrot.running.recipe import Recipe
from fedrot.running.secure import SecureSum, most_weight, total_weight
from fedrot.running.settings import drawn_count, least_uploads
from fedrot.running.simulation import personal

# How long a site may take to join: it loads its model then.
_JOINING = 600.0
# Between two looks for sites that are not there yet.
_PAUSE = 5.0


class Post(Protocol):
    """Carries requests to sites and brings their replies. Who a reply is from, the post knows; a reply cannot say.

    Bytes that are no message (`Message.from_parts`) are a reply that is not there, with the reason.
    """

    def clients(self) -> Sequence[str]:
        """The sites that can be asked now, by their clients' names."""

    def ask(
        self, requests: Mapping[str, Message], seconds: float | None
    ) -> Generator[tuple[str, Message | str], None, None]:
        """Every client's reply as it comes, or why there is none, until all are there or the time is over. Closed
        before, it waits no more; a client that is asked the same again is not to do it twice for that.
        """


@dataclass(frozen=True)
class Expected:
    """What a site must have to take part: the server's own."""

    form: Adapter  # the adapter of round 0
    model: str  # hash of the base weights
    labels: Sequence[str]

    def examples(self, reply: Message, recipe: Recipe, clients: int) -> dict[str, int]:
        """How many examples of each split a site has, by what it says of itself as far as the recipe lets it. Raises
        `MessageError` where it does not, or says that it is not what the run needs, or so many examples that a secure
        sum of all `clients` could not take its weight.
        """
        schema = Layout.of(self.form, ALL_PARTS).schema
        for key, mine, what in (
            ("fedrot", __version__, "another version of fedrot"),
            ("model", self.model, "another base model (the hash of its weights differs)"),
            ("schema", schema, "an adapter of another form (layers, ranks, scales or dtypes)"),
            ("labels", list(self.labels), "other labels"),
        ):
            theirs = value_of(reply.header, key, type(mine))
            if theirs != mine:
                said = f": {shown(theirs)}, not {shown(mine)}" if key in ("fedrot", "labels") else ""
                raise MessageError(f"has {what}{said}")
        counts = value_of(reply.header, "examples", dict)
        splits = counted(recipe, dict.fromkeys(("train", *counts)))
        found = {split: count_of(counts, split, least=int(split == "train")) for split in splits}
        most = MOST_WEIGHT // max(1, clients)
        if recipe.secure.aggregation and (weight := most_weight(recipe, found.get("train", 1))[0]) > most:
            raise MessageError(
                f"has {found['train']} training examples, a weight of up to {weight}; in a secure sum of {clients} "
                f"clients each may have {most}, unless federation.weighting is uniform"
            )
        return found

    @property
    def metric(self) -> str:
        """The score that counts."""
        return classification.METRIC if self.labels else generation.METRIC


class Network:
    """The engine of a run between sites; see `engine.Engine`. What clients keep stays with them.

    Every request for a round says which upload of the site's was the last that went into the sum: what the site kept of
    that round is what it goes on from. A site whose process was started again is told the recipe anew.
    """

    def __init__(
        self,
        recipe: Recipe,
        expected: Expected,
        post: Post,
        clients: Sequence[str] | None = None,
        run: str = "run",
        journal: Journal | None = None,
        wait: float = 0.0,
    ) -> None:
        """`clients` are those that may be drawn, whether they are there or not; None: all that have joined. `run` names
        the run to its sites, which keep what they keep under it. `wait`: the seconds that the first round may wait
        for sites.
        """
        self._recipe, self._expected, self._post = recipe, expected, post
        self._named, self._run, self._journal, self._wait = clients, run, journal, wait
        self._joined: dict[str, dict[str, int]] = {}  # client -> examples by split
        self._accepted: dict[str, int] = {}  # client -> the last round whose upload went into the sum
        self._trains: dict[str, int] = {}  # client -> the round of the broadcast that it was last asked to train from
        self._round = 0
        self.refused: dict[str, str] = {}  # why a site does not take part

    def begin(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take up a run after these rounds: wait for its sites, as long as was said.

        Raises `RunError` where there are too few of them then, or none has examples that the recipe scores.
        """
        self.remember(records)
        end, said = time.monotonic() + self._wait, None
        while True:
            self.join()
            missing = [client for client in self.clients if client not in self._joined]
            if not missing or time.monotonic() >= end:
                break
            if said != missing:
                logging.getLogger("fedrot").info("waiting for %s", "; ".join(map(self._why_not, missing)))
            said = missing
            time.sleep(min(_PAUSE, max(0.0, end - time.monotonic())))
        federation = self._recipe.federation
        asked = federation.buffer or drawn_count(len(self.clients), federation.participation)
        needed = least_uploads(federation.quorum, asked)
        if len(self._joined) < needed:
            raise RunError(
                f"{len(self._joined)} of {len(self.clients)} sites are there, a round needs {needed} "
                f"(federation.quorum); {'; '.join(map(self._why_not, missing))}"
            )
        for key, split in self._recipe.evaluation.scored.items():
            if not any(found.get(split) for found in self._joined.values()):
                raise RunError(f"evaluation.{key}: no site has examples of {split!r}; choose another split")

    def _why_not(self, client: str) -> str:
        return f"{client} ({self.refused.get(client, 'is not connected')})"

    def join(self) -> None:
        """Let the sites that can be asked take part, if they have what the run needs; the others are in `refused`."""
        there = [client for client in self._post.clients() if self._named is None or client in self._named]
        self._introduce([client for client in there if client not in self._joined], _JOINING)

    def _introduce(self, clients: Iterable[str], seconds: float | None) -> None:
        request = self._join_request()
        for client, reply in self._ask(dict.fromkeys(clients, request), seconds):
            self._admit(client, request, reply)

    def _join_request(self) -> Message:
        values = self._recipe.to_dict()
        values["data"] |= {"path": None}  # where data lies is each site's own
        return Message.of(kind="join", fedrot=__version__, run=self._run, recipe=values)

    def _admit(self, client: str, request: Message, reply: Message | str) -> None:
        """Let a site take part, if its reply to the request to join says that it has what the run needs."""
        try:
            clients = self._post.clients() if self._named is None else self._named
            self._joined[client] = self._expected.examples(_given(reply), self._recipe, len(clients))
            self.refused.pop(client, None)
        except MessageError as problem:
            self.refused[client] = str(problem)
            if isinstance(reply, Message) and reply.refused is None:  # it did not refuse, this server does
                self._note(client, request, Message.refusal(str(problem)), now())

    @property
    def clients(self) -> Sequence[str]:
        """Who may be drawn, sorted: it depends on their names, so none leaves while a run lasts."""
        return sorted(self._joined if self._named is None else self._named)

    @property
    def held(self) -> Mapping[str, int]:
        """Training examples of the sites that take part now, as they said; empty where they do not say."""
        return {client: counts["train"] for client, counts in self._joined.items() if counts}

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Upload | Failure]:
        """One round of local training at these sites."""
        self._begins(broadcast.round, clients)
        request = broadcast_message(broadcast, self._recipe, "train")
        for client, reply in self._replies(self._told(request, clients)):
            yield self._upload(client, reply, broadcast)

    def _begins(self, round: int, clients: Iterable[str]) -> None:
        self._round = round
        self._trains |= dict.fromkeys(clients, round)

    def _upload(self, client: str, reply: Message | str, broadcast: Broadcast) -> Upload | Failure:
        """What a site made of the broadcast that it was sent."""
        try:
            upload = read_upload(_given(reply), client, broadcast, self._recipe)
            self._check_counts(upload)
            return upload
        except (MessageError, RejectedUpload) as problem:
            return Failure(client, str(problem))

    def train_summed(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Summed | Failure]:
        """The same with secure aggregation: no upload is seen."""
        self._begins(broadcast.round, clients)
        held = self._held(clients)
        of = SecureSum.of_uploads(self._recipe, broadcast, total_weight(self._recipe, held.values()))
        request = broadcast_message(broadcast, self._recipe, "train", total=of.total)
        return self._summed(of, self._told(request, clients), held)

    def _held(self, clients: Sequence[str]) -> dict[str, int]:
        """How many examples the sites said to have, 1 where they do not say, which is where all weigh alike; those that
        have not joined do so now.
        """
        self._introduce([c for c in clients if c not in self._joined], self._recipe.federation.deadline)
        return {client: self._joined[client].get("train", 1) for client in clients if client in self._joined}

    def _summed(
        self, of: SecureSum, requests: Mapping[str, Message], held: Mapping[str, int]
    ) -> Iterator[Summed | Failure]:
        """The stages of a secure sum, which these requests begin; a deadline is of each stage."""
        require()
        from fedrot.running.network.secure.server import secure_sum

        seconds = self._recipe.federation.deadline
        away = [(client, self.refused[client]) for client in requests if client not in held]
        replies = chain(away, self._replies({client: requests[client] for client in held}))
        return secure_sum(of, replies, lambda more: self._ask(more, seconds), held, list(requests))

    def _check_counts(self, upload: Upload) -> None:
        """A site's weight is what it said when it joined, or no more than follows from that. With privacy.mode local or
        example no upload says any.
        """
        if not told(self._recipe)[0]:
            return
        joined = self._joined[upload.client]["train"]
        if upload.held != joined:
            raise RejectedUpload(f"upload: it says {upload.held} examples are held, the site said {joined} on joining")
        if upload.used > (most := most_rows(joined, self._recipe.local)):
            raise RejectedUpload(f"upload: it says {upload.used} rows were used, {joined} examples give {most} at most")

    def remember(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Which uploads went into the sum, by the records of the rounds so far: for a server that restarts."""
        for record in records:
            clients = record["clients"]
            # A rule against hostile clients looks at uploads that were accepted; a late one is of an earlier round.
            late = clients.get("late", {})
            accepted = {client: record["round"] - late.get(client, 0) for client in clients["used"]}
            self._accepted |= dict.fromkeys(clients.get("kept", ()), record["round"]) | accepted

    def settle(self, accepted: Collection[str]) -> None:
        """Remember whose uploads went into the sum: sites are told with the next request."""
        self._accepted |= {client: self._trains[client] for client in accepted}

    def answer(self, question: Adapter, clients: Sequence[str]) -> Iterator[Upload | Failure]:
        """The second phase of a round."""
        request = adapter_message(question, frozenset({"b"}), kind="answer", round=self._round)
        for client, reply in self._replies(dict.fromkeys(clients, request)):
            try:
                message = _given(reply)
                of_round(message.header, self._round)
                found = read_adapter(message, question, frozenset({"a"}))
            except MessageError as problem:
                yield Failure(client, f"answer: {problem}")
                continue
            # What an upload says beside its tensors was checked in the first phase.
            metrics = {"loss": 0.0, "steps": 0.0, "tokens": 0.0}
            yield Upload(client, found, held=1, used=1, metrics=metrics)

    def answer_summed(self, question: Adapter, clients: Sequence[str]) -> Iterator[Summed | Failure]:
        """The second phase with secure aggregation."""
        held = self._held(clients)
        of = SecureSum.of_answers(self._recipe, self._round, question, total_weight(self._recipe, held.values()))
        request = adapter_message(question, frozenset({"b"}), kind="answer", round=self._round, total=of.total)
        return self._summed(of, dict.fromkeys(clients, request), held)

    def evaluate(self, broadcast: Broadcast, split: str, limit: int | None = None) -> Evaluation:
        """The sites' own scores of their own examples, and their mean by numbers of examples.

        A site that gives none, or none that can be, is left out, with the reason in the log. `RunError` where all are.
        """
        clients, metric = self.clients, self._expected.metric
        each = None if limit is None else math.ceil(limit / max(1, len(clients)))
        request = broadcast_message(broadcast, self._recipe, "evaluate", split=split, limit=each)
        counts: dict[str, int] = {}
        scores: dict[str, dict[str, float]] = {}
        for client, reply in self._replies(self._told(request, self._scoring(broadcast.round, split))):
            try:
                message = _given(reply)
                of_round(message.header, broadcast.round)
                scores[client] = read_scores(message, metric)
                held = self._joined[client].get(split, 0)
                counts[client] = held if each is None else min(each, held)
            except MessageError as problem:
                left_out = "%s is left out of the scores of %s: %s"
                logging.getLogger("fedrot").warning(left_out, client, split, problem)
        if not sum(counts.values()):
            raise RunError(f"no site gave scores of {split} that can be used; the log says why")
        return averaged(split, metric, scores, counts, "personal" if personal(self._recipe) else "global")

    def _scoring(self, round: int, split: str) -> Sequence[str]:
        """Who is asked for the scores that are reported after so many rounds."""
        return self.clients

    def answers(self, broadcast: Broadcast, split: str) -> Evaluation:
        """Sites are not asked what their models write: `network.opening` refuses recipes that want it."""
        raise RunError("evaluation.answers: sites are not asked for what their models write; set it to none")

    def finish(self, broadcast: Broadcast) -> dict[str, Adapter]:
        """Send the result to every site, which keeps it, or its own model where models are personal."""
        request = broadcast_message(broadcast, self._recipe, "finish")
        for client, reply in self._replies(self._told(request, self.clients)):
            try:
                _given(reply)
            except MessageError as problem:
                logging.getLogger("fedrot").warning("%s did not get the result: %s", client, problem)
        return {}

    def states(self) -> Mapping[str, ClientState]:
        """Nothing: clients keep what they keep."""
        return {}

    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Nothing is to be put back."""

    def _told(self, request: Message, clients: Sequence[str]) -> dict[str, Message]:
        """The request to each client, with the last round whose upload of its own was accepted."""
        return {
            client: Message({**request.header, "accepted": self._accepted.get(client)}, request.payload)
            for client in clients
        }

    def _replies(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Message | str]]:
        """Each client's reply as it comes. Sites that have not joined do so first; those that were started again since
        are asked once more when they have.
        """
        seconds = self._recipe.federation.deadline
        self._introduce([client for client in requests if client not in self._joined], seconds)
        yield from ((client, self.refused[client]) for client in requests if client not in self._joined)
        fresh = []
        for client, reply in self._ask({c: request for c, request in requests.items() if c in self._joined}, seconds):
            if isinstance(reply, Message) and reply.header.get("join") is True:
                fresh.append(client)
            else:
                yield client, reply
        self._introduce(fresh, seconds)
        yield from ((client, self.refused[client]) for client in fresh if client in self.refused)
        yield from self._ask({client: requests[client] for client in fresh if client not in self.refused}, seconds)

    def _ask(self, requests: Mapping[str, Message], seconds: float | None) -> Iterator[tuple[str, Message | str]]:
        """One reply of each client, as they come: what comes twice, or was not asked for, is passed over."""
        waiting, began = set(requests), now()
        for client, reply in self._post.ask(requests, seconds) if requests else ():
            if client in waiting:
                waiting.remove(client)
                self._note(client, requests[client], reply, began)
                yield client, reply
        for client in sorted(waiting):
            self._note(client, requests[client], "gave no answer", began)
            yield client, "gave no answer"

    def _note(self, client: str, request: Message, reply: Message | str, began: float) -> None:
        """What went to a site and came back, for the journal."""
        if self._journal is None:
            return
        ended, answer = now(), reply if isinstance(reply, Message) else Message.refusal(reply)
        said = answer.refused
        self._journal.add(
            Exchange(
                time=ended,
                client=client,
                kind=str(request.header["kind"]),
                round=request.header.get("round"),
                sent=len(request.payload),
                received=len(answer.payload),
                headers=len(request.header_bytes()) + (len(answer.header_bytes()) if reply is answer else 0),
                seconds=ended - began,
                refused=said,
                answered=reply is answer,
            )
        )


def _given(reply: Message | str) -> Message:
    """The reply itself. `MessageError` with the reason where there is none."""
    refused = reply.refused if isinstance(reply, Message) else reply
    if refused is not None or not isinstance(reply, Message):
        raise MessageError(str(refused))
    return reply
