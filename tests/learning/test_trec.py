"""TREC's questions: the published files, copies with numbers for labels, made-up ones, and lines that are neither."""

from pathlib import Path

import pytest

from fedrot.core.errors import DataError
from fedrot.learning.settings import DataSettings
from fedrot.learning.sources.read import read_dataset
from fedrot.learning.sources.trec import LABELS

QUESTIONS = [f"Question {i} about \xe9t\xe9 ?" for i in range(40)]


def write(folder: Path, train: str, test: str, numbers: bool) -> DataSettings:
    """Forty questions a split, the labels in turn, in latin-1 as published."""
    folder.mkdir()
    for name in (train, test):
        labels = [str(i % 6) if numbers else f"{LABELS[i % 6]}:detail" for i in range(len(QUESTIONS))]
        lines = [f"{label} {text}\n" for label, text in zip(labels, QUESTIONS, strict=True)]
        (folder / name).write_text("".join(lines), encoding="latin-1")
    return DataSettings(source="trec", path=str(folder), holdout=0.3)


@pytest.mark.parametrize(
    ("train", "test", "numbers"),
    [("train_5500.label", "TREC_10.label", False), ("TREC.train.all", "TREC.test.all", True)],
)
def test_published_files_and_copies_of_them_give_the_same(train: str, test: str, numbers: bool, tmp_path: Path) -> None:
    found = read_dataset(write(tmp_path / "trec", train, test, numbers), seed=0)
    assert found.labels == LABELS
    assert list(found.split("test").text) == QUESTIONS
    assert list(found.split("test").label) == [i % 6 for i in range(40)]
    kept, held = found.split("train"), found.split("validation")
    assert sorted([*kept.text, *held.text]) == sorted(QUESTIONS)
    assert len(held) > 0
    for rows in (kept, held):
        assert all(QUESTIONS.index(text) % 6 == label for text, label in zip(rows.text, rows.label, strict=True))


@pytest.mark.parametrize("line", ["WHAT:x a question ?", "7 a question ?", "NUM:dist", "3", "NUM:dist  "])
def test_a_line_that_is_no_question_is_named(line: str, tmp_path: Path) -> None:
    settings = write(tmp_path / "trec", "train_5500.label", "TREC_10.label", False)
    path = tmp_path / "trec" / "TREC_10.label"
    path.write_text(path.read_text(encoding="latin-1") + line + "\n", encoding="latin-1")
    with pytest.raises(DataError, match=r"TREC_10\.label: line 41 is not 'LABEL:detail question'"):
        read_dataset(settings, seed=0)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no train_5500\.label of TREC \(data\.path\)"):
        read_dataset(DataSettings(source="trec", path=str(tmp_path)), seed=0)
    with pytest.raises(DataError, match=r"data\.path: give the folder of TREC's files"):
        read_dataset(DataSettings(source="trec"), seed=0)


def test_made_up_questions_ask_for_what_their_label_says() -> None:
    found = read_dataset(DataSettings(source="trec", generated=200), seed=0)
    starts = ("Why", "What kind", "What does", "Who", "Where", "How many")
    for rows in found.splits.values():
        assert all(text.startswith(starts[label]) for text, label in zip(rows.text, rows.label, strict=True))
    assert set(found.split("train").label) == set(range(6))
