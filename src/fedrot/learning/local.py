"""The local steps of one client."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.errors import FedrotError
from fedrot.learning.batching import shuffled_batches
from fedrot.learning.encoding import Encoded
from fedrot.learning.models import ResidentModel
from fedrot.learning.settings import LocalSettings
from fedrot.learning.tasks import classification


class LocalFailure(FedrotError):
    """Local training that cannot give a usable adapter; the message is the reason."""


@dataclass(frozen=True)
class LocalResult:
    """A client's adapter after its steps."""

    adapter: Adapter
    used: int  # rows processed
    steps: int
    loss: float  # mean over the steps
    tokens: int  # tokens in the batches, padding not counted
    gradient: Mapping[str, Tensor] = field(default_factory=dict)  # with `correction`: mean over the steps, uncorrected


def train_local(
    model: ResidentModel,
    adapter: Adapter,
    data: Encoded,
    indices: NDArray[np.int64],
    settings: LocalSettings,
    parts: frozenset[str],
    key: tuple[int | str, ...],
    correction: Mapping[str, Tensor] | None = None,
) -> LocalResult:
    """Train `parts` of `adapter` on the client's examples `indices` of `data`.

    `key` is (seed, round, client): batches and dropout masks come from it, so the result does not depend on what ran
    before or on how many other clients there are. `correction`, by flat tensor name, is added to every step's gradient
    after clipping (SCAFFOLD's c - c_i). Raises `LocalFailure` when the loss is not finite.
    """
    model.write(adapter)
    named = dict(model.parameters(parts))
    for parameter in named.values():
        parameter.requires_grad_(True)
    try:
        return _steps(model, named, data, indices, settings, key, correction)
    finally:
        model.set_dropout_key(None)
        for parameter in named.values():
            parameter.requires_grad_(False)
            parameter.grad = None


def _steps(
    model: ResidentModel,
    named: Mapping[str, torch.nn.Parameter],
    data: Encoded,
    indices: NDArray[np.int64],
    settings: LocalSettings,
    key: tuple[int | str, ...],
    correction: Mapping[str, Tensor] | None,
) -> LocalResult:
    trained = list(named.values())
    optimizer = _optimizer(trained, settings)
    start = [parameter.detach().clone() for parameter in trained] if settings.prox else []
    gradient = {name: torch.zeros_like(p) for name, p in named.items()} if correction is not None else {}
    batches = shuffled_batches(data.lengths[indices], settings.batch, key)
    steps = step_count(len(indices), settings)
    losses, used, tokens = [], 0, 0
    for step in range(steps):
        rows = indices[next(batches)]
        inputs, labels = data.batch(rows)
        model.set_dropout_key((*key, "dropout", step))
        logits = model.logits(inputs, settings.precision)
        loss = classification.loss(logits, labels.to(logits.device))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise LocalFailure(f"the loss is {losses[-1]} at local step {step}; lower local.lr or set local.clip")
        torch.autograd.backward(loss)
        for parameter, origin in zip(trained, start, strict=False):  # FedProx
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - origin, alpha=settings.prox)
        if settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        if correction is not None:
            for name, parameter in named.items():
                if parameter.grad is not None:
                    gradient[name].add_(parameter.grad, alpha=1 / steps)
                    parameter.grad.add_(correction[name])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        used += len(rows)
        tokens += int(data.lengths[rows].sum())
    adapter = model.read()
    if not all(bool(torch.isfinite(tensor).all()) for _, tensor in adapter.tensors()):
        raise LocalFailure("the factors are not finite after the last local step; lower local.lr or set local.clip")
    return LocalResult(adapter, used, steps, sum(losses) / steps, tokens, gradient)


def step_count(examples: int, settings: LocalSettings) -> int:
    """Steps a round: as given, or as many as make up the epochs, at least one."""
    if settings.steps is not None:
        return settings.steps
    return max(1, math.ceil((settings.epochs or 1.0) * examples / min(settings.batch, examples) - 1e-9))


def _optimizer(trained: list[torch.nn.Parameter], settings: LocalSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
