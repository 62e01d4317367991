"""Buffered rounds between sites, on real time: the server goes on with the uploads that came first, and the other sites
train on from what they were sent.
"""

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, repeat

from fedrot.core.methods.base import Broadcast, Upload
from fedrot.running.engine import Failure
from fedrot.running.network.engine import Network
from fedrot.running.network.journal import now
from fedrot.running.network.messages import Message
from fedrot.running.network.tensors import broadcast_message


@dataclass(frozen=True)
class _Asked:
    """A request that was not answered yet."""

    request: Message
    since: float  # when it was asked first


class Buffered(Network):
    """The engine of a run with federation.buffer; see `clock.Arriving`.

    Until a site that trains is heard, every round asks it the same again, byte for byte: the broadcast that it was sent
    and what of its own had been accepted then. So a server that was killed has to know that broadcast alone, a site
    that was started again begins with it anew, and one that has its upload ready gives it (`worker.Resident`).
    """

    _busy: frozenset[str] = frozenset()  # who trains between two rounds

    @cached_property
    def _open(self) -> dict[str, _Asked]:
        """What was asked of each client and not answered yet."""
        return {}

    def arrivals(self, flying: Callable[[], Mapping[str, Broadcast]]) -> Generator[Upload | Failure, None, None]:
        """See `clock.Arriving`. A site that was started again joins while others are heard."""
        seconds, began = self._recipe.federation.deadline, time.monotonic()
        again: set[str] = set()  # sites that had to join once more in this round
        try:
            while sent := flying():
                left = None if seconds is None else seconds - (time.monotonic() - began)
                if left is not None and left <= 0:
                    return
                requests = self._requests(sent)
                with closing(self._post.ask(requests, left)) as replies:
                    for client, reply in chain(replies, zip(requests, repeat("gave no answer"), strict=False)):
                        if client not in requests or client not in flying():
                            continue  # nobody asked it, or it was heard
                        if isinstance(reply, str) and seconds is not None and time.monotonic() - began >= seconds:
                            return
                        result = self._result(client, reply, sent[client], again)
                        if result is None:
                            break  # it is asked something else now
                        yield result
                        if flying().keys() - self._open.keys():
                            break  # others are asked, too
        finally:
            self._busy = frozenset(flying())

    def _requests(self, sent: Mapping[str, Broadcast]) -> dict[str, Message]:
        """What is asked of each client now: what it was asked before, if it has not answered."""
        made: dict[int, Message] = {}  # of each broadcast there is one payload
        for client, broadcast in sent.items():
            if client in self._open:
                continue
            if client in self._joined:
                if broadcast.round not in made:
                    made[broadcast.round] = broadcast_message(broadcast, self._recipe, "train")
                self._begins(broadcast.round, [client])
                request = self._told(made[broadcast.round], [client])[client]
            else:
                request = self._join_request()
            self._open[client] = _Asked(request, now())
        return {client: self._open[client].request for client in sent}

    def _result(
        self, client: str, reply: Message | str, broadcast: Broadcast, again: set[str]
    ) -> Upload | Failure | None:
        """What a reply gives of the client's round; None where it joins, or has joined and can be asked to train."""
        asked = self._open.pop(client)
        self._note(client, asked.request, reply, asked.since)
        if asked.request.header["kind"] == "join":
            self._admit(client, asked.request, reply)
            return Failure(client, self.refused[client]) if client in self.refused else None
        if client not in again and isinstance(reply, Message) and reply.header.get("join") is True:
            again.add(client)
            self._open[client] = _Asked(self._join_request(), now())
            return None
        return self._upload(client, reply, broadcast)

    def _scoring(self, round: int, split: str) -> Sequence[str]:
        """Those that do not train just then; all of them after the last round, or where no other has examples."""
        idle = [client for client in self.clients if client not in self._busy]
        if round >= self._recipe.rounds or not any(self._joined.get(client, {}).get(split) for client in idle):
            return self.clients
        for client in sorted(self._busy):
            logging.getLogger("fedrot").info("%s is left out of the scores of %s: it trains", client, split)
        return idle
