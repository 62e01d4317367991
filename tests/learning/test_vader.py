"""The VADER corpus: clear cases only, labels by sign, domains as groups, no text on two sides."""

from pathlib import Path

import pytest
from learning_helpers import refused, write_lines

from fedrot.learning.data import Dataset, bucket
from fedrot.learning.settings import DataSettings
from fedrot.learning.sources.read import read_dataset
from fedrot.learning.sources.vader import DOMAINS


def write_corpus(folder: Path, extra: dict[str, list[str]] | None = None, size: int = 60) -> Path:
    """Four files of `size` clear rows each, with further lines by domain."""
    for domain, name in DOMAINS.items():
        lines = [f"{i}_1\t{(-1) ** i * (0.6 + i / 50)}\t{domain} says {i // 2}" for i in range(size)]
        write_lines(folder / name, [*lines, *(extra or {}).get(domain, [])])
    return folder


def read(folder: Path) -> Dataset:
    """The corpus in this folder."""
    return read_dataset(DataSettings(source="vader", path=str(folder)), 0)


def examples(dataset: Dataset) -> list[tuple[str, str, int, str]]:
    """(split, text, label, domain) of every example."""
    return [
        (split, text, label, group)
        for split, rows in dataset.splits.items()
        for text, label, group in zip(rows.text, rows.label, rows.group or [], strict=True)
    ]


def labels_of(dataset: Dataset, text: str) -> list[str]:
    """The label names of every example with this text."""
    return [dataset.labels[label] for _, found, label, _ in examples(dataset) if found == text]


@pytest.mark.parametrize(
    ("rating", "labels"),
    [("0.5", []), ("-0.5", []), ("0.0", []), ("0.51", ["positive"]), ("-0.51", ["negative"]), ("-3.9", ["negative"])],
)
def test_only_clear_ratings_count_and_their_sign_is_the_label(tmp_path: Path, rating: str, labels: list[str]) -> None:
    found = read(write_corpus(tmp_path, {"tweets": [f"99_1\t{rating}\tthe one in question"]}))
    assert labels_of(found, "the one in question") == labels


def test_every_clear_row_is_in_one_split_with_its_domain(tmp_path: Path) -> None:
    found = examples(read(write_corpus(tmp_path)))
    assert len(found) == 4 * 60
    assert all(text.startswith(domain) for _, text, _, domain in found)
    assert {domain for *_, domain in found} == set(DOMAINS)


def test_no_text_is_in_two_splits_even_across_domains_and_in_other_case(tmp_path: Path) -> None:
    twice = [f"{i}_1\t1.0\tAMAZON says {i}" for i in range(30)]
    found = examples(read(write_corpus(tmp_path, {"movies": twice})))
    places: dict[str, set[str]] = {}
    for split, text, *_ in found:
        places.setdefault(text.lower(), set()).add(split)
    assert {len(splits) for splits in places.values()} == {1}
    assert set().union(*places.values()) == {"train", "validation", "test"}


def test_three_quarters_train_and_the_choice_depends_on_the_text_alone(tmp_path: Path) -> None:
    large = read(write_corpus(tmp_path / "large", size=1000))
    small = read(write_corpus(tmp_path / "small"))
    sizes = {split: len(rows) / 4000 for split, rows in large.splits.items()}
    assert sizes == pytest.approx({"train": 0.75, "validation": 0.10, "test": 0.15}, abs=0.03)
    assert set(examples(small)) <= set(examples(large))


def test_html_entities_are_text_and_tabs_in_a_text_stay(tmp_path: Path) -> None:
    found = read(write_corpus(tmp_path, {"movies": ["1_9\t2.0\t it&#39;s &lt;good&gt; &amp; warm ", "1_8\t2.0\ta\tb"]}))
    assert labels_of(found, "it's <good> & warm") == ["positive"]
    assert labels_of(found, "a\tb") == ["positive"]


def test_only_line_ends_end_a_row(tmp_path: Path) -> None:
    """Other Unicode line breaks occur within texts from the web."""
    found = read(write_corpus(tmp_path, {"tweets": ["1_9\t2.0\tone\x85two\u2028three"]}))
    assert labels_of(found, "one\x85two\u2028three") == ["positive"]


@pytest.mark.parametrize("line", ["1_9\tgood\ttext", "1_9\t2.0", "no tabs at all", "1_9\t\ttext"])
def test_a_malformed_line_is_refused_by_file_and_number(tmp_path: Path, line: str) -> None:
    write_corpus(tmp_path, {"movies": [line]})
    with refused(DOMAINS["movies"], "line 61", "rating"):
        read(tmp_path)


def test_a_missing_domain_is_refused_with_the_command_that_fetches(tmp_path: Path) -> None:
    (write_corpus(tmp_path) / DOMAINS["editorials"]).unlink()
    with refused(DOMAINS["editorials"], "fedrot data fetch vader"):
        read(tmp_path)


def test_a_file_of_another_encoding_is_refused_by_name(tmp_path: Path) -> None:
    with (write_corpus(tmp_path) / DOMAINS["tweets"]).open("ab") as file:
        file.write("1_9\t2.0\tcafé\n".encode("latin-1"))
    with refused(DOMAINS["tweets"]):
        read(tmp_path)


def test_without_a_path_the_fetched_corpus_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDROT_CACHE", str(tmp_path))
    with refused("vader", "fedrot data fetch vader"):
        read_dataset(DataSettings(source="vader"), 0)
    write_corpus(tmp_path / "vader")
    assert read_dataset(DataSettings(source="vader"), 0) == read(tmp_path / "vader")


def test_equal_texts_share_a_bucket_whatever_their_case_and_margins() -> None:
    assert bucket("  So Good\n") == bucket("so good")
    assert len({bucket(f"text {i}") for i in range(2000)}) == 100
