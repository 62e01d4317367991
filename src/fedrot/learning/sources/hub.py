"""Data sets of the Hugging Face hub, through `datasets`."""

from typing import Any

from fedrot.core.errors import DataError


def load(repository: str, name: str, instead: str) -> Any:
    """The splits of a configuration; `repository` may be a local copy of the hub's.

    Raises `DataError` with the reason where it cannot be loaded, and what data.path may be `instead`.
    """
    import datasets

    try:
        return datasets.load_dataset(repository, name)
    except Exception as problem:  # the library raises many kinds, offline ones among them
        reason = " ".join(str(problem).split())[:200]
        raise DataError(f"{repository}: {name} could not be loaded ({reason}); give data.path, {instead}") from None
