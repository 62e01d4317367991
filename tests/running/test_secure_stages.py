"""The protocol of secure sums: who may be lost when, what the server cannot know, and what arrives spoiled."""

import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from secure_room import Fault, Room, flipped, lost, payload, says
from tiny_runs import assert_equal

from fedrot.core.errors import FedrotError
from fedrot.core.secure_sum import Summand
from fedrot.running.network.messages import Message, MessageError
from fedrot.running.network.secure.crypto import PUBLIC, SEALED, Secrets, add_mask, joined, split
from fedrot.running.network.secure.graph import Graph

KINDS = ("ready", "share", "masked", "unmask")


def same(room: Room, without: tuple[str, ...] = ()) -> dict[str, str]:
    """The sum is that of all but these in the clear, bit for bit; why they are not in it."""
    summed, failed = room.run()
    assert summed is not None, failed
    assert set(failed) == set(without)
    clear = room.clear(without)
    assert_equal(summed.mean, clear.mean)
    assert (summed.clients, summed.weight, summed.reports) == (clear.clients, clear.weight, clear.reports)
    return failed


# Lost clients.


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_lost_at_any_stage(kind: str, tmp_path: Path) -> None:
    """Whoever sent its numbers is in the sum, whatever becomes of it afterwards."""
    room = Room(5, tmp_path)
    room.faults["c02", kind] = lost
    failed = same(room, () if kind == "unmask" else ("c02",))
    assert failed == ({} if kind == "unmask" else {"c02": f"gave no answer (secure sum, stage {kind})"})


def test_clients_lost_at_every_stage(tmp_path: Path) -> None:
    room = Room(9, tmp_path)
    room.faults = {(f"c0{i}", kind): lost for i, kind in enumerate(KINDS)}
    same(room, ("c00", "c01", "c02"))


@pytest.mark.parametrize("kind", KINDS)
def test_of_too_few_nothing_is_learnt(kind: str, tmp_path: Path) -> None:
    """Three of five can be left; of two the server has no sum, and those who are left were not asked for shares."""
    room = Room(5, tmp_path)
    room.faults = {(client, kind): lost for client in ("c00", "c02", "c04")}
    summed, failed = room.run()
    assert summed is None
    asked = {stage for _, stage in room.carried}
    if kind == "unmask":
        assert "2 shares of the seed of c00 do not give it, 3 are needed (secure.threshold)" in failed["c01"]
    else:
        assert asked == set(KINDS[: KINDS.index(kind) + 1])
        assert failed["c01"] == "the secure sum has 2 of 5 clients left and needs 3 (secure.fewest)"
        assert "gave no answer" in failed["c02"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--secure.threshold=0.9",), "needs 5 (secure.threshold)"),
        (("--federation.quorum=0.9",), "needs 5 (federation.quorum)"),
        (("--secure.fewest=5",), "needs 5 (secure.fewest)"),
    ],
)
def test_how_many_are_enough_is_the_recipe_s(flags: tuple[str, ...], words: str, tmp_path: Path) -> None:
    room = Room(5, tmp_path, *flags)
    room.faults["c02", "masked"] = lost
    assert room.run()[1]["c00"] == f"the secure sum has 4 of 5 clients left and {words}"


def test_neighbours_on_a_ring(tmp_path: Path) -> None:
    """Each of nine has four neighbours, and three of these five hold enough shares."""
    room = Room(9, tmp_path, "--secure.neighbours=4")
    room.faults = {("c03", "masked"): lost, ("c07", "unmask"): lost}
    same(room, ("c03",))
    _, shares = room.carried["c00", "share"]
    assert shares.payload.numel() == 4 * SEALED


def test_a_ring_that_falls_apart_is_not_opened(tmp_path: Path) -> None:
    """Two gaps as long as a neighbour reaches: the masks of the pieces would cancel by themselves."""
    room = Room(9, tmp_path, "--secure.neighbours=4")
    request = room.until("share", "c00")
    publics = {c: seat._secrets.public() for c, seat in room.seats.items()}
    graph = Graph(room.of, publics)
    assert request.header["clients"] == list(graph.clients)
    ring = graph._ring
    assert graph.holds([ring[i] for i in (0, 1, 2, 5, 6, 7, 8)])
    assert graph.holds([ring[i] for i in (0, 2, 4, 6, 8)])
    assert not graph.holds([ring[i] for i in (1, 4, 5, 8)])
    assert not graph.holds([])
    assert graph.covers(ring, [ring[i] for i in (0, 1, 2, 4, 5, 6, 8)])
    assert not graph.covers(ring, [ring[i] for i in (0, 1, 2, 6, 7, 8)])  # 2 and 6 are left of the group of 4


