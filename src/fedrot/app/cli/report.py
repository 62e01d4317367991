"""`fedrot report RUN... [--out DIR]`."""

from collections.abc import Sequence
from pathlib import Path

from fedrot.app.cli.parser import CommandParser


def main(words: Sequence[str]) -> int:
    """Write figures and an HTML page, and print its path."""
    parser = CommandParser(prog="fedrot report", description="Figures and one HTML page from one or more run folders.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, shown side by side")
    parser.add_argument(
        "--out", type=Path, help="folder to write to (default: the run folder; runs/report for several)"
    )
    call = parser.parse_args(list(words))
    from fedrot.app.report.build import build_report

    out = call.out or (call.runs[0] if len(call.runs) == 1 else Path("runs/report"))
    print(build_report(call.runs, out))
    return 0
