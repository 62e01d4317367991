"""What travels in the stages of a secure sum, read with every check that needs no secret."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fedrot.running.network.messages import Message, MessageError, Reader, count_of, of_round, only, shown, value_of
from fedrot.running.network.secure.crypto import KEY_SHARE, PUBLIC, SEALED, SEED_SHARE, Public
from fedrot.running.network.secure.graph import Graph


def opening_reply(round: int, phase: str, public: Public) -> Message:
    """Of a client that has trained or answered: what it announces."""
    return Message.of([_row(public.packed())], round=round, phase=phase)


def read_opening(reply: Message, round: int, phase: str) -> Public:
    """What a client announces. Raises `MessageError`, as all that read do."""
    only(reply.header, ("round", "phase"))
    of_round(reply.header, round)
    if (said := value_of(reply.header, "phase", str)) != phase:
        raise MessageError(f"the message is of phase {shown(said)}, not {phase}")
    (piece,) = _pieces(reply, [PUBLIC])
    return Public.read(piece)


def share_request(graph: Graph) -> Message:
    """To every client: what all announced."""
    payload = [_row(graph.publics[client].packed()) for client in graph.clients]
    return Message.of(payload, kind="share", round=graph.of.round, phase=graph.of.phase, clients=list(graph.clients))


def read_share_request(request: Message) -> dict[str, Public]:
    """What all announced, no key twice."""
    clients = names_of(request, "clients")
    publics = {
        c: Public.read(piece) for c, piece in zip(clients, _pieces(request, [PUBLIC] * len(clients)), strict=True)
    }
    keys = [key for public in publics.values() for key in (public.sealing, public.masking)]
    if len(set(keys)) != len(keys):
        raise MessageError("two of the clients' public keys are the same")
    return publics


def shares_reply(graph: Graph, sealed: Sequence[bytes]) -> Message:
    """A client's shares for its neighbours, in their order."""
    return Message.of([_row(piece) for piece in sealed], session=graph.session)


def read_shares(reply: Message, graph: Graph, client: str) -> dict[str, bytes]:
    """The encrypted shares by neighbour."""
    _of_session(reply, graph)
    others = [other for other in graph.group(client) if other != client]
    return dict(zip(others, _pieces(reply, [SEALED] * len(others)), strict=True))


def masked_request(graph: Graph, sealed: Mapping[str, bytes]) -> Message:
    """To a client: its neighbours' shares for it."""
    senders = sorted(sealed)
    payload = [_row(sealed[sender]) for sender in senders]
    return Message.of(payload, kind="masked", round=graph.of.round, session=graph.session, senders=senders)


def read_masked_request(request: Message, neighbours: Collection[str]) -> dict[str, bytes]:
    """The encrypted shares by sender."""
    senders = names_of(request, "senders", neighbours)
    return dict(zip(senders, _pieces(request, [SEALED] * len(senders)), strict=True))


def vector_reply(graph: Graph, payload: Tensor) -> Message:
    """A client's masked numbers."""
    return Message.of([payload], session=graph.session)


def read_vector(reply: Message, graph: Graph, size: int) -> Tensor:  # (size,) uint8
    """A client's masked numbers."""
    _of_session(reply, graph)
    reader = Reader(reply)
    found = reader.bytes(size)
    reader.end()
    return found


def unmask_request(graph: Graph, summed: Collection[str], lost: Collection[str]) -> Message:
    """To every client that is left: whose numbers are in the sum, and whose masks were left in those of others."""
    lists = {"summed": sorted(summed), "lost": sorted(lost)}
    return Message.of((), kind="unmask", round=graph.of.round, session=graph.session, **lists)


def reveal_reply(graph: Graph, seeds: Mapping[str, bytes], keys: Mapping[str, bytes]) -> Message:
    """A client's shares of the seeds of some and of the keys of others."""
    payload = [_row(shares[owner]) for shares in (seeds, keys) for owner in sorted(shares)]
    return Message.of(payload, session=graph.session, seeds=sorted(seeds), keys=sorted(keys))


def read_reveal(
    reply: Message, graph: Graph, client: str, summed: Collection[str], lost: Collection[str]
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """A client's shares of seeds and of keys, by their owners."""
    _of_session(reply, graph, "seeds", "keys")
    near = graph.group(client)
    seeds = names_of(reply, "seeds", [owner for owner in summed if owner in near])
    keys = names_of(reply, "keys", [owner for owner in lost if owner in near])
    pieces = _pieces(reply, [SEED_SHARE] * len(seeds) + [KEY_SHARE] * len(keys))
    return dict(zip(seeds, pieces, strict=False)), dict(zip(keys, pieces[len(seeds) :], strict=True))


def names_of(message: Message, key: str, among: Collection[str] | None = None) -> list[str]:
    """A list of clients in a header: sorted, none twice, all `among` these."""
    found = value_of(message.header, key, list)
    if not all(isinstance(name, str) for name in found) or found != sorted(set(found)):
        raise MessageError(f"the message's {key} must be names, sorted and each once, got {shown(found)}")
    if among is not None and (strange := sorted(set(found) - set(among))):
        raise MessageError(f"the message's {key} hold {shown(strange[0])}, who has no place there")
    return found


def check_session(request: Message, graph: Graph) -> None:
    """Raise `MessageError` unless a request is of this sum."""
    count_of(request.header, "round")
    if (said := value_of(request.header, "session", str)) != graph.session:
        raise MessageError(f"the message is of another sum ({shown(said)})")


def _of_session(reply: Message, graph: Graph, *more: str) -> None:
    only(reply.header, ("session", *more))
    if (said := value_of(reply.header, "session", str)) != graph.session:
        raise MessageError(f"the message is of another sum ({shown(said)})")


def _pieces(message: Message, sizes: Sequence[int]) -> list[bytes]:
    reader = Reader(message)
    found = [reader.bytes(size).numpy().tobytes() for size in sizes]
    reader.end()
    return found


def _row(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
