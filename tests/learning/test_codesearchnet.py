"""CodeSearchNet from the published archives and the hub: functions with their documentation, one client a language."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from learning_helpers import refused, write_jsonl, write_lines
from model_folders import SIZES, write_model

from fedrot.core.errors import RecipeError
from fedrot.learning.data import ASSISTANT, Dataset
from fedrot.learning.partition import divide
from fedrot.learning.settings import DataSettings, PartitionSettings
from fedrot.learning.sources import codesearchnet
from fedrot.learning.sources.codesearchnet import LANGUAGES
from fedrot.learning.sources.read import read_dataset

SIZES_OF = {"train": 6, "valid": 2, "test": 3}


def function(language: str, split: str, number: int, **changes: Any) -> dict[str, Any]:
    """A line as it is published, but for its tokens' length."""
    return {
        "repo": "a/b",
        "func_name": f"f{number}",
        "original_string": "not used",
        "language": language,
        "code": f"{language} {split} code {number}",
        "code_tokens": [language, split, "code", str(number)],
        "docstring": f"What {language} {split} {number} does.\n",
        "docstring_tokens": ["What"],
        "partition": split,
        **changes,
    }


def functions(language: str, split: str) -> list[dict[str, Any]]:
    return [function(language, split, number) for number in range(SIZES_OF[split])]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    """A JSONL file, compressed where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".gz":
        return write_jsonl(path, lines)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def archives(folder: Path, inside: str = "final/jsonl", suffix: str = ".jsonl.gz") -> Path:
    """All six unpacked, the training functions of each in two files."""
    for language in LANGUAGES:
        for split in SIZES_OF:
            found = functions(language, split)
            place = folder / language / inside / split
            write(place / f"{language}_{split}_0{suffix}", found[:2])
            if found[2:]:
                write(place / f"{language}_{split}_1{suffix}", found[2:])
    return folder


def read(folder: Path, **settings: Any) -> Dataset:
    return read_dataset(DataSettings(source="codesearchnet", path=str(folder), **settings), 0)


def wanted(split: str) -> list[tuple[str, str, str]]:
    """(language, prompt, response) of every function."""
    return [
        (
            language,
            f"Write a function in {LANGUAGES[language]} for this documentation:\n"
            f"What {language} {split} {number} does.\n\n",
            f"{language} {split} code {number}",
        )
        for language in LANGUAGES
        for number in range(SIZES_OF[split])
    ]


def found(dataset: Dataset, split: str) -> list[tuple[str, str, str]]:
    rows = dataset.splits[split]
    assert {tuple(role for role, _ in turns) for turns in rows.turns or ()} == {("user", ASSISTANT)}
    pairs = zip(rows.group or (), rows.turns or (), strict=True)
    return [(group, asked, written) for group, ((_, asked), (_, written)) in pairs]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl"])
@pytest.mark.parametrize("inside", ["final/jsonl", ""])
def test_the_archives_are_read_zipped_or_not_in_both_layouts(inside: str, suffix: str, tmp_path: Path) -> None:
    dataset = read(archives(tmp_path, inside, suffix))
    assert dataset.labels == ()
    assert set(dataset.splits) == {"train", "validation", "test"}
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        assert found(dataset, split) == wanted(name)


def test_a_file_that_was_unzipped_beside_its_archive_is_read_once(tmp_path: Path) -> None:
    place = archives(tmp_path) / "go" / "final" / "jsonl" / "train"
    packed = place / "go_train_0.jsonl.gz"
    (place / "go_train_0.jsonl").write_bytes(gzip.decompress(packed.read_bytes()))
    assert found(read(tmp_path), "train") == wanted("train")


def test_each_language_is_a_client(tmp_path: Path) -> None:
    dataset = read(archives(tmp_path))
    partition = divide(dataset, PartitionSettings(kind="column", clients=6), 0)
    assert partition.clients == tuple(sorted(LANGUAGES))
    for split, size in (("train", 6), ("validation", 2), ("test", 3)):
        for client, places in partition.indices[split].items():
            assert [(dataset.splits[split].group or ())[i] for i in places] == [client] * size


def test_languages_that_are_not_there_are_named_and_a_recipe_of_six_clients_refuses_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archives(tmp_path)
    for language in ("php", "ruby"):
        (tmp_path / language).rename(tmp_path / f"no-{language}")
    dataset = read(tmp_path)
    assert "no functions in php or ruby" in caplog.text
    assert found(dataset, "train") == [one for one in wanted("train") if one[0] not in ("php", "ruby")]
    assert len(divide(dataset, PartitionSettings(kind="column"), 0).clients) == 4
    with refused("partition.clients is 6", "4 values", error=RecipeError):
        divide(dataset, PartitionSettings(kind="column", clients=6), 0)


@pytest.mark.parametrize("key", ["docstring", "code"])
@pytest.mark.parametrize("value", ["", " \n", None])
def test_a_function_without_documentation_or_code_is_left_out_and_counted(
    key: str, value: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = function("java", "train", 0, **{key: value})
    write(archives(tmp_path) / "java" / "final" / "jsonl" / "train" / "java_train_2.jsonl.gz", [empty, empty])
    assert found(read(tmp_path), "train") == wanted("train")
    assert f"{tmp_path}, train: left out 2 functions" in caplog.text


def test_no_more_than_the_limit_are_drawn_from_all_languages(tmp_path: Path) -> None:
    dataset = read(archives(tmp_path), limit=20)
    kept = found(dataset, "train")
    assert len(kept) == 20
    assert set(kept) < set(wanted("train"))
    assert len({language for language, *_ in kept}) > 3
    assert len(dataset.splits["test"]) == 18


BAD_LINES = {
    "broken off": ('{"docstring": "x", "co', "line 2 is not valid JSON"),
    "a list": ("[1, 2]", "line 2 holds a list"),
    "no docstring": ('{"code": "x", "language": "go"}', "line 2 has no docstring"),
    "no code": ('{"docstring": "x", "language": "go"}', "line 2 has no code"),
    "no language": ('{"docstring": "x", "code": "x"}', "line 2 has no language"),
    "half a character": ('{"docstring": "x", "code": "\\ud83d", "language": "go"}', "line 2: 'code' holds '\\ud83d'"),
    "a number for code": ('{"docstring": "x", "code": 3, "language": "go"}', "line 2: 'code' is of type int"),
    "another language": ('{"docstring": "x", "code": "x", "language": "cobol"}', "line 2 is in the language 'cobol'"),
}


@pytest.mark.parametrize("name", sorted(BAD_LINES))
def test_a_line_that_is_no_function_is_refused_by_file_and_number(name: str, tmp_path: Path) -> None:
    line, message = BAD_LINES[name]
    path = archives(tmp_path, "", ".jsonl") / "go" / "valid" / "go_valid_0.jsonl"
    write_lines(path, [json.dumps(function("go", "valid", 0)), line])
    with refused(str(path), message):
        read(tmp_path)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with refused(str(tmp_path / "nowhere"), "no such folder", "data.path"):
        read(tmp_path / "nowhere")
    with refused(str(tmp_path), "no folder of a language", "go, java, javascript, php, python or ruby", "data.path"):
        read(tmp_path)
    place = archives(tmp_path) / "php" / "final" / "jsonl" / "valid"
    place.rename(place.with_name("other"))
    with refused(str(tmp_path / "php"), "final/jsonl/valid/*.jsonl.gz", "data.path"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["cut", "spoiled", "no archive"])
def test_an_archive_that_cannot_be_unzipped_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = write(
        archives(tmp_path) / "ruby" / "final" / "jsonl" / "test" / "ruby_test_0.jsonl.gz",
        [function("ruby", "test", number) for number in range(200)],
    )
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-20], "spoiled": whole[:20] + b"\xff" * 40 + whole[60:], "no archive": b"x"}[name])
    with refused(str(path), "cannot be read"):
        read(tmp_path)


def hub_copy(folder: Path, splits: tuple[str, ...] = tuple(SIZES_OF), **renamed: str) -> Path:
    """A local copy of the hub's repository, with its names of the columns."""
    import datasets

    names = {"docstring": "func_documentation_string", "code": "func_code_string", **renamed}
    files = []
    for split in splits:
        lines = [
            {names.get(key, key): value for key, value in line.items()}
            for language in LANGUAGES
            for line in functions(language, split)
        ]
        there = "validation" if split == "valid" else split
        path = folder / "all" / f"{there}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(lines).to_parquet(path)
        files.append(f"  - split: {there}\n    path: all/{there}-*")
    front = "\n".join(["---", "configs:", "- config_name: all", "  data_files:", *files, "---", ""])
    (folder / "README.md").write_text(front)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the hub's repository is; what the hub's library writes, it writes below tmp_path."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "hf-modules"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(codesearchnet, "HUB", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_the_hubs_repository_is_read_through_datasets(hub: Path) -> None:
    hub_copy(hub)
    dataset = read_dataset(DataSettings(source="codesearchnet"), 0)
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        assert found(dataset, split) == wanted(name)


