"""The base model with adapters in it: what is read is what was written, and the base never changes."""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning_helpers import ALL, assert_same, changed, encoded_splits, refused, resident, shaken
from model_folders import SIZES, write_model

from fedrot.core.adapter import Adapter, part_of
from fedrot.learning.encoding import Encoded
from fedrot.learning.loading import model_path
from fedrot.learning.local import train_local
from fedrot.learning.models import ResidentModel
from fedrot.learning.settings import LocalSettings, ModelSettings

STEPS = LocalSettings(lr=0.05, batch=8, steps=4)
LINEAR = "dense, key, query or value"


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ResidentModel:
    return resident(tiny_model)


@pytest.fixture(scope="module")
def start(model: ResidentModel) -> Adapter:
    return model.read()


@pytest.fixture(scope="module")
def splits(model: ResidentModel, tiny_data: Path) -> dict[str, Encoded]:
    return encoded_splits(model, tiny_data)


def all_parameters(model: ResidentModel) -> dict[str, torch.Tensor]:
    """A copy of every parameter, the adapter's too."""
    return {name: parameter.detach().clone() for name, parameter in model.model.named_parameters()}


def test_a_fresh_adapter_has_the_default_targets_the_head_and_a_zero_update(start: Adapter) -> None:
    layers = [f"bert.encoder.layer.{i}.attention.self.{name}" for i in range(2) for name in ("query", "value")]
    assert sorted(start.layers) == layers
    assert sorted(start.head) == ["classifier.bias", "classifier.weight"]
    assert start.head["classifier.weight"].shape == (2, 32)
    for pair in start.layers.values():
        assert (pair.a.shape, pair.b.shape, pair.scale) == ((2, 32), (32, 2), 2.0)
        assert pair.a.abs().min() > 0
        assert not pair.b.any()


def test_what_was_written_is_what_is_read(model: ResidentModel, start: Adapter) -> None:
    wanted = shaken(start)
    model.write(wanted)
    found = model.read()
    assert_same(found, wanted)
    assert changed(found, start) == {name for name, _ in start.tensors()}
    assert found.config == start.config


def test_what_was_read_is_a_copy(model: ResidentModel, start: Adapter) -> None:
    model.write(start)
    found = model.read()
    model.write(shaken(start))
    assert_same(found, start)
    for _, tensor in found.tensors():
        tensor.zero_()
    assert_same(model.read(), shaken(start))


def test_writing_and_training_leave_the_base_weights_as_they_were_loaded(
    model: ResidentModel, start: Adapter, splits: dict[str, Encoded]
) -> None:
    model.write(start)
    before, fingerprint = all_parameters(model), model.fingerprint()
    model.write(shaken(start))
    train_local(model, start, splits["train"], np.arange(20), STEPS, ALL, (1, 0, "a"))
    after = all_parameters(model)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert len(moved) == 10
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    assert model.fingerprint() == fingerprint
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_no_client_leaves_anything_in_the_shared_model_for_the_next(
    model: ResidentModel, start: Adapter, splits: dict[str, Encoded], tiny_model: Path
) -> None:
    """Not the head either, which code that swaps only the factors passes from client to client."""
    train_local(model, start, splits["train"], np.arange(0, 60), STEPS, ALL, (1, 0, "a"))
    after_a = train_local(model, start, splits["train"], np.arange(60, 120), STEPS, ALL, (1, 0, "b"))
    alone = train_local(resident(tiny_model), start, splits["train"], np.arange(60, 120), STEPS, ALL, (1, 0, "b"))
    assert_same(after_a.adapter, alone.adapter)
    assert after_a.loss == alone.loss
    assert changed(after_a.adapter, start) == {name for name, _ in start.tensors()}


def test_the_head_belongs_to_the_logits(model: ResidentModel, start: Adapter, splits: dict[str, Encoded]) -> None:
    inputs, _ = splits["train"].batch([0, 1, 2])
    model.write(start)
    first = model.logits(inputs, "fp32")
    model.write(replace(start, head={name: tensor + 1 for name, tensor in start.head.items()}))
    assert (model.logits(inputs, "fp32") - first).abs().min() > 0
    model.write(start)
    assert torch.equal(model.logits(inputs, "fp32"), first)


def test_parameters_are_named_as_the_adapters_tensors_and_chosen_by_part(model: ResidentModel, start: Adapter) -> None:
    shapes = {name: tensor.shape for name, tensor in start.tensors()}
    assert {name: p.shape for name, p in model.parameters(ALL)} == shapes
    for part in ALL:
        names = [name for name, _ in model.parameters(frozenset({part}))]
        assert sorted(names) == sorted(name for name in shapes if part_of(name) == part)


def test_the_seed_alone_decides_the_start(tiny_model: Path, start: Adapter) -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert_same(resident(tiny_model).read(), start)
    assert torch.equal(torch.get_rng_state(), state)
    other = changed(resident(tiny_model, seed=2).read(), start)
    assert {part_of(name) for name in other} == {"a", "head"}
    assert len(other) == 5  # every A and the head's weight


def test_the_labels_are_the_heads(tiny_model: Path) -> None:
    five = resident(tiny_model, labels=["a", "b", "c", "d", "e"])
    assert five.read().head["classifier.weight"].shape == (5, 32)
    assert five.model.base_model.model.config.id2label[3] == "d"


