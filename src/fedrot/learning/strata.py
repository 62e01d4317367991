"""What a partition is uneven in: every example belongs to one stratum, its label, where it comes from, how long it is
or what it is about. Bounds of lengths and centres of clusters come from the training split and hold for every split.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedrot.core.errors import DataError, RecipeError
from fedrot.core.seeding import seed_of
from fedrot.learning.data import Dataset
from fedrot.learning.settings import ModelSettings, PartitionSettings

Indices = NDArray[np.int64]
Vectors = NDArray[np.float32]

FITTED = 20_000  # training examples that cluster centres are fitted to, and those whose embeddings are held at once
STARTS = 4  # k-means keeps the best of so many
TOKENS = 128  # of an example that are embedded
BATCH = 64


@dataclass(frozen=True)
class Strata:
    """The stratum of every example of every split."""

    names: tuple[str, ...]  # for people
    of: Mapping[str, Indices]  # split -> of each example, an index into `names`


def strata(dataset: Dataset, settings: PartitionSettings, clients: int, seed: int, model: ModelSettings) -> Strata:
    """What `settings.by` names. `RecipeError` where the data does not have it, `DataError` where all are alike."""
    if settings.by == "label":
        if not dataset.labels:
            raise RecipeError(
                "partition.by label: the data has no labels; set partition.by length, cluster or group, or "
                "partition.kind iid"
            )
        return by_label(dataset)
    if settings.by == "group":
        return by_group(dataset, "partition.by group")
    train = len(dataset.split("train"))
    if settings.bins is not None and not 2 <= settings.bins <= train:
        raise RecipeError(f"partition.bins is {settings.bins}; give at least 2, at most the {train} training examples")
    bins = max(2, clients) if settings.bins is None else settings.bins
    found = by_length(dataset, bins) if settings.by == "length" else by_cluster(dataset, bins, settings, model, seed)
    if len(found.names) < 2:
        what = "are of one length" if settings.by == "length" else "read alike to the encoder"
        raise DataError(
            f"partition.by {settings.by}: all training examples {what}; use another partition.by, or kind iid"
        )
    return found


def by_label(dataset: Dataset) -> Strata:
    """A stratum for every label; one for all where there are none."""
    of = {split: np.asarray(rows.label, dtype=np.int64) for split, rows in dataset.splits.items()}
    return Strata(dataset.labels or ("all",), of)


def by_group(dataset: Dataset, key: str) -> Strata:
    """A stratum for every value of data.group that training examples have; `key` is what asks for it."""
    names = tuple(sorted(set(dataset.split("train").group or ())))
    places = {name: place for place, name in enumerate(names)}
    of: dict[str, Indices] = {}
    for split, rows in dataset.splits.items():
        if rows.group is None:
            raise RecipeError(f"{key}: name the column in data.group")
        if strange := set(rows.group) - set(names):
            raise DataError(f"split {split!r}: group {min(strange)!r} has no training examples, so it is no client's")
        of[split] = np.asarray([places[group] for group in rows.group], dtype=np.int64)
    return Strata(names, of)


def by_length(dataset: Dataset, bins: int) -> Strata:
    """Quantiles of the number of characters: fewer than `bins` where so many examples are of one length that quantiles
    fall together.
    """
    lengths = {
        split: np.asarray([len(text) for text in rows.whole()], dtype=np.int64)
        for split, rows in dataset.splits.items()
    }
    train = lengths["train"]
    # The longest of every stratum; each is the length of some example, and the last stratum takes all that is longer.
    tops = np.unique(np.quantile(train, np.arange(1, bins + 1) / bins, method="inverted_cdf").astype(np.int64))
    lows = [int(train.min()), *(int(top) + 1 for top in tops[:-1])]
    names = tuple(f"length {low}-{top}" if low < top else f"length {top}" for low, top in zip(lows, tops, strict=True))
    return Strata(names, {split: np.searchsorted(tops[:-1], found) for split, found in lengths.items()})


def by_cluster(dataset: Dataset, bins: int, settings: PartitionSettings, model: ModelSettings, seed: int) -> Strata:
    """Clusters that k-means finds in the encoder's embeddings of at most `FITTED` training examples; the others belong
    to the nearest centre. Fewer than `bins` where fewer examples differ.
    """
    encoder = _Encoder(settings, model)
    centres: Any = None
    of: dict[str, Indices] = {}
    for split in ("train", *sorted(dataset.splits.keys() - {"train"})):
        texts = dataset.split(split).whole()
        order = np.random.default_rng(seed_of(seed, "partition", "cluster", split)).permutation(len(texts))
        of[split] = np.zeros(len(texts), dtype=np.int64)
        for start in range(0, len(order), FITTED):
            places = order[start : start + FITTED]
            vectors = encoder.embed([texts[i] for i in places])
            if centres is None:
                centres = _centres(vectors, bins, seed)
            of[split][places] = np.argmax(vectors @ centres.T - 0.5 * (centres**2).sum(axis=1), axis=1)
    return Strata(tuple(f"cluster {i}" for i in range(len(centres))), of)


def _centres(vectors: Vectors, bins: int, seed: int) -> Vectors:
    """(at most `bins`, width)."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    bins = min(bins, len({vector.tobytes() for vector in vectors}))
    drawn = seed_of(seed, "partition", "cluster") % 2**32
    with threadpool_limits(1):  # threads would add up in the order in which they finish
        return KMeans(bins, n_init=STARTS, random_state=drawn).fit(vectors).cluster_centers_


