"""What a partition can be uneven in without labels: length, topic and origin, by bounds and centres of training."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import GROUPS, sentence
from hypothesis import assume, given
from hypothesis import strategies as st
from learning_helpers import quick, random_dataset, refused, seeds
from model_folders import SIZES, write_model

from fedrot.core.errors import DataError, RecipeError
from fedrot.learning import strata as module
from fedrot.learning.data import Dataset, Rows, conversations
from fedrot.learning.partition import Partition, divide
from fedrot.learning.settings import ModelSettings, PartitionSettings
from fedrot.learning.strata import by_length

By = Literal["group", "length", "cluster"]
BYS: tuple[By, ...] = ("group", "length", "cluster")


def written(lengths: Sequence[int]) -> Rows:
    """Unlabelled texts of these numbers of characters."""
    return Rows(["x" * n for n in lengths], [0] * len(lengths))


def spoken(seed: int, size: int) -> tuple[Rows, list[int]]:
    """Conversations about good and bad things, with their origins, and what each is about."""
    rng = random.Random(seed)
    about = [rng.randrange(2) for _ in range(size)]
    said = [[sentence(rng, ("negative", "positive")[topic]) for _ in range(2)] for topic in about]
    groups = [*GROUPS, *rng.choices(GROUPS, k=size)][:size]
    return conversations([(("user", a), ("assistant", b)) for a, b in said], groups), about


def unlabelled(seed: int = 0, train: int = 90, validation: int = 30) -> Dataset:
    """Conversations without labels."""
    return Dataset({"train": spoken(seed, train)[0], "validation": spoken(seed + 1, validation)[0]})


def uneven(by: By, clients: int = 3, **keys: Any) -> PartitionSettings:
    """A Dirichlet split of this kind."""
    return PartitionSettings(kind="dirichlet", by=by, clients=clients, **keys)


def base(folder: Path) -> ModelSettings:
    """Settings of the base model."""
    return ModelSettings(path=str(folder))


def places(partition: Partition, split: str = "train") -> list[list[int]]:
    """Every client's examples."""
    return [found.tolist() for found in partition.indices[split].values()]


def test_quantiles_have_the_bounds_of_training_in_every_split() -> None:
    dataset = Dataset(
        {"train": written([7, 1, 2, 3, 12, 4, 5, 6, 8, 9, 10, 11]), "test": written([0, 3, 4, 9, 10, 99])}
    )
    found = by_length(dataset, 4)
    assert found.names == ("length 1-3", "length 4-6", "length 7-9", "length 10-12")
    assert found.of["train"].tolist() == [2, 0, 0, 0, 3, 1, 1, 1, 2, 2, 3, 3]
    assert found.of["test"].tolist() == [0, 0, 1, 2, 3, 3]


@quick
@given(seeds, st.integers(2, 9), st.integers(9, 60))
def test_quantiles_of_distinct_lengths_are_equally_many(seed: int, bins: int, size: int) -> None:
    lengths = np.random.default_rng(seed).permutation(300)[:size]
    held = np.bincount(by_length(Dataset({"train": written(lengths.tolist())}), bins).of["train"])
    assert len(held) == bins
    assert held.max() - held.min() <= 1


def test_quantiles_that_fall_together_are_one() -> None:
    found = by_length(Dataset({"train": written([5] * 9 + [7])}), 4)
    assert found.names == ("length 5", "length 6-7")
    assert found.of["train"].tolist() == [0] * 9 + [1]


def test_the_length_of_a_conversation_is_that_of_all_turns() -> None:
    turns = [(("user", "?"), ("assistant", "x" * n)) for n in (1, 20)]
    assert by_length(Dataset({"train": conversations(turns)}), 2).names == ("length 3", "length 4-22")


