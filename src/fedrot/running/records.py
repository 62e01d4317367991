"""A round's line of metrics.jsonl: who took part, losses, bytes, aggregation errors, drift."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedrot.core.adapter import Adapter
from fedrot.core.compression import Codec, payload_bytes
from fedrot.core.diagnostics import Watch
from fedrot.core.drift import summarise_drift
from fedrot.core.methods.base import ALL_PARTS, Broadcast, Upload
from fedrot.core.packed import Layout
from fedrot.learning.scores import LOWER_IS_BETTER
from fedrot.running.engine import Summed


@dataclass(frozen=True)
class Seen:
    """What is kept of an upload once its tensors are in the sum: memory does not grow with the clients' adapters."""

    weight: float
    used: int
    metrics: Mapping[str, float]
    layers: Mapping[str, Mapping[str, float]]


def round_record(
    broadcast: Broadcast,
    drawn: Sequence[str],
    uploads: Mapping[str, Seen],
    dropped: Mapping[str, str],
    down: int,
    up: int,
) -> dict[str, Any]:
    """The record but for errors, evaluation and seconds; `down` and `up` are the bytes of all clients together."""
    record: dict[str, Any] = {
        "round": broadcast.round,
        "clients": {"drawn": len(drawn), "used": sorted(uploads), "dropped": dict(dropped)},
        "bytes": {"down": down, "up": up},
    }
    # With privacy.mode local clients report nothing, and with central there may be none.
    if reported := {name: u for name, u in uploads.items() if u.metrics}:
        total = sum(u.weight for u in reported.values())
        record["train"] = {
            "loss": sum(u.weight * u.metrics["loss"] for u in reported.values()) / total,
            "rows": sum(u.used for u in reported.values()),
            "tokens": sum(u.metrics["tokens"] for u in reported.values()),
            "loss_by_client": {name: u.metrics["loss"] for name, u in reported.items()},
        }
    return record


def add_kept(record: dict[str, Any], kept: Mapping[str, float]) -> None:
    """Put into the record what a rule against hostile clients let through, by client; a client of 0 was not used."""
    if kept:
        clients = record["clients"]
        clients["kept"] = dict(kept)
        clients["used"] = [name for name in clients["used"] if kept[name] > 0]


def add_summed(record: dict[str, Any], summed: Summed | None) -> None:
    """Put into the record what a secure sum says of its clients together."""
    if summed is not None:
        record["secure"] = {"clipped": summed.clipped}
        if summed.reports:
            record["train"] = dict(summed.reports)


def broadcast_bytes(broadcast: Broadcast, head: bool) -> int:
    """Bytes that go to one client, which has what earlier rounds sent: of the base's change only the new part."""
    parts = ALL_PARTS if head else ALL_PARTS - {"head"}
    extras = (broadcast.reference, broadcast.base_step, broadcast.variate)
    return sum(adapter.bytes(parts) for adapter in (broadcast.adapter, *extras) if adapter is not None)


def upload_bytes(upload: Upload, parts: frozenset[str], codec: Codec) -> int:
    """Bytes that one client sends: `parts` of the adapter as the codec packs them; rotations and the control variate in
    float32. As between sites (`network.tensors`), headers apart.
    """
    adapter = upload.adapter
    sent = adapter.bytes(parts) if codec == "none" else payload_bytes(Layout.of(adapter, parts), codec)
    variate = 0 if upload.variate is None else upload.variate.bytes(parts)
    return sent + variate + 4 * sum(r.numel() for r in upload.rotation.values())


def add_diagnostics(
    record: dict[str, Any], watch: Watch | None, sent: Sequence[Adapter], uploads: Mapping[str, Seen]
) -> None:
    """Put errors and drift into the record; what cannot be computed is left out, with the reason under `unmeasured`."""
    errors = None if watch is None else watch.result(sent)
    if errors is not None:
        record["aggregation"] = {**errors.totals(), "layers": errors.layers}
    problem = None if watch is None else watch.problem
    drift = summarise_drift({name: u.layers for name, u in uploads.items()})
    if drift and all(math.isfinite(value) for value in drift.values()):
        record["drift"] = {**drift, "layers": _drift_by_layer(uploads)}
    elif drift:
        problem = problem or "the clients' drift is not finite"
    if problem is not None:
        record["unmeasured"] = problem
        logging.getLogger("fedrot").warning("round %d: diagnostics are left out: %s", record["round"], problem)


def _drift_by_layer(uploads: Mapping[str, Seen]) -> dict[str, dict[str, float]]:
    """The mean over clients of every layer's drift numbers."""
    reports = [upload.layers for upload in uploads.values() if upload.layers]
    return {
        layer: {key: sum(report[layer][key] for report in reports) / len(reports) for key in values}
        for layer, values in reports[0].items()
    }


def outcome_of(broadcast: Broadcast) -> tuple[Adapter, ...]:
    """The updates whose sum is what the server made of a round's uploads: the adapter, and what the base gained."""
    return (broadcast.adapter,) if broadcast.base_step is None else (broadcast.adapter, broadcast.base_step)


def best_round(records: Iterable[Mapping[str, Any]]) -> int | None:
    """The round whose adapter scored best, the first of equals; None where no score is a number."""
    best: tuple[float, int] | None = None
    for record in records:
        scores = record.get("evaluation", {})
        value = scores.get(scores.get("metric"))
        if value is None or not math.isfinite(value):
            continue
        gain = -value if scores["metric"] in LOWER_IS_BETTER else value
        if best is None or gain > best[0]:
            best = gain, record["round"]
    return None if best is None else best[1]
