"""What the replies of a Flower app's clients say beside their arrays: their weight and their metrics."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from flwr.app import Message, MetricRecord, RecordDict
from torch import Tensor

from fedrot.core.checks import TOO_LARGE, RejectedUpload
from fedrot.running.flower.records import said


def content_of(reply: Message) -> RecordDict:
    """A reply's records. Raises `RejectedUpload` where it is an error instead."""
    if reply.has_error():
        raise RejectedUpload(said(reply.error))
    return reply.content


def weight_of(content: RecordDict, weighted_by_key: str) -> float:
    """A reply's weight in averages. Raises `RejectedUpload` unless it has one MetricRecord with a positive number."""
    records = list(content.metric_records.values())
    if len(records) != 1:
        raise RejectedUpload(f"the reply must hold one MetricRecord, it holds {len(records)}")
    weight = records[0].get(weighted_by_key)
    if not isinstance(weight, (int, float)) or not 0 < weight < TOO_LARGE:
        raise RejectedUpload(
            f"the reply's metric {weighted_by_key!r} must be a positive number, got {str(weight)[:40]}"
        )
    return float(weight)


def mean_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """The weighted mean of every metric over the replies that give it as finite numbers, of the shape that most give.

    Takes what `weight_of` takes. One reply's odd metrics cost the others nothing.
    """
    found: dict[str, list[tuple[float, Tensor]]] = {}
    for content in contents:
        (record,) = content.metric_records.values()
        for name, value in record.items():
            if name != weighted_by_key and all(-TOO_LARGE < x < TOO_LARGE for x in _numbers(value)):
                term = (weight_of(content, weighted_by_key), torch.tensor(value, dtype=torch.float64))
                found.setdefault(name, []).append(term)
    means = MetricRecord()
    for name, terms in found.items():
        shape = Counter(t.shape for _, t in terms).most_common(1)[0][0]
        alike = [(w, t) for w, t in terms if t.shape == shape]
        total = math.fsum(w for w, _ in alike)
        means[name] = torch.stack([t * (w / total) for w, t in alike]).sum(0).tolist()
    return means


def _numbers(value: int | float | list[int] | list[float]) -> Sequence[int | float]:
    return value if isinstance(value, list) else [value]
