"""The one way in: from data settings to a `Dataset`."""

from dataclasses import replace

import torch

from fedrot.core.errors import DataError
from fedrot.core.seeding import generator
from fedrot.learning.data import Dataset
from fedrot.learning.settings import DataSettings
from fedrot.learning.sources import codesearchnet, conversations, files, generated, glue, gsm8k, trec, vader

_SOURCES = {
    "files": files.read,
    "glue": glue.read,
    "vader": vader.read,
    "gsm8k": gsm8k.read,
    "trec": trec.read,
    "codesearchnet": codesearchnet.read,
}


def known_labels(settings: DataSettings) -> tuple[str, ...] | None:
    """The labels of what `settings` describe, without reading it; () for texts that a language model learns to write,
    None where only the files say.
    """
    if settings.source == "files":
        named = tuple(settings.labels) if settings.labels else None
        return () if settings.response or settings.messages else named
    labels = {"glue": glue.labels(settings), "trec": trec.LABELS, "vader": vader.LABELS}
    return labels.get(settings.source, ())


def read_dataset(settings: DataSettings, seed: int) -> Dataset:
    """Read the examples that `settings` describe.

    Raises `DataError` naming the file, line or column that cannot be used.
    """
    written = settings.source == "files" and (settings.response or settings.messages)
    reader = conversations.read if written else generated.read if settings.made_up else _SOURCES[settings.source]
    dataset = reader(settings)
    for name, rows in dataset.splits.items():
        if not len(rows):
            raise DataError(f"the split {name!r} holds no examples")
    if len(dataset.labels) == 1:
        raise DataError(f"the data has one label only ({dataset.labels[0]!r}); classification needs two or more")
    train = dataset.split("train")
    if settings.limit is not None and settings.limit < len(train):
        keep = torch.randperm(len(train), generator=generator(seed, "limit"))[: settings.limit]
        dataset = replace(dataset, splits=dataset.splits | {"train": train.take(sorted(keep.tolist()))})
    return dataset