def test_clusters_are_topics_and_hold_for_the_evaluation_split(tiny_model: Path, tmp_path: Path) -> None:
    (train, about), (validation, later) = spoken(0, 90), spoken(1, 40)
    dataset = Dataset({"train": train, "validation": validation})
    found = divide(dataset, uneven("cluster", 2), 0, base(tiny_model)).strata
    assert found.names == ("cluster 0", "cluster 1")
    first = int(found.of["train"][0] != about[0])  # what cluster 0 is about
    for split, topics in (("train", about), ("validation", later)):
        assert np.mean(found.of[split] == np.abs(np.array(topics) - first)) > 0.9
    alone = divide(Dataset({"train": train}), uneven("cluster", 2), 0, base(tiny_model)).strata
    assert np.array_equal(alone.of["train"], found.of["train"])
    named = divide(dataset, uneven("cluster", 2, encoder=str(tiny_model)), 0, base(tmp_path)).strata
    assert np.array_equal(named.of["validation"], found.of["validation"])


def test_centres_fitted_to_some_examples_hold_for_all(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FITTED", 25)
    train, about = spoken(0, 90)
    of = divide(Dataset({"train": train}), uneven("cluster", 2), 0, base(tiny_model)).strata.of["train"]
    assert np.mean(of == of[0]) < 0.7
    assert max(np.mean(of == about), np.mean(of != about)) > 0.9


def test_there_are_no_more_clusters_than_different_examples(tiny_model: Path) -> None:
    rows = Rows(["good film", "bad book", "good  film", ""] * 5, [0] * 20)
    found = divide(Dataset({"train": rows}), uneven("cluster", 2, bins=9), 0, base(tiny_model)).strata
    assert len(found.names) == 3
    one, two, three, four = found.of["train"][:4]
    assert one == three
    assert len({one, two, four}) == 3


@pytest.mark.parametrize("kind", ["gpt2", "llama", "roberta", "distilbert"])
def test_embeddings_do_not_see_the_padding(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """Whatever the model, and where its tokenizer has no padding token."""
    folder = write_model(tmp_path, kind, tiny_model, **SIZES[kind])
    encoder = module._Encoder(PartitionSettings(encoder=str(folder)), ModelSettings())
    short, long = "good film", "it was a very dull day " * 30
    both, alone = encoder.embed([long, short, long]), encoder.embed([short])
    np.testing.assert_allclose(both[1], alone[0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, atol=1e-5)
    assert np.array_equal(both[0], both[2])
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_an_embedding_is_the_mean_of_the_last_layer(tiny_model: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = ["a good film", "it was a very dull day"]
    inputs = AutoTokenizer.from_pretrained(tiny_model)(texts[:1], return_tensors="pt")
    with torch.no_grad():
        wanted = AutoModel.from_pretrained(tiny_model)(**inputs).last_hidden_state.mean(1)[0]
    found = module._Encoder(PartitionSettings(), base(tiny_model)).embed(texts)[0]
    np.testing.assert_allclose(found, (wanted / wanted.norm()).numpy(), atol=1e-5)


@quick
@given(st.sampled_from(BYS), seeds, st.integers(1, 5), st.integers(10, 60), st.integers(0, 20))
def test_every_example_belongs_to_exactly_one_client(
    tiny_model: Path, by: By, seed: int, clients: int, train: int, validation: int
) -> None:
    dataset = unlabelled(seed, train, validation)
    try:
        found = divide(dataset, uneven(by, clients, concentration=1.0), seed, base(tiny_model))
    except DataError:
        assume(False)
    for split, rows in dataset.splits.items():
        assert sorted(np.concatenate(list(found.indices[split].values())).tolist()) == list(range(len(rows)))
        held = np.array(list(found.counts(split).values()))
        assert held.shape == (clients, len(found.strata.names))
        assert held.sum() == len(rows)
        assert held.sum(axis=1).tolist() == [len(found.indices[split][client]) for client in found.clients]


@pytest.mark.parametrize("by", BYS)
def test_data_settings_and_seed_alone_decide(by: By, tiny_model: Path) -> None:
    dataset, settings, model = unlabelled(), uneven(by), base(tiny_model)
    first = places(divide(dataset, settings, 1, model))
    other = places(divide(dataset, settings, 2, model))
    torch.manual_seed(5)
    np.random.seed(5)
    drawn = torch.random.get_rng_state()
    for name in BYS:
        divide(dataset, uneven(name), 3, model)
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert places(divide(dataset, settings, 1, model)) == first
    assert places(divide(dataset, uneven(by, seed=1), 2, model)) == first
    assert other != first


@pytest.mark.parametrize("by", BYS)
def test_a_small_concentration_parts_the_strata_and_a_large_one_mixes_them(by: By, tiny_model: Path) -> None:
    dataset = unlabelled(0, 300, 100)
    for split in dataset.splits:
        hard, even = (
            np.array(list(divide(dataset, uneven(by, concentration=c), 0, base(tiny_model)).counts(split).values()))
            for c in (0.01, 1e4)
        )
        assert (hard.max(axis=0) / hard.sum(axis=0)).min() > 0.9  # one client holds nearly all of a stratum
        assert (even.max(axis=0) / even.sum(axis=0)).max() < 0.45


def test_strata_of_origin_are_the_values_of_the_column() -> None:
    dataset = unlabelled()
    found = divide(dataset, uneven("group"), 0)
    assert found.strata.names == GROUPS
    assert [GROUPS[i] for i in found.strata.of["validation"]] == dataset.splits["validation"].group


@pytest.mark.parametrize(
    "settings",
    [PartitionSettings(clients=2), PartitionSettings(kind="size", sizes=[1, 2]), PartitionSettings(kind="column")],
    ids=["iid", "size", "column"],
)
def test_other_kinds_take_data_without_labels(settings: PartitionSettings) -> None:
    found = divide(unlabelled(), settings, 0)
    assert found.strata.names == ("all",)
    assert sum(numbers[0] for numbers in found.counts("train").values()) == 90


def test_labelled_data_can_be_uneven_in_length_and_is_counted_so() -> None:
    found = divide(random_dataset(0, 120, 20), uneven("length", 2), 0)
    assert found.strata.names == ("length 6-7", "length 8")


def test_labels_that_there_are_not_are_refused_with_what_works() -> None:
    with refused("partition.by label", "length, cluster or group", "partition.kind iid", error=RecipeError):
        divide(unlabelled(), PartitionSettings(kind="dirichlet", clients=2), 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (uneven("group"), ["partition.by group", "data.group"]),
        (uneven("length", bins=1), ["partition.bins is 1", "at least 2"]),
        (uneven("cluster", bins=31), ["partition.bins is 31", "30 training examples"]),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_its_key(settings: PartitionSettings, words: list[str]) -> None:
    with refused(*words, error=RecipeError):
        divide(random_dataset(0, 30, 5), settings, 0)


def test_an_origin_without_training_examples_is_refused_by_name() -> None:
    splits = {"train": Rows(["a", "b"], [0, 0], group=["x", "y"]), "test": Rows(["c"], [0], group=["z"])}
    with refused("'test'", "'z'"):
        divide(Dataset(splits), uneven("group", 2), 0)


@pytest.mark.parametrize("by", ["length", "cluster"])
def test_examples_that_are_all_alike_are_refused(by: By, tiny_model: Path) -> None:
    with refused(f"partition.by {by}", "all training examples"):
        divide(Dataset({"train": Rows(["good"] * 20, [0] * 20)}), uneven(by), 0, base(tiny_model))


def test_an_encoder_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDROT_CACHE", str(tmp_path))
    for encoder, word in ((str(tmp_path / "none"), "no such"), (str(tmp_path), "loaded"), ("fetch:minilm", "fetch")):
        with refused("partition.encoder", word):
            divide(unlabelled(), uneven("cluster", encoder=encoder), 0)
    for model in (ModelSettings(), base(tmp_path)):
        with refused("model.path"):
            divide(unlabelled(), uneven("cluster"), 0, model)


def test_an_encoder_with_a_part_missing_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "attention" in name)
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with refused("partition.encoder", name, "model's files"):
        divide(unlabelled(), uneven("cluster", encoder=str(tmp_path)), 0)