def test_a_client_does_not_open_pieces_of_a_ring(tmp_path: Path) -> None:
    room = Room(9, tmp_path, "--secure.neighbours=4", "--secure.threshold=0.51")
    request = room.until("unmask", "c04")
    seat = room.seats["c04"]
    assert seat._graph is not None
    first = seat._graph._ring.index("c04")
    turned = seat._graph._ring[first:] + seat._graph._ring[:first]
    left = sorted(turned[i] for i in (0, 1, 2, 5, 6))
    with pytest.raises(FedrotError, match="their sum would fall into pieces"):
        seat.handle(says(summed=left, lost=sorted(set(turned) - set(left)))(request))
    assert seat.handle(request).refused is None


def test_clients_that_were_told_of_different_sums_are_of_no_use_to_each_other(tmp_path: Path) -> None:
    """A total of its own for each client would weigh the others down to nothing."""
    room = Room(5, tmp_path)
    sit = room.sit

    def lied_to() -> Iterator[tuple[str, Message | str]]:
        right = room.of
        for client in list(room.uploads):
            room.of = replace(right, total=right.total * 1000) if client == "c02" else right
            upload, room.uploads = room.uploads, {client: room.uploads[client]}
            yield from sit()
            room.uploads, room.of = upload, right

    room.sit = lied_to  # type: ignore[method-assign]
    failed = same(room, ("c02",))
    assert "of another sum" in failed["c02"]


# What the server has.


def test_a_masked_vector_is_uniform_and_a_plain_one_is_not(tmp_path: Path) -> None:
    room = Room(4, tmp_path)
    room.run()
    size = room.of.layout.size
    plain = room.of.summand(room.uploads["c01"])
    masked = Summand.of(room.carried["c01", "masked"][1].payload, size)
    assert not np.any(masked.numbers == plain.numbers)
    assert not np.any(masked.counts == plain.counts)
    # The bytes of many sums: 255 degrees of freedom, and a chance of about 1e-9 above 400.
    many = b"".join(_masked(room) for _ in range(20))
    assert _chi(many) < 400
    assert _chi(plain.payload().numpy().tobytes() * 20) > 4000


def _masked(room: Room) -> bytes:
    room.until("unmask", "c01")
    return room.carried["c01", "masked"][1].payload.numpy().tobytes()


def _chi(data: bytes) -> float:
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_server_cannot_take_the_masks_of_one_client_off(tmp_path: Path) -> None:
    """After an honest sum it has the seeds of all: the masks in common are still on each vector. And of the key that
    these are from it has no share, nor do fewer shares than the threshold give a secret.
    """
    room = Room(5, tmp_path)
    same(room)
    size, plain = room.of.layout.size, room.of.summand(room.uploads["c01"])
    seat = room.seats["c01"]
    vector = Summand.of(room.carried["c01", "masked"][1].payload, size)
    add_mask(vector, seat._secrets.seed, -1)
    assert np.mean(vector.numbers == plain.numbers) < 0.1
    for client in room.held:
        reveal = room.carried[client, "unmask"][1]
        assert reveal.header["keys"] == []
        assert reveal.header["seeds"] == sorted(room.held)
    shares = [room.carried[c, "unmask"][1].payload.numpy().tobytes()[52:104] for c in room.held]
    public = seat._secrets.public()
    assert joined(shares[:3], 3, public.opens_seed) == seat._secrets.seed
    assert joined(shares[:2], 2, public.opens_seed) is None
    # With the masks in common off as well, which the server cannot do, it would be plain.
    for other in room.held:
        if other != "c01":
            add_mask(vector, seat._secrets.mask_key(room.seats[other]._secrets.public()), 1 if other < "c01" else -1)
    assert np.array_equal(vector.numbers, plain.numbers)


def test_keys_and_masks_are_of_one_sum(tmp_path: Path) -> None:
    room = Room(4, tmp_path)
    first = room.until("unmask", "c01")
    before = {key: reply.payload for key, (_, reply) in room.carried.items()}
    room.until("unmask", "c01")
    assert all(not torch.equal(reply.payload, before[key]) for key, (_, reply) in room.carried.items())
    with pytest.raises(FedrotError, match="of another sum"):
        room.seats["c01"].handle(first)


