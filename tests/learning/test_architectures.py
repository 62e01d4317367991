"""Other kinds of base models than BERT: where their head is, how their layers lie, and how they see padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning_helpers import ALL, assert_same, changed, encoded_splits, resident, shaken
from model_folders import ENCODER, SIZES, write_model

from fedrot.core.adapter import Adapter
from fedrot.learning.data import Rows
from fedrot.learning.local import train_local
from fedrot.learning.models import ResidentModel
from fedrot.learning.settings import LocalSettings
from fedrot.learning.tasks.classification import encode

# kind -> (default targets, tensors of its head)
KINDS: dict[str, tuple[set[str], set[str]]] = {
    "roberta": (
        {"query", "value"},
        {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")},
    ),
    "gpt2": ({"c_attn"}, {"score.weight"}),
    "llama": ({"q_proj", "v_proj"}, {"score.weight"}),
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(kind), kind, tiny_model, **SIZES[kind])


def test_default_targets_and_head_are_found(kind: str, folder: Path) -> None:
    adapter = resident(folder).read()
    assert {name.rpartition(".")[2] for name in adapter.layers} == KINDS[kind][0]
    assert set(adapter.head) == KINDS[kind][1]
    assert {pair.fan_in_fan_out for pair in adapter.layers.values()} == {kind == "gpt2"}


@pytest.mark.parametrize(
    ("kind", "targets", "longest"),
    [
        ("bert", None, 80),
        ("camembert", ["query"], 79),
        ("roberta", None, 79),
        ("roberta-prelayernorm", ["query"], 79),
        ("mpnet", ["q"], 78),
    ],
)
def test_an_example_as_long_as_the_model_says_fits_into_its_positions(
    kind: str, targets: list[str] | None, longest: int, tiny_model: Path, tmp_path: Path
) -> None:
    """Of 80 positions some kinds leave those up to their padding index unused."""
    model = resident(write_model(tmp_path, kind, tiny_model, **ENCODER), targets=targets)
    assert model.longest() == longest
    data = encode(model.tokenizer, Rows(["good " * 100], [0]), longest)
    assert data.lengths.tolist() == [longest]
    with torch.no_grad():
        for packing in {False, model.packable}:
            assert model.forward(model.collate(data, np.array([0]), packing), "fp32").isfinite().all()


def test_padding_does_not_change_the_logits(folder: Path, tiny_data: Path) -> None:
    model = resident(folder)
    model.write(shaken(model.read()))
    data = encoded_splits(model, tiny_data)["test"]
    order = data.lengths.argsort()
    rows = [int(order[0]), int(order[-1]), int(order[len(order) // 2])]
    with torch.no_grad():
        together = model.logits(data.batch(rows)[0], "fp32")
        alone = torch.cat([model.logits(data.batch([row])[0], "fp32") for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_the_saved_adapter_gives_the_same_logits_in_plain_peft(folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = resident(folder)
    model.write(shaken(model.read()))
    model.read().save(tmp_path)
    data = encoded_splits(model, tiny_data)["test"]
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    base.config.pad_token_id = data.pad  # as everyone must who batches for a decoder
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    for row in range(4):
        inputs, _ = data.batch([row])
        with torch.no_grad():
            found, expected = model.logits(inputs, "fp32"), plain(**inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_factors_of_every_layer_are_scaled_products_in_the_bases_orientation(folder: Path, tiny_data: Path) -> None:
    """Merging the dense update by hand gives the logits that the adapter gives."""
    model = resident(folder)
    adapter = shaken(model.read())
    inputs, _ = encoded_splits(model, tiny_data)["test"].batch([0])
    model.write(adapter)
    with torch.no_grad():
        expected = model.logits(inputs, "fp32")
        model.write(adapter.with_tensors({n: t * (0 if n.endswith("/b") else 1) for n, t in adapter.tensors()}))
        without = model.logits(inputs, "fp32")
        for name, pair in adapter.layers.items():
            model.model.base_model.model.get_submodule(name).base_layer.weight += pair.delta()
        merged = model.logits(inputs, "fp32")
    assert (expected - without).abs().max() > 1e-4
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-6)


def test_training_is_the_same_twice_and_moves_every_part(folder: Path, tiny_data: Path) -> None:
    model = resident(folder)
    start, data = model.read(), encoded_splits(model, tiny_data)["train"]
    settings = LocalSettings(lr=0.01, batch=8, steps=3)
    first, second = (train_local(model, start, data, np.arange(30), settings, ALL, (1, 0, "a")) for _ in range(2))
    assert_same(first.adapter, second.adapter)
    assert changed(first.adapter, start) == {name for name, _ in start.tensors()}


def distilbert(tiny_model: Path, folder: Path) -> ResidentModel:
    """A model whose head is two layers, `pre_classifier` and `classifier`."""
    return resident(write_model(folder, "distilbert", tiny_model, **SIZES["distilbert"]), targets=["q_lin", "v_lin"])


def test_all_that_the_checkpoint_lacks_is_part_of_the_head(tiny_model: Path, tmp_path: Path) -> None:
    """A layer that stays at a random start and is not saved would spoil the adapter for everyone else."""
    head = distilbert(tiny_model, tmp_path).read().head
    assert set(head) == {f"{layer}.{kind}" for layer in ("classifier", "pre_classifier") for kind in ("weight", "bias")}


def test_a_head_of_more_than_one_module_is_saved_and_loaded_whole(tiny_model: Path, tmp_path: Path) -> None:
    model = distilbert(tiny_model, tmp_path / "model")
    model.read().save(tmp_path / "adapter")
    assert_same(model.fit(Adapter.load(tmp_path / "adapter"), where="adapter"), model.read())


@pytest.mark.parametrize(
    ("kind", "config", "targets"),
    [
        ("bert", {**ENCODER, "pooler": False}, None),
        ("deberta-v2", ENCODER, None),
        ("electra", {**ENCODER, "embedding_size": 32}, None),
        ("mpnet", {**ENCODER, "pooler": False}, ["q", "v"]),
    ],
)
def test_an_adapter_means_the_same_wherever_its_checkpoint_is_loaded(
    kind: str, config: dict[str, Any], targets: list[str] | None, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """What the checkpoint lacks starts at random, elsewhere at other numbers: it travels in the adapter's head."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    folder = write_model(tmp_path / "model", kind, tiny_model, **config)
    model = resident(folder, targets=targets)
    model.write(shaken(model.read()))
    adapter = model.read()
    adapter.save(tmp_path / "adapter")
    inputs, _ = encoded_splits(model, tiny_data)["test"].batch([0, 1, 2])
    torch.manual_seed(123)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    other = resident(folder, targets=targets, seed=99)
    other.write(adapter)
    with torch.no_grad():
        expected = model.logits(inputs, "fp32")
        torch.testing.assert_close(other.logits(inputs, "fp32"), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-4, atol=1e-6)
    assert other.fingerprint() == model.fingerprint()
