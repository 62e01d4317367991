"""Who takes part: sites that lack what a run needs are refused by name with the reason, and the others go on."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from network_sites import ONE_BY_ONE, LocalPost, divide_files, network, values_of
from safetensors.torch import load_file, save_file
from tiny_runs import Tiny

from fedrot import __version__
from fedrot.running.network.engine import Network
from fedrot.running.network.messages import Message
from fedrot.running.network.site import Here, Site
from fedrot.running.prepare import Prepared, prepare
from fedrot.running.recipe_file import parse_recipe

OTHERS = ["books", "films"]


@pytest.fixture(scope="module")
def ready(tiny_recipe: Callable[[], dict[str, Any]]) -> Prepared:
    """What the server has; the tests change nothing of it."""
    return prepare(parse_recipe(tiny_recipe(), ONE_BY_ONE))


@pytest.fixture(scope="module")
def known(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalPost:
    """Sites that have loaded what they need, so that they join at once."""
    folder = tmp_path_factory.mktemp("known")
    return LocalPost(divide_files(tiny_data, folder / "sites"), folder / "memory")


@pytest.fixture
def post(tiny_data: Path, tmp_path: Path) -> LocalPost:
    return LocalPost(divide_files(tiny_data, tmp_path / "sites"), tmp_path / "memory")


def joined(ready: Prepared, post: LocalPost) -> Network:
    engine = network(ready, post)
    engine.join()
    return engine


def without_music(ready: Prepared, engine: Network, *words: str) -> None:
    """Music alone is refused, with these words in the reason, and the others play a round."""
    assert list(engine.refused) == ["music"]
    for word in words:
        assert word in engine.refused["music"]
    assert "\n" not in engine.refused["music"]
    assert list(engine.clients) == OTHERS
    start = ready.recipe.method.start(ready.model.read())
    tiny = Tiny(ready.recipe, ready, engine, start).play()  # type: ignore[arg-type]
    assert tiny.records[0]["clients"] == {"drawn": 2, "used": OTHERS, "dropped": {}}


def says(**header: Any) -> Callable[[Message, Message], Message]:
    """A fault that changes what a site says."""
    return lambda request, reply: replace(reply, header={**reply.header, **header})


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"fedrot": "0.0.1"}, ("another version of fedrot", "'0.0.1'", __version__)),
        ({"model": "0" * 64}, ("another base model",)),
        ({"schema": "0" * 32}, ("adapter of another form",)),
        ({"labels": ["bad", "good"]}, ("other labels", "'bad'", "'negative'")),
        ({"labels": ["negative"]}, ("other labels",)),
        ({"labels": [[[[]]] * 99] * 99}, ("other labels",)),
        ({"labels": "negative, positive"}, ("labels must be of type list",)),
        ({"model": None}, ("model must be of type str",)),
        ({"examples": {"train": 0}}, ("train must be a whole number of at least 1",)),
        ({"examples": {"train": 5, "validation": -1}}, ("validation must be a whole number",)),
        ({"examples": {"train": 10**400}}, ("train must be a whole number",)),
        ({"examples": [5]}, ("examples must be of type dict",)),
        ({"refused": {"a": ["\x1b[31m"] * 999}}, ("{'a': [",)),
        ({"refused": "it\nis \x1b[31m so\u202e"}, ("it is [31m so",)),
        ({"refused": ""}, ("gave no reason",)),
    ],
)
def test_what_a_site_says_of_itself(
    said: dict[str, Any], words: tuple[str, ...], ready: Prepared, known: LocalPost
) -> None:
    known.faults["music", "join"] = says(**said)
    engine = joined(ready, known)
    assert list(engine.refused) == ["music"]
    assert all(word in engine.refused["music"] for word in words), engine.refused
    assert engine.refused["music"].isprintable()
    assert list(engine.clients) == OTHERS


@pytest.mark.parametrize(
    ("arrives", "words"),
    [
        (None, "gave no answer"),
        ("is not connected", "is not connected"),
        (Message({}), "fedrot must be of type str"),
        (Message({"round": 0, "scores": {}}), "fedrot must be of type str"),
    ],
)
def test_a_reply_that_is_no_introduction(
    arrives: Message | str | None, words: str, ready: Prepared, known: LocalPost
) -> None:
    known.faults["music", "join"] = lambda request, reply: arrives
    without_music(ready, joined(ready, known), words)


def test_another_base_model(ready: Prepared, post: LocalPost, tiny_model: Path, tmp_path: Path) -> None:
    """The same shapes, and one weight that differs."""
    other = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    weights[name][0, 0] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    post.sites["music"] = Site(Here("music", post.folders["music"], model=str(other)), post.memory / "music")
    without_music(ready, joined(ready, post), "another base model")


def rewritten(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


UNREADABLE = "music: cannot read its data or model as the recipe says; the site's own log says why"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("negative", "bad"), "has label 'bad', which data.labels does not name"),
        (lambda text: text.replace("label", "verdict", 1), "no column 'label' (data.label)"),
        (lambda text: text + "one field\n", "has 1 fields, expected 3"),
        (lambda text: "", "the file is empty"),
    ],
)
def test_other_data(
    change: Any, words: str, ready: Prepared, post: LocalPost, caplog: pytest.LogCaptureFixture
) -> None:
    """The site is told what is wrong with them, the server that it is to ask the site."""
    for path in post.folders["music"].glob("*.csv"):
        rewritten(path, change)
    engine = joined(ready, post)
    assert engine.refused["music"] == UNREADABLE
    assert f"music: {post.folders['music']}" in caplog.text
    assert words in caplog.text
    without_music(ready, engine)


def test_a_site_whose_data_are_mended_can_join_later(ready: Prepared, post: LocalPost) -> None:
    data = post.folders["music"]
    data.rename(data.with_name("elsewhere"))
    engine = joined(ready, post)
    without_music(ready, engine, UNREADABLE)
    data.with_name("elsewhere").rename(data)
    engine.join()
    assert engine.refused == {}
    assert list(engine.clients) == [*OTHERS, "music"]


def test_replies_that_nobody_asked_for_bring_nobody_in(ready: Prepared, known: LocalPost) -> None:
    class Crowd(LocalPost):
        def ask(self, requests: Any, seconds: float | None) -> Any:
            for client, reply in super().ask(requests, seconds):
                yield "stranger", reply
                yield client, reply
                yield client, Message.refusal("the second reply")

    crowd = Crowd(known.folders, known.memory)
    crowd.sites = known.sites
    engine = network(ready, crowd)
    engine.join()
    assert engine.refused == {}
    assert list(engine.clients) == [*OTHERS, "music"]


def request(recipe: Any, version: str = __version__) -> Message:
    return Message.of(kind="join", fedrot=version, run="run", recipe=recipe)


def test_a_site_refuses_a_server_of_another_version(post: LocalPost) -> None:
    refused = post.sites["music"].handle(request({}, "9.9.9")).refused or ""
    assert f"music has fedrot {__version__}, the server '9.9.9'" in refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"locals": {}}, ("there is no such recipe key", "did you mean 'local'")),
        ({"local": {"lr": "fast"}}, ("local.lr must be a number",)),
        ({"local": {"lr": -1}}, ("local.lr",)),
        ({"data": "here"}, ("data must hold keys and values",)),
        ({"data": None}, ("data must hold keys and values",)),
        ({"model": [1]}, ("model must hold keys and values",)),
        ({"method": {"name": ["fedrot"]}}, ("method",)),
        ({"method": {"name": {"a": {}}}}, ("method",)),
        ({"rounds": [[]]}, ("rounds",)),
        ({"data": {"labels": None}}, ("data.labels: a site does not say its labels",)),
        ({"data": {"train": "/etc/passwd"}}, ("data.train", "not in the site's own folder")),
        ({"data": {"train": "train.csv", "test": "../books/test.csv"}}, ("data.test", "not in the site's own folder")),
    ],
)
def test_a_site_refuses_a_recipe_that_it_cannot_take(
    change: dict[str, Any], words: tuple[str, ...], post: LocalPost, tiny_values: dict[str, Any]
) -> None:
    site = post.sites["music"]
    refused = site.handle(request(values_of(tiny_values, **change))).refused or ""
    assert refused.startswith("the server's recipe: ")
    for word in words:
        assert word in refused
    # It was not told a recipe that it could take, so it is not there for any.
    assert site.handle(Message.of(kind="train")).header["join"] is True


@pytest.mark.parametrize(
    "data",
    [
        {"label": "text", "labels": None},
        {"label": "text"},
        {"label": "missing"},
        {"label": "text", "columns": ["text", "label"]},
        {"columns": ["label", "group", "label"]},
        {"text": "missing"},
        {"group": "missing"},
        {"train": "missing.csv"},
        {"source": "glue", "name": "rte", "labels": None},
        {"source": "codesearchnet", "labels": None},
        {"messages": "text", "labels": None},
    ],
    ids=str,
)
def test_no_recipe_has_a_site_tell_what_is_in_its_files_or_where_they_are(
    data: dict[str, Any], post: LocalPost, tiny_values: dict[str, Any]
) -> None:
    reply = post.sites["music"].handle(request(values_of(tiny_values, data=data)))
    assert reply.refused
    said = reply.header_bytes().decode()
    rows = (post.folders["music"] / "train.csv").read_text().splitlines()[1:]
    assert [row for row in rows if row.split(",")[0] in said] == []
    assert str(post.folders["music"].parent) not in said


@pytest.mark.parametrize("recipe", [None, "fedrot", [], 3, True])
def test_a_recipe_is_keys_and_values(recipe: Any, post: LocalPost) -> None:
    refused = post.sites["music"].handle(request(recipe)).refused or ""
    assert "recipe must be of type dict" in refused


def test_what_the_site_says_itself_wins(post: LocalPost, tiny_values: dict[str, Any], ready: Prepared) -> None:
    """Data, compute and where to begin are not the server's to say."""
    asked = values_of(tiny_values, compute={"workers": 64}, init="/somewhere", data={"path": "/somewhere"})
    reply = post.sites["music"].handle(request(asked))
    assert reply.refused is None
    assert reply.header["examples"]["train"] == 60
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({}, None),
        ({"name": "other", "checkpoint": {"keep": 7}, "compute": {"workers": 64}, "data": {"path": "/else"}}, None),
        ({"local": {"lr": 0.5}}, "local.lr 0.01, the server's recipe has 0.5"),
        ({"rounds": 99}, "rounds 3, the server's recipe has 99"),
        ({"method": {"name": "fedit"}}, "method.name 'fedrot', the server's recipe has 'fedit'"),
    ],
)
def test_a_site_takes_part_in_no_other_recipe_than_was_agreed_on(
    change: dict[str, Any],
    key: str | None,
    post: LocalPost,
    tiny_values: dict[str, Any],
    recipe_file: Any,
    tmp_path: Path,
) -> None:
    here = Here("music", post.folders["music"], compute={"threads": 1}, recipe=str(recipe_file()))
    reply = Site(here, tmp_path / "state").handle(request(values_of(tiny_values, **change)))
    assert reply.refused is None if key is None else f"music has agreed to {key}" in str(reply.refused)


def test_what_is_wrong_with_the_agreed_recipe_is_for_the_site_alone(
    post: LocalPost, tiny_values: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "agreed.yaml").write_text("rounds: [a secret\n")
    here = Here("music", post.folders["music"], recipe=str(tmp_path / "agreed.yaml"))
    refused = Site(here, tmp_path / "state").handle(request(tiny_values)).refused
    assert refused == "music: cannot do what is asked; the site's own log says why"
    assert f"agreed on: {tmp_path / 'agreed.yaml'}: line" in caplog.text
