"""Who shares masks with whom: everybody with everybody, or neighbours on a ring in an order that nobody chose."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from fedrot.running.network.secure.crypto import Public
from fedrot.running.secure import SecureSum, share_of


@dataclass(frozen=True)
class Graph:
    """The clients of a sum and their neighbours. All sides derive the same from what everybody announced."""

    of: SecureSum
    publics: Mapping[str, Public]

    @cached_property
    def session(self) -> str:
        """A hash that names this sum among all others: its keys are of it alone."""
        found = hashlib.blake2b(f"{self.of.round} {self.of.phase} {self.of.total}".encode(), digest_size=16)
        for client in self.clients:
            name = client.encode()
            found.update(len(name).to_bytes(8, "big") + name + self.publics[client].packed())
        return found.hexdigest()

    @cached_property
    def clients(self) -> tuple[str, ...]:
        """All clients, sorted."""
        return tuple(sorted(self.publics))

    def mark(self, client: str) -> int:
        """What stands for a client beside encrypted shares: shares are of no use to one who was told of another sum."""
        return int.from_bytes(hashlib.blake2b(f"{self.session} {client}".encode(), digest_size=8).digest(), "big")

    def group(self, client: str) -> tuple[str, ...]:
        """The client and its neighbours, sorted: who hold shares of its secrets, in the order of the shares."""
        if self._reach is None:
            return self.clients
        ring, here = self._ring, self._ring.index(client)
        return tuple(sorted(ring[(here + step) % len(ring)] for step in range(-self._reach, self._reach + 1)))

    def threshold(self) -> int:
        """How many of a group must join their shares."""
        return share_of(self.of.recipe, len(self.clients) if self._reach is None else 2 * self._reach + 1)

    def holds(self, clients: Collection[str]) -> bool:
        """Whether the masks that these clients have in common tie all of them together: otherwise the server would
        learn the sums of the pieces. On the ring that is where no two gaps are as long as a neighbour reaches.
        """
        if self._reach is None:
            return True
        there = [client in clients for client in self._ring]
        if not any(there):
            return False
        first = there.index(True)
        turned = "".join("1" if there[(first + i) % len(there)] else "0" for i in range(len(there)))
        return sum(len(gap) >= self._reach for gap in turned.split("1")) <= 1

    def covers(self, owners: Collection[str], left: Collection[str]) -> bool:
        """Whether each owner's secrets can be had from those of its group who are left."""
        there, least = set(left), self.threshold()
        return all(len(there.intersection(self.group(owner))) >= least for owner in owners)

    @cached_property
    def _reach(self) -> int | None:
        """Neighbours on each side of the ring; None: all are neighbours."""
        near = self.of.recipe.secure.neighbours
        return None if near is None or near + 1 >= len(self.publics) else near // 2

    @cached_property
    def _ring(self) -> tuple[str, ...]:
        key = self.session.encode()
        return tuple(sorted(self.clients, key=lambda c: hashlib.blake2b(c.encode(), key=key).digest()))
