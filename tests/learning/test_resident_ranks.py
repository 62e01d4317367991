"""One resident model for adapters of any ranks and scales: what is written is what it computes, reads and trains."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_models import at_ranks, dense_logits
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from learning_helpers import ALL, assert_same, changed, encoded_splits, refused, resident, seeds, shaken
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.learning.encoding import Encoded
from fedrot.learning.local import train_local
from fedrot.learning.models import ResidentModel
from fedrot.learning.settings import LocalSettings

few = hypothesis_settings(max_examples=8, deadline=None, database=None, derandomize=True)
STEPS = LocalSettings(optimizer="sgd", lr=0.5, batch=8, steps=2, clip=None)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ResidentModel:
    return resident(tiny_model)


@pytest.fixture(scope="module")
def start(model: ResidentModel) -> Adapter:
    return model.read()


@pytest.fixture(scope="module")
def data(model: ResidentModel, tiny_data: Path) -> Encoded:
    return encoded_splits(model, tiny_data)["train"]


@pytest.fixture(scope="module")
def inputs(data: Encoded) -> dict[str, Tensor]:
    return data.batch(range(6))[0]


@few
@given(seed=seeds, ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4), scale=st.sampled_from([0.25, 1.0, 3.0]))
def test_any_ranks_and_scale_are_the_dense_model_and_read_back(
    model: ResidentModel, start: Adapter, inputs: dict[str, Tensor], tiny_model: Path,
    seed: int, ranks: list[int], scale: float,
) -> None:  # fmt: skip
    wanted = at_ranks(start, ranks, scale, seed)
    model.write(wanted)
    with torch.no_grad():
        found = model.logits(inputs, "fp32")
    torch.testing.assert_close(found.double(), dense_logits(tiny_model, inputs, wanted), rtol=1e-4, atol=1e-5)
    read = model.read()
    assert_same(read, wanted)
    assert [pair.scale for pair in read.layers.values()] == [scale] * 4
    assert read.config == start.config


def test_the_way_back_to_the_first_ranks_leaves_nothing_behind(
    model: ResidentModel, start: Adapter, inputs: dict[str, Tensor]
) -> None:
    first = shaken(start)
    model.write(first)
    before = model.logits(inputs, "fp32")
    model.write(at_ranks(start, [5, 1], 0.5, seed=3))
    assert not torch.equal(model.logits(inputs, "fp32"), before)
    model.write(first)
    assert torch.equal(model.logits(inputs, "fp32"), before)
    assert_same(model.read(), first)


def test_what_was_written_is_a_copy_at_any_rank(model: ResidentModel, start: Adapter) -> None:
    wanted = at_ranks(start, [3], 1.0, seed=4)
    model.write(wanted)
    kept = wanted.map(torch.clone)
    for _, tensor in wanted.tensors():
        tensor.zero_()
    assert_same(model.read(), kept)


@pytest.mark.parametrize("rank", [1, 4])
def test_training_after_a_change_of_rank_is_that_of_a_model_made_with_it(
    model: ResidentModel, data: Encoded, tiny_model: Path, rank: int
) -> None:
    """Its own gradients are held to the dense model's in test_gradients.py."""
    made = resident(tiny_model, rank=rank, alpha=3.0)
    first = shaken(made.read())
    expected = train_local(made, first, data, np.arange(20), STEPS, ALL, (1, 0, "a"))
    model.write(at_ranks(first, [6, 2], 9.0, seed=5))
    found = train_local(model, first, data, np.arange(20), STEPS, ALL, (1, 0, "a"))
    assert_same(found.adapter, expected.adapter)
    assert found.loss == expected.loss
    assert changed(found.adapter, first) == {name for name, _ in first.tensors()}
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_clients_of_many_ranks_do_not_disturb_each_other(
    model: ResidentModel, start: Adapter, data: Encoded, tiny_model: Path
) -> None:
    """One after the other on one model is each on a model of its own."""
    adapters = [at_ranks(start, ranks, scale, seed=6) for ranks, scale in (([1], 4.0), ([3, 2], 1.0), ([2], 2.0))]
    for number, adapter in enumerate(adapters):
        found, alone = (
            train_local(one, adapter, data, np.arange(10 * number, 20 + 10 * number), STEPS, ALL, (1, 0, "a"))
            for one in (model, resident(tiny_model))
        )
        assert_same(found.adapter, alone.adapter)
        assert [p.rank for p in found.adapter.layers.values()] == [p.rank for p in adapter.layers.values()]


def test_fit_at_any_rank_keeps_ranks_scales_and_numbers(
    model: ResidentModel, start: Adapter, inputs: dict[str, Tensor], tiny_model: Path
) -> None:
    wide = at_ranks(start, [7, 40], 1.0, seed=7)  # 40 is more than the 32 of the layers
    foreign = replace(wide.map(lambda t: t.to(torch.bfloat16)), config={"peft_type": "LORA", "r": 7})
    found = model.fit(foreign, where="run/adapter", any_rank=True)
    assert_same(found, foreign.map(lambda t: t.float()))
    assert [(p.rank, p.scale) for p in found.layers.values()] == [(7, 1.0), (40, 1.0)] * 2
    assert found.config == model.config()
    model.write(found)
    with torch.no_grad():
        logits = model.logits(inputs, "fp32").double()
    torch.testing.assert_close(logits, dense_logits(tiny_model, inputs, found), rtol=1e-4, atol=1e-5)


def test_fit_at_any_rank_still_refuses_what_is_of_another_model(
    model: ResidentModel, start: Adapter, tiny_model: Path
) -> None:
    name = next(iter(start.layers))
    pair = start.layers[name]
    with refused("init", name, "missing"):
        model.fit(replace(start, layers={n: p for n, p in start.layers.items() if n != name}), "init", any_rank=True)
    with refused("init", ".key'", "not in the reference"):
        model.fit(resident(tiny_model, targets=["query", "value", "key"]).read(), "init", any_rank=True)
    for other in (replace(pair, a=torch.zeros(2, 31)), replace(pair, b=torch.zeros(33, 2))):
        with refused("init", name, "shape"):
            model.fit(replace(start, layers={**start.layers, name: other}), "init", any_rank=True)
    with refused("init", "classifier", "missing"):
        model.fit(replace(start, head={}), "init", any_rank=True)
    with refused("init", "classifier", "shape"):
        model.fit(resident(tiny_model, labels=["a", "b", "c"]).read(), "init", any_rank=True)


def test_without_it_the_recipes_rank_counts_whatever_was_written_last(model: ResidentModel, start: Adapter) -> None:
    model.write(at_ranks(start, [3], 2.0, seed=1))
    with refused("init", "shape", "(3, 32)", "(2, 32)"):
        model.fit(at_ranks(start, [3], 2.0, seed=1), where="init")
    mine = shaken(start)
    assert_same(model.fit(mine, where="init"), mine)
