"""FedProx's term and SCAFFOLD's correction in the local steps, held to a plain PyTorch loop."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from learning_helpers import ALL, assert_same, assert_steps, changed, encoded_splits, resident, shaken
from plain_loop import plain_steps
from torch import Tensor

from fedrot.core.adapter import Adapter, part_of
from fedrot.learning.encoding import Encoded
from fedrot.learning.local import LocalResult, train_local
from fedrot.learning.models import ResidentModel
from fedrot.learning.settings import LocalSettings

KEY = (1, 0, "client")
FEW = np.array([3, 50, 7, 120, 11, 90, 42, 0])
SGD = LocalSettings(optimizer="sgd", lr=0.2, momentum=0.5, batch=3, steps=5, clip=0.3)
ADAM = LocalSettings(optimizer="adamw", lr=0.02, weight_decay=0.1, batch=3, steps=5, clip=0.3)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ResidentModel:
    return resident(tiny_model, dropout=0.2)


@pytest.fixture(scope="module")
def start(model: ResidentModel) -> Adapter:
    return shaken(model.read())


@pytest.fixture(scope="module")
def data(model: ResidentModel, tiny_data: Path) -> Encoded:
    return encoded_splits(model, tiny_data)["train"]


def train(model: ResidentModel, start: Adapter, data: Encoded, settings: LocalSettings) -> Adapter:
    return train_local(model, start, data, FEW, settings, ALL, KEY).adapter


def corrected(
    model: ResidentModel,
    start: Adapter,
    data: Encoded,
    settings: LocalSettings,
    correction: Mapping[str, Tensor],
    parts: frozenset[str] = ALL,
) -> LocalResult:
    return train_local(model, start, data, FEW, settings, parts, KEY, correction)


def distance(one: Adapter, other: Adapter) -> float:
    theirs = dict(other.tensors())
    return float(torch.cat([(t - theirs[name]).flatten() for name, t in one.tensors()]).double().norm())


def some_correction(start: Adapter, size: float) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(8)
    return {name: size * torch.randn(t.shape, generator=rng) for name, t in start.tensors()}


@pytest.mark.parametrize("mu", [0.05, 2.0])
@pytest.mark.parametrize("settings", [SGD, replace(SGD, clip=None), ADAM], ids=["sgd", "unclipped", "adamw"])
def test_the_proximal_term_is_that_of_the_loss(
    model: ResidentModel, start: Adapter, data: Encoded, settings: LocalSettings, mu: float
) -> None:
    settings = replace(settings, prox=mu)
    wanted, _, norms = plain_steps(model, start, data, FEW, settings, KEY)
    found = train(model, start, data, settings)
    assert settings.clip is None or max(norms) > settings.clip, "the term must enter before clipping"
    assert_steps(found, start, wanted)
    assert distance(found, train(model, start, data, replace(settings, prox=0.0))) > 1e-4


def test_without_a_term_the_steps_are_those_of_the_plain_loop(
    model: ResidentModel, start: Adapter, data: Encoded
) -> None:
    for settings in (SGD, ADAM):
        assert_steps(
            train(model, start, data, settings), start, plain_steps(model, start, data, FEW, settings, KEY)[0], rel=1e-4
        )


def test_the_first_step_feels_no_term(model: ResidentModel, start: Adapter, data: Encoded) -> None:
    one = replace(SGD, steps=1)
    assert_same(train(model, start, data, replace(one, prox=50.0)), train(model, start, data, one))


@pytest.mark.parametrize("settings", [replace(SGD, lr=0.05, momentum=0.0), ADAM], ids=["sgd", "adamw"])
def test_a_larger_mu_ends_nearer_to_the_start(
    model: ResidentModel, start: Adapter, data: Encoded, settings: LocalSettings
) -> None:
    settings = replace(settings, batch=8, steps=8, clip=None, weight_decay=0.0)
    ways = [distance(train(model, start, data, replace(settings, prox=mu)), start) for mu in (0.0, 0.3, 1.0, 4.0)]
    assert ways == sorted(ways, reverse=True)
    assert ways[-1] < 0.7 * ways[0]


def test_the_reported_loss_is_the_tasks_alone(model: ResidentModel, start: Adapter, data: Encoded) -> None:
    """At a rate that moves nothing the term is zero; at the first step it is zero at any rate."""
    one = replace(SGD, steps=1)
    found = [train_local(model, start, data, FEW, replace(one, prox=mu), ALL, KEY).loss for mu in (0.0, 50.0)]
    assert found[0] == found[1]
    two = [train_local(model, start, data, FEW, replace(SGD, steps=2, prox=mu), ALL, KEY).loss for mu in (0.0, 1e-7)]
    assert two[0] == pytest.approx(two[1], rel=1e-6)


def test_only_trained_parts_are_held(model: ResidentModel, start: Adapter, data: Encoded) -> None:
    settings, parts = replace(SGD, prox=2.0), frozenset({"b"})
    found = train_local(model, start, data, FEW, settings, parts, KEY).adapter
    free = train_local(model, start, data, FEW, replace(settings, prox=0.0), parts, KEY).adapter
    assert {part_of(name) for name in changed(found, start)} == {"b"}
    assert distance(found, start) < distance(free, start)


@pytest.mark.parametrize("settings", [SGD, replace(SGD, clip=None, momentum=0.0), ADAM], ids=["clip", "none", "adamw"])
def test_a_correction_is_added_to_every_clipped_gradient(
    model: ResidentModel, start: Adapter, data: Encoded, settings: LocalSettings
) -> None:
    correction = some_correction(start, 0.1)
    wanted, gradient, norms = plain_steps(model, start, data, FEW, settings, KEY, correction)
    found = corrected(model, start, data, settings, correction)
    assert settings.clip is None or max(norms) > settings.clip, "nothing was clipped"
    assert_steps(found.adapter, start, wanted)
    assert found.gradient.keys() == gradient.keys()
    for name, mean in gradient.items():
        torch.testing.assert_close(found.gradient[name], mean, rtol=1e-4, atol=1e-6)


def test_steps_of_plain_sgd_are_the_recorded_gradient_and_the_correction(
    model: ResidentModel, start: Adapter, data: Encoded
) -> None:
    """It is x - y = K lr (g + c - c_i): what SCAFFOLD's second way to a new variate rests on."""
    settings, correction = replace(SGD, momentum=0.0), some_correction(start, 0.2)
    found = corrected(model, start, data, settings, correction)
    ends = dict(found.adapter.tensors())
    for name, tensor in start.tensors():
        wanted = 5 * 0.2 * (found.gradient[name] + correction[name])
        torch.testing.assert_close(tensor - ends[name], wanted, rtol=1e-4, atol=1e-5)


