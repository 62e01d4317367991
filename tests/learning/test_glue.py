"""GLUE tasks in the forms in which they are published: the original TSVs, the hub's parquet, the hub's repository."""

from pathlib import Path
from typing import Any

import pytest
from learning_helpers import refused, write_parquet, write_tsv

from fedrot.learning.data import Dataset, Rows
from fedrot.learning.settings import DataSettings
from fedrot.learning.sources import glue
from fedrot.learning.sources.glue import TASKS, hub_tables
from fedrot.learning.sources.read import read_dataset

# Every task's (text, pair, label number) by split; quotes are unbalanced as in the published files.
TEXTS = {
    "train": [('a "good one', "it 's good", 1), ("bad, very", 'no "', 0), ("so so", "well", 0)],
    "validation": [("fine", "very fine", 1), ("cold", "warm", 0)],
}
HELD = 0.4  # share held out of the training texts: one of the three
HUB_COLUMNS = {
    "sst2": ("sentence", None),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
}
MNLI = [
    "index",
    "promptID",
    "pairID",
    "genre",
    *(f"sentence{i}_{kind}" for kind in ("binary_parse", "parse") for i in "12"),
]
ENTAILED = ("entailment", "not_entailment")
THREE = ("entailment", "neutral", "contradiction")
# The names that the hub's label numbers have.
NAMES = {
    "sst2": ("negative", "positive"),
    "qnli": ENTAILED,
    "qqp": ("not_duplicate", "duplicate"),
    "rte": ENTAILED,
    "mnli": THREE,
}


def original(name: str, split: str) -> tuple[list[str], list[list[Any]]]:
    """(header, rows) of the task's TSV as GLUE publishes it."""
    rows = TEXTS[split]
    if name == "sst2":
        return ["sentence", "label"], [[text, label] for text, _, label in rows]
    if name == "qqp":
        header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
        return header, [[i, 2 * i, 2 * i + 1, *row] for i, row in enumerate(rows)]
    if name == "mnli":
        votes = 1 if split == "train" else 5
        header = [*MNLI, "sentence1", "sentence2", *(f"label{i + 1}" for i in range(votes)), "gold_label"]
        parses = ["( a parse )"] * 4
        return header, [
            [i, f"{i}", f"{i}n", "fiction", *parses, text, pair, *["neutral"] * votes, THREE[label]]
            for i, (text, pair, label) in enumerate(rows)
        ]
    texts = ["question", "sentence"] if name == "qnli" else ["sentence1", "sentence2"]
    return ["index", *texts, "label"], [[i, text, pair, ENTAILED[label]] for i, (text, pair, label) in enumerate(rows)]


def hub_columns(name: str, split: str) -> dict[str, list[Any]]:
    """The columns of the task's parquet on the hub."""
    text, pair = HUB_COLUMNS[name]
    rows = TEXTS[split]
    second = {pair: [row[1] for row in rows]} if pair else {}
    return {text: [row[0] for row in rows], **second, "label": [r[2] for r in rows], "idx": list(range(len(rows)))}


def expected(name: str, split: str) -> Rows:
    """What every form gives."""
    rows = TEXTS[split]
    pair = [row[1] for row in rows] if HUB_COLUMNS[name][1] else None
    return Rows([row[0] for row in rows], [row[2] for row in rows], pair)


def hub_copy(folder: Path, name: str) -> Path:
    """A local copy of the hub's repository with one task, labels typed as there."""
    import datasets

    published = {"validation": "validation_matched"} if name == "mnli" else {}
    files = []
    for split in TEXTS:
        columns = hub_columns(name, split)
        features = datasets.Features(
            {column: datasets.Value("string") for column in columns}
            | {"label": datasets.ClassLabel(names=list(NAMES[name])), "idx": datasets.Value("int32")}
        )
        there = published.get(split, split)
        path = folder / name / f"{there}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
        files.append(f"  - split: {there}\n    path: {name}/{there}-*")
    front = "\n".join(["---", "configs:", f"- config_name: {name}", "  data_files:", *files, "---", ""])
    (folder / "README.md").write_text(front)
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub's library writes, it writes below tmp_path, and it says nothing."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "hf-modules"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def read(name: str, folder: Path | None) -> Dataset:
    """The task from a folder, or from the hub."""
    settings = DataSettings(source="glue", name=name, path=folder and str(folder), holdout=HELD)  # type: ignore[arg-type]
    return read_dataset(settings, 0)


def published(found: Dataset) -> dict[str, Rows]:
    """The splits as they were published: what was held out put back, and what is reported by its published name."""
    train, held = found.splits["train"], found.splits["validation"]
    assert len(train)
    assert len(held)
    order = [text for text, *_ in TEXTS["train"]]
    both = Rows(
        [*train.text, *held.text],
        [*train.label, *held.label],
        None if train.pair is None or held.pair is None else [*train.pair, *held.pair],
    )
    put_back = both.take(sorted(range(len(both)), key=lambda i: order.index(both.text[i])))
    others = {split: rows for split, rows in found.splits.items() if split not in ("train", "validation")}
    return {"train": put_back, **{split.replace("test", "validation"): rows for split, rows in others.items()}}


