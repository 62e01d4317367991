"""Gradient checkpointing: layers are computed again, less is kept, and not a bit of the result changes."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning_helpers import ALL, assert_same, encoded_splits, refused, resident, shaken
from model_folders import ENCODERS, SIZES, write_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedrot.core.adapter import Adapter
from fedrot.core.errors import RecipeError
from fedrot.learning import capacity
from fedrot.learning.architectures import PACKABLE
from fedrot.learning.checkpointing import layers_of
from fedrot.learning.data import ASSISTANT, conversations
from fedrot.learning.encoding import Encoded
from fedrot.learning.local import Job, LocalResult, train_clients
from fedrot.learning.models import ResidentModel
from fedrot.learning.settings import LocalSettings
from fedrot.learning.tasks import generation

LAYERS = 4
DEEP: dict[str, dict[str, Any]] = {"bert": {"num_hidden_layers": LAYERS}, "gpt2": {"n_layer": LAYERS}}
CLIENTS = [np.arange(0, 40), np.arange(40, 43), np.arange(50, 90), np.array([99])]
ADAM = LocalSettings(lr=0.01, batch=8, epochs=0.6, clip=0.05)  # 3, 1, 3 and 1 steps
KINDS = ["bert", "roberta", "gpt2", "llama", "llama that writes"]


def written(folder: Path, kind: str, tiny_model: Path, **config: Any) -> Path:
    deep = DEEP["gpt2" if kind == "gpt2" else "bert"]
    return write_model(folder, kind, tiny_model, **{**SIZES[kind], **deep, **config})


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ResidentModel:
    """Of four layers, with dropout on."""
    kind, writes = request.param.split()[0], "writes" in request.param
    folder = written(tmp_path_factory.mktemp(kind), kind, tiny_model, causal=writes)
    made: ResidentModel = resident(folder, dropout=0.2, **({"labels": ()} if writes else {}))
    return made


@pytest.fixture(scope="module")
def data(model: ResidentModel, tiny_data: Path) -> Encoded:
    if not model.causal:
        return encoded_splits(model, tiny_data)["train"]
    words = ["good", "bad", "film", "book", "warm", "dull", "day", "plot"]
    turns = [(("user", "the " + " ".join(words[: i % 7])), (ASSISTANT, " ".join(words[i % 5 :]))) for i in range(100)]
    return generation.encode(model.tokenizer, conversations(turns), 64)


def trained(model: ResidentModel, data: Encoded, settings: LocalSettings, packing: bool) -> list[Adapter]:
    start = model.read()
    jobs = [Job(shaken(start, seed=i), rows, (1, 0, f"client-{i}")) for i, rows in enumerate(CLIENTS)]
    found = train_clients(model, data, jobs, settings, ALL, packing)
    assert all(isinstance(one, LocalResult) for one in found), found
    return [one.adapter for one in found if isinstance(one, LocalResult)]


@contextmanager
def counted(layers: list[nn.Module]) -> Iterator[list[int]]:
    """How often each layer is computed."""
    counts, kind = [0] * len(layers), type(layers[0])
    whole = kind.forward

    def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        counts[layers.index(layer)] += 1
        return whole(layer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", run)
        yield counts


def storages(values: Any) -> list[torch.UntypedStorage]:
    """The memory of all tensors in nested values."""
    return [one.untyped_storage() for one in tree_leaves(values) if isinstance(one, torch.Tensor)]


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were made within and lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in storages((args, kwargs))}  # of which a view may be the result
        for storage in storages(found):
            self._add(storage, given)
        return found

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        name, size = id(storage), storage.nbytes()
        if name not in self._seen | given:
            self._seen.add(name)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, name, size)

    def _drop(self, name: int, size: int) -> None:
        self._seen.discard(name)
        self.now -= size


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_adapters_are_the_same_bit_for_bit(model: ResidentModel, data: Encoded, packing: bool, precision: Any) -> None:
    """After several steps of a stack, with dropout on."""
    settings = replace(ADAM, precision=precision)
    kept = trained(model, data, settings, packing)
    again = trained(model, data, replace(settings, checkpointing=True), packing)
    for one, other in zip(kept, again, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_every_layer_but_the_last_is_computed_twice_a_step(model: ResidentModel, data: Encoded, packing: bool) -> None:
    layers = layers_of(model.model)
    with counted(layers) as once:
        trained(model, data, ADAM, packing)
    with counted(layers) as twice:
        trained(model, data, replace(ADAM, checkpointing=True), packing)
    assert once == [3] * LAYERS
    assert twice == [6] * (LAYERS - 1) + [3]


def test_less_lives_at_once(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """With twelve layers: of eleven a step keeps no more than the inputs."""
    model = resident(written(tmp_path, "bert", tiny_model, num_hidden_layers=12), dropout=0.2)
    data, peaks = encoded_splits(model, tiny_data)["train"], []
    for settings in (ADAM, replace(ADAM, checkpointing=True)):
        with Peak() as peak:
            trained(model, data, settings, packing=True)
        peaks.append(peak.most)
    assert peaks[1] < 0.35 * peaks[0]


def test_afterwards_the_model_is_as_it_was(model: ResidentModel, data: Encoded) -> None:
    config = model.model.config
    before = config._attn_implementation, getattr(config, "use_cache", None)
    trained(model, data, replace(ADAM, checkpointing=True), packing=True)
    assert (config._attn_implementation, getattr(config, "use_cache", None)) == before
    assert not any("forward" in vars(layer) for layer in layers_of(model.model))


def bare(kind: str, **config: Any) -> Any:
    """A model of this kind without adapters."""
    from transformers import AutoConfig, AutoModel

    return AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=30, pad_token_id=0, **config))


@pytest.mark.parametrize("kind", sorted({*SIZES, *ENCODERS, *PACKABLE}))
def test_the_layers_of_every_architecture_are_found(kind: str) -> None:
    found = layers_of(bare(kind, **SIZES.get(kind, SIZES["bert"])))
    assert len(found) == 2
    assert len({type(layer) for layer in found}) == 1
    assert all(any(isinstance(m, nn.LayerNorm) or "Norm" in type(m).__name__ for m in one.modules()) for one in found)


def test_a_model_whose_layers_cannot_be_told_is_refused() -> None:
    """ALBERT has one layer, which it goes through many times."""
    with refused("local.checkpointing", "albert", error=RecipeError):
        layers_of(bare("albert", embedding_size=16, **SIZES["bert"]))


def test_stacks_are_wider_where_layers_are_computed_again(tiny_model: Path, tmp_path: Path) -> None:
    model = resident(written(tmp_path, "bert", tiny_model)).model
    whole, less = capacity.activation_bytes(model), capacity.activation_bytes(model, checkpointing=True)
    layer = 6 * sum(sum(m.weight.shape) for m in layers_of(model)[0].modules() if isinstance(m, nn.Linear))
    assert whole - less == (LAYERS - 1) * layer - 4 * 32 * LAYERS
    assert capacity.stack_width(model, 100.0, "cuda", 4 * 500 * whole) == 5
    assert capacity.stack_width(model, 100.0, "cuda", 4 * 500 * whole, checkpointing=True) == 500 * whole // less // 100
