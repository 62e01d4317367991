"""Adapters that come from elsewhere or go there: fit, fingerprint, half precision, and the plain PEFT model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learning_helpers import LABELS, assert_same, encoded_splits, refused, resident, shaken

from fedrot.core.adapter import Adapter
from fedrot.learning.encoding import Encoded
from fedrot.learning.models import ResidentModel


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ResidentModel:
    return resident(tiny_model)


@pytest.fixture(scope="module")
def start(model: ResidentModel) -> Adapter:
    return model.read()


@pytest.fixture(scope="module")
def splits(model: ResidentModel, tiny_data: Path) -> dict[str, Encoded]:
    return encoded_splits(model, tiny_data)


def plain_peft(tiny_model: Path, folder: Path, labels: int = 2) -> torch.nn.Module:
    """The model as a user of PEFT alone loads it."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=labels)
    return PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize(
    "lora",
    [{}, {"rank": 3, "alpha": 1.0, "rslora": True}, {"targets": ["query", "key", "dense"], "dropout": 0.3}],
    ids=["default", "rslora", "other targets"],
)
def test_logits_are_those_of_the_plain_peft_model_that_was_saved(
    tiny_model: Path, tmp_path: Path, splits: dict[str, Encoded], lora: dict[str, object]
) -> None:
    mine = resident(tiny_model, labels=["a", "b", "c"], **lora)
    adapter = shaken(mine.read())
    mine.write(adapter)
    adapter.save(tmp_path)
    inputs, _ = splits["test"].batch(range(12))
    with torch.no_grad():
        found = mine.logits(inputs, "fp32")
        expected = plain_peft(tiny_model, tmp_path, labels=3)(**inputs).logits
    assert found.shape == (12, 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_adapter_saved_by_peft_itself_is_read_and_fits(
    model: ResidentModel, start: Adapter, tiny_model: Path, tmp_path: Path
) -> None:
    shaken(start).save(tmp_path / "ours")
    plain_peft(tiny_model, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    found = model.fit(Adapter.load(tmp_path / "theirs"), where="theirs")
    assert_same(found, shaken(start))


def test_padding_does_not_change_the_logits(model: ResidentModel, start: Adapter, splits: dict[str, Encoded]) -> None:
    model.write(shaken(start))
    data = splits["test"]
    order = data.lengths.argsort()
    rows = [int(order[0]), int(order[-1])]
    assert data.lengths[rows[0]] < data.lengths[rows[1]]
    with torch.no_grad():
        together = model.logits(data.batch(rows)[0], "fp32")
        alone = torch.cat([model.logits(data.batch([row])[0], "fp32") for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_fit_gives_the_same_numbers_in_float32_under_this_models_config(model: ResidentModel, start: Adapter) -> None:
    foreign = replace(shaken(start).map(lambda t: t.to(torch.bfloat16)), config={"peft_type": "LORA", "revision": "x"})
    found = model.fit(foreign, where="init")
    assert_same(found, foreign.map(lambda t: t.float()))
    assert found.config == model.config()
    assert all(found.layers[name].scale == pair.scale for name, pair in start.layers.items())


def test_fit_refuses_other_layers_shapes_and_heads(model: ResidentModel, start: Adapter, tiny_model: Path) -> None:
    name = sorted(start.layers)[0]
    fewer = replace(start, layers={n: p for n, p in start.layers.items() if n != name})
    with refused("init", name, "missing"):
        model.fit(fewer, where="init")
    with refused("init", ".key'", "not in the reference"):
        model.fit(resident(tiny_model, targets=["query", "value", "key"]).read(), where="init")
    with refused("init", "shape", "(3, 32)", "(2, 32)"):
        model.fit(resident(tiny_model, rank=3).read(), where="init")
    with refused("init", "classifier", "shape"):
        model.fit(resident(tiny_model, labels=["a", "b", "c"]).read(), where="init")
    with refused("init", "classifier", "missing"):
        model.fit(replace(start, head={}), where="init")


def test_fit_refuses_another_scale_and_names_the_key_to_change(
    model: ResidentModel, start: Adapter, tiny_model: Path
) -> None:
    other = resident(tiny_model, alpha=8.0).read()
    with refused("init", "scale 4", "give 2", "lora.alpha"):
        model.fit(other, where="init")
    wider = resident(tiny_model, alpha=8.0)
    assert_same(wider.fit(other, where="init"), other)
    with refused("init", "scale 2", "give 4"):
        wider.fit(start, where="init")


def test_the_fingerprint_is_the_base_weights_whatever_the_adapter_is(
    model: ResidentModel, start: Adapter, tiny_model: Path
) -> None:
    first = model.fingerprint()
    model.write(shaken(start))
    assert model.fingerprint() == first
    assert resident(tiny_model).fingerprint() == first
    other = resident(tiny_model)
    with torch.no_grad():
        other.model.base_model.model.bert.pooler.dense.bias[0] += 1e-3
    assert other.fingerprint() != first


@pytest.mark.parametrize("change", [{"seed": 2}, {"labels": ["a", "b", "c"]}], ids=["seed", "labels"])
def test_the_fingerprint_does_not_hold_the_unused_fresh_head(
    model: ResidentModel, tiny_model: Path, change: dict[str, object]
) -> None:
    """PEFT keeps the head that was there before its own: random numbers, not weights of the base model."""
    assert resident(tiny_model, **change).fingerprint() == model.fingerprint()


def test_a_bfloat16_base_keeps_factors_and_head_in_float32(
    tiny_model: Path, start: Adapter, splits: dict[str, Encoded]
) -> None:
    half = resident(tiny_model, dtype="bfloat16")
    assert {tensor.dtype for _, tensor in half.read().tensors()} == {torch.float32}
    base = half.model.base_model.model.bert
    assert base.pooler.dense.weight.dtype == torch.bfloat16
    assert base.encoder.layer[0].attention.self.query.base_layer.weight.dtype == torch.bfloat16
    half.write(shaken(start))
    assert_same(half.read(), shaken(start))


def test_a_bfloat16_base_gives_nearly_the_logits_of_the_float32_one(
    model: ResidentModel, start: Adapter, tiny_model: Path, splits: dict[str, Encoded]
) -> None:
    half = resident(tiny_model, dtype="bfloat16")
    inputs, _ = splits["test"].batch(range(8))
    found = []
    for each, precision in ((model, "fp32"), (model, "bf16"), (half, "bf16")):
        each.write(shaken(start))
        with torch.no_grad():
            found.append(each.logits(inputs, precision).float())
    for other in found[1:]:
        assert not torch.equal(found[0], other)
        assert (found[0] - other).norm() < 0.1 * found[0].norm()


def test_half_and_full_bases_have_different_fingerprints(model: ResidentModel, tiny_model: Path) -> None:
    assert resident(tiny_model, dtype="bfloat16", labels=LABELS).fingerprint() != model.fingerprint()
