"""A client's side of a secure sum."""

import hashlib
import json
import logging
from pathlib import Path

from fedrot.core.errors import RunError
from fedrot.core.files import flush_folder, write_atomic
from fedrot.core.secure_sum import Summand
from fedrot.running.network.messages import Message, MessageError, Refusal, of_round, shown, value_of
from fedrot.running.network.secure import STAGES, stages
from fedrot.running.network.secure.crypto import KEY_SHARE, SEED_SHARE, Secrets, add_mask, numbered, split
from fedrot.running.network.secure.graph import Graph
from fedrot.running.secure import SecureSum, check_enough


class Consents:
    """Whose sum a client helped to open, by round and phase, on its disk: one sum each, and never another.

    A server that restarts may play a round again, and a client's part of it is the same then. The difference of two
    sums of a round would be what the clients sent who are in one of them alone.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "sums.json"

    def give(self, round: int, phase: str, clients: list[str]) -> None:
        """Remember these clients; durable when this returns. `Refusal` where they were others before, `RunError`
        where what was given before cannot be read.
        """
        given: dict[str, str] = {}
        if self._path.exists():
            try:
                given = dict(json.loads(self._path.read_bytes()))
            except (ValueError, TypeError):
                raise RunError(f"{self._path}: cannot be read; it says which sums of the run were opened") from None
        key, named = f"{round} {phase}", hashlib.blake2b(json.dumps(clients).encode(), digest_size=16).hexdigest()
        if given.get(key, named) != named:
            raise Refusal(
                f"has helped to open a sum of round {round} with other clients in it; a second one would show what "
                f"those sent who are in one of them alone. The site allows it by removing {self._path.name} of the "
                "run's folder there"
            )
        write_atomic(self._path, json.dumps({**given, key: named}).encode())
        flush_folder(self._path.parent)


class Participant:
    """A client in one sum: answers the requests of its stages in their order, each once. What a request asks for is
    refused, with nothing told, by `MessageError` or another `FedrotError`.
    """

    def __init__(self, name: str, of: SecureSum, summand: Summand, consents: Consents) -> None:
        self._name, self._of, self._consents = name, of, consents
        self._summand: Summand | None = summand
        self._secrets = Secrets.fresh()
        self._stages = list(STAGES)  # that are still to come
        self._graph: Graph | None = None
        # Shares of seed and key by their owner, one's own included.
        self._shares: dict[str, tuple[bytes, bytes]] = {}
        self._near: set[str] = set()  # whose masks are in what was sent

    def opening(self) -> Message:
        """The reply to the request that the sum begins with."""
        return stages.opening_reply(self._of.round, self._of.phase, self._secrets.public())

    def handle(self, request: Message) -> Message:
        """The reply to a stage's request."""
        kind = value_of(request.header, "kind", str)
        of_round(request.header, self._of.round)
        if not self._stages or kind != self._stages[0]:
            wanted = self._stages[0] if self._stages else "none"
            raise MessageError(f"the request {shown(kind)} is out of turn: the next one of this sum is {wanted}")
        reply = {"share": self._share, "masked": self._masked, "unmask": self._unmask}[kind](request)
        self._stages.pop(0)
        return reply

    def _share(self, request: Message) -> Message:
        """Take on what all announced, and split seed and key among the neighbours."""
        if (phase := value_of(request.header, "phase", str)) != self._of.phase:
            raise MessageError(f"the request is of phase {shown(phase)}, not {self._of.phase}")
        publics = stages.read_share_request(request)
        if publics.get(self._name) != self._secrets.public():
            raise MessageError(f"the request does not hold what {self._name} announced")
        graph = Graph(self._of, publics)
        check_enough(self._of.recipe, len(publics), len(publics), len(publics))
        group, threshold = graph.group(self._name), graph.threshold()
        seeds = split(self._secrets.seed, threshold, len(group))
        keys = split(self._secrets.scalar(), threshold, len(group))
        shares = dict(zip(group, zip(seeds, keys, strict=True), strict=True))
        self._graph, self._shares = graph, {self._name: shares[self._name]}
        marks = {other: (graph.mark(self._name), graph.mark(other)) for other in group}
        return stages.shares_reply(
            graph,
            [self._secrets.seal(shares[o], marks[o], publics[o]) for o in group if o != self._name],
        )

    def _masked(self, request: Message) -> Message:
        """Mask the numbers, with a mask in common with each neighbour whose shares came."""
        graph, summand = self._graph, self._summand
        if graph is None or summand is None:
            raise MessageError("there is nothing to mask")
        stages.check_session(request, graph)
        sealed = stages.read_masked_request(request, [n for n in graph.group(self._name) if n != self._name])
        if len(sealed) + 1 < graph.threshold():
            raise MessageError(f"{len(sealed)} neighbours are left, too few to take masks off again")
        for sender, data in sealed.items():
            self._take_shares(graph, sender, data)
        add_mask(summand, self._secrets.seed, 1)
        for sender in sealed:
            add_mask(summand, self._secrets.mask_key(graph.publics[sender]), 1 if self._name < sender else -1)
        self._near, self._summand = set(sealed), None
        return stages.vector_reply(graph, summand.payload())

    def _take_shares(self, graph: Graph, sender: str, sealed: bytes) -> None:
        """Keep a neighbour's shares. What is none is left out, with a line of the log: others hold shares of it too."""
        try:
            marks = graph.mark(sender), graph.mark(self._name)
            shares = self._secrets.unseal(sealed, marks, graph.publics[sender])
            mine = graph.group(sender).index(self._name) + 1
            lengths = (len(shares[0]), len(shares[1])) == (SEED_SHARE, KEY_SHARE)
            if not lengths or {numbered(share) for share in shares} != {mine}:
                raise MessageError("its shares are not those of this client")
            self._shares[sender] = shares
        except MessageError as problem:
            logging.getLogger("fedrot").warning("%s: %s is of no help in the sum: %s", self._name, sender, problem)

    def _unmask(self, request: Message) -> Message:
        """Give shares of the seeds of those in the sum and of the keys of those who were lost, never both of one."""
        graph = self._graph
        if graph is None:
            raise MessageError("there is nothing to unmask")
        stages.check_session(request, graph)
        summed = stages.names_of(request, "summed", graph.clients)
        lost = stages.names_of(request, "lost", graph.clients)
        if both := sorted(set(summed) & set(lost)):
            raise MessageError(f"it asks for both secrets of {shown(both[0])}, which would show what that client sent")
        if self._name not in summed:
            raise MessageError(f"{self._name} sent its numbers, and they are said to be lost")
        if missing := sorted(self._near - {*summed, *lost}):
            raise MessageError(f"it does not say whether {shown(missing[0])} is in the sum")
        check_enough(self._of.recipe, len(summed), len(graph.clients), len(graph.clients))
        if not graph.holds(summed):
            raise MessageError("those who are left have no masks in common, and their sum would fall into pieces")
        self._consents.give(self._of.round, self._of.phase, summed)
        held = self._shares
        self._shares = {}
        return stages.reveal_reply(
            graph,
            {owner: held[owner][0] for owner in summed if owner in held},
            {owner: held[owner][1] for owner in lost if owner in held},
        )
