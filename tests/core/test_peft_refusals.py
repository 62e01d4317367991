"""Folders that hold no plain LoRA adapter are refused with one line that names the file or the key."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from core_helpers import make_adapter, refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.errors import AdapterError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.enc.0.out.lora_A.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter folder, to be spoilt."""
    make_adapter(0).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def set_config(folder: Path, **change: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | change))


def set_tensors(folder: Path, drop: str = "", **change: Tensor) -> None:
    """Change the tensors file; in the names of `change`, '__' stands for a dot."""
    tensors = {k: t for k, t in load_file(folder / TENSORS).items() if k != drop}
    save_file(tensors | {k.replace("__", "."): t for k, t in change.items()}, folder / TENSORS)


def test_the_good_folder_that_these_tests_spoil_is_loaded(folder):
    assert Adapter.load(folder).layers.keys() == make_adapter(0).layers.keys()


def test_a_bare_file_is_refused_with_what_to_give_instead(folder):
    with refused(TENSORS, "give the folder", error=AdapterError):
        Adapter.load(folder / TENSORS)


def test_a_missing_folder_is_refused_by_its_name(tmp_path):
    with refused("nowhere", "no such adapter folder", error=AdapterError):
        Adapter.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file_is_refused_by_its_name(folder, name):
    (folder / name).unlink()
    with refused(name, "no such file", error=AdapterError):
        Adapter.load(folder)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_folder_in_a_file_s_place_is_refused_by_its_name(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    with refused(name, error=AdapterError):
        Adapter.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b'{"r": 4,}', b"\xff\xfe{}", b"not json"])
def test_broken_json_is_refused(folder, content):
    (folder / CONFIG).write_bytes(content)
    with refused(CONFIG, "not valid JSON", error=AdapterError):
        Adapter.load(folder)


@pytest.mark.parametrize(("content", "kind"), [("[]", "list"), ('"r"', "str"), ("4", "int"), ("null", "NoneType")])
def test_settings_that_are_no_object_are_refused(folder, content, kind):
    (folder / CONFIG).write_text(content)
    with refused(CONFIG, kind, "object", error=AdapterError):
        Adapter.load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("use_dora", True),
        ("use_qalora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["experts.weight"]),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [5]),
        ("megatron_config", {"x": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "PiSSA"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
    ],
)
def test_a_setting_that_makes_it_no_plain_lora_is_refused_by_its_key(folder, key, value):
    set_config(folder, **{key: value})
    with refused(CONFIG, key, str(value), error=AdapterError):
        Adapter.load(folder)


@pytest.mark.parametrize("value", [True, False, "gaussian", "orthogonal", "eva"])
def test_starting_values_that_leave_the_base_alone_are_accepted(folder, value):
    set_config(folder, init_lora_weights=value, use_dora=False, bias="none", trainable_token_indices=None)
    assert Adapter.load(folder).config["init_lora_weights"] == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0), ("r", -4), ("r", True), ("r", "4"), ("r", 4.5), ("r", None), ("r", [4]),
        ("lora_alpha", 0), ("lora_alpha", "16"), ("lora_alpha", None), ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")), ("rank_pattern", [1]), ("alpha_pattern", "query"),
    ],
)  # fmt: skip
def test_a_rank_or_alpha_that_is_no_positive_number_is_refused_by_its_key(folder, key, value):
    set_config(folder, **{key: value})
    with refused(CONFIG, key, error=AdapterError):
        Adapter.load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank_pattern", {"out": 0}),
        ("rank_pattern", {"out": "3"}),
        ("rank_pattern", {"out": None}),
        ("rank_pattern", {"(": 3}),
        ("alpha_pattern", {"out": "16"}),
        ("alpha_pattern", {"out": None}),
        ("alpha_pattern", {"out": float("nan")}),
        ("alpha_pattern", {"out": -1}),
        ("alpha_pattern", {"[": 8}),
    ],
)
def test_a_pattern_that_is_no_expression_with_a_positive_number_is_refused_by_its_key(folder, key, value):
    set_config(folder, **{key: value})
    with refused(CONFIG, key, error=AdapterError):
        Adapter.load(folder)