def test_a_hub_that_lacks_something_is_refused_with_the_way_out(hub: Path) -> None:
    settings = DataSettings(source="codesearchnet")
    with refused(str(hub), "all could not be loaded", "give data.path, a folder with go/final/jsonl/train/"):
        read_dataset(settings, 0)
    hub_copy(hub, splits=("train", "test"))
    with refused(str(hub), "no validation split"):
        read_dataset(settings, 0)
    hub_copy(hub, code="func")
    with refused(f"{hub}, train: row 1 has no code or func_code_string"):
        read_dataset(settings, 0)


def test_made_up_functions_are_of_all_languages_and_the_same_each_time(caplog: pytest.LogCaptureFixture) -> None:
    settings = DataSettings(source="codesearchnet", generated=240)
    dataset = read_dataset(settings, 0)
    assert "240 made-up examples of the form of codesearchnet" in caplog.text
    assert read_dataset(settings, 0) == dataset
    train, held = (found(dataset, split) for split in ("train", "validation"))
    assert len(train) + len(held) == 240
    assert len(held) >= 12
    assert not {asked for _, asked, _ in train} & {asked for _, asked, _ in held}
    for split in ("train", "test"):
        assert {language for language, *_ in found(dataset, split)} == set(LANGUAGES)
    for language, asked, written in [*train, *held, *found(dataset, "test")]:
        begin, task, *_ = asked.splitlines()
        assert begin == f"Write a function in {LANGUAGES[language]} for this documentation:"
        verb, _, thing, _, number = task.removesuffix(".").lower().split()
        sign = {"raise": "+", "lower": "-", "multiply": "*", "divide": "/"}[verb]
        assert f"{thing} {sign} {number}" in written
        if language == "python":
            scope: dict[str, Any] = {}
            exec(written, scope)
            assert scope[f"{verb}_{thing}"](600) == eval(f"600 {sign} {number}")


def test_a_language_model_trains_on_it(tiny_model: Path, tmp_path: Path) -> None:
    from fedrot.app.cli.main import main

    model = write_model(tmp_path / "llama", "llama", tiny_model, causal=True, **SIZES["llama"])
    values = {
        "rounds": 2,
        "compute": {"threads": 1},
        "model": {"path": str(model)},
        "lora": {"rank": 2},
        "data": {"source": "codesearchnet", "path": str(archives(tmp_path / "data")), "max_length": 64},
        "partition": {"kind": "column"},
        "local": {"lr": 0.02, "batch": 2, "steps": 3},
    }
    path = tmp_path / "code.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["run", str(path), "--out", str(tmp_path / "run")]) == 0
    rounds = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert set(rounds[0]["evaluation"]["by_client"]) == set(LANGUAGES)
    assert rounds[1]["evaluation"]["loss"] < rounds[0]["evaluation"]["loss"]
