"""PEFT adapter directories: what is saved is what is loaded, exactly, and nothing half-written is ever seen."""

import errno
import json
import math
import os
from dataclasses import replace

import pytest
import torch
from core_helpers import SHAPES, assert_same, make_adapter, refused
from safetensors.torch import load_file, save_file

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.errors import AdapterError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def with_layer(adapter: Adapter, name: str, **change: object) -> Adapter:
    """The adapter with one layer's pair changed."""
    return replace(adapter, layers={**adapter.layers, name: replace(adapter.layers[name], **change)})


def assert_same_adapter(left: Adapter, right: Adapter) -> None:
    assert_same(left, right)
    for name, pair in left.layers.items():
        assert pair.scale == right.layers[name].scale, name
        assert pair.fan_in_fan_out == right.layers[name].fan_in_fan_out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_a_saved_adapter_is_loaded_bit_for_bit(tmp_path, dtype, fan_in_fan_out, head):
    adapter = make_adapter(0, dtype=dtype, fan_in_fan_out=fan_in_fan_out, head=head)
    adapter.save(tmp_path / "new" / "adapter")
    again = Adapter.load(str(tmp_path / "new" / "adapter"))
    assert_same_adapter(again, adapter)
    again.save(tmp_path / "second")
    assert_same_adapter(Adapter.load(tmp_path / "second"), adapter)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [1, 7, 16, 0.5, 12.5])
def test_the_scale_is_alpha_over_r_or_its_root_and_survives_saving(tmp_path, rslora, alpha):
    for rank in range(1, 9):
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        adapter = replace(make_adapter(0, rank, scale), config={"use_rslora": rslora})
        adapter.save(tmp_path / f"{rank}")
        config = json.loads((tmp_path / f"{rank}" / CONFIG).read_text())
        assert (config["r"], config["use_rslora"]) == (rank, rslora)
        # A whole alpha comes back whole, and not as 7.999999999999999.
        assert config["lora_alpha"] == (alpha if alpha == round(alpha) else pytest.approx(alpha, rel=1e-12))
        assert_same_adapter(Adapter.load(tmp_path / f"{rank}"), adapter)


def test_layers_of_different_rank_and_scale_are_kept_by_patterns(tmp_path):
    small, large = make_adapter(0, rank=2, scale=4.0), make_adapter(1, rank=5, scale=1.0)
    mixed = replace(small, layers={**small.layers, "enc.0.out": large.layers["enc.0.out"]})
    mixed = with_layer(mixed, "enc.0.value", scale=2.0)
    mixed.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 8)
    assert sorted(config["rank_pattern"].values()) == [5]
    assert sorted(config["alpha_pattern"].values()) == [4, 5]
    assert_same_adapter(Adapter.load(tmp_path), mixed)


@pytest.mark.parametrize("name", ["q", "dec.q"])
def test_a_layer_s_pattern_does_not_catch_a_layer_whose_path_looks_alike(tmp_path, name):
    shapes = {"q": (6, 5), "dec.q": (6, 5), "dec.aq": (6, 5), "dec_q": (6, 5), "model.dec.q": (6, 5)}
    adapter = with_layer(make_adapter(0, shapes=shapes), name, scale=7.0)
    adapter.save(tmp_path)
    assert_same_adapter(Adapter.load(tmp_path), adapter)


def test_every_setting_that_says_nothing_about_the_factors_is_kept(tmp_path):
    config = {
        "base_model_name_or_path": "some/base", "task_type": "SEQ_CLS", "lora_dropout": 0.1,
        "target_modules": ["query", "value", "out"], "modules_to_save": ["classifier", "score"], "peft_version": "0.18",
    }  # fmt: skip
    stale = {"r": 9, "lora_alpha": 1, "rank_pattern": {"query": 1}, "alpha_pattern": {"out": 3}, "fan_in_fan_out": True}
    adapter = replace(make_adapter(0), config=config | stale)
    adapter.save(tmp_path)
    again = Adapter.load(tmp_path)
    assert {key: again.config[key] for key in config} == config
    assert_same_adapter(again, adapter)


def test_an_adapter_without_settings_names_its_layers_and_head_for_peft(tmp_path):
    make_adapter(0).save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == sorted(SHAPES)
    assert config["modules_to_save"] == ["classifier"]
    assert config["peft_type"] == "LORA"
    keys = set(load_file(tmp_path / TENSORS))
    assert "base_model.model.enc.0.out.lora_A.weight" in keys
    assert "base_model.model.classifier.weight" in keys