def test_encrypted_shares_are_of_no_use_to_another_client_or_in_another_sum() -> None:
    mine, theirs, other = (Secrets.fresh() for _ in range(3))
    shares = split(mine.seed, 2, 3)[0], split(mine.scalar(), 2, 3)[0]
    sealed = mine.seal(shares, (5, 9), theirs.public())
    assert theirs.unseal(sealed, (5, 9), mine.public()) == shares
    for marks, receiver, sender, words in (
        ((5, 8), theirs, mine, "are of others"),
        ((5, 9), other, mine, "cannot be decrypted"),
        ((5, 9), theirs, other, "cannot be decrypted"),
    ):
        with pytest.raises(MessageError, match=words):
            receiver.unseal(sealed, marks, sender.public())


# What a client refuses.

REFUSED: list[tuple[str, Callable[[Message], Message], str]] = [
    ("share", says(kind="unmask"), "the request 'unmask' is out of turn: the next one of this sum is share"),
    ("share", says(round=1), "is of round 1, not of round 2"),
    ("share", says(phase="answer"), "of phase 'answer', not train"),
    ("share", says(clients=["c01"]), "bytes, 130 are expected"),
    ("share", says(clients=["c04", "c03", "c02", "c01", "c00"]), "sorted and each once"),
    ("share", says(clients=["c00", "c01", "c01", "c02", "c03"]), "sorted and each once"),
    ("share", says(clients=["c00", "c01", "c02", "c03", 4]), "must be names"),
    ("share", says(clients=["c00", "c02", "c03", "c04", "c05"]), "does not hold what c01 announced"),
    ("share", flipped(PUBLIC + 1), "c01 announced|not a point of the curve"),
    ("share", flipped(2 * PUBLIC - 1), "does not hold what c01 announced"),
    ("share", payload(lambda old: torch.cat([old[: 4 * PUBLIC], old[:PUBLIC]])), "public keys are the same"),
    ("share", payload(lambda old: old[:-1]), "bytes, at least"),
    ("masked", says(session="0"), r"of another sum \('0'\)"),
    ("masked", says(senders=["c00", "c01", "c02", "c03"]), "hold 'c01', who has no place there"),
    ("masked", says(senders=["c00", "c02", "c03", "c9"]), "hold 'c9', who has no place there"),
    ("masked", says(senders=["c00"]), "are expected"),
    ("masked", lambda m: says(senders=["c00"])(payload(lambda old: old[:SEALED])(m)), "1 neighbours are left"),
    ("unmask", says(summed=["c00", "c02", "c03", "c04"], lost=["c01"]), "sent its numbers, and they are said to be"),
    ("unmask", says(lost=["c00"]), "asks for both secrets of 'c00'"),
    ("unmask", says(summed=["c00", "c01", "c02", "c03"]), "does not say whether 'c04' is in the sum"),
    ("unmask", says(summed=["c00", "c01"], lost=["c02", "c03", "c04"]), "has 2 of 5 clients left and needs 3"),
    ("unmask", says(summed=["c00", "c01", "c9"], lost=["c02", "c03", "c04"]), "hold 'c9'"),
]


@pytest.mark.parametrize(("kind", "change", "words"), REFUSED)
def test_a_client_refuses(kind: str, change: Callable[[Message], Message], words: str, tmp_path: Path) -> None:
    """And it goes on with the right request afterwards."""
    room = Room(5, tmp_path)
    request = room.until(kind, "c01")
    seat = room.seats["c01"]
    with pytest.raises(FedrotError, match=words):
        seat.handle(change(request))
    assert seat.handle(request).refused is None
    with pytest.raises(FedrotError, match="out of turn"):
        seat.handle(request)


def test_a_client_takes_no_part_with_too_few(tmp_path: Path) -> None:
    """Whatever the server lists: of two clients each would learn what the other sent."""
    room = Room(3, tmp_path)
    request = room.until("share", "c01")
    few = says(clients=["c00", "c01"])(payload(lambda old: old[: 2 * PUBLIC])(request))
    with pytest.raises(FedrotError, match=r"has 2 of 2 clients left and needs 3 \(secure\.fewest\)"):
        room.seats["c01"].handle(few)


def test_after_one_sum_of_a_round_no_other_is_opened(tmp_path: Path) -> None:
    """The same clients may be summed again, as by a server that restarted; the difference of two sums is one client."""
    room = Room(5, tmp_path)
    same(room)
    same(room)
    room.faults["c02", "ready"] = lost
    summed, failed = room.run()
    assert summed is None
    assert "c00: has helped to open a sum of round 2 with other clients in it" in failed["c01"]
    (tmp_path / "c01" / "sums.json").write_text("[")
    assert "c01: " in room.run()[1]["c01"]
    for client in room.held:  # as the message says
        (tmp_path / client / "sums.json").unlink()
    same(room, ("c02",))


