"""One client's local steps: what they depend on, what they change, and what they count."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from learning_helpers import ALL, assert_same, assert_steps, changed, encoded_splits, refused, resident, shaken

from fedrot.core.adapter import Adapter, part_of
from fedrot.learning.batching import shuffled_batches
from fedrot.learning.encoding import Encoded
from fedrot.learning.evaluation import How, measure
from fedrot.learning.local import LocalFailure, LocalResult, step_count, train_local
from fedrot.learning.models import ResidentModel
from fedrot.learning.settings import LocalSettings

KEY = (1, 0, "client")
FEW = np.array([3, 50, 7, 120, 11, 90, 42, 0])  # a client's places, in no order
SOME = LocalSettings(lr=0.02, batch=8, steps=4)
SGD = LocalSettings(optimizer="sgd", lr=0.5, batch=8, steps=1, clip=None)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ResidentModel:
    return resident(tiny_model)


@pytest.fixture(scope="module")
def start(model: ResidentModel) -> Adapter:
    return shaken(model.read())


@pytest.fixture(scope="module")
def data(model: ResidentModel, tiny_data: Path) -> Encoded:
    return encoded_splits(model, tiny_data)["train"]


@pytest.fixture(scope="module")
def undropped(tiny_model: Path) -> ResidentModel:
    return resident(tiny_model, dropout=0.0)


def train(
    model: ResidentModel,
    start: Adapter,
    data: Encoded,
    settings: LocalSettings = SOME,
    indices: np.ndarray = FEW,
    parts: frozenset[str] = ALL,
    key: tuple[int | str, ...] = KEY,
) -> LocalResult:
    """`train_local`, of a few examples of one client unless told otherwise."""
    return train_local(model, start, data, indices, settings, parts, key)


def test_the_result_depends_on_the_key_and_not_on_what_was_trained_before(
    model: ResidentModel, start: Adapter, data: Encoded, tiny_model: Path
) -> None:
    first = train(model, start, data)
    train(model, shaken(start, seed=9), data, replace(SOME, lr=0.3), np.arange(60), key=(1, 0, "other"))
    torch.manual_seed(4)
    second = train(model, start, data)
    fresh = train(resident(tiny_model, seed=8), start, data)
    for again in (second, fresh):
        assert_same(first.adapter, again.adapter)
        assert (again.loss, again.used, again.steps, again.tokens) == (
            first.loss, first.used, first.steps, first.tokens,
        )  # fmt: skip


@pytest.mark.parametrize("key", [(2, 0, "client"), (1, 1, "client"), (1, 0, "other")])
def test_seed_round_and_client_each_name_other_batches_and_masks(
    model: ResidentModel, start: Adapter, data: Encoded, key: tuple[int | str, ...]
) -> None:
    many = np.arange(40)
    for settings in (SOME, replace(SOME, batch=40)):  # of a full batch, only the dropout differs
        assert changed(
            train(model, start, data, settings, many).adapter,
            train(model, start, data, settings, many, key=key).adapter,
        )


def test_without_dropout_a_full_batch_does_not_depend_on_the_key(
    start: Adapter, data: Encoded, tiny_model: Path
) -> None:
    model = resident(tiny_model, dropout=0.0)
    first, other = (train(model, start, data, key=(1, 0, name)).adapter for name in ("a", "b"))
    theirs = dict(other.tensors())
    for name, tensor in first.tensors():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [{"a", "b", "head"}, {"b", "head"}, {"a"}, {"a", "b"}, {"head"}])
def test_only_the_named_parts_change(model: ResidentModel, start: Adapter, data: Encoded, parts: set[str]) -> None:
    found = train(model, start, data, parts=frozenset(parts)).adapter
    assert changed(found, start) == {name for name, _ in start.tensors() if part_of(name) in parts}
    assert_same(found, start, lambda name: part_of(name) not in parts)


def test_the_broadcast_is_not_changed_in_place(model: ResidentModel, start: Adapter, data: Encoded) -> None:
    before = start.map(torch.clone)
    train(model, start, data)
    assert_same(start, before)


def test_the_loss_is_the_mean_over_the_steps(undropped: ResidentModel, start: Adapter, data: Encoded) -> None:
    still = replace(SGD, lr=1e-12, batch=3, steps=5)
    losses = measure(undropped, start, data, FEW, How(8))[:, 1]
    batches = list(islice(shuffled_batches(data.lengths[FEW], 3, KEY), 5))
    wanted = float(np.mean([losses[places].mean() for places in batches]))
    assert train(undropped, start, data, still).loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "steps"),
    [
        (10, 5, 1.0, 2),
        (10, 4, 1.0, 3),
        (10, 4, 2.0, 5),
        (10, 16, 1.0, 1),
        (10, 16, 3.0, 3),
        (10, 4, 0.01, 1),
        (1, 1, 1.5, 2),
    ],
)
def test_epochs_are_as_many_steps_as_it_takes(examples: int, batch: int, epochs: float, steps: int) -> None:
    assert step_count(examples, LocalSettings(batch=batch, epochs=epochs)) == steps
    assert step_count(examples, LocalSettings(batch=batch, steps=7)) == 7


@pytest.mark.parametrize(("batch", "steps", "used"), [(3, 5, 15), (8, 2, 16), (64, 3, 24)])
def test_rows_and_tokens_are_counted_without_padding(
    model: ResidentModel, start: Adapter, data: Encoded, batch: int, steps: int, used: int
) -> None:
    """A client with fewer examples than a batch uses all that it has at every step."""
    found = train(model, start, data, replace(SOME, batch=batch, steps=steps))
    assert (found.steps, found.used) == (steps, used)
    batches = islice(shuffled_batches(data.lengths[FEW], batch, KEY), steps)
    assert found.tokens == sum(int(data.lengths[FEW][places].sum()) for places in batches)


def test_a_client_of_one_example_trains(model: ResidentModel, start: Adapter, data: Encoded) -> None:
    found = train(model, start, data, LocalSettings(lr=0.02, epochs=2.0), np.array([5]))
    assert (found.steps, found.used, found.tokens) == (2, 2, 2 * int(data.lengths[5]))
    assert changed(found.adapter, start)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_task_is_learned_in_sixty_steps(
    model: ResidentModel, data: Encoded, tiny_model: Path, precision: str
) -> None:
    everyone = np.arange(len(data))
    start = resident(tiny_model).read()
    settings = LocalSettings(lr=0.02, batch=16, steps=60, precision=precision)  # type: ignore[arg-type]
    found = train(model, start, data, settings, everyone)
    before = measure(model, start, data, everyone, How(64))[:, 1]
    predicted, after = measure(model, found.adapter, data, everyone, How(64)).T
    assert float(after.mean()) < 0.5 * float(before.mean())
    assert float((predicted.numpy() == data.labels).mean()) > 0.85
    assert found.loss < float(before.mean())


def test_bfloat16_arithmetic_leaves_float32_factors_close_to_those_of_float32(
    undropped: ResidentModel, start: Adapter, data: Encoded
) -> None:
    half = train(undropped, start, data, replace(SGD, precision="bf16"))
    full = train(undropped, start, data, SGD)
    assert {tensor.dtype for _, tensor in half.adapter.tensors()} == {torch.float32}
    assert changed(half.adapter, full.adapter)
    assert_steps(half.adapter, start, full.adapter, rel=0.1)


def test_a_loss_that_is_not_finite_fails_and_leaves_the_model_usable(
    model: ResidentModel, start: Adapter, data: Encoded
) -> None:
    before = train(model, start, data)
    with refused("the loss is", "local step", "local.lr", "local.clip", error=LocalFailure):
        train(model, start, data, replace(SGD, lr=1e30, steps=6))
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert_same(train(model, start, data).adapter, before.adapter)


def test_a_last_step_that_leaves_values_which_are_not_finite_fails(
    model: ResidentModel, start: Adapter, data: Encoded
) -> None:
    """The loss of every step was finite, and still the adapter cannot be used."""
    with refused("finite", error=LocalFailure):
        train(model, start, data, replace(SGD, lr=1e36, weight_decay=1e6))


def test_every_step_has_masks_of_its_own(start: Adapter, data: Encoded, tiny_model: Path) -> None:
    """With one example and a model that stands still, nothing but the masks tells two steps apart."""
    model, one = resident(tiny_model, dropout=0.5), np.array([5])
    losses = [train(model, start, data, replace(SGD, lr=1e-12, steps=steps), one).loss for steps in (1, 2, 3)]
    later = [2 * losses[1] - losses[0], 3 * losses[2] - 2 * losses[1]]
    assert len({round(loss, 5) for loss in [losses[0], *later]}) == 3


def test_dropout_is_off_after_training(model: ResidentModel, start: Adapter, data: Encoded) -> None:
    inputs, _ = data.batch(FEW)
    model.write(start)
    before = model.logits(inputs, "fp32")
    train(model, start, data)
    model.write(start)
    assert torch.equal(model.logits(inputs, "fp32"), before)
