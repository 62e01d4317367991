"""How a run stands, in lines of text for a terminal."""

from collections.abc import Sequence

from rich.cells import cell_len

from fedrot.app.live.summary import Client, Dropped, Finished, Summary
from fedrot.app.live.words import ago, size

_CLIENT = (
    "client",
    "asked",
    "answered",
    "down",
    "up",
    "headers",
    "median s",
    "longest s",
    "last heard",
    "dropped",
    "state",
)
_DROPPED = ("round", "when", "what", "client", "reason")
_LEFT = ("client", "what", "state", "reason")  # columns of text
_SHOWN = 10  # of what was dropped
_NAME = 40  # characters of a client's name


def told(summary: Summary, now: float) -> str:
    """A summary in lines of text."""
    of = "" if summary.planned is None else f" of {summary.planned}"
    head = [summary.name, summary.method or "waits for its clients", f"{len(summary.rounds)}{of} rounds"]
    head.append("finished" if summary.finished else f"changed {ago(now - (summary.changed or now))}")
    lines = ["  ".join(head), *(last_round(one) for one in summary.rounds[-1:])]
    if summary.clients:
        lines += ["", *columns([_CLIENT, *(client_row(one, now) for one in summary.clients)])]
    if summary.dropped:
        earlier = len(summary.dropped) - _SHOWN
        more = f" ({earlier} earlier ones are not shown)" if earlier > 0 else ""
        lines += ["", f"dropped or refused{more}"]
        lines += columns([_DROPPED, *(dropped_row(one, now) for one in summary.dropped[-_SHOWN:])])
    return "\n".join(lines)


def last_round(one: Finished) -> str:
    """A finished round in one line."""

    def shown(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.4f}"

    words = [f"round {one.round}", f"{one.used} used"] + ([f"{one.dropped} dropped"] if one.dropped else [])
    words += [] if one.loss is None else [f"loss {shown(one.loss)}"]
    if one.metric is not None:
        scored = f"{one.split} {one.metric.replace('_', ' ')} {shown(one.score)}"
        words.append(f"{scored} (worst client {shown(one.worst)})")
    words += [] if one.epsilon is None else [f"epsilon {one.epsilon:.3g}"]
    return "  ".join([*words, f"{one.seconds:.1f} s"])


def client_row(one: Client, now: float) -> list[str]:
    """A client's cells."""
    traffic = one.traffic
    return [
        one.name[:_NAME],
        str(traffic.requests),
        str(traffic.answered),
        *map(size, (traffic.down, traffic.up, traffic.headers)),
        *("-" if value is None else f"{value:.3g}" for value in (one.median, one.longest)),
        "-" if one.last_heard is None else ago(now - one.last_heard),
        str(one.dropped),
        one.state + (f": {one.reason}" if one.reason else ""),
    ]


def dropped_row(one: Dropped, now: float) -> list[str]:
    """The cells of something that was not used."""
    when = "-" if one.time is None else ago(now - one.time)
    return ["-" if one.round is None else str(one.round), when, one.kind, one.client[:_NAME], one.reason]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, their cells one below the other; text on the left, what is counted on the right."""
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = []
        for name, cell, width in zip(rows[0], row, widths, strict=True):
            space = " " * (width - cell_len(cell))
            cells.append(cell + space if name in _LEFT else space + cell)
        lines.append("  ".join(cells).rstrip())
    return lines
