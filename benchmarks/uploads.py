"""What compressed uploads cost in precision and save in bytes, on recorded uploads of VADER and MiniLM.

Run: python benchmarks/uploads.py. Writes docs/results/uploads.csv, which the table of docs/methods.md is held to; every
codec gets the very same uploads. `factors` rounds the factors themselves to bfloat16, for comparison with rounding
their change.

bytes: of a payload, of float32's. change: ||mean that arrived - mean||, of the norm of the mean's change, over rounds.
sum: the same of the changes of all rounds together. update: ||s Bbar Abar of what arrived - s Bbar Abar||, of the norm
of the ideal update, as the aggregation error is given; averaging is that error.
"""

import argparse
import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.aggregate import combine
from fedrot.core.compression import Codec, compress, payload_bytes
from fedrot.core.packed import Layout
from fedrot.core.reduce import Reduction
from fedrot.core.seeding import generator
from recorded import Recorded, Setting, record
from table import markdown, read_csv

WRITTEN = Path(__file__).parents[1] / "docs" / "results" / "uploads.csv"
PARTS = frozenset({"a", "b"})
CODECS: tuple[Codec, ...] = ("bf16", "int8")
LINES = {
    "factors": "factors as bf16, for comparison",
    "bf16": "bf16 without feedback",
    "bf16 feedback": "bf16",
    "int8": "int8 without feedback",
    "int8 feedback": "int8",
}
NUMBERS = ("bytes", "change", "sum", "update", "averaging")
OPTIMIZERS = ("adamw", "sgd")
Rows = Sequence[Mapping[str, str]]


def arrivals(rounds: Sequence[Recorded], codec: Codec, feedback: bool) -> Iterator[list[Adapter]]:
    """What the server makes of every round's uploads."""
    lost: dict[int, Mapping[str, Tensor]] = {}
    for one in rounds:
        layout, arrived = Layout.of(one.reference, PARTS), []
        for client, adapter in enumerate(one.adapters):
            rng = generator("compression", one.round, client)
            made = compress(adapter, one.reference, layout, codec, rng, lost.get(client) if feedback else None)
            lost[client] = made.lost
            arrived.append(made.adapter)
        yield arrived


def mean(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted mean in float64."""
    reduction = Reduction(adapters[0].map(Tensor.double), PARTS)
    for adapter, weight in zip(adapters, weights, strict=True):
        reduction.add(adapter, weight)
    return reduction.result().mean


def apart(one: Adapter, other: Adapter) -> list[Tensor]:
    """The differences of all tensors."""
    return [x.double() - y.double() for (_, x), (_, y) in zip(one.tensors(), other.tensors(), strict=True)]


def norm(tensors: Sequence[Tensor]) -> float:
    """Of all of them together."""
    return float(sum((t.square().sum() for t in tensors), torch.zeros(()))) ** 0.5


def measure(rounds: Sequence[Recorded], what: str) -> dict[str, float]:
    """The numbers of a line, by column."""
    layout = Layout.of(rounds[0].reference, PARTS)
    codec = next((codec for codec in CODECS if codec in what), None)
    if codec is None:
        arrived = [[a.map(lambda t: t.bfloat16().float()) for a in one.adapters] for one in rounds]
    else:
        arrived = list(arrivals(rounds, codec, "feedback" in what))
    exact = [mean(one.adapters, one.weights) for one in rounds]
    found = [mean(these, one.weights) for these, one in zip(arrived, rounds, strict=True)]
    off = [apart(*pair) for pair in zip(found, exact, strict=True)]
    change = [apart(e, one.reference) for e, one in zip(exact, rounds, strict=True)]
    updates, averaging = [], []
    for f, e, one in zip(found, exact, rounds, strict=True):
        errors = combine(one.adapters, one.weights, "fedit", one.reference).errors.totals()
        update = norm([f.layers[name].delta() - e.layers[name].delta() for name in e.layers])
        updates.append(update / float(errors["ideal"]))
        averaging.append(float(errors["before_relative"]))
    return {
        "bytes": payload_bytes(layout, codec or "bf16") / payload_bytes(layout, "none"),
        "change": sum(norm(o) / norm(c) for o, c in zip(off, change, strict=True)) / len(rounds),
        "sum": norm([sum(t) for t in zip(*off, strict=True)]) / norm([sum(t) for t in zip(*change, strict=True)]),
        "update": sum(updates) / len(rounds),
        "averaging": sum(averaging) / len(rounds),
    }


def read(path: Path = WRITTEN) -> Rows:
    """The rows that were written."""
    return read_csv(path)


def table(rows: Rows, rank: str = "4") -> str:
    """The table of docs/methods.md: bytes, and what is lost of a round's change and of all rounds'."""
    mine = {(row["line"], row["optimizer"]): row for row in rows if row["rank"] == rank}
    both = f"({', '.join(OPTIMIZERS)})"
    lines = [["", "bytes", f"lost in a round {both}", f"lost of three rounds' sum {both}"]]
    for what, words in LINES.items():
        lost = [
            ", ".join(percent(float(mine[what, optimizer][key])) for optimizer in OPTIMIZERS)
            for key in ("change", "sum")
        ]
        lines.append([words, f"{100 * float(mine[what, OPTIMIZERS[0]]['bytes']):.3g}%", *lost])
    return markdown(lines)


def percent(value: float) -> str:
    """With two digits behind the point below 100%."""
    return f"{100 * value:.2f}%" if value < 1 else f"{100 * value:.0f}%"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", default="4,64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=WRITTEN)
    call = parser.parse_args()
    torch.set_num_threads(call.threads)
    with call.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["rank", "optimizer", "line", *NUMBERS])
        for rank in map(int, call.ranks.split(",")):
            for optimizer in OPTIMIZERS:
                rounds = list(record(Setting("vader", optimizer, rank, "common", 0), None, call.steps))
                for what in LINES:
                    found = measure(rounds, what)
                    cells = (f"{key} {found[key]:.3%}" for key in NUMBERS)
                    print(f"rank {rank} {optimizer:5} {what:13}", *cells, sep="  ", flush=True)
                    writer.writerow([rank, optimizer, what, *(f"{found[key]:.6g}" for key in NUMBERS)])


if __name__ == "__main__":
    main()