class _Encoder:
    """A model whose embeddings are the means of its last layer over an example's tokens, of length one."""

    def __init__(self, settings: PartitionSettings, model: ModelSettings) -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        from fedrot.learning.loading import model_path

        key = "model.path" if settings.encoder is None else "partition.encoder"
        source = model if settings.encoder is None else ModelSettings(path=settings.encoder)
        try:
            path = model_path(source)
        except DataError as problem:
            message = str(problem).replace("model.path", key)
            raise DataError(message if key in message else f"{message} ({key})") from None
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            with torch.random.fork_rng():  # what the files lack is drawn at random
                self.tokenizer: Any = AutoTokenizer.from_pretrained(
                    path, revision=source.revision, trust_remote_code=False
                )
                self.model, loaded = AutoModel.from_pretrained(
                    path,
                    revision=source.revision,
                    dtype=torch.float32,
                    output_loading_info=True,
                    use_safetensors=True,  # nothing is unpickled
                    trust_remote_code=False,
                )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
            first = str(problem).strip().partition("\n")[0][:160] or type(problem).__name__
            raise DataError(f"{path}: the encoder of the clusters cannot be loaded ({first}); see {key}") from None
        if absent := sorted(name for name in loaded["missing_keys"] if "pooler." not in name):
            raise DataError(f"{path}: {absent[0]} cannot be found in the model's files; see {key}")
        if len(self.tokenizer) <= len(self.tokenizer.all_special_tokens):
            raise DataError(f"{path}: the tokenizer has no vocabulary, its files are missing; see {key}")
        if self.model.config.is_encoder_decoder:
            self.model = self.model.get_encoder()
        self.model.eval()
        positions = getattr(self.model.config, "max_position_embeddings", None) or TOKENS + 2
        self.longest = min(TOKENS, self.tokenizer.model_max_length, positions - 2)  # RoBERTa begins to count at 2

    def embed(self, texts: list[str]) -> Vectors:
        """(texts, width). Texts of the same tokens have the same embedding to the last bit."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        encoded = self.tokenizer(texts, truncation=True, max_length=self.longest, return_attention_mask=False)
        ids = [tuple(one) or (0,) for one in encoded["input_ids"]]  # some tokenizers make nothing of an empty text
        distinct = sorted(set(ids), key=lambda one: (len(one), one))
        vectors = []
        for start in range(0, len(distinct), BATCH):
            rows = [torch.tensor(one) for one in distinct[start : start + BATCH]]
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            with torch.inference_mode():  # nothing attends to the padding, so any token will do for it
                states = self.model(pad_sequence(rows, batch_first=True), attention_mask=mask).last_hidden_state
                means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                vectors.append(torch.nn.functional.normalize(means, dim=1).numpy())
        places = {one: place for place, one in enumerate(distinct)}
        return np.concatenate(vectors)[[places[one] for one in ids]]