def test_head_keys_of_older_files_lose_their_wrapper_s_name(tmp_path):
    make_adapter(0).save(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    for old in ("modules_to_save.default", "modules_to_save"):
        wrapped = {k.replace("classifier.", f"classifier.{old}."): t for k, t in tensors.items()}
        save_file(wrapped, tmp_path / TENSORS)
        assert_same(Adapter.load(tmp_path), make_adapter(0))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"query": 7}, {"enc.0.query": 7, "enc.1.query": 7}),  # the end of the path, at a dot
        ({"uery": 7}, {}),
        ({"enc.0.query": 7}, {"enc.0.query": 7}),
        ({"0.query": 7}, {"enc.0.query": 7}),
        (r"enc\.0\..*", {"enc.0.query": 7, "enc.0.value": 7, "enc.0.out": 7}),
        ({"^enc.0.out": 7}, {"enc.0.out": 7}),
        ({"query": 7, "enc.1.query": 9}, {"enc.0.query": 7, "enc.1.query": 7}),  # the first that matches wins
        ({"enc.1.query": 9, "query": 7}, {"enc.0.query": 7, "enc.1.query": 9}),
    ],
)
def test_alpha_patterns_match_as_peft_s_do(tmp_path, patterns, expected):
    other = pytest.importorskip("peft.utils.other")
    patterns = {patterns: 7} if isinstance(patterns, str) else patterns
    make_adapter(0, rank=2, scale=4.0).save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "alpha_pattern": patterns}))
    scales = {name: pair.scale for name, pair in Adapter.load(tmp_path).layers.items()}
    assert scales == {name: expected.get(name, 8) / 2 for name in SHAPES}
    for name in SHAPES:
        assert scales[name] == patterns.get(other.get_pattern_key(patterns, name), 8) / 2


def test_saving_what_is_not_finite_is_refused_by_name_and_writes_nothing(tmp_path):
    adapter = make_adapter(0)
    for name, tensor in adapter.tensors():
        for bad in (math.nan, math.inf):
            poisoned = tensor.clone()
            poisoned.view(-1)[-1] = bad
            broken = adapter.with_tensors(dict(adapter.tensors()) | {name: poisoned})
            key = name.split("/")[1]
            with refused(key, "not finite", error=AdapterError):
                broken.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [math.nan, math.inf, 0.0, -1.0])
def test_a_scale_that_could_not_be_loaded_again_is_refused_and_writes_nothing(tmp_path, scale):
    with refused("scale", error=AdapterError):
        Adapter({"q": LoraPair(torch.ones(2, 3), torch.ones(4, 2), scale)}).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_saving_no_layers_is_refused(tmp_path):
    with refused("no layers", error=AdapterError):
        Adapter({}).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_differ_in_orientation_are_refused_and_nothing_is_written(tmp_path):
    make_adapter(1).save(tmp_path)
    mixed = with_layer(make_adapter(0), "enc.0.out", fan_in_fan_out=True)
    with refused("fan_in_fan_out", error=AdapterError):
        mixed.save(tmp_path)
    assert_same(Adapter.load(tmp_path), make_adapter(1))
    with refused("fan_in_fan_out", error=AdapterError):
        mixed.save(tmp_path / "new")
    assert not (tmp_path / "new" / TENSORS).exists()


def test_saving_again_replaces_what_was_there(tmp_path):
    make_adapter(0, rank=2).save(tmp_path)
    make_adapter(1, rank=4).save(tmp_path)
    assert_same(Adapter.load(tmp_path), make_adapter(1, rank=4))
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, TENSORS]


def test_a_full_disk_leaves_the_old_adapter_whole_and_no_rubbish(tmp_path, monkeypatch):
    make_adapter(0).save(tmp_path / "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for folder in ("old", "new"):
        with pytest.raises(OSError, match="No space left"):
            make_adapter(1).save(tmp_path / folder)
    assert sorted(p.name for p in (tmp_path / "old").iterdir()) == [CONFIG, TENSORS]
    assert list((tmp_path / "new").iterdir()) == []
    assert_same(Adapter.load(tmp_path / "old"), make_adapter(0))


def test_tensors_that_share_memory_or_are_views_are_saved(tmp_path):
    a, b = torch.randn(3, 20)[:, ::2], torch.randn(3, 9).T
    pair = LoraPair(a, b, 1.0)
    Adapter({"q": pair, "v": pair}).save(tmp_path)
    again = Adapter.load(tmp_path)
    assert all(torch.equal(again.layers[n].a, a) and torch.equal(again.layers[n].b, b) for n in "qv")