@pytest.mark.parametrize("value", ["classifier", 3, [3], {"a": 1}])
def test_modules_to_save_that_are_no_list_of_names_are_refused_by_that_key(folder, value):
    set_config(folder, modules_to_save=value)
    with refused("modules_to_save", error=AdapterError):
        Adapter.load(folder)


@pytest.mark.parametrize(("gone", "there"), [("A", "B"), ("B", "A")])
def test_a_factor_without_its_partner_is_refused_by_its_key(folder, gone, there):
    key = KEY.replace("lora_A", f"lora_{gone}")
    set_tensors(folder, drop=key)
    with refused(key, "missing", f"lora_{there}", error=AdapterError):
        Adapter.load(folder)


def test_factors_of_different_rank_are_refused_by_their_layer(folder):
    set_tensors(folder, **{KEY.replace(".", "__"): torch.ones(2, 7)})
    with refused("enc.0.out", "rank 2", "rank 3", error=AdapterError):
        Adapter.load(folder)


def test_a_rank_other_than_the_settings_say_is_refused_by_its_key(folder):
    set_config(folder, r=4)
    with refused("lora_A.weight", "rank 3", "rank 4", error=AdapterError):
        Adapter.load(folder)


def test_four_dimensional_factors_are_refused_by_their_layer(folder):
    set_tensors(folder, **{KEY.replace(".", "__"): torch.ones(3, 7, 1, 1)})
    with refused("enc.0.out", "matrices", error=AdapterError):
        Adapter.load(folder)


@pytest.mark.parametrize(
    "key",
    [
        "enc.0.out.lora_magnitude_vector",
        "enc.0.out.lora_magnitude_vector.weight",
        "emb.lora_embedding_A",
        "emb.lora_embedding_B",
        "enc.0.out.lora_B.bias",
        "enc.0.out.lora_diag",
    ],
)
def test_a_tensor_of_another_kind_of_lora_is_refused_by_its_key(folder, key):
    set_tensors(folder, **{f"base_model.model.{key}".replace(".", "__"): torch.ones(3, 7)})
    with refused(TENSORS, key, "not a plain LoRA factor", error=AdapterError):
        Adapter.load(folder)


@pytest.mark.parametrize("key", ["enc.0.out.bias", "embeddings.weight", "classifier2.weight"])
def test_a_tensor_outside_modules_to_save_is_refused_by_its_key(folder, key):
    set_tensors(folder, **{f"base_model.model.{key}".replace(".", "__"): torch.ones(3)})
    with refused(TENSORS, key, "modules_to_save", error=AdapterError):
        Adapter.load(folder)


def test_a_head_without_modules_to_save_is_refused_and_not_passed_over(folder):
    set_config(folder, modules_to_save=None)
    with refused("classifier", "modules_to_save", error=AdapterError):
        Adapter.load(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [KEY, "base_model.model.classifier.weight"])
def test_values_that_are_not_finite_are_refused_by_their_key(folder, key, bad):
    tensor = load_file(folder / TENSORS)[key]
    tensor[-1, -1] = bad
    set_tensors(folder, **{key.replace(".", "__"): tensor})
    with refused(key, "not finite", error=AdapterError):
        Adapter.load(folder)


def test_a_file_without_lora_factors_is_refused(folder):
    save_file({"base_model.model.classifier.weight": torch.ones(3, 8)}, folder / TENSORS)
    with refused(TENSORS, "no LoRA factors", error=AdapterError):
        Adapter.load(folder)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_tensor_file_is_refused(folder, keep):
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[:keep])
    with refused(TENSORS, "damaged", error=AdapterError):
        Adapter.load(folder)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["adapter_model.bin", TENSORS])
def test_a_pickle_is_refused_and_never_run(folder, tmp_path, name):
    (folder / TENSORS).unlink()
    torch.save({"base_model.model.q.lora_A.weight": Bomb(tmp_path / "boom")}, folder / name)
    with refused(name, error=AdapterError):
        Adapter.load(folder)
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with refused(name, error=AdapterError):
        Adapter.load(folder)
    assert not (tmp_path / "boom").exists()
    pickle.loads((folder / name).read_bytes())
    assert (tmp_path / "boom").exists()  # it was live
