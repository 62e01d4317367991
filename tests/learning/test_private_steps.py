"""DP-SGD's steps: each example's own gradient, clipped, with noise, against a plain loop of one example at a time."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning_helpers import ALL, assert_same, changed, encoded_splits, quick, resident, seeds, shaken
from model_folders import SIZES, write_model
from plain_loop import plain_loss
from scipy import stats
from test_generation import written
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.ranks import cut, first_frames
from fedrot.core.seeding import generator
from fedrot.learning.batching import Batch
from fedrot.learning.encoding import Encoded
from fedrot.learning.local import Job, LocalResult, step_count, train_clients
from fedrot.learning.models import ResidentModel
from fedrot.learning.private import ExamplePrivacy, clipped_sums
from fedrot.learning.settings import LocalSettings
from fedrot.learning.tasks import classification, generation

NOISY = ExamplePrivacy(clip=0.05, noise=0.7)
SGD = LocalSettings(optimizer="sgd", lr=0.3, momentum=0.5, batch=4, steps=3, clip=None)
# Clients of every size: more than a batch, fewer, a single example.
CLIENTS = [np.arange(0, 12), np.arange(12, 15), np.array([20])]


def loaded(kind: str, tiny_model: Path, tiny_data: Path, out: Path, dropout: float) -> tuple[ResidentModel, Encoded]:
    """A classifier, or for "writer" a language model, and its examples."""
    causal = kind == "writer"
    name = "llama" if causal else kind
    folder = write_model(out, name, tiny_model, causal=causal, **SIZES[name])
    model: ResidentModel = resident(folder, dropout=dropout, **({"labels": ()} if causal else {}))
    data = generation.encode(model.tokenizer, written(), 64) if causal else encoded_splits(model, tiny_data)["train"]
    return model, data


@pytest.fixture(scope="module", params=["bert", "roberta", "writer"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def there(
    kind: str, tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ResidentModel, Encoded]:
    """In double precision, with dropout on."""
    model, data = loaded(kind, tiny_model, tiny_data, tmp_path_factory.mktemp(kind), 0.2)
    model.model.double()
    return model, data


@pytest.fixture(scope="module")
def bert(tiny_model: Path, tiny_data: Path) -> tuple[ResidentModel, Encoded]:
    """Without dropout."""
    model: ResidentModel = resident(tiny_model, dropout=0.0)
    return model, encoded_splits(model, tiny_data)["train"]


def jobs_of(start: Adapter) -> list[Job]:
    return [Job(shaken(start, seed=i), rows, (1, 0, f"client-{i}")) for i, rows in enumerate(CLIENTS)]


def trained(
    there: tuple[ResidentModel, Encoded],
    jobs: list[Job],
    settings: LocalSettings,
    private: ExamplePrivacy | None,
    packing: bool = True,
    parts: frozenset[str] = ALL,
) -> list[LocalResult]:
    found = train_clients(*there, jobs, settings, parts, packing, private)
    assert [one for one in found if not isinstance(one, LocalResult)] == []
    return [one for one in found if isinstance(one, LocalResult)]


def gradient_of(model: ResidentModel, data: Encoded, row: int, named: Mapping[str, Tensor]) -> list[Tensor]:
    """The gradient of one example's loss by PEFT's own layers."""
    rows = np.array([row])
    loss = plain_loss(model, data, rows, *data.batch(rows), "fp32")
    return list(torch.autograd.grad(loss, list(named.values())))


def plain_private(
    there: tuple[ResidentModel, Encoded], job: Job, settings: LocalSettings, private: ExamplePrivacy
) -> tuple[Adapter, dict[str, Tensor], list[float]]:
    """(adapter, mean of the noisy gradients, norms before clipping): one example after the other, as it is written."""
    model, data = there
    model.write(job.adapter)
    named = {name: p.requires_grad_(True) for name, p in model.parameters(ALL)}
    optimizer = torch.optim.SGD(list(named.values()), lr=settings.lr, momentum=settings.momentum)
    batches = private.batches(len(job.indices), settings.batch, job.key)
    begun, norms, steps = dict(job.adapter.tensors()), [], step_count(len(job.indices), settings)
    mean = {name: torch.zeros_like(p) for name, p in named.items()}
    for step in range(steps):
        total = {name: torch.zeros_like(p) for name, p in named.items()}
        for place in next(batches):
            model.set_dropout_key((*job.key, "dropout", step, int(place)))
            found = gradient_of(model, data, int(job.indices[place]), named)
            norms.append(math.sqrt(sum(float(g.square().sum()) for g in found)))
            for name, g in zip(named, found, strict=True):
                total[name] += g * min(1.0, private.clip / norms[-1])
        rng = generator(*job.key, "privacy", step)
        for name, p in named.items():
            noise = private.noise * private.clip * torch.randn(p.shape, generator=rng, dtype=torch.float64)
            p.grad = ((total[name] + noise) / min(settings.batch, len(job.indices))).to(p.dtype)
            p.grad += settings.prox * (p.detach() - begun[name])
            mean[name] += p.grad / steps
            p.grad += job.correction[name] if job.correction else 0.0
        optimizer.step()
    model.set_dropout_key(None)
    for p in named.values():
        p.requires_grad_(False)
        p.grad = None
    return model.read(), mean, norms


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], atol: float) -> None:
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_every_client_ends_where_a_loop_over_single_examples_leads_it(
    there: tuple[ResidentModel, Encoded], packing: bool
) -> None:
    """In float64, with dropout on, in a stack and alone."""
    jobs = jobs_of(there[0].read())
    for job, found in zip(jobs, trained(there, jobs, SGD, NOISY, packing), strict=True):
        wanted, _, norms = plain_private(there, job, SGD, NOISY)
        assert max(norms) > NOISY.clip, "clipping must be at work"
        assert_close(dict(found.adapter.tensors()), dict(wanted.tensors()), 1e-9)
        (alone,) = trained(there, [job], SGD, NOISY, packing)
        assert_close(dict(alone.adapter.tensors()), dict(wanted.tensors()), 1e-9)
        assert (found.used, found.steps, found.tokens) == (alone.used, alone.steps, alone.tokens)
        assert found.used == len(norms)


def test_the_pull_to_the_start_and_corrections_come_after_the_noise(there: tuple[ResidentModel, Encoded]) -> None:
    settings, jobs = replace(SGD, prox=0.5), jobs_of(there[0].read())
    jobs = [replace(job, correction=dict(job.adapter.map(lambda t: 0.1 * t).tensors())) for job in jobs]
    for job, found in zip(jobs, trained(there, jobs, settings, NOISY), strict=True):
        wanted, mean, _ = plain_private(there, job, settings, NOISY)
        assert_close(dict(found.adapter.tensors()), dict(wanted.tensors()), 1e-9)
        assert_close(found.gradient, mean, 1e-9)


def test_layers_that_are_computed_again_give_each_example_s_gradient(there: tuple[ResidentModel, Encoded]) -> None:
    jobs = jobs_of(there[0].read())
    again = trained(there, jobs, replace(SGD, checkpointing=True), NOISY)
    for one, other in zip(again, trained(there, jobs, SGD, NOISY), strict=True):
        assert_close(dict(one.adapter.tensors()), dict(other.adapter.tensors()), 1e-12)


def test_single_precision_gives_the_same_step_to_1e_6(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    there = loaded("bert", tiny_model, tiny_data, tmp_path, 0.2)
    settings = replace(SGD, lr=1.0, steps=1)
    for job in jobs_of(there[0].read()):
        (found,) = trained(there, [job], settings, NOISY)
        assert {t.dtype for _, t in found.adapter.tensors()} == {torch.float32}
        wanted, _, _ = plain_private(there, job, settings, NOISY)
        assert_close(dict(found.adapter.tensors()), dict(wanted.tensors()), 1e-6)


@pytest.mark.parametrize("parts", [{"b", "head"}, {"a"}, {"a", "b", "head"}], ids=["ffa", "a", "all"])
def test_all_examples_without_clip_and_noise_are_an_ordinary_step(
    bert: tuple[ResidentModel, Encoded], parts: set[str]
) -> None:
    jobs, settings = jobs_of(bert[0].read()), replace(SGD, batch=50, steps=2)
    plain = trained(bert, jobs, settings, None, parts=frozenset(parts))
    private = trained(bert, jobs, settings, ExamplePrivacy(1e9, 0.0), parts=frozenset(parts))
    for job, mine, theirs in zip(jobs, private, plain, strict=True):
        assert_close(dict(mine.adapter.tensors()), dict(theirs.adapter.tensors()), 1e-5)
        assert changed(mine.adapter, job.adapter) == changed(theirs.adapter, job.adapter)
        assert (mine.used, mine.steps, mine.tokens) == (theirs.used, theirs.steps, theirs.tokens)
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)


def test_epochs_are_so_many_expected_passes(bert: tuple[ResidentModel, Encoded]) -> None:
    settings = replace(SGD, steps=None, epochs=2.0)
    found = trained(bert, jobs_of(bert[0].read()), settings, NOISY)
    assert [one.steps for one in found] == [6, 2, 2]
    assert found[2].used == 2
    assert found[0].used != 24, "a draw by chance that is just as large as expected: choose another seed"


def moves(there: tuple[ResidentModel, Encoded], jobs: list[Job], private: ExamplePrivacy, batch: int = 4) -> Tensor:
    """(clients, numbers): how far one SGD step of rate 1 goes, times the batch: the noisy sums themselves."""
    settings = replace(SGD, lr=1.0, momentum=0.0, steps=1, batch=batch)
    rows = []
    for job, found in zip(jobs, trained(there, jobs, settings, private), strict=True):
        ends = dict(found.adapter.tensors())
        rows.append(torch.cat([(t.double() - ends[n].double()).flatten() for n, t in job.adapter.tensors()]))
    return torch.stack(rows) * batch


def test_noise_has_the_deviation_z_c_and_is_each_client_s_and_round_s_own(bert: tuple[ResidentModel, Encoded]) -> None:
    start = shaken(bert[0].read())
    jobs = [Job(start, np.arange(12), (1, number, name)) for number in range(2) for name in "abcdef"]
    private = ExamplePrivacy(clip=0.5, noise=3.0)
    sums = moves(bert, jobs, private)
    noise = sums - moves(bert, jobs, replace(private, noise=0.0))
    assert float(noise.std()) == pytest.approx(1.5, rel=5 / math.sqrt(2 * noise.numel()))
    assert stats.kstest(noise.flatten().numpy() / 1.5, "norm").pvalue > 1e-3
    alike = torch.corrcoef(noise).fill_diagonal_(0).abs().max()
    assert float(alike) < 6 / math.sqrt(noise.shape[1])
    assert torch.equal(sums, moves(bert, jobs, private))
    secure = replace(private, secure=True)
    assert not torch.equal(moves(bert, jobs, secure), moves(bert, jobs, secure))


def test_every_step_has_noise_of_its_own(bert: tuple[ResidentModel, Encoded]) -> None:
    """Gradients of a bound that is next to nothing leave the noise alone."""
    job = Job(shaken(bert[0].read()), np.arange(12), (1, 0, "c"))
    private = ExamplePrivacy(clip=1e-6, noise=1e6)
    ends = []
    for steps in (1, 2):
        (found,) = trained(bert, [job], replace(SGD, lr=0.1, momentum=0.0, steps=steps), private)
        ends.append(torch.cat([t.flatten() for _, t in found.adapter.tensors()]))
    first, second = ends[0] - torch.cat([t.flatten() for _, t in job.adapter.tensors()]), ends[1] - ends[0]
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 6 / math.sqrt(len(first))


@pytest.mark.parametrize("secure", [False, True])
def test_each_example_is_drawn_by_itself(secure: bool) -> None:
    private = ExamplePrivacy(1.0, 1.0, secure)
    draws = list(islice(private.batches(40, 4, (1, 0, "c")), 3000))
    counts = np.array([len(drawn) for drawn in draws])
    assert counts.min() == 0
    assert counts.mean() == pytest.approx(4, abs=5 * math.sqrt(3.6 / 3000))
    assert counts.var() == pytest.approx(3.6, rel=0.15)  # of a batch of fixed size it would be 0
    each = np.bincount(np.concatenate(draws), minlength=40) / 3000
    assert abs(each - 0.1).max() < 5 * math.sqrt(0.09 / 3000)
    again = list(islice(private.batches(40, 4, (1, 0, "c")), 3000))
    assert all(np.array_equal(a, b) for a, b in zip(draws, again, strict=True)) == (not secure)
    for whole in islice(private.batches(3, 4, (1, 0, "c")), 5):
        assert whole.tolist() == [0, 1, 2]


def test_a_step_that_draws_nobody_is_noise_alone(bert: tuple[ResidentModel, Encoded]) -> None:
    start, clear = shaken(bert[0].read()), ExamplePrivacy(1.0, 0.0)
    keys = [(1, number, "c") for number in range(60)]
    empty = [not len(next(clear.batches(12, 1, key))) for key in keys]
    assert 5 < sum(empty) < 55
    jobs = [Job(start, np.arange(12), key) for key in keys]
    settings = replace(SGD, batch=1, steps=1)
    for drawn, found in zip(empty, trained(bert, jobs, settings, clear), strict=True):
        assert (found.used == 0) == drawn == (not changed(found.adapter, start)) == math.isnan(found.loss)
        assert found.steps == 1
    alone = next(job for job, drawn in zip(jobs, empty, strict=True) if drawn)
    assert float(moves(bert, [alone], ExamplePrivacy(1.0, 0.5), batch=1).std()) == pytest.approx(0.5, rel=0.15)


def test_a_narrow_client_s_noise_is_at_its_own_rank(there: tuple[ResidentModel, Encoded]) -> None:
    jobs = jobs_of(there[0].read())
    jobs[0] = replace(jobs[0], adapter=cut(jobs[0].adapter, first_frames(jobs[0].adapter, 1), scale=0.7))
    found = trained(there, jobs, SGD, NOISY)
    (alone,) = trained(there, jobs[:1], SGD, NOISY)
    assert {pair.rank for pair in found[0].adapter.layers.values()} == {1}
    assert_close(dict(found[0].adapter.tensors()), dict(alone.adapter.tensors()), 1e-9)


def test_an_example_whose_gradient_is_not_finite_is_left_out_and_said(
    bert: tuple[ResidentModel, Encoded], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Failing would tell that it is there."""
    job, private = Job(shaken(bert[0].read()), np.arange(6), (1, 0, "c")), ExamplePrivacy(0.5, 0.0)
    settings = replace(SGD, batch=6, steps=1)
    usual = classification.losses

    def spoiled(resident: ResidentModel, batch: Batch, precision: str) -> Tensor:
        losses = usual(resident, batch, precision)
        return losses * torch.tensor([1.0, math.nan, 1.0, 1.0, 1.0, 1.0])

    monkeypatch.setattr(classification, "losses", spoiled)
    with caplog.at_level(logging.WARNING, "fedrot"):
        (found,) = trained(bert, [job], settings, private)
    assert "c: 1 gradients of examples were not finite and were left out" in caplog.text
    monkeypatch.undo()
    # Five of the six examples, over the six that were expected.
    (others,) = trained(bert, [replace(job, indices=np.array([0, 2, 3, 4, 5]))], settings, private)
    begun, goals = dict(job.adapter.tensors()), dict(others.adapter.tensors())
    for name, tensor in found.adapter.tensors():
        torch.testing.assert_close(tensor - begun[name], (goals[name] - begun[name]) * 5 / 6, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_an_example_that_is_not_finite_within_the_layers_takes_no_other_one_out(
    there: tuple[ResidentModel, Encoded], packing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The first example of the first client begins with a word that no other one has, and whose embedding is NaN."""
    model, data = there
    tokens, words = data.tokens.copy(), model.model.get_input_embeddings().weight.data
    assert model.tokenizer.unk_token_id not in tokens
    tokens[data.offsets[0]] = model.tokenizer.unk_token_id
    data, settings, private = replace(data, tokens=tokens), replace(SGD, batch=12, steps=1), replace(NOISY, noise=0.0)
    jobs, usual = jobs_of(model.read()), words[model.tokenizer.unk_token_id].clone()
    words[model.tokenizer.unk_token_id] = math.nan
    try:
        with caplog.at_level(logging.WARNING, "fedrot"):
            found = trained((model, data), jobs, settings, private, packing)
    finally:
        words[model.tokenizer.unk_token_id] = usual
    assert [record.args for record in caplog.records] == [("client-0", 1)]
    for mine, theirs in list(zip(found, trained((model, data), jobs, settings, private, packing), strict=True))[1:]:
        assert_close(dict(mine.adapter.tensors()), dict(theirs.adapter.tensors()), 1e-12)


def test_a_factor_that_is_not_finite_fails_the_client(bert: tuple[ResidentModel, Encoded]) -> None:
    job = Job(shaken(bert[0].read()), np.arange(12), (1, 0, "c"))
    found = train_clients(*bert, [job], replace(SGD, lr=1e38), ALL, True, ExamplePrivacy(1.0, 1e5))
    assert "factors are not finite" in str(found[0])


def test_equal_jobs_give_equal_bits_and_afterwards_the_model_is_as_it_was(
    bert: tuple[ResidentModel, Encoded],
) -> None:
    before, jobs = bert[0].read(), jobs_of(bert[0].read())
    first, second = (trained(bert, jobs, SGD, NOISY) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_same(one.adapter, other.adapter)
    assert_same(bert[0].read(), before)
    plain = trained(bert, jobs, SGD, None)
    assert all(changed(one.adapter, other.adapter) for one, other in zip(first, plain, strict=True))


@quick
@given(seeds, st.lists(st.integers(0, 4), min_size=1, max_size=4), st.floats(1e-3, 10), st.booleans())
def test_one_example_changes_a_sum_by_no_more_than_the_bound(
    seed: int, counts: list[int], bound: float, spoiled: bool
) -> None:
    counts = [*counts, 3]
    rng = torch.Generator().manual_seed(seed)
    size = sum(counts)
    gradients = {n: torch.randn(size, *shape, generator=rng) for n, shape in {"x": (2, 3), "y": (4,)}.items()}
    gradients = {n: g * 10 ** torch.randn(size, *[1] * (g.ndim - 1), generator=rng) for n, g in gradients.items()}
    if spoiled:
        gradients["x"][-1, 0, 0], gradients["y"][-2, 0] = math.inf, math.nan
    sums, left_out = clipped_sums(gradients, counts, bound)
    assert left_out == [0] * (len(counts) - 1) + [2 if spoiled else 0]
    fewer = {name: gradient[:-1] for name, gradient in gradients.items()}
    without, _ = clipped_sums(fewer, [*counts[:-1], 2], bound)
    for client, count in enumerate(counts):
        norm = math.sqrt(sum(float(s[client].square().sum()) for s in sums.values()))
        assert norm <= count * bound * (1 + 1e-9)
        off = math.sqrt(sum(float((s[client] - without[n][client]).square().sum()) for n, s in sums.items()))
        assert off <= (bound * (1 + 1e-9) if client == len(counts) - 1 else 0.0)
    small, _ = clipped_sums({n: g[:1] for n, g in gradients.items()}, [1], 1e9)
    assert all(torch.equal(small[n][0], g[0].double()) for n, g in gradients.items())
