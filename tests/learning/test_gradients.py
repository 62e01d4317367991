"""A local step against the gradient of the dense model, worked out without PEFT in float64."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from learning_helpers import ALL, assert_same, assert_steps, changed, encoded_splits, resident, shaken

from fedrot.core.adapter import Adapter, part_of
from fedrot.learning.batching import shuffled_batches
from fedrot.learning.encoding import Encoded
from fedrot.learning.local import train_local
from fedrot.learning.models import ResidentModel
from fedrot.learning.settings import LocalSettings

KEY = (1, 0, "client")
FEW = np.array([3, 50, 7, 120, 11, 90, 42, 0])  # a client's places, in no order
SGD = LocalSettings(optimizer="sgd", lr=0.5, batch=8, steps=1, clip=None)


@pytest.fixture(scope="module")
def undropped(tiny_model: Path) -> ResidentModel:
    return resident(tiny_model, dropout=0.0)


@pytest.fixture(scope="module")
def start(undropped: ResidentModel) -> Adapter:
    return shaken(undropped.read())


@pytest.fixture(scope="module")
def data(undropped: ResidentModel, tiny_data: Path) -> Encoded:
    return encoded_splits(undropped, tiny_data)["train"]


def train(
    model: ResidentModel, start: Adapter, data: Encoded, settings: LocalSettings, parts: frozenset[str] = ALL
) -> Adapter:
    """The adapter after local training on the few examples."""
    return train_local(model, start, data, FEW, settings, parts, KEY).adapter


class Dense:
    """The same model without PEFT, in float64: gradients of the factors from those of the dense weights."""

    def __init__(self, folder: Path, data: Encoded) -> None:
        from transformers import AutoModelForSequenceClassification

        self.folder, self.data = folder, data
        self.make = AutoModelForSequenceClassification.from_pretrained

    def gradient(self, adapter: Adapter, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """By flat name, of the mean loss of these rows: dA = s B^T G and dB = s G A^T where G is dL/dW."""
        base = self.make(self.folder, num_labels=2).double().eval()
        pairs = adapter.map(torch.Tensor.double)
        with torch.no_grad():
            for name, pair in pairs.layers.items():
                base.get_submodule(name).weight += pair.scale * pair.b @ pair.a
            for name, tensor in pairs.head.items():
                base.get_parameter(name).copy_(tensor)
        inputs, labels = self.data.batch(rows)
        torch.nn.functional.cross_entropy(base(**inputs).logits, labels).backward()
        found = {f"head/{name}": base.get_parameter(name).grad for name in pairs.head}
        for name, pair in pairs.layers.items():
            g = base.get_submodule(name).weight.grad
            found |= {f"layers/{name}/a": pair.scale * pair.b.T @ g, f"layers/{name}/b": pair.scale * g @ pair.a.T}
        return found


@pytest.fixture(scope="module")
def dense(tiny_model: Path, data: Encoded) -> Dense:
    return Dense(tiny_model, data)


def moved(adapter: Adapter, steps: dict[str, torch.Tensor]) -> Adapter:
    """The adapter in float64 with these steps added."""
    return adapter.with_tensors({name: tensor.double() + steps[name] for name, tensor in adapter.tensors()})


def test_a_step_of_sgd_is_the_gradient_of_the_dense_model(
    undropped: ResidentModel, start: Adapter, data: Encoded, dense: Dense
) -> None:
    found = train(undropped, start, data, SGD)
    wanted = moved(start, {name: -0.5 * g for name, g in dense.gradient(start, FEW).items()})
    assert_steps(found, start, wanted)


def test_a_step_uses_the_clients_own_rows_of_the_batch(
    undropped: ResidentModel, start: Adapter, data: Encoded, dense: Dense
) -> None:
    found = train(undropped, start, data, replace(SGD, batch=3))
    rows = FEW[next(shuffled_batches(data.lengths[FEW], 3, KEY))]
    wanted = moved(start, {name: -0.5 * g for name, g in dense.gradient(start, rows).items()})
    assert_steps(found, start, wanted)


def test_clipping_shortens_the_step_to_the_norm_and_leaves_a_short_one(
    undropped: ResidentModel, start: Adapter, data: Encoded, dense: Dense
) -> None:
    gradient = dense.gradient(start, FEW)
    norm = float(torch.cat([g.flatten() for g in gradient.values()]).norm())
    short = train(undropped, start, data, replace(SGD, clip=0.1 * norm))
    assert_steps(short, start, moved(start, {name: -0.05 * g for name, g in gradient.items()}), rel=0.01)
    assert_same(train(undropped, start, data, replace(SGD, clip=2 * norm)), train(undropped, start, data, SGD))


def test_clipping_counts_the_trained_parts_alone(
    undropped: ResidentModel, start: Adapter, data: Encoded, dense: Dense
) -> None:
    gradient = {name: g for name, g in dense.gradient(start, FEW).items() if part_of(name) == "b"}
    norm = float(torch.cat([g.flatten() for g in gradient.values()]).norm())
    found = train(undropped, start, data, replace(SGD, clip=0.5 * norm), parts=frozenset({"b"}))
    ways = [found.layers[name].b - pair.b for name, pair in start.layers.items()]
    assert float(torch.stack(ways).norm()) == pytest.approx(0.5 * 0.5 * norm, rel=1e-3)


def test_momentum_carries_the_first_step_into_the_second(
    undropped: ResidentModel, start: Adapter, data: Encoded, dense: Dense
) -> None:
    first = dense.gradient(start, FEW)
    middle = moved(start, {name: -0.5 * g for name, g in first.items()})
    second = dense.gradient(middle, FEW)
    wanted = moved(middle, {name: -0.5 * (0.9 * first[name] + second[name]) for name in first})
    found = train(undropped, start, data, replace(SGD, momentum=0.9, steps=2))
    assert_steps(found, start, wanted)
    assert changed(found, train(undropped, start, data, replace(SGD, steps=2)))


def test_weight_decay_pulls_every_trained_tensor_to_zero(
    undropped: ResidentModel, start: Adapter, data: Encoded, dense: Dense
) -> None:
    tensors = dict(start.tensors())
    steps = {name: -0.5 * (g + 0.1 * tensors[name].double()) for name, g in dense.gradient(start, FEW).items()}
    assert_steps(train(undropped, start, data, replace(SGD, weight_decay=0.1)), start, moved(start, steps))


def test_the_first_step_of_adamw_is_the_gradients_sign(
    undropped: ResidentModel, start: Adapter, data: Encoded, dense: Dense
) -> None:
    settings = LocalSettings(optimizer="adamw", lr=0.01, batch=8, steps=1, clip=None)
    steps = {name: -0.01 * g / (g.abs() + 1e-8) for name, g in dense.gradient(start, FEW).items()}
    assert_steps(train(undropped, start, data, settings), start, moved(start, steps), rel=0.01)
