"""Prompts with responses, chats and GSM8K from files, and what cannot be used of them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from learning_helpers import refused, write_jsonl, write_lines, write_parquet

from fedrot.core.errors import RecipeError
from fedrot.learning.data import ASSISTANT, Dataset
from fedrot.learning.settings import DataSettings
from fedrot.learning.sources.read import read_dataset
from fedrot.running.recipe_file import parse_recipe

PAIRS = [{"text": f"question {i}", "response": f"answer {i}", "site": "ab"[i % 2]} for i in range(40)]
CHATS = [
    {"messages": [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": f"hi {i}"}]}
    for i in range(40)
]


def read(folder: Path, **settings: Any) -> Dataset:
    return read_dataset(DataSettings(**{"path": str(folder), "train": "train.jsonl", **settings}), 0)


def test_prompts_and_responses_become_conversations_and_some_are_held_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", PAIRS)
    found = read(tmp_path, response="response", group="site", holdout=0.3)
    assert found.labels == ()
    both = {
        (turns[0][1], turns[1][1]) for split in ("train", "validation") for turns in found.splits[split].turns or ()
    }
    assert both == {(one["text"], one["response"]) for one in PAIRS}
    train = found.splits["train"]
    assert 0 < len(found.splits["validation"]) < len(train)
    assert train.group is not None
    assert train.group[0] == PAIRS[int(train.text[0].split()[1])]["site"]
    assert {role for turns in train.turns or () for role, _ in turns} == {"user", ASSISTANT}
    assert train.whole()[0] == "\n".join(content for _, content in (train.turns or ())[0])


def test_a_second_text_follows_the_first_where_there_is_one(tmp_path: Path) -> None:
    rows = [{**one, "input": None if i % 2 else "context"} for i, one in enumerate(PAIRS)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    found = read(tmp_path, response="response", pair="input", validation="train.jsonl").splits["train"]
    assert list(found.text[:2]) == ["question 0\n\ncontext", "question 1"]


def test_chats_are_read_from_jsonl_and_parquet(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", CHATS)
    write_parquet(tmp_path / "validation.parquet", {"messages": [one["messages"] for one in CHATS]})
    found = read(tmp_path, messages="messages", validation="validation.parquet").splits
    assert found["train"].turns == found["validation"].turns
    assert found["train"].text[3] == "hello 3"
    assert (found["train"].turns or ())[3] == (("user", "hello 3"), (ASSISTANT, "hi 3"))


BAD_CHATS: dict[str, tuple[Any, str]] = {
    "no list": ("hello", "row 2 has no list of messages"),
    "empty": ([], "row 2 has no list of messages"),
    "strange role": ([{"role": "alien", "content": "x"}], "row 2: message 1 has not a role"),
    "no content": ([{"role": "user"}], "row 2: message 1 has not a role"),
    "text": (["hello"], "row 2: message 1 has not a role"),
    "empty answer": ([{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}], "row 2: message 2"),
    "half a character": (
        [{"role": "user", "content": "x \ud83d"}, {"role": "assistant", "content": "y"}],
        "row 2: message 1 (data.messages) holds '\\ud83d'",
    ),
    "nothing said": ([{"role": "user", "content": "x"}], "row 2: the assistant says nothing"),
}


@pytest.mark.parametrize("name", sorted(BAD_CHATS))
def test_a_chat_that_cannot_be_learnt_is_refused_by_file_and_row(tmp_path: Path, name: str) -> None:
    value, message = BAD_CHATS[name]
    write_jsonl(tmp_path / "train.jsonl", [CHATS[0], {"messages": value}])
    with refused(str(tmp_path / "train.jsonl"), message):
        read(tmp_path, messages="messages")


@pytest.mark.parametrize("response", ["", "  \n", None])
def test_an_empty_response_is_refused_by_row(tmp_path: Path, response: str | None) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*PAIRS[:2], {"text": "x", "response": response}])
    with refused("train.jsonl: row 3", "data.response"):
        read(tmp_path, response="response")


@pytest.mark.parametrize("value", [["a", "b"], {"a": 1}, math.nan, "x \ud83d"], ids=repr)
@pytest.mark.parametrize("key", ["text", "input", "response"])
def test_what_is_no_text_is_refused_by_row(tmp_path: Path, key: str, value: object) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*PAIRS[:2], {"text": "x", "input": None, "response": "y", key: value}])
    with refused(f"train.jsonl: row 3: {key!r}"):
        read(tmp_path, response="response", pair="input")


@pytest.mark.parametrize("last", ['{"text": "x", "resp', "[1, 2]", "nothing"])
def test_a_line_that_breaks_off_is_refused_by_its_number(tmp_path: Path, last: str) -> None:
    write_lines(tmp_path / "train.jsonl", ['{"text": "a", "response": "b"}', last])
    with refused("train.jsonl: line 2"):
        read(tmp_path, response="response")


def gsm8k(folder: Path, rows: int = 40) -> Path:
    for split in ("train", "test"):
        write_jsonl(
            folder / f"{split}.jsonl",
            [
                {"question": f"{split} {i} and 1?", "answer": f"It is {i} + 1 = {i + 1}.\n#### {i + 1}"}
                for i in range(rows)
            ],
        )
    return folder


def test_gsm8k_is_read_from_its_files_with_a_part_of_train_held_out(tmp_path: Path) -> None:
    found = read_dataset(DataSettings(source="gsm8k", path=str(gsm8k(tmp_path)), holdout=0.3), 0)
    assert set(found.splits) == {"train", "validation", "test"}
    assert len(found.splits["train"]) + len(found.splits["validation"]) == 40
    assert len(found.splits["test"]) == 40
    asked, answered = (found.splits["test"].turns or ())[4]
    assert asked == ("user", "Question: test 4 and 1?\nAnswer:")
    assert answered == (ASSISTANT, " It is 4 + 1 = 5.\n#### 5")


def test_gsm8k_s_parquet_files_are_read_together(tmp_path: Path) -> None:
    whole = read_dataset(DataSettings(source="gsm8k", path=str(gsm8k(tmp_path))), 0)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "train.jsonl").unlink()
    for i, part in enumerate((lines[:25], lines[25:])):
        columns = {name: [line[name] for line in part] for name in ("question", "answer")}
        write_parquet(tmp_path / f"train-0000{i}-of-00002.parquet", columns)
    assert read_dataset(DataSettings(source="gsm8k", path=str(tmp_path)), 0) == whole
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with refused(str(tmp_path), "train-00001-of-00002.parquet", "1 files"):
        read_dataset(DataSettings(source="gsm8k", path=str(tmp_path)), 0)


def test_gsm8k_without_a_file_is_refused(tmp_path: Path) -> None:
    (gsm8k(tmp_path) / "test.jsonl").unlink()
    with refused(str(tmp_path), "test.jsonl", "data.path"):
        read_dataset(DataSettings(source="gsm8k", path=str(tmp_path)), 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": "x.jsonl", "response": "a", "messages": "b"}, "not both"),
        ({"source": "gsm8k", "response": "a"}, "data.source files"),
    ],
)
def test_settings_that_contradict_are_refused(data: dict[str, Any], message: str) -> None:
    with refused(message, error=RecipeError):
        parse_recipe({"data": data, "partition": {"clients": 2}, "local": {"steps": 1}})
