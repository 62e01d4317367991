"""The local steps of clients: of one, or of several at once in a stack. Both are the same code and give the same."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.errors import FedrotError
from fedrot.core.privacy import with_noise
from fedrot.learning.batching import shuffled_batches
from fedrot.learning.checkpointing import recomputed
from fedrot.learning.dropout import Key
from fedrot.learning.encoding import Encoded
from fedrot.learning.models import ResidentModel
from fedrot.learning.private import ExamplePrivacy, clipped_sums, expected_batch
from fedrot.learning.settings import LocalSettings
from fedrot.learning.stacked import Seats, Stack
from fedrot.learning.tasks.base import task_of


class LocalFailure(FedrotError):
    """Local training that cannot give a usable adapter; the message is the reason."""


@dataclass(frozen=True)
class Job:
    """What one client trains in one round."""

    adapter: Adapter  # to start from
    indices: NDArray[np.int64]  # the client's examples, as places in the data
    key: Key  # (seed, round, client): batches and dropout masks come from it
    correction: Mapping[str, Tensor] | None = None  # by flat name, added to every gradient (SCAFFOLD's c - c_i)


@dataclass(frozen=True)
class LocalResult:
    """A client's adapter after its steps."""

    adapter: Adapter
    used: int  # rows processed
    steps: int
    loss: float  # mean over the steps; with privacy over those that drew an example, and not a number without any
    tokens: int  # tokens in the batches, padding not counted
    gradient: Mapping[str, Tensor] = field(default_factory=dict)  # with `correction`: mean over the steps, uncorrected


def train_local(
    model: ResidentModel,
    adapter: Adapter,
    data: Encoded,
    indices: NDArray[np.int64],
    settings: LocalSettings,
    parts: frozenset[str],
    key: Key,
    correction: Mapping[str, Tensor] | None = None,
    packing: bool = False,
    private: ExamplePrivacy | None = None,
) -> LocalResult:
    """Train one client; see `train_clients`. Raises `LocalFailure`."""
    (result,) = train_clients(model, data, [Job(adapter, indices, key, correction)], settings, parts, packing, private)
    if isinstance(result, LocalFailure):
        raise result
    return result


