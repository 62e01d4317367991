"""What the tests of the learning floor share: files, small data sets, the tiny model and comparisons."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from fedrot.core.adapter import Adapter
from fedrot.core.errors import DataError, FedrotError
from fedrot.learning.data import Dataset, Rows
from fedrot.learning.encoding import Encoded
from fedrot.learning.loading import load_model
from fedrot.learning.models import ResidentModel
from fedrot.learning.settings import DataSettings, LoraSettings, ModelSettings
from fedrot.learning.sources.read import read_dataset
from fedrot.learning.tasks import classification

quick = settings(max_examples=30, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
LABELS = ("negative", "positive")
ALL = frozenset({"a", "b", "head"})


@contextmanager
def refused(*words: str, error: type[FedrotError] = DataError) -> Iterator[None]:
    """The block raises `error` itself, with one line that holds every one of `words`."""
    with pytest.raises(FedrotError) as caught:
        yield
    assert type(caught.value) is error
    message = str(caught.value)
    assert message
    assert "\n" not in message
    for word in words:
        assert word in message


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    """A UTF-8 text file of these lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join(lines) + "\n").encode())
    return path


def write_tsv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """Fields joined by tabs, nothing quoted."""
    return write_lines(path, ["\t".join(map(str, row)) for row in [header, *rows]])


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """An object a line."""
    return write_lines(path, [json.dumps(row) for row in rows])


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    """A parquet file of these columns."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def labelled(labels: Sequence[int], groups: Sequence[str] | None = None) -> Rows:
    """Rows with these labels and texts that all differ."""
    return Rows([f"text {i}" for i in range(len(labels))], list(labels), group=groups)


def label_names(count: int) -> tuple[str, ...]:
    """Names for `count` labels."""
    return tuple(f"label-{i}" for i in range(count))


def random_dataset(seed: int, train: int, validation: int, labels: int = 3) -> Dataset:
    """A data set of uniformly drawn labels."""
    rng = np.random.default_rng(seed)
    sizes = {"train": train, "validation": validation}
    splits = {name: labelled(rng.integers(0, labels, size).tolist()) for name, size in sizes.items()}
    return Dataset(splits, label_names(labels))


def resident(folder: Path, seed: int = 1, dtype: str = "float32", labels: Sequence[str] = LABELS, **lora: Any) -> Any:
    """The model in `folder` with fresh adapters."""
    model = ModelSettings(path=str(folder), dtype=dtype)  # type: ignore[arg-type]
    return load_model(model, LoraSettings(**{"rank": 2, **lora}), labels, seed)


def encoded_splits(model: ResidentModel, folder: Path) -> dict[str, Encoded]:
    """The splits of the tiny data, as the model's tokenizer encodes them."""
    settings = DataSettings(
        path=str(folder), train="train.csv", validation="validation.csv", test="test.csv", group="group"
    )
    splits = read_dataset(settings, 1).splits
    return {name: classification.encode(model.tokenizer, rows, 64) for name, rows in splits.items()}


def shaken(adapter: Adapter, seed: int = 5, size: float = 0.1) -> Adapter:
    """The adapter with noise on every tensor, so that no factor is zero."""
    rng = torch.Generator().manual_seed(seed)
    return adapter.map(lambda t: t + size * torch.randn(t.shape, generator=rng).to(t.dtype))


def assert_same(left: Adapter, right: Adapter, names: Callable[[str], bool] = lambda name: True) -> None:
    """Bit for bit the same tensors, of those whose flat name is wanted."""
    mine, theirs = dict(left.tensors()), dict(right.tensors())
    assert mine.keys() == theirs.keys()
    for name in filter(names, mine):
        assert mine[name].dtype == theirs[name].dtype, name
        assert torch.equal(mine[name], theirs[name]), name


def changed(left: Adapter, right: Adapter) -> set[str]:
    """Flat names of the tensors that differ."""
    theirs = dict(right.tensors())
    return {name for name, tensor in left.tensors() if not torch.equal(tensor, theirs[name])}


def assert_steps(found: Adapter, start: Adapter, wanted: Adapter, rel: float = 1e-3) -> None:
    """`found` went from `start` where `wanted` went, to `rel` of the length of each tensor's way."""
    ends, goals = dict(found.tensors()), dict(wanted.tensors())
    for name, tensor in start.tensors():
        way = goals[name].double() - tensor.double()
        assert way.norm() > 1e-4, name
        assert float((ends[name].double() - goals[name]).norm()) <= rel * float(way.norm()), name
