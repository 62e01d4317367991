"""fedrot data divide: a recipe's partition as files, by which sites play the very run that is simulated."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import Silent, go
from network_sites import ONE_BY_ONE, LocalPost

from fedrot.app.cli.main import main
from fedrot.learning.data import Dataset, Rows, conversations
from fedrot.learning.partition import Partition
from fedrot.learning.settings import DataSettings
from fedrot.learning.sources.read import read_dataset
from fedrot.learning.strata import by_label
from fedrot.learning.written import columns, write_clients
from fedrot.running.network.opening import between_sites
from fedrot.running.recipe_file import read_recipe
from fedrot.running.run import run

EVEN = {"kind": "iid", "clients": 2}


def test_sites_with_the_divided_files_play_the_simulated_run(
    recipe_file: Callable[..., Path], tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    path = recipe_file(partition=EVEN, rounds=2)
    assert main(["data", "divide", str(path), "--out", str(tmp_path / "trial")]) == 0
    clients = sorted((tmp_path / "trial" / "data").iterdir())
    post = LocalPost({folder.name: folder for folder in clients}, tmp_path / "memory")
    recipe = read_recipe(tmp_path / "trial" / "recipe.yaml", ONE_BY_ONE)
    there = run(recipe, tmp_path / "there", Silent(), open_stage=between_sites(post, [c.name for c in clients], 0.0))
    here = go({**tiny_values, "partition": EVEN, "rounds": 2}, tmp_path / "here", *ONE_BY_ONE)
    name = "adapter_model.safetensors"
    assert (there.adapter / name).read_bytes() == (here.adapter / name).read_bytes()


def test_it_does_not_write_over_another_one(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "divide", str(recipe_file(partition=EVEN)), "--out", str(tmp_path / "trial")]
    assert [main(words), main(words)] == [0, 2]
    assert "is there already" in capsys.readouterr().err


def one_client(dataset: Dataset) -> Partition:
    places = {split: {"a": np.arange(len(rows))[::2]} for split, rows in dataset.splits.items()}
    return Partition(("a",), places, by_label(dataset))


PAIRS = Rows(['one "quoted"', "two\nlines", "drei ä"], [1, 0, 1], pair=["x", "y", "z"])
CHATS = conversations([(("system", "s"), ("user", f"q{i}"), ("assistant", "a\n")) for i in range(3)])


@pytest.mark.parametrize(
    ("rows", "labels"), [(PAIRS, ("no", "yes")), (replace(PAIRS, pair=None), ("no", "yes")), (CHATS, ())]
)
def test_what_is_read_back_is_what_was_written(rows: Rows, labels: tuple[str, ...], tmp_path: Path) -> None:
    dataset = Dataset({"train": rows, "validation": rows}, labels)
    (folder,) = write_clients(dataset, one_client(dataset), tmp_path)
    found = read_dataset(DataSettings(path=str(folder), **columns(dataset)), 0)
    assert found.labels == labels
    mine = rows.take([0, 2])
    for split in ("train", "validation"):
        back = found.split(split)
        assert (list(back.text), list(back.label)) == (mine.text, mine.label)
        assert back.pair == mine.pair
        assert [list(turns) for turns in back.turns or ()] == [list(turns) for turns in mine.turns or ()]


def test_a_client_without_examples_of_a_split_is_named(tmp_path: Path) -> None:
    from fedrot.core.errors import DataError

    dataset = Dataset({"train": PAIRS, "validation": PAIRS}, ("no", "yes"))
    places = {"train": {"a": np.arange(3)}, "validation": {"a": np.arange(0)}}
    with pytest.raises(DataError, match="the client 'a' has no examples of 'validation'"):
        write_clients(dataset, Partition(("a",), places, by_label(dataset)), tmp_path)
