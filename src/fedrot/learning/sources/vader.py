"""The VADER corpus: sentences of four domains with the mean of 20 human sentiment ratings in [-4, 4].

A row looks like "1_1<TAB>-0.9<TAB>troubleshooting ad-2500 and ad-2600 no picture scrolling b/w." Clear cases only:
|rating| > 0.5, labelled by sign. The domain is the group: a natural federation of four clients whose label shares
differ. Do not report SST-2 dev with a model trained on the movie domain: it holds 692 of those 872 sentences.
"""

import html
from pathlib import Path

from fedrot.core.errors import DataError
from fedrot.learning.data import Dataset, Rows, bucket
from fedrot.learning.fetch import fetched
from fedrot.learning.settings import DataSettings

DOMAINS = {
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}

LABELS = ("negative", "positive")


def read(settings: DataSettings) -> Dataset:
    """75 % train, 10 % validation, 15 % test, divided by the texts' own hash, so that no text is on two sides."""
    folder = Path(settings.path) if settings.path else fetched("vader")
    rows: dict[str, list[tuple[str, int, str]]] = {"train": [], "validation": [], "test": []}
    for domain, name in DOMAINS.items():
        for text, rating in _ratings(folder / name):
            if abs(rating) > 0.5:
                place = bucket(text)
                split = "test" if place < 15 else "validation" if place < 25 else "train"
                rows[split].append((text, int(rating > 0), domain))
    splits = {
        split: Rows(text=[r[0] for r in found], label=[r[1] for r in found], group=[r[2] for r in found])
        for split, found in rows.items()
    }
    return Dataset(splits, LABELS)


def _ratings(path: Path) -> list[tuple[str, float]]:
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run: fedrot data fetch vader") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: cannot be read ({problem})") from None
    found = []
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t", 2)
        try:
            found.append((html.unescape(fields[2]).strip(), float(fields[1])))
        except (IndexError, ValueError):
            raise DataError(f"{path}: line {number} is not 'id<TAB>rating<TAB>text'") from None
    return found
