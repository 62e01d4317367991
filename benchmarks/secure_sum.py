"""What a secure sum costs without training: seconds of one core and bytes.

Run: python benchmarks/secure_sum.py. Writes docs/results/secure_sum.csv, which the table of docs/privacy.md is held to.
"""

import csv
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.methods.base import Upload
from fedrot.core.seeding import generator
from fedrot.running.engine import Summed
from fedrot.running.network.messages import Message
from fedrot.running.network.secure.server import secure_sum
from fedrot.running.network.secure.site import Consents, Participant
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.secure import SecureSum
from table import markdown, read_csv

CSV = Path(__file__).parents[1] / "docs" / "results" / "secure_sum.csv"
COLUMNS = ("clients", "neighbours", "numbers", "client_seconds", "server_seconds", "up", "down")
CASES = ((4, 100_000, None), (10, 1_000_000, None), (30, 1_000_000, None), (100, 100_000, None), (100, 100_000, 40))
RANK = 8


def measured(clients: int, size: int, neighbours: int | None) -> tuple[float, float, int, int]:
    """(a client's seconds, the server's, bytes up and down by client) of one sum."""
    values = {
        "model": {"path": "-"},
        "data": {"path": "-", "train": "-"},
        "local": {"steps": 1},
        "partition": {"clients": clients},
        "federation": {"weighting": "uniform"},
        "secure": {"aggregation": True, "neighbours": neighbours},
    }
    side = size // (2 * RANK)
    form = Adapter({"layer": LoraPair(torch.zeros(RANK, side), torch.zeros(side, RANK), 1.0)})
    of = SecureSum(parse_recipe(values), 0, "train", form, frozenset({"a", "b"}), clients)
    held = {f"client-{i:03d}": 1 for i in range(clients)}
    seats: dict[str, Participant] = {}
    spent = 0.0
    with tempfile.TemporaryDirectory() as folder:

        def opened() -> Iterator[tuple[str, Message | str]]:
            nonlocal spent
            for client in held:
                rng = generator(client)
                changes = {name: 0.01 * torch.randn(t.shape, generator=rng) for name, t in form.tensors()}
                upload = Upload(
                    client, form.with_tensors(changes), held=1, used=1, metrics={"loss": 1.0, "steps": 1, "tokens": 1}
                )
                began = time.process_time()
                seats[client] = Participant(client, of, of.summand(upload), Consents(Path(folder) / client))
                reply = seats[client].opening()
                spent += time.process_time() - began
                yield client, reply

        def ask(requests: Mapping[str, Message]) -> Iterator[tuple[str, Message | str]]:
            nonlocal spent
            for client, request in requests.items():
                began = time.process_time()
                reply = seats[client].handle(request)
                spent += time.process_time() - began
                yield client, reply

        replies = list(opened())
        began, own = time.process_time(), spent
        (summed,) = secure_sum(of, replies, ask, held, list(held))
        server = time.process_time() - began - (spent - own)
    assert isinstance(summed, Summed), summed
    return spent / clients, server, summed.up // clients, summed.down // clients


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """The table of docs/privacy.md."""
    head = ["clients", "numbers", "a client's seconds", "the server's seconds", "up, by client"]
    lines = [[*head, "down, beside the broadcast"]]
    for row in rows:
        who = f"{row['clients']}, of whom {row['neighbours']} are neighbours" if row["neighbours"] else row["clients"]
        up, plain = int(row["up"]), 4 * int(row["numbers"])
        seconds = [f"{float(row['client_seconds']):.2f}", f"{float(row['server_seconds']):.1f}"]
        lines.append(
            [who, f"{int(row['numbers']):,}", *seconds, f"{up:,} ({up / plain:.2f} x)", f"{int(row['down']):,}"]
        )
    return markdown(lines)


def read() -> Sequence[Mapping[str, str]]:
    """The rows that were written."""
    return read_csv(CSV)


def main() -> None:
    """Measure, write, print the table."""
    with CSV.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for clients, size, neighbours in CASES:
            client, server, up, down = measured(clients, size, neighbours)
            whole = size // (2 * RANK) * 2 * RANK
            writer.writerow([clients, neighbours or "", whole, f"{client:.4g}", f"{server:.4g}", up, down])
    print(table(read()))


if __name__ == "__main__":
    main()
