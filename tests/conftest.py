"""What many tests share: a tiny model and tiny data on disk, made once a session, and no network."""

import csv
import os
import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

# Set before torch or transformers are imported anywhere: one thread a test process, and never a hub.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

# Real processes for minutes: make test-deploy and make soak.
collect_ignore = [] if os.environ.get("FEDROT_DEPLOY") else ["deploy"]

WORDS = {
    "positive": ["good", "great", "fine", "lovely", "superb", "bright", "happy", "warm", "clever", "charming"],
    "negative": ["bad", "awful", "poor", "dull", "bleak", "cold", "sad", "weak", "clumsy", "boring"],
    "neutral": ["the", "a", "film", "book", "camera", "song", "day", "story", "plot", "it", "was", "is", "very", "of"],
}
GROUPS = ("books", "films", "music")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with a word-level tokenizer, saved as transformers saves a model."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *chain.from_iterable(WORDS.values())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,  # a wide spread, so that a random encoder tells words apart
    )
    model = BertModel(config)
    with torch.no_grad():  # words of one feeling share a direction, so that there is something to learn
        direction = torch.randn(config.hidden_size)
        for label, sign in (("positive", 1.0), ("negative", -1.0)):
            rows = [vocabulary[word] for word in WORDS[label]]
            model.embeddings.word_embeddings.weight[rows] += 0.5 * sign * direction
    model.save_pretrained(folder)
    return folder


def sentence(rng: random.Random, label: str) -> str:
    """A sentence whose label can be told from two of its words."""
    words = rng.choices(WORDS["neutral"], k=rng.randint(2, 9)) + rng.sample(WORDS[label], 2)
    rng.shuffle(words)
    return " ".join(words)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv, validation.csv and test.csv: text, label, group; groups differ in their label shares."""
    folder = tmp_path_factory.mktemp("tiny-data")
    rng = random.Random(3)
    for name, size in (("train", 180), ("validation", 60), ("test", 60)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "group"])
            for i in range(size):
                group = GROUPS[i % 3]
                label = "positive" if rng.random() < (0.3, 0.5, 0.7)[i % 3] else "negative"
                writer.writerow([sentence(rng, label), label, group])
    return folder


@pytest.fixture
def tiny_values(tiny_recipe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A recipe's values that run in a second or two; tests change what they are about."""
    return tiny_recipe()


@pytest.fixture(scope="session")
def tiny_recipe(tiny_model: Path, tiny_data: Path) -> Callable[[], dict[str, Any]]:
    """Gives these values anew, for what several tests share."""
    return lambda: {
        "name": "tiny",
        "seed": 1,
        "rounds": 3,
        "compute": {"threads": 1},
        "model": {"path": str(tiny_model)},
        "lora": {"rank": 2},
        "data": {
            "path": str(tiny_data),
            "train": "train.csv",
            "validation": "validation.csv",
            "test": "test.csv",
            "labels": ["negative", "positive"],
            "group": "group",
            "max_length": 64,
        },
        "partition": {"kind": "column"},
        "local": {"lr": 0.01, "batch": 8, "steps": 3},
        "method": {"name": "fedrot"},
        "evaluation": {"final": "test"},
    }


@pytest.fixture
def recipe_file(tiny_values: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Write the tiny recipe, with sections updated, to a YAML file and give its path."""
    import yaml

    def write(**changes: Any) -> Path:
        values = dict(tiny_values)
        for key, value in changes.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


# Files whose tests take minutes: begun first, so that no process is left with one of them at the end.
LONG = ("test_benchmark.py", "test_readme.py", "test_recipes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files' tests before the others; all else as it was."""
    items.sort(key=lambda item: item.path.name not in LONG)


# Tests that may be skipped where CI runs, with the reason.
MAY_BE_SKIPPED: dict[str, str] = {
    "tests/running/test_simulated.py::test_ray_plays_the_simulated_run": "Ray is large, and no extra of dev",
    "tests/running/test_simulated.py::test_a_cluster_that_is_too_small_ends_the_run": "likewise",
}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """In CI a skipped test is a failure unless it is listed: nothing is left out without saying so."""
    left_out = [report.nodeid for report in terminalreporter.stats.get("skipped", [])]
    if os.environ.get("CI") and (unlisted := [name for name in left_out if name not in MAY_BE_SKIPPED]):
        terminalreporter.write_line(f"skipped in CI and not listed in tests/conftest.py: {', '.join(unlisted)}")
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED
