"""Whole runs whose clients are at sites: the server sees no examples, and what it leaves is what one process would."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fakes import Silent, go, outcome
from network_sites import ONE_BY_ONE, LocalPost, divide_files, values_of

from fedrot.core.adapter import Adapter
from fedrot.core.errors import DataError, RecipeError, RunError
from fedrot.running.folder import RunFolder
from fedrot.running.network.journal import read_exchanges
from fedrot.running.network.opening import between_sites
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.run import run

SITES = ["books", "films", "music"]
LABELS = {"labels": ["negative", "positive"]}


@pytest.fixture
def post(tiny_data: Path, tmp_path: Path) -> LocalPost:
    return LocalPost(divide_files(tiny_data, tmp_path / "sites"), tmp_path / "memory")


def deploy(
    values: Mapping[str, Any], post: LocalPost, out: Path, *flags: str, resume: bool = False, wait: float = 0.0
) -> RunFolder:
    """A run whose recipe says nothing of where data is."""
    asked = values_of(values, data={**LABELS, "path": None}, partition={"kind": "iid", "clients": 1})
    recipe = parse_recipe(asked, (*ONE_BY_ONE, *flags))
    return run(recipe, out, Silent(), resume=resume, open_stage=between_sites(post, SITES, wait))


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_deployed_run_leaves_what_a_simulated_one_does(
    tiny_values: dict[str, Any], post: LocalPost, tmp_path: Path
) -> None:
    made = deploy(tiny_values, post, tmp_path / "out")
    go(values_of(tiny_values, data=LABELS), tmp_path / "here", *ONE_BY_ONE)
    assert adapter_bytes(made.adapter) == adapter_bytes(tmp_path / "here" / "adapter")
    there, here = made.metrics(), RunFolder(tmp_path / "here").metrics()
    assert [record["train"] for record in there] == [record["train"] for record in here]
    assert [record["aggregation"] for record in there] == [record["aggregation"] for record in here]
    sites = made.read_json("sites.json")
    assert sites["clients"] == SITES
    for name in SITES:  # every site is left the result
        assert adapter_bytes(post.memory / name / sites["run"] / "adapter") == adapter_bytes(made.adapter)


def test_the_journal_says_what_each_site_was_asked_and_gave(
    tiny_values: dict[str, Any], post: LocalPost, tmp_path: Path
) -> None:
    post.faults["films", "train"] = lambda request, reply: "lost on the way" if request.header["round"] == 1 else reply
    made = deploy(tiny_values, post, tmp_path / "out")
    exchanges = read_exchanges(made.path)
    kinds = {kind: sum(e.kind == kind for e in exchanges) for kind in ("join", "train", "evaluate", "finish")}
    assert kinds == {"join": 3, "train": 9, "evaluate": 12, "finish": 3}
    (lost,) = [e for e in exchanges if e.refused]
    assert (lost.client, lost.kind, lost.round, lost.refused, lost.received) == (
        "films",
        "train",
        1,
        "lost on the way",
        0,
    )
    assert made.metrics()[1]["clients"]["dropped"] == {"films": "lost on the way"}
    sizes = {(e.sent, e.received) for e in exchanges if e.kind == "train" and e.round == 2}
    numbers = Adapter.load(made.adapter).bytes()
    rotations = 4 * sum(pair.rank**2 for pair in Adapter.load(made.adapter).layers.values())
    assert sizes == {(numbers, numbers + rotations)}


@pytest.mark.parametrize("flags", [(), ("--method.name", "fedsa"), ("--lora.head", "personal")])
def test_a_server_that_was_killed_goes_on_to_the_same_result(
    flags: tuple[str, ...], tiny_values: dict[str, Any], post: LocalPost, tmp_path: Path
) -> None:
    keep = ("--checkpoint.keep", "9", *flags)
    whole = deploy(tiny_values, post, tmp_path / "whole", *keep)
    cut = tmp_path / "cut"
    shutil.copytree(whole.path, cut)
    shutil.rmtree(cut / "checkpoints" / "round-000003")
    shutil.rmtree(cut / "adapter")
    (cut / "result.json").unlink()
    post.restart("films")
    deploy(tiny_values, post, cut, *keep, resume=True)
    found, wanted = outcome(cut), outcome(whole.path)
    assert found == wanted
    assert not (cut / "clients").exists()  # what is a client's own stays at its site
    run_name = whole.read_json("sites.json")["run"]
    own = {name: adapter_bytes(post.memory / name / run_name / "adapter") for name in SITES}
    assert len(set(own.values())) == (3 if flags else 1)


def test_sites_that_are_missing_are_named_and_those_that_come_later_take_part(
    tiny_values: dict[str, Any], post: LocalPost, tmp_path: Path
) -> None:
    films = post.sites.pop("films")
    with pytest.raises(RunError, match=r"2 of 3 sites are there, a round needs 3 .*; films \(is not connected\)"):
        deploy(tiny_values, post, tmp_path / "all", "--federation.quorum", "1")

    def comes(request: Any, reply: Any) -> Any:
        post.sites["films"] = films
        return reply

    post.faults["music", "evaluate"] = comes  # after round 0
    made = deploy(tiny_values, post, tmp_path / "out")
    assert [record["clients"]["used"] for record in made.metrics()] == [["books", "music"], SITES, SITES]
    assert made.metrics()[0]["clients"]["dropped"] == {"films": "is not connected"}


def test_other_clients_than_the_run_began_with_are_refused(
    tiny_values: dict[str, Any], post: LocalPost, tmp_path: Path
) -> None:
    made = deploy(tiny_values, post, tmp_path / "out", "--rounds", "1")
    path = made.path / "sites.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clients": ["books"]}))
    with pytest.raises(RunError, match="was started with the clients books"):
        deploy(tiny_values, post, tmp_path / "out", "--rounds", "1", resume=True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data.labels", "null"), "data.labels: a server sees no examples"),
        (("--method.name", "centralised"), "method.name: between sites"),
        (("--evaluation.choose", "best", "--lora.head", "personal"), "evaluation.choose: between sites"),
        (("--lora.ranks", "{elsewhere: 1}"), "lora.ranks: there is no client 'elsewhere'"),
        (("--evaluation.final", "other"), "evaluation.final: no site has examples of 'other'"),
        (("--data.max_length", "128"), "data.max_length is 128, .* has 64 positions"),
    ],
)
def test_what_sites_cannot_do_is_refused(
    flags: tuple[str, ...], words: str, tiny_values: dict[str, Any], post: LocalPost, tmp_path: Path
) -> None:
    with pytest.raises((RecipeError, DataError, RunError), match=words):
        deploy(tiny_values, post, tmp_path / "out", *flags)