def test_another_round_is_another_matter(tmp_path: Path) -> None:
    same(Room(5, tmp_path))
    room = Room(5, tmp_path, round=3)
    room.faults["c02", "ready"] = lost
    same(room, ("c02",))
    assert json.loads((tmp_path / "c00" / "sums.json").read_text()).keys() == {"2 train", "3 train"}


# What arrives spoiled.


def noise(message: Message) -> Message:
    return payload(lambda old: torch.frombuffer(bytearray(secrets.token_bytes(len(old))), dtype=torch.uint8))(message)


DROPPED: list[tuple[str, Fault, str]] = [
    ("ready", says(round=1), "of round 1, not of round 2"),
    ("ready", says(phase="answer"), "of phase 'answer', not train"),
    ("ready", says(extra=1), "holds 'extra'"),
    ("ready", payload(lambda old: old[:-1]), "bytes, at least"),
    ("ready", payload(torch.zeros_like), "not a point of the curve"),
    ("ready", lambda m: Message.refusal("no\n\x1b[2J"), "no [2J"),
    ("share", says(session="x"), "of another sum ('x')"),
    ("share", says(session=None), "session must be of type str"),
    ("share", payload(lambda old: torch.cat([old, old])), "are expected"),
    ("masked", says(session="x"), "of another sum"),
    ("masked", says(counts=[]), "holds 'counts'"),
    ("masked", payload(lambda old: old[4:]), "bytes, at least"),
    ("masked", payload(lambda old: torch.cat([old, old[:8]])), "are expected"),
]


@pytest.mark.parametrize(("kind", "fault", "words"), DROPPED)
def test_a_spoiled_reply_drops_its_client(kind: str, fault: Fault, words: str, tmp_path: Path) -> None:
    room = Room(5, tmp_path)
    room.faults["c02", kind] = fault
    reason = same(room, ("c02",))["c02"]
    assert words in reason
    assert reason.isprintable()


HARMLESS: list[tuple[str, Fault]] = [
    ("share", flipped(0)),  # to c00 alone
    ("unmask", says(seeds=["c09"])),
    ("unmask", says(keys="all")),
    ("unmask", noise),
    ("unmask", flipped(0)),  # the number of a share
    ("unmask", flipped(20)),  # a share itself
    ("unmask", payload(lambda old: old[:-1])),
]


@pytest.mark.parametrize(("kind", "fault"), HARMLESS)
def test_spoiled_shares_of_one_client_do_no_harm(kind: str, fault: Fault, tmp_path: Path) -> None:
    room = Room(5, tmp_path)
    room.faults["c02", kind] = fault
    same(room)


@pytest.mark.parametrize(
    ("gone", "words"), [(True, "0 shares of the key of c02"), (False, "1 shares of the seed of c02")]
)
def test_a_client_whose_shares_nobody_can_decrypt_ends_the_sum(gone: bool, words: str, tmp_path: Path) -> None:
    """Its masks cannot be taken off, so there is no sum; it is named."""
    room = Room(5, tmp_path)
    room.faults = {("c02", "share"): noise, **({("c02", "masked"): lost} if gone else {})}
    summed, failed = room.run()
    assert summed is None
    assert f"{words} do not give it, 3 are needed (secure.threshold); all shares came" in failed["c00"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (noise, "the secure sum's weight is"),
        (flipped(3, 64), "means beyond secure.range 4"),
        (flipped(-40), "the secure sum's weight is"),
    ],
    ids=["noise", "a number", "the weight"],
)
def test_a_sum_that_cannot_be_is_not_used(fault: Fault, words: str, tmp_path: Path) -> None:
    room = Room(5, tmp_path)
    room.faults["c02", "masked"] = fault
    summed, failed = room.run()
    assert summed is None
    assert set(failed) == set(room.held)
    assert all(words in reason for reason in failed.values())


def test_a_key_that_another_client_has(tmp_path: Path) -> None:
    room = Room(5, tmp_path)
    announced: list[torch.Tensor] = []

    def remember(message: Message) -> Message:
        announced.append(message.payload)
        return message

    room.faults = {("c01", "ready"): remember, ("c02", "ready"): payload(lambda old: announced[0])}
    failed = same(room, ("c01", "c02"))
    assert "announced a key that another one has" in failed["c01"]
