"""`fedrot methods`."""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from fedrot.app.cli.parser import CommandParser

DESCRIPTION = """\
Aggregation methods. reduction: with 'sum' a weighted sum of the uploads is enough, with 'factors' the server must see
each client's own. needs: what it asks of clients and engine. takes: clients of different rank (ranks), a server
optimizer (opt), SCAFFOLD's control variates (variates), adapters outside of rounds as in fedrot merge (merge)."""

_NEEDS = {
    "client_state": "client state",
    "personal": "a model a client",
    "pooled": "all data in one place",
    "changes_base": "a base that changes",
    "second_phase": "a second phase",
}


def main(words: Sequence[str]) -> int:
    """Print every method: source, needs, settings. Plain lines, never cut."""
    parser = CommandParser(prog="fedrot methods", description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    call = parser.parse_args(list(words))
    from fedrot.core.methods import methods

    rows: list[dict[str, Any]] = [
        {
            "method": name,
            "source": method.paper + (" (a control)" if method.capabilities.control else ""),
            "reduction": method.capabilities.reduction,
            "needs": [words for key, words in _NEEDS.items() if getattr(method.capabilities, key)],
            "takes": method.capabilities.takes(),
            "settings": {f.name: f.default for f in fields(method)},
        }
        for name, method in methods().items()
    ]
    if call.json:
        print(json.dumps(rows))
        return 0
    table = [list(rows[0])]
    for row in rows:
        settings = ", ".join(f"{key}={value}" for key, value in row["settings"].items())
        table.append(
            [row["method"], row["source"], row["reduction"], *map(", ".join, (row["needs"], row["takes"])), settings]
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        cells = (cell or "-" for cell in line)
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    return 0
