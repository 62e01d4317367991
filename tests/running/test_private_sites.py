"""Runs between sites in which the server is not trusted: what sites say beside their uploads, and how a run ends."""

from pathlib import Path
from typing import Any

import pytest
from fakes import Silent, go
from network_sites import ONE_BY_ONE, LocalPost, divide_files, values_of

from fedrot.app.cli.main import main
from fedrot.app.cli.run import conclude
from fedrot.core.errors import RecipeError
from fedrot.running.folder import RunFolder
from fedrot.running.network.messages import Message
from fedrot.running.network.opening import between_sites
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.run import run

SITES = ["books", "films", "music"]
UNSCORED = ("--evaluation.every", "0", "--evaluation.final", "null")
PRIVATE = (
    *("--privacy.clip", "1", "--privacy.noise", "0.1", "--privacy.delta", "0.01", "--privacy.secure", "true"),
    *("--federation.weighting", "uniform", "--local.clip", "null", "--rounds", "2"),
)


@pytest.fixture
def post(tiny_data: Path, tmp_path: Path) -> LocalPost:
    return LocalPost(divide_files(tiny_data, tmp_path / "sites"), tmp_path / "memory")


def deploy(values: dict[str, Any], post: LocalPost, out: Path, *flags: str) -> RunFolder:
    asked = values_of(values, data={"labels": ["negative", "positive"], "path": None})
    recipe = parse_recipe(asked, (*ONE_BY_ONE, *PRIVATE, *flags))
    return run(recipe, out, Silent(), open_stage=between_sites(post, SITES, 0.0))


@pytest.mark.parametrize(
    ("flags", "examples"),
    [
        (("--privacy.mode", "local"), {}),
        (("--privacy.mode", "local", "--secure.aggregation", "true"), {}),
        (("--privacy.mode", "example"), {"train": 60}),
    ],
)
def test_a_server_that_is_not_trusted_is_told_no_scores_and_no_more_counts_than_it_needs(
    flags: tuple[str, ...], examples: dict[str, int], tiny_values: dict[str, Any], post: LocalPost, tmp_path: Path
) -> None:
    made = deploy(tiny_values, post, tmp_path / "out", *flags, *UNSCORED)
    kinds = {request.header["kind"] for _, request, _ in post.carried}
    assert {"join", "train", "finish"} <= kinds
    assert "evaluate" not in kinds
    joined = [reply.header["examples"] for _, request, reply in post.carried if request.header["kind"] == "join"]
    assert joined == [examples] * 3
    assert [record["clients"]["used"] for record in made.metrics()] == [SITES] * 2
    assert set(made.read_json("result.json")) == {"rounds", "method", "round", "privacy"}
    # A site gives none whatever it is asked.
    (asked,) = [r for c, r, _ in post.carried if c == "music" and r.header["kind"] == "finish"]
    request = Message({**asked.header, "kind": "evaluate", "split": "train", "limit": None}, asked.payload)
    reply = post.sites["music"].handle(request)
    assert reply.refused == "music: its examples' scores have no noise, and privacy.mode says to give none"


@pytest.mark.parametrize("mode", ["local", "example"])
@pytest.mark.parametrize("flags", [(), ("--evaluation.every", "0"), ("--evaluation.final", "null")])
def test_scores_without_noise_are_refused(
    mode: str, flags: tuple[str, ...], tiny_values: dict[str, Any], post: LocalPost, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"evaluation\.every: between sites, .* have no noise.*fedrot eval"):
        deploy(tiny_values, post, tmp_path / "out", "--privacy.mode", mode, *flags)
    assert post.carried == []


def test_a_run_without_scores_needs_no_split_but_train_and_is_scored_afterwards(
    tiny_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--privacy.mode", "local", *PRIVATE, *UNSCORED, "--rounds", "1", "--data.validation", "null")
    made = go(tiny_values, tmp_path / "out", *flags, "--data.test", "null")
    assert list(made.read_json("partition.json")["indices"]) == ["train"]
    conclude(made)
    said = capsys.readouterr().out
    assert "epsilon" in said
    assert "accuracy" not in said
    assert main(["eval", str(made.path), "--split", "test", "--data.test", "test.csv"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_without_scores_there_is_no_best_round_and_nothing_to_compare(
    tiny_values: dict[str, Any], recipe_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RecipeError, match=r"evaluation\.choose: without scores"):
        parse_recipe(tiny_values, [*UNSCORED, "--evaluation.choose", "best"])
    words = ["compare", str(recipe_file()), "--methods", "fedit,fedrot", "--evaluation.every", "0"]
    assert main([*words, "--out", str(tmp_path / "compared")]) == 2
    assert "evaluation.every: a comparison is of scores" in capsys.readouterr().err
