"""A change of the base weights: what the model then computes, that it is no sum of changes, and that it goes away."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_models import at_ranks, dense_logits
from learning_helpers import ALL, assert_same, changed, encoded_splits, resident, shaken
from model_folders import SIZES, write_model
from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.learning.encoding import Encoded
from fedrot.learning.local import train_local
from fedrot.learning.models import ResidentModel
from fedrot.learning.settings import LocalSettings

STEPS = LocalSettings(lr=0.01, batch=8, steps=2)


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def folder(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT's layers are nn.Linear, GPT-2's are Conv1D, whose weights lie the other way."""
    if request.param == "bert":
        return tiny_model
    return write_model(tmp_path_factory.mktemp("gpt2"), "gpt2", tiny_model, **SIZES["gpt2"])


@pytest.fixture(scope="module")
def resident_model(folder: Path) -> ResidentModel:
    return resident(folder)


@pytest.fixture
def model(resident_model: ResidentModel) -> Iterator[ResidentModel]:
    yield resident_model
    resident_model.change_base(None)


@pytest.fixture(scope="module")
def data(resident_model: ResidentModel, tiny_data: Path) -> Encoded:
    return encoded_splits(resident_model, tiny_data)["train"]


def change(model: ResidentModel, seed: int = 11, rank: int = 6, size: float = 0.2) -> Adapter:
    """A change of every adapted layer, as a method sends it: scale 1, no head, of a rank of its own."""
    return replace(at_ranks(model.read(), [rank], 1.0, seed, size), head={})


def logits(model: ResidentModel, inputs: dict[str, Tensor], precision: str = "fp32") -> Tensor:
    with torch.no_grad():
        return model.logits(inputs, precision)


def base_weights(model: ResidentModel) -> dict[str, Tensor]:
    """Copies of all parameters but the adapter's."""
    named = model.model.named_parameters()
    return {n: p.detach().clone() for n, p in named if "lora_" not in n and "modules_to_save" not in n}


def test_the_change_is_in_the_dense_weights_below_the_adapter(
    model: ResidentModel, data: Encoded, folder: Path
) -> None:
    inputs, adapter, delta = data.batch([0, 1, 2])[0], shaken(model.read()), change(model)
    model.write(adapter)
    plain = logits(model, inputs)
    model.change_base(delta)
    found = logits(model, inputs)
    assert (found - plain).abs().max() > 1e-3
    wanted = dense_logits(folder, inputs, adapter, delta, pad=data.pad)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    assert_same(model.read(), adapter)


def test_a_change_replaces_the_one_before(model: ResidentModel, data: Encoded, folder: Path) -> None:
    inputs, delta = data.batch([0, 1, 2])[0], change(model, seed=12)
    adapter = shaken(model.read())
    model.change_base(change(model, seed=13))
    model.change_base(delta)
    model.write(adapter)
    other = resident(folder)
    other.change_base(delta)
    other.write(adapter)
    assert torch.equal(logits(model, inputs), logits(other, inputs))


def test_none_restores_what_was_loaded_bit_for_bit(model: ResidentModel, data: Encoded) -> None:
    inputs, adapter = data.batch([0, 1, 2])[0], shaken(model.read())
    model.write(adapter)
    before, fingerprint, answer = base_weights(model), model.fingerprint(), logits(model, inputs)
    model.change_base(change(model))
    assert model.fingerprint() != fingerprint
    train_local(model, adapter, data, np.arange(20), STEPS, ALL, (1, 0, "a"))
    model.change_base(change(model, seed=14))
    model.change_base(None)
    after = base_weights(model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert model.fingerprint() == fingerprint
    model.write(adapter)
    assert torch.equal(logits(model, inputs), answer)


def test_only_the_adapted_layers_change(model: ResidentModel) -> None:
    before = base_weights(model)
    model.change_base(change(model))
    after = base_weights(model)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    prefix = "base_model.model."
    assert moved == {f"{prefix}{name}.base_layer.weight" for name in model.read().layers}


def test_training_sees_the_changed_base_and_leaves_it(model: ResidentModel, data: Encoded, folder: Path) -> None:
    """As on a model that has the change in its files."""
    from transformers import AutoModelForSequenceClassification

    adapter, delta, rows = shaken(model.read()), change(model), np.arange(20)
    plain = train_local(model, adapter, data, rows, STEPS, ALL, (1, 0, "a"))
    model.change_base(delta)
    weights = base_weights(model)
    found = train_local(model, adapter, data, rows, STEPS, ALL, (1, 0, "a"))
    assert found.loss != plain.loss
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base_weights(model).items())
    other = resident(folder)
    whole = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    for name, pair in delta.layers.items():
        update = pair.b @ pair.a
        weight = whole.get_submodule(name).weight.detach() + (update.T if pair.fan_in_fan_out else update)
        other.model.base_model.model.get_submodule(name).base_layer.weight.data = weight
    expected = train_local(other, adapter, data, rows, STEPS, ALL, (1, 0, "a"))
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    theirs = dict(expected.adapter.tensors())
    for name, tensor in found.adapter.tensors():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.fixture
def half(folder: Path) -> ResidentModel:
    return resident(folder, dtype="bfloat16")


def test_a_bfloat16_base_is_widened_where_it_is_changed_and_comes_back(
    half: ResidentModel, data: Encoded, folder: Path
) -> None:
    inputs, adapter, delta = data.batch([0, 1, 2])[0], shaken(half.read()), change(half, size=0.3)
    half.write(adapter)
    before, fingerprint, plain = base_weights(half), half.fingerprint(), logits(half, inputs, "bf16")
    half.change_base(delta)
    for name, pair in delta.layers.items():
        weight = half.model.base_model.model.get_submodule(name).base_layer.weight
        assert weight.dtype == torch.float32
        original = before[f"base_model.model.{name}.base_layer.weight"].float()
        torch.testing.assert_close(weight, original + pair.delta(), rtol=1e-6, atol=1e-6)
    found = logits(half, inputs, "bf16").double()
    wanted = dense_logits(folder, inputs, adapter, delta, pad=data.pad)
    assert (found - wanted).norm() < 0.5 * (plain.double() - wanted).norm()
    half.change_base(None)
    after = base_weights(half)
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())
    assert half.fingerprint() == fingerprint
    assert torch.equal(logits(half, inputs, "bf16"), plain)


def test_factors_train_on_a_changed_bfloat16_base(half: ResidentModel, data: Encoded) -> None:
    half.change_base(change(half))
    adapter = half.read()
    found = train_local(half, adapter, data, np.arange(20), replace(STEPS, precision="bf16"), ALL, (1, 0, "a"))
    assert changed(found.adapter, adapter) == {name for name, _ in adapter.tensors()}
    assert {tensor.dtype for _, tensor in found.adapter.tensors()} == {torch.float32}


def test_a_change_below_the_rounding_of_bfloat16_still_counts(half: ResidentModel, data: Encoded) -> None:
    """A thousandth of every weight: bfloat16 keeps eight bits, so that each sum alone rounds back to the weight."""
    inputs = data.batch(range(8))[0]
    half.write(shaken(half.read()))
    plain = logits(half, inputs, "bf16")
    layers = {}
    for name, pair in half.read().layers.items():
        weight = half.model.base_model.model.get_submodule(name).base_layer.weight.float()
        small = (weight.T if pair.fan_in_fan_out else weight) / 1024
        layers[name] = LoraPair(small, torch.eye(len(small)), 1.0, pair.fan_in_fan_out)
    half.change_base(Adapter(layers))
    assert float((logits(half, inputs, "bf16") - plain).abs().max()) > 0
