"""TREC-6: questions by what they ask for (Li and Roth 2002), a line "NUM:dist How far is it from Denver to Aspen ?".

Copies that are as common write the label as a number, 0 to 5 in the order of `LABELS` (Kim, arXiv 1408.5882).
"""

from pathlib import Path

from fedrot.core.errors import DataError, choices
from fedrot.learning.data import Dataset, Rows, hold_out
from fedrot.learning.settings import DataSettings

# Description, entity, abbreviation, human, location, number.
LABELS = ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")
_NUMBERS = tuple(str(number) for number in range(len(LABELS)))
# The published files, and the names that copies of them go by.
_FILES = {
    "train": ("train_5500.label", "TREC.train.all", "train.txt"),
    "test": ("TREC_10.label", "TREC.test.all", "test.txt"),
}


def read(settings: DataSettings) -> Dataset:
    """train, and validation held out of it by `data.holdout`; test. `data.path` is the published files' folder."""
    if settings.path is None:
        raise DataError("data.path: give the folder of TREC's files, train_5500.label and TREC_10.label")
    folder = Path(settings.path)
    splits = {split: _rows(folder, names) for split, names in _FILES.items()}
    train, validation = hold_out(splits["train"], settings.holdout)
    return Dataset({"train": train, "validation": validation, "test": splits["test"]}, LABELS)


def _rows(folder: Path, names: tuple[str, ...]) -> Rows:
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise DataError(f"{folder}: there is no {names[0]} of TREC (data.path)")
    texts, labels = [], []
    for number, line in enumerate(path.read_text(encoding="latin-1").splitlines(), start=1):
        if not line.strip():
            continue
        label, _, text = line.partition(" ")
        coarse = label.partition(":")[0]
        known = _NUMBERS if label in _NUMBERS else LABELS
        if coarse not in known or not text.strip():
            raise DataError(
                f"{path}: line {number} is not 'LABEL:detail question' or 'NUMBER question', LABEL one of "
                f"{choices(LABELS)}, NUMBER its place among them from 0 on"
            )
        texts.append(text.strip())
        labels.append(known.index(coarse))
    return Rows(texts, labels)
