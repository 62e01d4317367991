"""Many clients in one pass, packed and padded: every one of them ends where PEFT's own layers lead it alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning_helpers import ALL, encoded_splits, quick, resident, seeds, shaken
from model_folders import SIZES, write_model
from plain_loop import plain_steps
from torch import Tensor

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.ranks import cut, first_frames
from fedrot.learning.batching import Batch
from fedrot.learning.encoding import Encoded
from fedrot.learning.local import Job, LocalFailure, LocalResult, train_clients
from fedrot.learning.models import ResidentModel
from fedrot.learning.settings import LocalSettings
from fedrot.learning.stacked import _LowRankAdd

# Clients of every size: one with fewer examples than a batch, one with a single one.
CLIENTS = [np.arange(0, 40), np.arange(40, 43), np.arange(50, 90), np.array([99]), np.arange(100, 133)]
SGD = LocalSettings(optimizer="sgd", lr=0.3, momentum=0.5, batch=8, steps=1, clip=0.05)
ADAM = LocalSettings(lr=0.01, batch=8, steps=1, clip=0.05)
EPOCHS = LocalSettings(lr=0.003, batch=8, epochs=1.5, clip=0.05, weight_decay=0.1)


@pytest.fixture(scope="module", params=["bert", "gpt2", "llama", "roberta"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(kind), kind, tiny_model, **SIZES[kind])


@pytest.fixture(scope="module")
def model(folder: Path) -> ResidentModel:
    """In double precision, with dropout on."""
    made: ResidentModel = resident(folder, dropout=0.2)
    made.model.double()
    return made


@pytest.fixture(scope="module")
def data(model: ResidentModel, tiny_data: Path) -> Encoded:
    return encoded_splits(model, tiny_data)["train"]


def jobs_of(start: Adapter, correction: bool = False) -> list[Job]:
    """Each client from a start of its own."""
    made = [Job(shaken(start, seed=i), rows, (1, 0, f"client-{i}")) for i, rows in enumerate(CLIENTS)]
    return [replace(j, correction=noise(start, seed=i)) for i, j in enumerate(made)] if correction else made


def noise(start: Adapter, seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: 0.01 * torch.randn(t.shape, generator=rng).to(t.dtype) for name, t in start.tensors()}


def results(found: list[LocalResult | LocalFailure]) -> list[LocalResult]:
    assert [one for one in found if isinstance(one, LocalFailure)] == []
    return [one for one in found if isinstance(one, LocalResult)]


def assert_close(found: Adapter, wanted: Adapter, atol: float) -> None:
    theirs = dict(wanted.tensors())
    for name, tensor in found.tensors():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("settings", [SGD, ADAM, EPOCHS], ids=["sgd", "adamw", "epochs"])
def test_every_client_of_a_stack_ends_where_the_plain_loop_leads_it(
    model: ResidentModel, data: Encoded, settings: LocalSettings, packing: bool
) -> None:
    """In float64, with dropout on: a step to 1e-9, in a stack and alone; AdamW makes later ones differ by more."""
    atol = 1e-7 if settings.epochs else 1e-9
    jobs = jobs_of(model.read())
    stacked = results(train_clients(model, data, jobs, settings, ALL, packing))
    for job, found in zip(jobs, stacked, strict=True):
        wanted, _, norms = plain_steps(model, job.adapter, data, job.indices, settings, job.key)
        assert_close(found.adapter, wanted, atol)
        (alone,) = results(train_clients(model, data, [job], settings, ALL, packing))
        assert_close(alone.adapter, wanted, atol)
        assert (found.used, found.steps, found.tokens) == (alone.used, alone.steps, alone.tokens)
        assert found.loss == pytest.approx(alone.loss, rel=1e-9)
        assert max(norms) > 0.05, "clipping must be at work"
    if settings.epochs:
        assert [found.steps for found in stacked] == [8, 2, 8, 2, 7]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_in_single_precision_to_1e_5(folder: Path, tiny_data: Path, packing: bool) -> None:
    model = resident(folder, dropout=0.2)
    data = encoded_splits(model, tiny_data)["train"]
    settings = replace(SGD, lr=0.05)
    jobs = jobs_of(model.read())
    for job, found in zip(jobs, results(train_clients(model, data, jobs, settings, ALL, packing)), strict=True):
        assert {t.dtype for _, t in found.adapter.tensors()} == {torch.float32}
        assert_close(found.adapter, plain_steps(model, job.adapter, data, job.indices, settings, job.key)[0], 1e-5)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_one_pass_a_step_serves_all_clients_that_still_train(
    model: ResidentModel, data: Encoded, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Batch] = []
    forward = model.forward

    def spy(batch: Batch, precision: str) -> Tensor:
        seen.append(batch)
        return forward(batch, precision)

    monkeypatch.setattr(model, "forward", spy)
    train_clients(model, data, jobs_of(model.read()), EPOCHS, ALL, packing)
    assert [len(batch.labels) for batch in seen] == [8 + 3 + 8 + 1 + 8] * 2 + [24] * 5 + [16]
    assert [batch.packing is not None for batch in seen] == [packing] * len(seen)
    if packing:  # no row is padding
        assert all(batch.inputs["input_ids"].shape == (1, batch.lengths.sum()) for batch in seen)


@pytest.mark.parametrize("parts", [{"b", "head"}, {"a"}, {"a", "b"}], ids=["ffa", "a", "no head"])
def test_parts_that_are_not_trained_stay_bit_for_bit(model: ResidentModel, data: Encoded, parts: set[str]) -> None:
    jobs = jobs_of(model.read())
    for job, found in zip(jobs, results(train_clients(model, data, jobs, SGD, frozenset(parts), True)), strict=True):
        assert_close(
            found.adapter,
            plain_steps(model, job.adapter, data, job.indices, SGD, job.key, parts=frozenset(parts))[0],
            1e-9,
        )
        begun = dict(job.adapter.tensors())
        assert {n for n, t in found.adapter.tensors() if torch.equal(t, begun[n])} == {
            n for n in begun if part_of(n) not in parts
        }


def test_the_pull_to_the_start_and_the_corrections_are_each_client_s_own(model: ResidentModel, data: Encoded) -> None:
    settings = replace(EPOCHS, prox=0.5)
    jobs = jobs_of(model.read(), correction=True)
    for job, found in zip(jobs, results(train_clients(model, data, jobs, settings, ALL, True)), strict=True):
        wanted, gradient, _ = plain_steps(model, job.adapter, data, job.indices, settings, job.key, job.correction)
        assert_close(found.adapter, wanted, 1e-7)
        for name, tensor in gradient.items():
            torch.testing.assert_close(found.gradient[name], tensor, rtol=0, atol=1e-9)


def test_clients_of_different_rank_train_side_by_side(model: ResidentModel, data: Encoded, folder: Path) -> None:
    jobs = jobs_of(model.read())
    narrow = cut(jobs[2].adapter, first_frames(jobs[2].adapter, 1), scale=0.7)
    jobs[2] = replace(jobs[2], adapter=narrow)
    found = results(train_clients(model, data, jobs, EPOCHS, ALL, True))
    assert {pair.rank for pair in found[2].adapter.layers.values()} == {1}
    assert {pair.scale for pair in found[2].adapter.layers.values()} == {0.7}
    for job, one in zip(jobs, found, strict=True):
        assert_close(one.adapter, plain_steps(model, job.adapter, data, job.indices, EPOCHS, job.key)[0], 1e-7)
    model.write(jobs[0].adapter)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("bad", [0, 2])
def test_a_client_whose_loss_is_not_finite_leaves_the_others_as_they_were(
    model: ResidentModel, data: Encoded, bad: int, packing: bool
) -> None:
    jobs = jobs_of(model.read())
    settings = replace(EPOCHS, clip=None)
    before = results(train_clients(model, data, jobs, settings, ALL, packing))
    jobs[bad] = replace(jobs[bad], adapter=jobs[bad].adapter.map(lambda t: t * torch.tensor(1e200, dtype=t.dtype)))
    found = train_clients(model, data, jobs, settings, ALL, packing)
    assert isinstance(found[bad], LocalFailure)
    assert "the loss is" in str(found[bad])
    for i in set(range(len(jobs))) - {bad}:
        assert_close(results([found[i]])[0].adapter, before[i].adapter, 1e-12)


def test_afterwards_the_model_is_as_it_was(model: ResidentModel, data: Encoded) -> None:
    own = shaken(model.read(), seed=77)
    model.write(own)
    batch = model.collate(data, np.arange(5), packing=True)
    with torch.no_grad():
        before = model.forward(batch, "fp32")
        with torch.enable_grad():
            train_clients(model, data, jobs_of(own), ADAM, ALL, True)
        assert torch.equal(model.forward(batch, "fp32"), before)
    assert not any(p.requires_grad for p in model.model.parameters())
    assert_close(model.read(), own, 0.0)


def test_the_same_stack_twice_gives_the_same_bits(model: ResidentModel, data: Encoded) -> None:
    jobs = jobs_of(model.read())
    first, second = (results(train_clients(model, data, jobs, EPOCHS, ALL, True)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_close(one.adapter, other.adapter, 0.0)


@quick
@given(seeds, st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_the_low_rank_path_and_its_gradients_are_those_of_dense_layers(
    seed: int, sizes: list[int], dropped: bool, alike: bool
) -> None:
    sizes = [sizes[0]] * len(sizes) if alike else sizes
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()

    rows, count = sum(sizes), len(sizes)
    x, w, a, b = draw(rows, 4), draw(5, 4), draw(count, 2, 4), draw(count, 5, 2)
    scale = torch.rand(count, 1, 1, generator=rng, dtype=torch.float64)
    keep = torch.rand(rows, 4, generator=rng) > 0.3 if dropped else None
    weight = draw(rows, 5).detach()
    found = _LowRankAdd.apply(x @ w.T, x, a, b, scale, keep, tuple(sizes))
    mine = torch.autograd.grad((found * weight).sum(), [x, w, a, b])
    pieces = []
    for client, rows_of in enumerate(x.split(sizes)):
        seen = rows_of if keep is None else rows_of * keep.split(sizes)[client]
        pieces.append(rows_of @ w.T + seen @ (scale[client] * b[client] @ a[client]).T)
    dense = torch.cat(pieces)
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-12)
    for one, other in zip(mine, torch.autograd.grad((dense * weight).sum(), [x, w, a, b]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