def test_clipping_bounds_the_recorded_gradient_and_not_the_correction(
    model: ResidentModel, start: Adapter, data: Encoded
) -> None:
    correction = some_correction(start, 10.0)
    found = corrected(model, start, data, replace(SGD, steps=1, momentum=0.0, clip=1e-3), correction)
    gradient = torch.cat([g.flatten() for g in found.gradient.values()])
    whole = torch.cat([c.flatten() for c in correction.values()])
    assert float(gradient.norm()) == pytest.approx(1e-3, rel=1e-3)
    assert distance(found.adapter, start) == pytest.approx(0.2 * float(whole.norm()), rel=1e-2)


def test_a_correction_of_zero_changes_no_bit_and_none_records_nothing(
    model: ResidentModel, start: Adapter, data: Encoded
) -> None:
    for settings in (SGD, ADAM):
        plain = train_local(model, start, data, FEW, settings, ALL, KEY)
        zero = corrected(model, start, data, settings, some_correction(start, 0.0))
        assert_same(zero.adapter, plain.adapter)
        assert plain.gradient == {}
        assert zero.loss == plain.loss


def test_parts_that_are_not_trained_are_not_corrected_and_have_no_gradient(
    model: ResidentModel, start: Adapter, data: Encoded
) -> None:
    correction = some_correction(start, 1.0)
    kept = {name: tensor.clone() for name, tensor in correction.items()}
    found = corrected(model, start, data, SGD, correction, frozenset({"b", "head"}))
    assert {part_of(name) for name in found.gradient} == {"b", "head"}
    assert {part_of(name) for name in changed(found.adapter, start)} == {"b", "head"}
    assert all(torch.equal(tensor, kept[name]) for name, tensor in correction.items())
