"""Local files as labelled texts: every format, the order of labels, what is held out, and every bad input."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from learning_helpers import labelled, quick, refused, write_jsonl, write_lines, write_parquet, write_tsv

from fedrot.core.errors import DataError
from fedrot.learning.data import Dataset, Rows, hold_out
from fedrot.learning.settings import DataSettings
from fedrot.learning.sources.read import read_dataset

TRAIN = [
    ("a good film", "positive", "films"),
    ("dull, and long", "negative", "books"),
    ("so warm", "positive", "books"),
]
VALIDATION = [("cold and sad", "negative", "films"), ("very clever", "positive", "films")]
HEADER = ["sentence", "answer", "domain"]


def write_as(suffix: str, path: Path, rows: list[tuple[str, str, str]]) -> str:
    """The same rows as a file of the format that `suffix` names; gives the file's name."""
    path = path.with_suffix(suffix)
    if suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([HEADER, *rows])
    elif suffix == ".tsv":
        write_tsv(path, HEADER, rows)
    elif suffix == ".jsonl":
        write_jsonl(path, [dict(zip(HEADER, row, strict=True)) for row in rows])
    else:
        write_parquet(path, {name: [row[i] for row in rows] for i, name in enumerate(HEADER)})
    return path.name


def read(folder: Path, train: str, seed: int = 0, **keys: Any) -> Dataset:
    """A training file, which is its own validation file unless another is named."""
    return read_dataset(DataSettings(path=str(folder), **{"train": train, "validation": train, **keys}), seed)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows_of_the_named_columns(tmp_path: Path, suffix: str) -> None:
    train = write_as(suffix, tmp_path / "train", TRAIN)
    validation = write_as(suffix, tmp_path / "validation", VALIDATION)
    found = read(tmp_path, train, validation=validation, test=train, text="sentence", label="answer", group="domain")
    assert found.labels == ("negative", "positive")
    assert found.splits["train"] == Rows([r[0] for r in TRAIN], [1, 0, 1], None, ["films", "books", "books"])
    assert found.splits["validation"] == Rows([r[0] for r in VALIDATION], [0, 1], None, ["films", "films"])
    assert found.splits["test"] == found.splits["train"]