def write_original(folder: Path, name: str) -> Path:
    """The folder of a task's own TSV files."""
    for split, file in (("train", "train"), ("validation", "dev_matched" if name == "mnli" else "dev")):
        write_tsv(folder / f"{file}.tsv", *original(name, split))
    return folder


def test_every_task_that_a_recipe_can_name_is_known() -> None:
    from typing import get_args, get_type_hints

    choice = get_args(get_type_hints(DataSettings)["name"])[0]
    assert set(TASKS) == set(get_args(choice)) == set(HUB_COLUMNS)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_original_files_of_a_task_are_read(tmp_path: Path, name: str) -> None:
    found = read(name, write_original(tmp_path, name))
    assert found.labels == NAMES[name]
    assert published(found) == {split: expected(name, split) for split in TEXTS}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_parquet_files_with_the_hubs_columns_are_read(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / "train.parquet", hub_columns(name, "train"))
    there = "validation_matched" if name == "mnli" else "validation"
    write_parquet(tmp_path / f"{there}.parquet", hub_columns(name, "validation"))
    assert published(read(name, tmp_path)) == {split: expected(name, split) for split in TEXTS}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_hubs_repository_is_read_through_datasets(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, hub_cache: None
) -> None:
    monkeypatch.setattr(glue, "HUB", str(hub_copy(tmp_path / "glue", name)))
    found = read(name, None)
    assert found.labels == NAMES[name]
    assert published(found) == {split: expected(name, split) for split in TEXTS}


def test_a_tasks_folder_of_the_hubs_repository_is_read_as_a_local_folder(tmp_path: Path) -> None:
    """Who copies the repository has files named train-00000-of-00001.parquet."""
    found = read("rte", hub_copy(tmp_path, "rte") / "rte")
    assert published(found) == {split: expected("rte", split) for split in TEXTS}


def test_mnli_leaves_out_rows_without_agreement_and_keeps_mismatched_beside_matched(tmp_path: Path) -> None:
    write_original(tmp_path, "mnli")
    header, rows = original("mnli", "validation")
    undecided = [*rows[0][:-1], "-"]
    write_tsv(tmp_path / "dev_matched.tsv", header, [undecided, *rows, undecided])
    write_tsv(tmp_path / "dev_mismatched.tsv", header, [rows[1], undecided])
    splits = published(read("mnli", tmp_path))
    assert splits["validation"] == expected("mnli", "validation")
    assert splits["validation_mismatched"] == expected("mnli", "validation").take([1])


def test_the_broken_lines_of_the_published_qqp_file_do_not_stop_the_task(tmp_path: Path) -> None:
    """Its train.tsv holds a few rows that a line end in a question broke in two; the hub leaves them out."""
    write_original(tmp_path, "qqp")
    with (tmp_path / "train.tsv").open("a") as file:
        file.write('9\t18\t19\t"Was he real?\n"\tWas he a real figure? What is the evidence?\t0\n')
    assert published(read("qqp", tmp_path))["train"] == expected("qqp", "train")


def test_no_such_folder_is_refused(tmp_path: Path) -> None:
    with refused("nowhere", "data.path"):
        read("sst2", tmp_path / "nowhere")


@pytest.mark.parametrize(("missing", "split"), [("train.tsv", "train"), ("dev.tsv", "validation")])
def test_a_missing_split_is_refused_by_folder_and_task(tmp_path: Path, missing: str, split: str) -> None:
    (write_original(tmp_path, "sst2") / missing).unlink()
    with refused(str(tmp_path), f"no {split} split", "sst2"):
        read("sst2", tmp_path)


@pytest.mark.parametrize("label", ["maybe", "3", "-1", "", "0.5"])
def test_a_label_that_the_task_does_not_have_is_refused_by_file_and_row(tmp_path: Path, label: str) -> None:
    write_original(tmp_path, "mnli")
    header, rows = original("mnli", "train")
    write_tsv(tmp_path / "train.tsv", header, [[*rows[0][:-1], "-"], rows[1], [*rows[2][:-1], label]])
    with refused("train.tsv: row 3", repr(label), "contradiction, entailment or neutral"):
        read("mnli", tmp_path)


@pytest.mark.parametrize(("column", "what"), [("sentence1", "the text"), ("sentence2", "second"), ("label", "label")])
def test_a_column_that_is_not_there_is_refused_by_file_and_name(tmp_path: Path, column: str, what: str) -> None:
    write_original(tmp_path, "rte")
    header, rows = original("rte", "validation")
    write_tsv(tmp_path / "dev.tsv", ["other" if name == column else name for name in header], rows)
    with refused("dev.tsv", repr(column), what):
        read("rte", tmp_path)


def test_no_task_name_is_refused_with_the_choices() -> None:
    with refused("data.name", "mnli, qnli, qqp, rte or sst2"):
        read_dataset(DataSettings(source="glue"), 0)


def test_a_hub_that_cannot_be_reached_is_refused_with_the_way_out(tmp_path: Path, hub_cache: None) -> None:
    with refused("nowhere", "sst2", "data.path"):
        hub_tables(str(tmp_path / "nowhere"), "sst2")


def test_a_task_that_the_repository_lacks_is_refused(tmp_path: Path, hub_cache: None) -> None:
    with refused("qnli", "data.path"):
        hub_tables(str(hub_copy(tmp_path / "glue", "sst2")), "qnli")