def train_clients(
    model: ResidentModel,
    data: Encoded,
    jobs: Sequence[Job],
    settings: LocalSettings,
    parts: frozenset[str],
    packing: bool = False,
    private: ExamplePrivacy | None = None,
) -> list[LocalResult | LocalFailure]:
    """Train `parts` of each job's adapter on the client's examples, all jobs in one stack; results in their order.

    A client's result depends on its own job alone, up to the order of floating point sums: not on who else is in the
    stack, on what ran before, or on `packing` (see packing.py). A client whose loss is not finite gives a
    `LocalFailure`. With several jobs either all have a correction or none.

    With `private` the adapter is differentially private for every example, and so are `gradient` and what follows from
    them; the numbers beside them are not. Then a client fails by its adapter alone.
    """
    # Clients that finish early are at the end, so those that still train are always the first ones of the stack.
    order = sorted(range(len(jobs)), key=lambda i: -step_count(len(jobs[i].indices), settings))
    ordered = [jobs[i] for i in order]
    if private is None:
        training = _Training(model, data, ordered, settings, parts, packing)
    else:
        training = _PrivateTraining(model, data, ordered, settings, parts, packing, private)
    again = recomputed(model.model.base_model.model) if settings.checkpointing else nullcontext()
    with training.stack.installed(), again:
        found = training.run()
    return [result for _, result in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


class _Training:
    """The steps of a stack whose clients are sorted by their number of steps, most first."""

    def __init__(
        self,
        model: ResidentModel,
        data: Encoded,
        jobs: Sequence[Job],
        settings: LocalSettings,
        parts: frozenset[str],
        packing: bool,
    ) -> None:
        self.model, self.data, self.jobs, self.settings, self.packing = model, data, jobs, settings, packing
        self.stack = Stack(model, [job.adapter for job in jobs], parts)
        self.trained, self.task = self.stack.trained, task_of(data)
        self.steps = [step_count(len(job.indices), settings) for job in jobs]
        self.batches = [shuffled_batches(data.lengths_of(job.indices), settings.batch, job.key) for job in jobs]
        self.optimizer = _optimizer(list(self.trained.values()), settings)
        self.start = {name: t.detach().clone() for name, t in self.trained.items()} if settings.prox else {}
        corrections = [job.correction for job in jobs if job.correction is not None]
        self.correction = self.stack.stacked([{name: c[name] for name in self.trained} for c in corrections])
        self.gradient = {name: torch.zeros_like(self.trained[name]) for name in self.correction}
        self.losses: list[list[float]] = [[] for _ in jobs]
        self.used, self.tokens = [0] * len(jobs), [0] * len(jobs)
        self.found: list[LocalResult | LocalFailure | None] = [None] * len(jobs)

    def run(self) -> list[LocalResult | LocalFailure]:
        """All steps of all clients."""
        for step in range(max(self.steps)):
            active = [steps > step for steps in self.steps].count(True)
            self._forward_backward(step, active)
            self._change_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            for client in range(active):
                if self.steps[client] == step + 1 and self.found[client] is None:
                    self.found[client] = self._result(client)
        return [result for result in self.found if result is not None]

    def _forward_backward(self, step: int, active: int) -> None:
        rows = [self.jobs[client].indices[next(self.batches[client])] for client in range(active)]
        batch = self.model.collate(self.data, np.concatenate(rows), self.packing)
        examples = [len(mine) for mine in rows]
        seats = Seats.of(batch, examples, [(*job.key, "dropout", step) for job in self.jobs[:active]])
        self.stack.seat(seats)
        losses = self.task.losses(self.model, batch, self.settings.precision)
        ends = np.cumsum(examples)
        scored = [int(mine.sum()) for mine in np.split(batch.scored, ends[:-1])]
        means = torch.stack([mine.mean() for mine in losses.split(scored)])
        for client, loss in enumerate(means.tolist()):
            self.losses[client].append(loss)
            self.used[client] += examples[client]
            self.tokens[client] += seats.tokens[client]
            if not math.isfinite(loss) and self.found[client] is None:
                self.found[client] = LocalFailure(
                    f"the loss is {loss} at local step {step}; lower local.lr or set local.clip"
                )
        torch.autograd.backward(means.sum())

    def _change_gradients(self) -> None:
        """FedProx's pull, clipping by client, and SCAFFOLD's correction, in this order."""
        gradients = {name: tensor.grad for name, tensor in self.trained.items() if tensor.grad is not None}
        if self.start:
            for name, gradient in gradients.items():
                gradient.add_(self.trained[name].detach() - self.start[name], alpha=self.settings.prox)
        if self.settings.clip is not None and gradients:
            norms = torch.stack([g.square().flatten(1).sum(1) for g in gradients.values()]).sum(0).sqrt()
            share = (self.settings.clip / (norms + 1e-6)).clamp(max=1.0)
            for gradient in gradients.values():
                gradient.mul_(_by_client(share, gradient))
        if self.correction:
            steps = torch.tensor(self.steps, dtype=torch.float64)
            for name, gradient in gradients.items():
                self.gradient[name].add_(gradient / _by_client(steps.to(gradient), gradient))
                gradient.add_(self.correction[name])

    def _result(self, client: int) -> LocalResult | LocalFailure:
        adapter = self.stack.adapter(client)
        if not all(bool(torch.isfinite(tensor).all()) for _, tensor in adapter.tensors()):
            return LocalFailure(
                "the factors are not finite after the last local step; lower local.lr or set local.clip"
            )
        losses = self.losses[client]
        loss = sum(losses) / len(losses) if losses else math.nan
        gradient = {name: self.stack.own(client, name, tensor) for name, tensor in self.gradient.items()}
        return LocalResult(adapter, self.used[client], self.steps[client], loss, self.tokens[client], gradient)


class _PrivateTraining(_Training):
    """The same with DP-SGD's steps: every example of a batch has a copy of its client's factors and head to itself, so
    the gradient of a copy is the example's own.
    """

    def __init__(
        self,
        model: ResidentModel,
        data: Encoded,
        jobs: Sequence[Job],
        settings: LocalSettings,
        parts: frozenset[str],
        packing: bool,
        private: ExamplePrivacy,
    ) -> None:
        super().__init__(model, data, jobs, settings, parts, packing)
        self.private = private
        self.batches = [private.batches(len(job.indices), settings.batch, job.key) for job in jobs]
        self.expected = [expected_batch(len(job.indices), settings.batch) for job in jobs]
        self.left_out = [0] * len(jobs)

    def _forward_backward(self, step: int, active: int) -> None:
        drawn = [next(self.batches[client]) for client in range(active)]
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in self.trained.items()}
        if any(len(places) for places in drawn):
            sums = self._clipped_sums(step, drawn)
        noisy = [self._noisy_mean(client, step, sums) for client in range(active)]
        for name, mean in self.stack.stacked(noisy).items():
            gradient = torch.zeros_like(self.trained[name])
            gradient[:active] = mean
            self.trained[name].grad = gradient

    def _clipped_sums(self, step: int, drawn: Sequence[NDArray[np.int64]]) -> dict[str, Tensor]:
        """The sums of the clipped gradients of the examples that each client drew, (clients, ...) in float64."""
        jobs, counts = self.jobs[: len(drawn)], [len(places) for places in drawn]
        rows = np.concatenate([job.indices[places] for job, places in zip(jobs, drawn, strict=True)])
        batch = self.model.collate(self.data, rows, self.packing)
        # A mask is its example's own: one drawn for all would change with who else is in the batch.
        keys = [(*job.key, "dropout", step, int(i)) for job, places in zip(jobs, drawn, strict=True) for i in places]
        seats = Seats.of(batch, [1] * len(rows), keys)
        copies = self.stack.seat_examples(seats, np.repeat(np.arange(len(drawn)), counts).tolist())
        losses = self.task.losses(self.model, batch, self.settings.precision)
        means = torch.stack([mine.mean() for mine in losses.split(batch.scored.tolist())])
        torch.autograd.backward(means.sum())
        gradients = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in copies.items()}
        sums, left_out = clipped_sums(gradients, counts, self.private.clip)
        for client, (mine, lengths) in enumerate(
            zip(means.detach().split(counts), np.split(batch.lengths, np.cumsum(counts)[:-1]), strict=True)
        ):
            self.losses[client] += [float(mine.mean())] if len(mine) else []
            self.used[client] += len(mine)
            self.tokens[client] += int(lengths.sum())
            self.left_out[client] += left_out[client]
        return sums

    def _noisy_mean(self, client: int, step: int, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A client's sum with noise, over the number of examples that were expected; at its own rank."""
        own = {name: self.stack.own(client, name, tensor) for name, tensor in sums.items()}
        normals = self.private.normals((*self.jobs[client].key, "privacy", step))
        noisy = with_noise(own, self.private.noise * self.private.clip, normals)
        return {name: tensor / self.expected[client] for name, tensor in noisy.items()}

    def _result(self, client: int) -> LocalResult | LocalFailure:
        if self.left_out[client]:
            logging.getLogger("fedrot").warning(
                "%s: %d gradients of examples were not finite and were left out; lower local.lr",
                self.jobs[client].key[-1],
                self.left_out[client],
            )
        return super()._result(client)


def _by_client(
    values: Tensor,  # (C)
    like: Tensor,  # (C, ...)
) -> Tensor:  # (C, 1, ...)
    return values.view(-1, *[1] * (like.ndim - 1))


def step_count(examples: int, settings: LocalSettings) -> int:
    """Steps a round: as given, or as many as make up the epochs, at least one."""
    if settings.steps is not None:
        return settings.steps
    return max(1, math.ceil((settings.epochs or 1.0) * examples / min(settings.batch, examples) - 1e-9))


def most_rows(examples: int, settings: LocalSettings) -> int:
    """The most rows that a client of so many examples can process in a round."""
    return step_count(examples, settings) * min(settings.batch, examples)


def _optimizer(trained: list[Tensor], settings: LocalSettings) -> torch.optim.Optimizer:
    """Elementwise, so that one on stacked tensors is one for each client."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
