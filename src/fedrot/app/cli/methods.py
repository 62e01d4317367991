"""`fedrot methods`."""

from collections.abc import Sequence
from dataclasses import fields

from fedrot.app.cli.parser import CommandParser


def main(words: Sequence[str]) -> int:
    """Print every method: source, needs, settings. Plain lines, never cut."""
    parser = CommandParser(
        prog="fedrot methods",
        description="Aggregation methods. 'sum': a weighted sum of the uploads is enough; 'factors': the server must "
        "see each client's own.",
    )
    parser.parse_args(list(words))
    from fedrot.core.methods import methods

    rows = [("method", "source", "reduction", "needs", "settings")]
    for name, method in methods().items():
        has = method.capabilities
        needs = [what for what in ("client_state", "changes_base", "mixed_ranks", "second_phase") if getattr(has, what)]
        settings = ", ".join(f"{f.name}={f.default}" for f in fields(method))
        rows.append((name, method.paper, has.reduction, ", ".join(needs) or "-", settings or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
