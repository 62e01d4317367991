"""Methods whose models are the clients' own, and the lines to compare with: alone, and with all data in one place."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import go
from tiny_runs import Tiny, assert_equal, begin
from torch import Tensor

from fedrot import Adapter
from fedrot.core.adapter import part_of
from fedrot.core.methods.base import Upload
from fedrot.running.checkpoint import load_latest
from fedrot.running.draws import draw_clients
from fedrot.running.engine import Failure
from fedrot.running.simulation import EVERYONE

ONE_A_ROUND = ("--federation.participation", "0.34")
CLIENTS = ["books", "films", "music"]


def kept(tiny: Tiny, client: str) -> dict[str, Tensor]:
    """What the client keeps of the method's; empty before it took part."""
    return {n: t for n, t in tiny.engine.states().get(client, {}).items() if n.startswith("method/")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


@pytest.mark.parametrize("name", ["fedsa", "local"])
def test_what_a_client_keeps_outlives_the_rounds_without_it(name: str, tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, f"--method.name={name}", *ONE_A_ROUND)
    turns = [draw_clients(CLIENTS, 0.34, 1, number)[0] for number in range(8)]
    assert set(turns) == set(CLIENTS), "the test needs other draws"
    last: dict[str, dict[str, Tensor]] = {client: {} for client in CLIENTS}
    for turn in turns:
        tiny.play()
        assert tiny.records[-1]["clients"]["used"] == [turn]
        for client in CLIENTS:
            now = kept(tiny, client)
            assert same(now, last[client]) == (client != turn), client
            last[client] = now


def test_of_fedsa_a_client_trains_its_own_b_on_the_common_a(tiny_values: dict[str, Any]) -> None:
    """One that was never drawn starts from B = 0, whatever round it is."""
    tiny = begin(tiny_values, "--method.name", "fedsa", *ONE_A_ROUND).play(2)
    drawn = {client for record in tiny.records for client in record["clients"]["used"]}
    assert 0 < len(drawn) < 3
    for client in CLIENTS:
        own = tiny.engine.own_model(tiny.state.broadcast, client)
        for layer, pair in own.layers.items():
            assert torch.equal(pair.a, tiny.adapter.layers[layer].a)
            assert bool(pair.b.any()) == (client in drawn)
        assert_equal(replace(own, layers={}), replace(tiny.adapter, layers={}))


def test_of_fedsa_b_never_reaches_the_server(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, "--method.name", "fedsa").play(2)
    for upload in [tiny.engine.uploads[-1].adapter, tiny.adapter]:
        assert not any(bool(pair.b.any()) for pair in upload.layers.values())
    owns = [kept(tiny, client) for client in CLIENTS]
    assert all(n.startswith("method/b/") for n in owns[0])
    assert not same(owns[0], owns[1])


def spoil(upload: Upload) -> Upload:
    return replace(upload, held=0)


def fail(upload: Upload) -> Failure:
    return Failure(upload.client, "power cut")


@pytest.mark.parametrize("fault", [spoil, fail])
@pytest.mark.parametrize("flags", [
    ("--method.name=fedsa",), ("--method.name=local",), ("--method.name=fedrot", "--lora.head=personal"),
])  # fmt: skip
def test_a_dropped_clients_new_state_is_forgotten(fault: Any, flags: tuple[str, ...], tiny_values: Any) -> None:
    tiny = begin(tiny_values, *flags)
    tiny.engine.faults = {"films": fault}
    tiny.play()
    assert sorted(tiny.engine.states()) == ["books", "music"]
    tiny.engine.faults = {}
    before = dict(tiny.play().engine.states()["films"])
    tiny.engine.faults = {"films": fault}
    tiny.play()
    assert same(dict(tiny.engine.states()["films"]), before)
    assert list(tiny.records[-1]["clients"]["dropped"]) == ["films"]


def test_personal_models_are_scored_each_on_its_own_examples(tiny_values: dict[str, Any]) -> None:
    for name in ("fedsa", "local"):
        tiny = begin(tiny_values, f"--method.name={name}").play()
        scores = tiny.records[0]["evaluation"]
        assert scores["model"] == "personal"
        data = tiny.ready.encoded["validation"]
        for client in CLIENTS:
            inputs, labels = data.batch(tiny.ready.partition.indices["validation"][client])
            tiny.ready.model.write(tiny.engine.own_model(tiny.state.broadcast, client))
            with torch.no_grad():
                right = tiny.ready.model.logits(inputs, "fp32").argmax(-1) == labels
            assert scores["by_client"][client] == pytest.approx(float(right.float().mean()))


def only(folder: Path, source: Path, group: str | None) -> dict[str, str]:
    """The tiny data of one group, or all of it under one group's name; as the recipe's data.path."""
    folder.mkdir()
    for path in source.glob("*.csv"):
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if group in (None, row["group"])]
        with (folder / path.name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label", "group"])
            writer.writeheader()
            writer.writerows({**row, "group": group or EVERYONE} for row in rows)
    return {"path": str(folder)}


@pytest.mark.parametrize("lora", [(), ("--lora.head", "personal")])
def test_local_is_every_client_alone_bit_for_bit(
    lora: tuple[str, ...], tiny_values: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    """Seeds are named by seed, round and client; an average of one is the one: so it can be exact."""
    lora = ("--compute.stack=1", *lora)
    together = go(tiny_values, tmp_path / "local", "--method.name=local", *lora)
    names = together.read_json("clients/names.json")
    assert sorted(names.values()) == CLIENTS
    for number, client in names.items():
        values = {**tiny_values, "data": {**tiny_values["data"], **only(tmp_path / client, tiny_data, client)}}
        alone = go(values, tmp_path / f"alone-{client}", "--method.name=fedit", *lora)
        own = alone.adapter if "personal" not in lora else alone.path / "clients" / "000"
        assert_equal(Adapter.load(together.path / "clients" / number), Adapter.load(own))
        found, wanted = (f.read_json("result.json")["final"] for f in (together, alone))
        assert found["by_client"][client] == wanted["by_client"][client]
        for mine, theirs in zip(together.metrics(), alone.metrics(), strict=True):
            assert mine["train"]["loss_by_client"][client] == theirs["train"]["loss_by_client"][client]


def test_own_models_are_exported_with_what_went_into_the_base(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    """Of FLoRA it is everything: the factors that clients start the next round from are B = 0."""
    folder = go(tiny_values, tmp_path, "--method.name=flora", "--lora.head=personal", "--rounds=2")
    saved = load_latest(folder.checkpoints)
    assert saved is not None
    change = saved.server.broadcast.base_delta
    assert change is not None
    heads = []
    for number in folder.read_json("clients/names.json"):
        own = Adapter.load(folder.path / "clients" / number)
        for name, pair in change.layers.items():
            assert bool(pair.delta().any())
            torch.testing.assert_close(own.layers[name].delta(), pair.delta(), rtol=1e-5, atol=1e-8)
        heads.append(own.head["classifier.weight"])
    assert not torch.equal(heads[0], heads[1])


def test_local_sends_nothing_and_leaves_the_global_adapter_alone(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, "--method.name=local")
    start = tiny.adapter
    tiny.play(2)
    assert_equal(tiny.adapter, start)
    assert all(record["bytes"]["up"] == 0 for record in tiny.records)
    own = [tiny.engine.own_model(tiny.state.broadcast, client) for client in CLIENTS]
    for one, other in ((0, 1), (1, 2)):
        theirs = dict(own[other].tensors())
        assert not any(torch.equal(tensor, theirs[name]) for name, tensor in own[one].tensors())


def test_centralised_is_one_client_with_all_data_and_everyones_steps(
    tiny_values: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    """Bit for bit: FedIT with all data under one name, and three clients' steps."""
    pooled = go(tiny_values, tmp_path / "pooled", "--method.name", "centralised")
    values = {**tiny_values, "data": {**tiny_values["data"], **only(tmp_path / "all", tiny_data, None)}}
    single = go(values, tmp_path / "single", "--method.name", "fedit", "--local.steps", "9")
    assert_equal(Adapter.load(pooled.adapter), Adapter.load(single.adapter))
    for mine, theirs in zip(pooled.metrics(), single.metrics(), strict=True):
        assert mine["train"] == theirs["train"]
        assert mine["train"]["rows"] == 9 * 8
        assert mine["evaluation"]["loss"] == theirs["evaluation"]["loss"]
    final = pooled.read_json("result.json")["final"]
    assert final["model"] == "global"
    assert sorted(final["by_client"]) == CLIENTS


def test_centralised_epochs_are_passes_over_all_data(tiny_values: dict[str, Any]) -> None:
    flags = ("--method.name", "centralised", "--local.steps", "null", "--local.epochs", "1", "--local.batch", "30")
    tiny = begin(tiny_values, *flags).play()
    assert tiny.records[0]["train"]["rows"] == 180
    assert tiny.engine.uploads[0].held == 180
    assert tiny.engine.uploads[0].metrics["steps"] == 6


def test_a_methods_state_and_an_own_head_are_kept_side_by_side(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, "--method.name", "fedsa", "--lora.head", "personal").play(2)
    heads = set()
    for client in CLIENTS:
        own = tiny.engine.own_model(tiny.state.broadcast, client)
        heads.add(tuple(own.head["classifier.weight"].flatten().tolist()))
        assert all(bool(pair.b.any()) for pair in own.layers.values())
        state = tiny.engine.states()[client]
        assert {part_of(n.removeprefix("method/")) if n.startswith("head/") else n[:9] for n in state} == {
            "head", "method/b/",
        }  # fmt: skip
    assert len(heads) == 3
