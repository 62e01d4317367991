"""The server's side of a secure sum."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedrot.core.checks import RejectedUpload
from fedrot.core.secure_sum import Summand, bytes_of
from fedrot.running.engine import Failure, Summed
from fedrot.running.network.messages import Message, MessageError
from fedrot.running.network.secure import stages
from fedrot.running.network.secure.crypto import Public, add_mask, common_key, joined, numbered
from fedrot.running.network.secure.graph import Graph
from fedrot.running.secure import SecureSum, check_enough, failures

Replies = Iterable[tuple[str, Message | str]]
Ask = Callable[[Mapping[str, Message]], Replies]


def secure_sum(
    of: SecureSum, opening: Replies, ask: Ask, held: Mapping[str, int], drawn: Sequence[str]
) -> Iterator[Summed | Failure]:
    """The stages of one sum, after the request that it begins with.

    Args:
        of: what is summed.
        opening: the replies to that request.
        ask: sends requests and gives each client's reply, or why there is none.
        held: the clients' examples, as they said on joining.
        drawn: all clients that were asked.

    Yields a failure for each client that is lost before its numbers came, and the sum of the others; where too few are
    left, or the sum cannot be theirs, a failure for each of them too.
    """
    server = _Server(of, ask, held, len(drawn))
    try:
        summed = server.run(opening)
    except RejectedUpload as problem:
        yield from server.lost
        gone = {failure.client for failure in server.lost}
        yield from failures([client for client in drawn if client not in gone], problem)
        return
    yield from server.lost
    yield summed


@dataclass
class _Server:
    of: SecureSum
    ask: Ask
    held: Mapping[str, int]
    drawn: int
    lost: list[Failure] = field(default_factory=list)
    up: int = 0
    down: int = 0

    def run(self, opening: Replies) -> Summed:
        """The stages in their order. Raises `RejectedUpload` where there can be no sum."""
        graph = self._announced(opening)
        sealed = self._shared(graph)
        total, summed = self._masked(graph, sealed)
        self._unmask(graph, total, summed, [client for client in sealed if client not in summed])
        return self.of.opened(total, {client: self.held[client] for client in summed}, self.up, self.down)

    def _announced(self, replies: Replies) -> Graph:
        """Who is ready, with what they announced."""
        publics: dict[str, Public] = {}
        for client, reply in replies:
            try:
                publics[client] = stages.read_opening(self._given(reply), self.of.round, self.of.phase)
            except MessageError as problem:
                self._lose(client, "ready", problem)
        keys = [key for public in publics.values() for key in (public.sealing, public.masking)]
        for client, public in sorted(publics.items()):
            if keys.count(public.sealing) + keys.count(public.masking) > 2:
                del publics[client]
                self._lose(client, "ready", MessageError("it announced a key that another one has"))
        check_enough(self.of.recipe, len(publics), len(publics), self.drawn)
        return Graph(self.of, publics)

    def _shared(self, graph: Graph) -> dict[str, dict[str, bytes]]:
        """The encrypted shares, by whom they are from and for."""
        found: dict[str, dict[str, bytes]] = {}
        request = stages.share_request(graph)
        for client, reply in self._ask(dict.fromkeys(graph.clients, request)):
            try:
                found[client] = stages.read_shares(self._given(reply), graph, client)
            except MessageError as problem:
                self._lose(client, "share", problem)
        self._check_left(graph, found, found)
        return found

    def _masked(self, graph: Graph, sealed: Mapping[str, Mapping[str, bytes]]) -> tuple[Summand, list[str]]:
        """The sum of the masked numbers, and of whom."""
        total: Summand | None = None
        summed: list[str] = []
        size = self.of.layout.size
        requests = {
            client: stages.masked_request(
                graph,
                {other: sealed[other][client] for other in graph.group(client) if other in sealed and other != client},
            )
            for client in sealed
        }
        for client, reply in self._ask(requests):
            try:
                payload = stages.read_vector(self._given(reply), graph, bytes_of(size))
            except MessageError as problem:
                self._lose(client, "masked", problem)
                continue
            mine = Summand.of(payload, size)
            total = mine if total is None else total + mine
            summed.append(client)
        self._check_left(graph, summed, sealed)
        if total is None:
            raise RejectedUpload("the secure sum has no numbers")
        return total, sorted(summed)

    def _unmask(self, graph: Graph, total: Summand, summed: list[str], lost: list[str]) -> None:
        """Take the masks off, in place. A client that gives no shares now is in the sum all the same."""
        seeds: dict[str, list[bytes]] = {client: [] for client in summed}
        keys: dict[str, list[bytes]] = {client: [] for client in lost}
        silent: dict[str, str] = {}
        for client, reply in self._ask(dict.fromkeys(summed, stages.unmask_request(graph, summed, lost))):
            try:
                found = stages.read_reveal(self._given(reply), graph, client, summed, lost)
            except MessageError as problem:
                silent[client] = str(problem)
                continue
            for shares, into in zip(found, (seeds, keys), strict=True):
                for owner, share in shares.items():
                    # Two shares of one number would be taken for two clients'.
                    if numbered(share) == graph.group(owner).index(client) + 1:
                        into[owner].append(share)
        for client in summed:
            add_mask(total, self._secret(graph, client, seeds[client], "seed", silent), -1)
        for client in lost:
            scalar = self._secret(graph, client, keys[client], "key", silent)
            for other in graph.group(client):
                if other in summed:  # what it added is to be subtracted
                    add_mask(total, common_key(scalar, graph.publics[other]), -1 if other < client else 1)

    def _secret(self, graph: Graph, owner: str, shares: list[bytes], what: str, silent: Mapping[str, str]) -> bytes:
        public, threshold = graph.publics[owner], graph.threshold()
        secret = joined(shares, threshold, public.opens_seed if what == "seed" else public.opens_key)
        if secret is None:
            why = "; ".join(f"{client}: {reason}" for client, reason in silent.items()) or "all shares came"
            raise RejectedUpload(
                f"the secure sum cannot be unmasked: {len(shares)} shares of the {what} of {owner} do not give it, "
                f"{threshold} are needed (secure.threshold); {why}"
            )
        return secret

    def _check_left(self, graph: Graph, left: Collection[str], owners: Collection[str]) -> None:
        """Nobody is asked to open what cannot be opened, or must not be."""
        check_enough(self.of.recipe, len(left), len(graph.clients), self.drawn)
        if not (graph.holds(left) and graph.covers(owners, left)):
            raise RejectedUpload("the secure sum has lost too many neighbours of one client (secure.neighbours)")

    def _ask(self, requests: Mapping[str, Message]) -> Replies:
        self.down += sum(request.payload.numel() for request in requests.values())
        return self.ask(requests)

    def _given(self, reply: Message | str) -> Message:
        """The reply itself, its bytes counted. `MessageError` with the reason where there is none."""
        refused = reply.refused if isinstance(reply, Message) else reply
        if refused is not None or not isinstance(reply, Message):
            raise MessageError(str(refused))
        self.up += reply.payload.numel()
        return reply

    def _lose(self, client: str, stage: str, problem: MessageError) -> None:
        self.lost.append(Failure(client, f"{problem} (secure sum, stage {stage})"))
