"""Secure aggregation in a round: what a client's part of a sum is, and what the sum gives. Alike in simulation and
deployment, so that both give the same bits; how parts are hidden from the server is `network.secure`'s.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.checks import RejectedUpload, check_upload
from fedrot.core.errors import FedrotError
from fedrot.core.methods.base import Broadcast, Upload
from fedrot.core.packed import Layout
from fedrot.core.privacy import with_change
from fedrot.core.secure_sum import Scale, Summand
from fedrot.core.seeding import generator
from fedrot.learning.local import most_rows
from fedrot.running.client import travelling_parts
from fedrot.running.engine import Failure, Summed
from fedrot.running.privacy import told
from fedrot.running.recipe import Recipe
from fedrot.running.rounds import weight_of
from fedrot.running.settings import least_uploads

ANSWER = frozenset({"a"})  # the part of an adapter that an answer of a second phase is


@dataclass(frozen=True)
class SecureSum:
    """One sum of a round: of uploads, or of a second phase's answers. Every client and the server make the same."""

    recipe: Recipe
    round: int
    phase: str  # train or answer
    base: Adapter  # what changes are from
    parts: frozenset[str]
    total: int  # the most that the clients' weights can add up to

    @classmethod
    def of_uploads(cls, recipe: Recipe, broadcast: Broadcast, total: int) -> "SecureSum":
        """The sum of a round's changes of the broadcast."""
        parts = travelling_parts(recipe, broadcast.round)
        return cls(recipe, broadcast.round, "train", broadcast.adapter, parts, total)

    @classmethod
    def of_answers(cls, recipe: Recipe, round: int, question: Adapter, total: int) -> "SecureSum":
        """The sum of the answers themselves: the question has nothing in their place that they could be changes of."""
        zeros = {n: torch.zeros_like(t) if part_of(n) in ANSWER else t for n, t in question.tensors()}
        return cls(recipe, round, "answer", question.with_tensors(zeros), ANSWER, total)

    @property
    def layout(self) -> Layout:
        """Of what is summed."""
        return Layout.of(self.base, self.parts)

    def summand(self, upload: Upload) -> Summand:
        """The part of one client, who checks what it would send as the server does elsewhere. Raises `FedrotError`."""
        check_upload(upload, self.base, self.recipe.checks, False, *told(self.recipe))
        layout = self.layout
        change = layout.pack(upload.adapter).double() - layout.pack(self.base).double()
        told_of: dict[str, float] = {}
        if upload.metrics and self.phase == "train":
            told_of = {"loss": upload.metrics["loss"], "rows": upload.used, "tokens": upload.metrics["tokens"]}
        rng = generator(self.recipe.seed, self.round, upload.client, "secure", self.phase)
        return self._scale.summand(change, int(weight_of(upload, self.recipe)), told_of, rng)

    def opened(self, total: Summand, held: Mapping[str, int], up: int, down: int) -> Summed:
        """What the sum of the clients in `held`, who have so many examples, gives; `up` and `down` are bytes that
        travelled for it. Raises `RejectedUpload` where it cannot be theirs.
        """
        weights = [most_weight(self.recipe, count) for count in held.values()]
        known = sum(weight for weight, _ in weights) if all(exact for _, exact in weights) else None
        mean = self._scale.mean(total, len(held), known)
        adapter = with_change(self.base, self.layout.split(mean.change, torch.float64))
        return Summed(tuple(sorted(held)), adapter, mean.weight, mean.clipped, mean.reports, up, down)

    @property
    def _scale(self) -> Scale:
        return Scale(self.recipe.secure.range, self.total)


def most_weight(recipe: Recipe, held: int) -> tuple[int, bool]:
    """(the most that a client of so many examples can weigh, whether it weighs exactly that)."""
    rule = recipe.method.weighting or recipe.federation.weighting
    if rule == "used":
        return most_rows(held, recipe.local), False
    return (held if rule == "held" else 1), True


def total_weight(recipe: Recipe, held: Iterable[int]) -> int:
    """The most that clients of so many examples can weigh together, at least 1."""
    return max(1, sum(most_weight(recipe, count)[0] for count in held))


def share_of(recipe: Recipe, clients: int) -> int:
    """How many of so many clients must be left, by secure.threshold: more than half of them in any case, so that no two
    groups of that size are without a common client.
    """
    return max(clients // 2 + 1, math.ceil(recipe.secure.threshold * clients - 1e-9))


def check_enough(recipe: Recipe, left: int, listed: int, drawn: int) -> None:
    """Raise `RejectedUpload` unless a sum of the clients that are left may be opened; `listed` of the `drawn` ones
    began it. Fewer than the quorum would end the round, so their sum is not opened for nothing.
    """
    for key, least in (
        ("secure.fewest", recipe.secure.fewest),
        ("secure.threshold", share_of(recipe, listed)),
        ("federation.quorum", least_uploads(recipe.federation.quorum, drawn)),
    ):
        if left < least:
            raise RejectedUpload(f"the secure sum has {left} of {drawn} clients left and needs {least} ({key})")


def in_the_clear(
    uploads: Iterable[Upload | Failure], of: SecureSum, held: Mapping[str, int]
) -> Iterator[Failure | Summed]:
    """What a secure sum gives, without masks: for clients of one process, who have nothing to hide from it."""
    total: Summand | None = None
    summed: list[str] = []
    for upload in uploads:
        if isinstance(upload, Failure):
            yield upload
            continue
        try:
            mine = of.summand(upload)
        except FedrotError as problem:
            yield Failure(upload.client, str(problem))
            continue
        total = mine if total is None else total + mine
        summed.append(upload.client)
    try:
        check_enough(of.recipe, len(summed), len(summed), len(held))
        if total is not None:
            up = len(summed) * total.payload().numel()
            yield of.opened(total, {client: held[client] for client in summed}, up, 0)
    except RejectedUpload as problem:
        yield from failures(summed, problem)


def failures(clients: Sequence[str], reason: FedrotError) -> Iterator[Failure]:
    """The same reason for each of them."""
    return (Failure(client, str(reason)) for client in clients)
