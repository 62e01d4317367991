"""Clients on virtual nodes of Flower's simulation: any process may answer for any of them, to the simulation's bits."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from fakes import Silent, go, outcome
from local_grid import LocalGrid

from fedrot.app.cli.main import main
from fedrot.core.errors import RecipeError
from fedrot.running.flower import simulated, tether
from fedrot.running.flower.simulated import Share, on_nodes
from fedrot.running.folder import RunFolder
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.run import run

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (the extra ray)")
ONE_BY_ONE = ("--compute.stack", "1", "--compute.workers", "1")
# What the scores of the clients' own parts and times are not alike in.
SCORES = ("evaluation", "seconds")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    simulated._process.cache_clear()
    yield
    simulated._process.cache_clear()


@contextmanager
def here(app: Any, count: int) -> Iterator[LocalGrid]:
    """Nodes in this process, of which every message finds a process that was just started."""

    def started(message: Any, context: Any) -> Any:
        if message.metadata.message_type == "train":
            simulated._process.cache_clear()
        return app(message, context)

    yield LocalGrid({f"node {number}": started for number in range(count)})


def on_grid(values: dict[str, Any], out: Path, *flags: str, resume: bool = False) -> RunFolder:
    with ExitStack() as stack:
        return run(parse_recipe(values, flags), out, Silent(), resume, on_nodes(stack, here, Share()))


def same_run(found: Path, wanted: Path) -> None:
    mine, theirs = outcome(found), outcome(wanted)
    assert mine["adapter"] == theirs["adapter"]
    for one, other in zip(mine["metrics"], theirs["metrics"], strict=True):
        assert {k: v for k, v in one.items() if k not in SCORES} == {k: v for k, v in other.items() if k not in SCORES}
        for key in ("accuracy", "loss"):
            assert one["evaluation"][key] == pytest.approx(other["evaluation"][key], abs=1e-6)
        assert one["evaluation"]["by_client"] == pytest.approx(other["evaluation"]["by_client"], abs=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        ("--partition.kind", "dirichlet", "--partition.clients", "4"),
        ("--method.name", "fedsa", "--lora.head", "personal"),
    ],
    ids=["dirichlet", "state"],
)
def test_virtual_nodes_play_the_simulated_run(
    flags: tuple[str, ...], tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    made = on_grid(tiny_values, tmp_path / "nodes", *flags)
    go(tiny_values, tmp_path / "here", *ONE_BY_ONE, *flags)
    same_run(made.path, tmp_path / "here")
    there = RunFolder(tmp_path / "here")
    assert made.read_json("partition.json") == there.read_json("partition.json")
    assert made.read_json("versions.json")["identity"] == there.read_json("versions.json")["identity"]


def test_a_run_on_nodes_goes_on_where_it_was(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    flags = ("--method.name", "fedsa", "--data.labels", "null")  # all files are one machine's: it sees the labels
    on_grid(tiny_values, tmp_path / "out", *flags, "--rounds", "1")
    (tmp_path / "out" / "result.json").unlink()
    path = tmp_path / "out" / "recipe.yaml"
    path.write_text(path.read_text().replace("rounds: 1\n", "rounds: 3\n"))
    on_grid(tiny_values, tmp_path / "out", *flags, resume=True)
    go(tiny_values, tmp_path / "here", *ONE_BY_ONE, *flags)
    assert outcome(tmp_path / "out")["adapter"] == outcome(tmp_path / "here")["adapter"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--method.name", "fedask"), r"method\.name: on virtual nodes, fedask asks twice"),
        (("--method.name", "centralised"), r"method\.name: on virtual nodes, centralised has one client"),
        (("--secure.aggregation", "true"), r"secure\.aggregation: on virtual nodes"),
        (("--federation.buffer", "2"), r"federation\.buffer: on virtual nodes, who comes first"),
        (("--compute.stack", "4"), r"compute\.stack: on virtual nodes"),
        (("--compute.threads", "2"), r"compute\.threads: on virtual nodes, --ray.cpus says it"),
        (("--compute.device", "cuda"), r"compute\.device: on virtual nodes, --ray.gpus says it"),
    ],
)
def test_what_virtual_nodes_cannot_do_is_refused(
    flags: tuple[str, ...], words: str, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        on_grid({**tiny_values, "compute": {}}, tmp_path / "out", *flags)


def test_options_of_ray_are_for_ray(recipe_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(recipe_file()), "--ray.gpus", "1"]) == 2
    assert "are for --engine flower-ray" in capsys.readouterr().err
    assert main(["run", str(recipe_file()), "--engine", "flower-ray", "--ray.gpus", "nan"]) == 2
    assert "--ray.gpus at least 0" in capsys.readouterr().err


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the command and Ray change of it is put back."""
    for name in (*tether.environment(tmp_path), "RAY_USAGE_STATS_ENABLED", "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


@needs_ray
@pytest.mark.usefixtures("environment")
def test_ray_plays_the_simulated_run(recipe_file: Any, tiny_values: dict[str, Any], tmp_path: Path) -> None:
    path = recipe_file(rounds=2)
    words = ["run", str(path), "--out", str(tmp_path / "ray"), "--engine", "flower-ray", "--ray.cpus", "1"]
    assert main([*words, "--method.name", "fedsa"]) == 0
    go({**tiny_values, "rounds": 2}, tmp_path / "here", *ONE_BY_ONE, "--method.name", "fedsa")
    same_run(tmp_path / "ray", tmp_path / "here")


@needs_ray
@pytest.mark.usefixtures("environment")
def test_a_cluster_that_is_too_small_ends_the_run(
    recipe_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(recipe_file(compute={"threads": None})), "--engine", "flower-ray", "--ray.cpus", "999"]
    assert main([*words, "--out", str(tmp_path / "ray")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "Flower's simulation engine ended: ValueError: ActorPool is empty" in last