def test_paths_stand_as_they_are_where_there_is_no_folder(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.csv", ["text,label", "good,1", "bad,0"])
    found = read_dataset(DataSettings(train=str(path), validation=str(path)), 0)
    assert found.splits["train"].text == ["good", "bad"]


def test_the_second_text_comes_from_the_pair_column(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.csv", ["question,answer,label", "who,me,yes", "where,there,no"])
    found = read(tmp_path, "train.csv", text="question", pair="answer")
    assert found.splits["train"] == Rows(["who", "where"], [1, 0], ["me", "there"])


def test_tsv_keeps_quotes_as_they_are_balanced_or_not(tmp_path: Path) -> None:
    texts = ['"so bad', 'a "quoted" word', 'ends in "', '""', "it 's", '"whole"']
    write_tsv(tmp_path / "train.tsv", ["text", "label"], [(text, i % 2) for i, text in enumerate(texts)])
    assert read(tmp_path, "train.tsv").splits["train"].text == texts


def test_csv_fields_in_quotes_hold_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.csv", ["text,label", '"good, ""really""', 'good",1', "bad,0"])
    assert read(tmp_path, "train.csv").splits["train"].text == ['good, "really"\ngood', "bad"]


def test_a_byte_order_mark_is_not_part_of_the_first_columns_name(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbftext,label\ngood,1\nbad,0\n")
    assert read(tmp_path, "train.csv").splits["train"].text == ["good", "bad"]


@pytest.mark.parametrize(("name", "mark"), [("train.csv", ","), ("train.tsv", "\t")])
def test_files_without_a_header_line_take_their_names_from_data_columns(tmp_path: Path, name: str, mark: str) -> None:
    write_lines(tmp_path / name, [f"1{mark}good", f"0{mark}bad"])
    found = read(tmp_path, name, columns=["label", "text"])
    assert found.splits["train"] == Rows(["good", "bad"], [1, 0])


def test_labels_are_whole_numbers_by_value_then_names_by_alphabet(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.csv", ["text,label", "t,b", "t,10", "t,2", "t,a", "t,-1", "t,2"])
    found = read(tmp_path, "train.csv")
    assert found.labels == ("-1", "2", "10", "a", "b")
    assert found.splits["train"].label == [4, 2, 1, 3, 0, 1]


def test_labels_of_one_value_have_an_order_that_does_not_change_from_run_to_run(tmp_path: Path) -> None:
    """Strings hash differently in every process, so an order that a set decides would differ between two runs."""
    labels = ["0" * zeros + "1" for zeros in range(12)]
    write_lines(tmp_path / "train.csv", ["text,label", *(f"t,{label}" for label in labels)])
    found = read(tmp_path, "train.csv").labels
    assert found in (tuple(sorted(labels)), tuple(sorted(labels, reverse=True)), tuple(labels))


def test_a_label_that_only_looks_like_a_number_is_a_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.csv", ["text,label", "t,--1", "t,1"])
    assert read(tmp_path, "train.csv").labels == ("1", "--1")


@pytest.mark.parametrize("values", [[1.0, 0.0], [True, False], [1, 0], ["1", "0"]])
def test_typed_labels_are_named_like_those_of_text_files(tmp_path: Path, values: list[Any]) -> None:
    write_parquet(tmp_path / "train.parquet", {"text": ["good", "bad"], "label": values})
    found = read(tmp_path, "train.parquet")
    assert (found.labels, list(found.splits["train"].label)) == (("0", "1"), [1, 0])


@quick
@given(st.lists(st.text("ab ", max_size=4), min_size=1, max_size=60), st.floats(0.1, 0.9))
def test_holding_out_keeps_every_row_once_and_equal_texts_on_one_side(texts: list[str], share: float) -> None:
    kept, held = hold_out(Rows(texts, list(range(len(texts)))), share)
    assert sorted([*kept.label, *held.label]) == list(range(len(texts)))
    assert not set(kept.text) & set(held.text)


def test_what_is_held_out_depends_on_the_text_alone_and_has_about_the_share_asked_for() -> None:
    rows = labelled([0] * 2000)
    _, held = hold_out(rows, 0.1)
    _, again = hold_out(rows.take(list(range(1999, 999, -1))), 0.1)
    assert 150 < len(held) < 250
    assert set(again.text) == set(held.text) & set(rows.text[1000:])


def test_without_a_validation_file_a_part_of_training_is_held_out(tmp_path: Path) -> None:
    rows = [(f"text {i % 100}", i % 2) for i in range(300)]
    write_tsv(tmp_path / "train.tsv", ["text", "label"], rows)
    splits = read(tmp_path, "train.tsv", validation=None, holdout=0.3).splits
    assert len(splits["train"]) + len(splits["validation"]) == 300
    assert not set(splits["train"].text) & set(splits["validation"].text)
    assert 50 < len(splits["validation"]) < 130


def test_limit_draws_training_examples_by_seed_and_leaves_the_other_splits(tmp_path: Path) -> None:
    write_tsv(tmp_path / "train.tsv", ["text", "label"], [(i, i % 2) for i in range(50)])
    full = read(tmp_path, "train.tsv")
    some, same, other = (read(tmp_path, "train.tsv", seed=s, limit=20) for s in (1, 1, 2))
    texts = [int(text) for text in some.splits["train"].text]
    assert len(set(texts)) == 20
    assert texts == sorted(texts)
    assert list(some.splits["train"].label) == [text % 2 for text in texts]
    assert some == same
    assert some.splits["train"] != other.splits["train"]
    assert some.splits["validation"] == full.splits["validation"]
    assert read(tmp_path, "train.tsv", limit=50) == full


GOOD = b"text,label\ngood,1\nbad,0\n"


@pytest.mark.parametrize(
    ("name", "content", "keys", "words"),
    [
        ("t.csv", None, {}, ["t.csv: no such file"]),
        ("t.parquet", None, {}, ["t.parquet: no such file"]),
        ("t.csv", GOOD, {"text": "body"}, ["t.csv", "'body'", "data.text", "label or text"]),
        ("t.csv", GOOD, {"pair": "body"}, ["t.csv", "'body'", "data.pair"]),
        ("t.csv", GOOD, {"group": "body"}, ["t.csv", "'body'", "data.group"]),
        ("t.csv", GOOD, {"label": "body"}, ["t.csv", "'body'", "data.label"]),
        ("t.jsonl", b'{"text": "a", "label": 1}\n\n{"text": \n', {}, ["t.jsonl: line 3", "JSON"]),
        ("t.jsonl", b'{"text": "a", "label": 1}\n[1]\n', {}, ["t.jsonl: line 2", "list"]),
        ("t.jsonl", b'{"text": "a", "label": 1}\n{"label": 0}\n', {}, ["t.jsonl: row 2", "'text'", "data.text"]),
        ("t.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}\n', {}, ["t.jsonl: row 2", "'label'", "data.label"]),
        ("t.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "label": 0.5}\n', {}, ["t.jsonl: row 2", "0.5"]),
        ("t.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n', {}, ["t.jsonl: row 2", "nan"]),
        ("t.csv", b"text,label\ngood,1\nbad\n", {}, ["t.csv: line 3 has 1 fields, expected 2"]),
        ("t.csv", b'text,label\n"a\nb",1\nx,y,0\n', {}, ["t.csv: line 4 has 3 fields, expected 2"]),
        ("t.tsv", b"text\tlabel\ngood\t1\t2\n", {}, ["t.tsv: line 2 has 3 fields, expected 2"]),
        ("t.csv", GOOD, {"columns": ["a", "text", "label"]}, ["t.csv: line 1 has 2 fields, expected 3"]),
        ("t.csv", b'text,label\ngood,1\n"bad,0\n', {}, ["t.csv: line 3"]),
        ("t.csv", b'text,label\ngood,1\n"so" bad,0\n', {}, ["t.csv: line 3"]),
        ("t.csv", b"", {}, ["t.csv", "empty"]),
        ("t.csv", b"text,label,text\na,1,b\n", {}, ["t.csv", "'text'", "twice"]),
        ("t.tsv", b"", {}, ["t.tsv", "empty"]),
        ("t.jsonl", b"", {}, ["t.jsonl", "empty"]),
        ("t.csv", b"text,label\n", {}, ["t.csv", "no examples"]),
        ("t.tsv", b"text\tlabel\n", {}, ["t.tsv", "no examples"]),
        ("t.xlsx", GOOD, {}, ["t.xlsx", ".xlsx", ".csv, .jsonl, .parquet or .tsv"]),
        ("noend", GOOD, {}, ["noend", "without suffix"]),
        ("t.parquet", b"PAR1 is not all it takes", {}, ["t.parquet", "parquet"]),
        ("t.csv", "text,label\ncaf\xe9,1\n".encode("latin-1"), {}, ["t.csv", "utf-8"]),
        ("t.csv", b"text,label\ngood,1\nbad,\n", {}, ["t.csv: row 2", "'label'", "data.label"]),
        ("t.csv", b"text,label,group\na,1,x\nb,0,\n", {"group": "group"}, ["t.csv: row 2", "'group'", "data.group"]),
        ("t.csv", b"text,label\ngood,1\nbad,1\n", {}, ["one label only", "'1'"]),
    ],
)
def test_a_bad_file_is_refused_by_name_and_place(
    tmp_path: Path, name: str, content: bytes | None, keys: dict[str, Any], words: list[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused(*words):
        read(tmp_path, name, **keys)


@pytest.mark.parametrize(
    ("value", "word"),
    [(["b"], "list"), ({"b": 1}, "dict"), (math.nan, "nan"), ("b \ud83d", "'\\ud83d'")],
    ids=["list", "object", "nan", "half a character"],
)
@pytest.mark.parametrize("key", ["text", "label", "group"])
def test_what_is_no_text_is_refused_by_file_and_row(tmp_path: Path, key: str, value: object, word: str) -> None:
    good = {"text": "a", "label": "b", "group": "c"}
    write_jsonl(tmp_path / "t.jsonl", [good, good | {key: value}])
    with pytest.raises(DataError) as caught:
        read(tmp_path, "t.jsonl", group="group")
    for wanted in ("t.jsonl: row 2", key, word):
        assert wanted in str(caught.value).lower()


def test_a_label_that_training_lacks_is_refused_by_file_and_row(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.csv", ["text,label", "good,1", "bad,0"])
    write_lines(tmp_path / "dev.csv", ["text,label", "good,1", "so so,2"])
    with refused("dev.csv: row 2", "'2'", "training"):
        read(tmp_path, "train.csv", validation="dev.csv")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").mkdir()
    with refused("train.csv"):
        read(tmp_path, "train.csv")


def test_no_training_file_is_refused_by_key() -> None:
    with refused("data.train"):
        read_dataset(DataSettings(), 0)


def test_a_held_out_part_without_examples_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.csv", ["text,label", "good,1", "bad,0"])
    with refused("'validation'", "no examples"):
        read(tmp_path, "train.csv", validation=None, holdout=1e-9)


def test_a_split_that_is_not_there_is_refused_with_the_choices(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.csv", ["text,label", "good,1", "bad,0"])
    with refused("'test'", "train or validation"):
        read(tmp_path, "train.csv").split("test")
