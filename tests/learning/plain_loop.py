"""The oracle of local training: a loop over PEFT's own layers and padded batches, client by client."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrot.core.adapter import Adapter, part_of
from fedrot.learning.batching import shuffled_batches
from fedrot.learning.dropout import Key
from fedrot.learning.encoding import Encoded
from fedrot.learning.local import step_count
from fedrot.learning.models import ResidentModel
from fedrot.learning.settings import LocalSettings


def plain_steps(
    model: ResidentModel,
    start: Adapter,
    data: Encoded,
    indices: NDArray[np.int64],
    settings: LocalSettings,
    key: Key,
    correction: Mapping[str, Tensor] | None = None,
    parts: frozenset[str] = frozenset({"a", "b", "head"}),
) -> tuple[Adapter, dict[str, Tensor], list[float]]:
    """(adapter, mean of the clipped gradients, their norms before clipping), the proximal term being in the loss."""
    model.write(start)
    named = {name: p for name, p in model.parameters(frozenset({"a", "b", "head"})) if part_of(name) in parts}
    trained = [p.requires_grad_(True) for p in named.values()]
    kind = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.AdamW
    extra = {"momentum": settings.momentum} if settings.optimizer == "sgd" else {}
    optimizer = kind(trained, lr=settings.lr, weight_decay=settings.weight_decay, **extra)
    origin, batches = dict(start.tensors()), shuffled_batches(data.lengths[indices], settings.batch, key)
    mean, norms = {name: torch.zeros_like(p) for name, p in named.items()}, []
    steps = step_count(len(indices), settings)
    for step in range(steps):
        model.set_dropout_key((*key, "dropout", step))
        rows = indices[next(batches)]
        inputs, labels = data.batch(rows)
        away = sum((p - origin[name]).square().sum() for name, p in named.items())
        loss = plain_loss(model, data, rows, inputs, labels, settings.precision) + settings.prox / 2 * away
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, settings.clip or float("inf"))))
        for name, p in named.items():
            mean[name] += p.grad / steps
            p.grad += correction[name] if correction else 0.0
        optimizer.step()
    model.set_dropout_key(None)
    for p in trained:
        p.requires_grad_(False)
        p.grad = None
    return model.read(), mean, norms


def plain_loss(
    model: ResidentModel,
    data: Encoded,
    rows: NDArray[np.int64],
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    precision: str,
) -> Tensor:
    """The mean loss of a batch as transformers computes it: over examples, or over the tokens that are learnt."""
    logits = model.logits(inputs, precision)
    if data.learnt is None:
        return torch.nn.functional.cross_entropy(logits, labels)
    targets = torch.full(inputs["input_ids"].shape, -100)
    for place, row in enumerate(rows):
        learnt = torch.from_numpy(data.learnt[data.offsets[row] : data.offsets[row + 1]].copy())
        targets[place, : len(learnt)][learnt] = inputs["input_ids"][place, : len(learnt)][learnt]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
