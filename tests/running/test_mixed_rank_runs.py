"""Clients of smaller ranks in runs: every method that takes them, what such a client trains, and what it sends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import go
from tiny_runs import Tiny, assert_equal, assert_near, begin, flat

from fedrot import Adapter
from fedrot.core.adapter import LoraPair
from fedrot.core.errors import FedrotError
from fedrot.core.methods import methods
from fedrot.core.ranks import cut
from fedrot.learning.loading import load_model
from fedrot.learning.local import train_local
from fedrot.learning.settings import LoraSettings
from fedrot.running.prepare import prepare
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.score import score_adapter

BOOKS = ("--lora.ranks", '{"books": 1}')
MIXED = [name for name, method in methods().items() if method.capabilities.mixed_ranks]
# What is uploaded are the client's own factors, whose products can be looked at.
FACTORS = [name for name in MIXED if name not in ("fedask", "fedsa", "local", "ffa", "rolora")]


def spectrum(pair: LoraPair) -> list[float]:
    """The singular values of an update, relative to the largest."""
    values = torch.linalg.svdvals(pair.b.double() @ pair.a.double())
    return (values / values[0]).tolist()


def method(name: str, *flags: str) -> tuple[str, ...]:
    return (f"--method.name={name}", *flags)


@pytest.mark.parametrize("name", MIXED)
def test_every_method_that_takes_them_runs(name: str, tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *method(name), *BOOKS, "--rounds", "2").play(2)
    for record in tiny.records:
        assert record["clients"] == {"drawn": 3, "used": ["books", "films", "music"], "dropped": {}}
        assert record["evaluation"]["loss"] < 2
    assert all(bool(torch.isfinite(tensor).all()) for _, tensor in tiny.adapter.tensors())
    assert {pair.rank for pair in tiny.adapter.layers.values()} == {2}


@pytest.mark.parametrize("name", ["fedit", "flora", "fedask"])
def test_the_exported_adapter_has_the_reported_scores(name: str, tiny_values: dict[str, Any], tmp_path: Path) -> None:
    folder = go(tiny_values, tmp_path / "run", "--rounds", "2", *method(name), *BOOKS)
    reported = folder.read_json("result.json")["final"]
    found = score_adapter(folder.adapter, folder.recipe(), "test").record()
    assert found["loss"] == pytest.approx(reported["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["fedsa", "local"])
def test_a_narrow_clients_own_adapter_has_its_reported_scores(
    name: str, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    folder = go(tiny_values, tmp_path / "run", "--rounds", "2", *method(name), *BOOKS)
    reported = folder.read_json("result.json")["final"]["by_client"]
    for number, client in folder.read_json("clients/names.json").items():
        found = score_adapter(folder.path / "clients" / number, folder.recipe(), "test").record()
        assert found["by_client"][client] == reported[client]


@pytest.mark.parametrize("name", FACTORS)
def test_a_narrow_client_sends_an_update_of_its_rank(name: str, tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *method(name), *BOOKS).play(2)
    for upload in tiny.engine.uploads:
        second = [spectrum(pair)[1] for pair in upload.adapter.layers.values()]
        if upload.client == "books":
            assert max(second) < 1e-5
        else:
            assert min(second) > 1e-4


def test_the_drift_of_a_narrow_client_is_what_it_moved_and_not_what_it_was_not_sent(
    tiny_values: dict[str, Any],
) -> None:
    still = begin(tiny_values, *BOOKS, "--local.lr", "1e-6").play(2)
    assert still.records[1]["drift"]["a_mean"] < 1e-3
    moving = begin(tiny_values, *BOOKS).play(2)
    assert moving.records[1]["drift"]["a_mean"] > 1e-2


def test_a_bound_on_the_norm_is_of_what_a_narrow_client_moved(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *BOOKS, "--local.lr", "1e-6", "--checks.max_norm", "0.01").play()
    assert tiny.records[0]["clients"]["dropped"] == {}


@pytest.mark.parametrize("name", ["ffa", "rolora", "fedsa", "local"])
def test_a_narrow_client_trains_an_update_of_its_rank(name: str, tiny_values: dict[str, Any]) -> None:
    """Where only a part of the factors travels, or none."""
    tiny = begin(tiny_values, *method(name), *BOOKS).play()
    assert max(spectrum(pair)[1] for pair in tiny.client("books").trained.layers.values()) < 1e-5
    assert min(spectrum(pair)[1] for pair in tiny.client("films").trained.layers.values()) > 1e-4


@pytest.mark.parametrize("lora", [("--lora.alpha", "3"), ("--lora.alpha", "3", "--lora.rslora", "true"), ()])
def test_a_narrow_client_trains_as_plain_lora_of_its_rank_does(
    lora: tuple[str, ...], tiny_values: dict[str, Any]
) -> None:
    """With PEFT's own scale at that rank; the update comes back whole at the global rank and scale."""
    tiny = begin(tiny_values, *method("fedit"), *lora, *BOOKS)
    recipe, start = tiny.recipe, tiny.adapter
    sent = tiny.client("books").upload
    settings = LoraSettings(rank=1, alpha=recipe.lora.alpha, rslora=recipe.lora.rslora)
    narrow = load_model(recipe.model, settings, tiny.ready.dataset.labels, recipe.seed)
    scale = next(iter(narrow.read().layers.values())).scale
    layers = {n: LoraPair(p.a[:1], p.b[:, :1], scale) for n, p in start.layers.items()}
    data, key = tiny.data("books"), (recipe.seed, 0, "books")
    parts = frozenset({"a", "b", "head"})
    alone = train_local(narrow, Adapter(layers, start.head), data.data, data.indices, recipe.local, parts, key)
    assert sent.metrics["loss"] == pytest.approx(alone.loss, rel=1e-6)
    assert_near(
        {n: p.delta() for n, p in sent.adapter.layers.items()},
        {n: p.delta() for n, p in alone.adapter.layers.items()},
        rel=1e-4,
    )
    assert_near(dict(sent.adapter.head), dict(alone.adapter.head), rel=1e-5)
    assert [p.scale for p in sent.adapter.layers.values()] == [p.scale for p in start.layers.values()]