@pytest.mark.parametrize(
    ("lora", "scale"),
    [
        ({"rank": 4}, 2.0),
        ({"rank": 4, "alpha": 6.0}, 1.5),
        ({"rank": 4, "alpha": 6.0, "rslora": True}, 3.0),
        ({"rank": 3, "alpha": 1.0, "rslora": True}, 1 / math.sqrt(3)),
    ],
)
def test_the_scale_is_alpha_over_the_rank_or_its_root(
    tiny_model: Path, tmp_path: Path, lora: dict[str, Any], scale: float
) -> None:
    adapter = resident(tiny_model, **lora).read()
    assert [pair.scale for pair in adapter.layers.values()] == pytest.approx([scale] * 4)
    adapter.save(tmp_path)
    assert [pair.scale for pair in Adapter.load(tmp_path).layers.values()] == pytest.approx([scale] * 4)


def test_the_layers_are_those_of_the_targets(tiny_model: Path) -> None:
    layers = resident(tiny_model, targets=["key"]).read().layers
    assert sorted(layers) == [f"bert.encoder.layer.{i}.attention.self.key" for i in range(2)]


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], ["query", "valeu"], ["LayerNorm"], ["word_embeddings"]],
    ids=["none is there", "one is misspelt", "not linear", "an embedding"],
)
def test_targets_that_do_not_fit_are_refused_with_the_linear_layers(tiny_model: Path, targets: list[str]) -> None:
    with refused("lora.targets", targets[-1], LINEAR):
        resident(tiny_model, targets=targets)


def test_the_libraries_own_dropout_is_off_and_ours_is_named(
    tiny_model: Path, start: Adapter, splits: dict[str, Encoded]
) -> None:
    model = resident(tiny_model, dropout=0.5)
    model.write(shaken(start))
    inputs, _ = splits["train"].batch([0, 1])

    def logits(key: tuple[int | str, ...] | None) -> torch.Tensor:
        model.set_dropout_key(key)
        return model.logits(inputs, "fp32")

    assert torch.equal(logits(None), logits(None))
    assert torch.equal(logits((1, "step")), logits((1, "step")))
    assert not torch.equal(logits((1, "step")), logits((2, "step")))
    assert not torch.equal(logits((1, "step")), logits(None))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with refused("nowhere", "model.path"):
        resident(tmp_path / "nowhere")
    with refused("./nowhere", "model.path"):
        model_path(ModelSettings(path="./nowhere"))
    with refused("model.path"):
        model_path(ModelSettings())


def test_a_fetched_model_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDROT_CACHE", str(tmp_path))
    with refused("fedrot data fetch minilm"):
        model_path(ModelSettings(path="fetch:minilm"))
    (tmp_path / "minilm").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "minilm" / name).touch()
    assert model_path(ModelSettings(path="fetch:minilm")) == str(tmp_path / "minilm")


def test_home_is_expanded_and_a_hub_name_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bert").mkdir()
    assert model_path(ModelSettings(path="~/bert")) == str(tmp_path / "bert")
    assert model_path(ModelSettings(path="org/bert")) == "org/bert"


def _cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def _remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def _configure(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text().replace(old, new))


@pytest.mark.parametrize(
    "damage",
    [
        _cut("model.safetensors", 1000),
        _cut("model.safetensors", 0),
        _remove("model.safetensors"),
        _cut("config.json", 40),
        _remove("config.json"),
        _configure('"bert"', '"no-such-kind"'),
        _configure('"intermediate_size": 64', '"intermediate_size": 48'),
        _configure('"num_hidden_layers": 2', '"num_hidden_layers": 3'),
        _cut("tokenizer.json", 40),
        _remove("tokenizer.json"),
        _remove("tokenizer.json", "tokenizer_config.json"),
    ],
    ids=[
        "weights cut off", "weights empty", "no weights", "config cut off", "no config", "unknown kind",
        "other shapes", "weights lack a layer", "tokenizer cut off", "no vocabulary", "no tokenizer",
    ],
)  # fmt: skip
def test_a_broken_model_folder_is_refused_by_name(
    tiny_model: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    resident(folder)
    damage(folder)
    with refused(str(folder), "model.path"):
        resident(folder)


@pytest.mark.parametrize(
    ("added", "refusal"),
    [
        ({"image_token": "<image>"}, None),
        ({"pad_token": "[NEW]"}, "'[NEW]'"),
        ({"unk_token": "[NEW]"}, "'[NEW]'"),
        ({}, "'zzz'"),
    ],
    ids=["a mark that no text has", "for padding", "for the unknown", "a word"],
)
def test_a_token_without_an_embedding_is_refused_if_a_text_can_have_it(
    tiny_model: Path, tmp_path: Path, added: dict[str, str], refusal: str | None
) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, **added)
    tokenizer.add_tokens([] if added else ["zzz"])
    assert len(tokenizer) == 1 + len(AutoTokenizer.from_pretrained(tiny_model))
    tokenizer.save_pretrained(tmp_path)
    with refused(str(tmp_path), refusal, "model.path") if refusal else nullcontext():
        resident(tmp_path)


def test_a_language_model_without_an_end_of_text_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    write_model(tmp_path, "llama", tiny_model, causal=True, **SIZES["llama"])
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None, "pad_token": "[PAD]"}))
    resident(tmp_path)  # a classifier needs none
    with refused(str(tmp_path), "eos_token"):
        resident(tmp_path, labels=())