@pytest.mark.parametrize("name", ["fedrot", "hetlora", "fedsa", "fedask", "flora", "local"])
def test_ranks_that_are_all_the_global_one_change_no_bit(name: str, tiny_values: dict[str, Any]) -> None:
    even = ("--lora.ranks", '{"books": 2, "films": 2, "music": 2}')
    plain, found = begin(tiny_values, *method(name)).play(2), begin(tiny_values, *method(name), *even).play(2)
    assert_equal(found.adapter, plain.adapter)
    for mine, theirs in zip(found.records, plain.records, strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}


def test_a_narrow_client_leaves_the_others_alone(tiny_values: dict[str, Any]) -> None:
    """Though all share one resident model."""
    plain, mixed = begin(tiny_values).play(), begin(tiny_values, *BOOKS).play()
    uploads = [{u.client: u for u in tiny.engine.uploads} for tiny in (plain, mixed)]
    for client in ("films", "music"):
        assert_equal(uploads[1][client].adapter, uploads[0][client].adapter)
        assert uploads[1][client].metrics == uploads[0][client].metrics


def test_all_clients_narrow_is_a_global_adapter_of_their_rank(tiny_values: dict[str, Any]) -> None:
    everyone = ("--lora.ranks", '{"books": 1, "films": 1, "music": 1}')
    tiny = begin(tiny_values, *method("fedit"), *everyone).play()
    assert max(spectrum(pair)[1] for pair in tiny.adapter.layers.values()) < 1e-5


def own_start(tiny: Tiny, client: str) -> tuple[Adapter, Adapter]:
    """(the client's model as it is scored, what it would train from in the next round)."""
    own = tiny.engine.own_model(tiny.state.broadcast, client)
    rank = (tiny.recipe.lora.ranks or {})[client]
    return own, cut(own, tiny.recipe.method.narrow(own, rank), tiny.recipe.lora.scale(rank))


@pytest.mark.parametrize("name", ["local", "fedsa"])
def test_a_narrow_client_goes_on_from_its_own_model(name: str, tiny_values: dict[str, Any]) -> None:
    """Its B has the client's rank, so there is a part of the global factors that holds the whole of it."""
    tiny = begin(tiny_values, *method(name), *BOOKS)
    for _ in range(3):
        own, start = own_start(tiny.play(), "books")
        assert max(spectrum(pair)[1] for pair in own.layers.values()) < 1e-5
        wanted = {n: pair.delta() for n, pair in own.layers.items()}
        assert_near({n: pair.delta() for n, pair in start.layers.items()}, wanted)


def test_what_a_narrow_client_does_not_take_is_as_it_was_in_a_and_zero_in_b(tiny_values: dict[str, Any]) -> None:
    """Its second column of B counts as zero in FedIT's average; its second row of A is the broadcast's."""
    tiny = begin(tiny_values, *method("fedit"), *BOOKS)
    start = flat(tiny.adapter)
    sent = {u.client: flat(u.adapter) for u in tiny.play().engine.uploads}
    for name in start:
        if name.endswith("/a"):
            torch.testing.assert_close(sent["books"][name][1], start[name][1], rtol=1e-6, atol=1e-7)
        if name.endswith("/b"):
            assert not sent["books"][name][:, 1].any()
            wanted = (sent["films"][name][:, 1] + sent["music"][name][:, 1]) / 3
            torch.testing.assert_close(flat(tiny.adapter)[name][:, 1], wanted, rtol=1e-5, atol=1e-7)


def test_a_rank_for_nobody_is_refused_before_anything_is_written(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    """A name that is mistyped must not train at the full rank unseen."""
    for ranks in ({"nobody": 1}, {"books": 1, "film": 1}):
        with pytest.raises(FedrotError) as caught:
            go(tiny_values, tmp_path / "run", "--rounds", "1", "--lora.ranks", json.dumps(ranks))
        message = str(caught.value)
        assert "\n" not in message
        for word in ("lora.ranks", sorted(ranks)[-1], "books", "films", "music"):
            assert word in message
        assert not (tmp_path / "run").exists()


def test_client_names_of_other_partitions_are_taken(tiny_values: dict[str, Any]) -> None:
    flags = ["--partition.kind", "iid", "--partition.clients", "3", "--lora.ranks", '{"client-2": 1}']
    recipe = parse_recipe(tiny_values, flags)
    assert "client-2" in prepare(recipe).partition.clients
    tiny = begin(tiny_values, *flags).play()
    narrow = {u.client for u in tiny.engine.uploads if spectrum(next(iter(u.adapter.layers.values())))[1] < 1e-5}
    assert narrow == {"client-2"}
