"""When clients were asked and answered, as a figure."""

from collections.abc import Sequence
from datetime import UTC

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fedrot.app.live.summary import plain
from fedrot.app.live.words import moment
from fedrot.app.report.figures import COLOURS, empty_figure
from fedrot.app.report.load import RunData
from fedrot.running.network.journal import Exchange
from fedrot.running.network.secure import STAGES

_SUM = "secure sum"
KINDS = {"join": COLOURS[3], "train": COLOURS[0], "answer": COLOURS[4], "evaluate": COLOURS[2], "finish": COLOURS[5]}
KINDS[_SUM] = COLOURS[7]
_OTHER, _REFUSED = COLOURS[6], COLOURS[1]
_DAY = 86400.0  # a unit of the axis of dates
_NARROWEST = 0.002  # of a bar, as a share of the axis: a quick exchange is seen too


def timeline(run: RunData) -> Figure:
    """A line a client: a bar for each exchange, from asking to the reply, and a cross where nothing could be used."""
    names = sorted({*run.sites, *(e.client for e in run.exchanges)})
    row = {name: number for number, name in enumerate(names)}
    begin = min(e.time - e.seconds for e in run.exchanges)
    end = max(e.time for e in run.exchanges)
    figure, (ax,) = empty_figure(height=max(2.4, 1.3 + 0.28 * len(names)))
    figure.set_figwidth(10.4)
    least = _NARROWEST * max(end - begin, 1e-3)
    for (client, kind), found in _grouped(run.exchanges).items():
        bars = [((e.time - e.seconds) / _DAY, max(e.seconds, least) / _DAY) for e in found]
        ax.broken_barh(bars, (row[client] - 0.32, 0.64), facecolors=KINDS.get(kind, _OTHER))
    refused = [e for e in run.exchanges if e.refused is not None]
    ax.plot([e.time / _DAY for e in refused], [row[e.client] for e in refused], "x", color=_REFUSED, mew=2, ms=7)
    ax.set_yticks(range(len(names)), [plain(name)[:40] for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.xaxis_date(UTC)
    ax.grid(False)
    ax.grid(True, axis="x", alpha=0.25)
    ax.set_title(f"Exchanges with each client, {moment(begin)} to {moment(end)} UTC", fontsize=11)
    seen = {_kind(e) for e in run.exchanges}
    marks: list[Patch | Line2D] = [Patch(color=colour, label=kind) for kind, colour in KINDS.items() if kind in seen]
    if seen - KINDS.keys():
        marks.append(Patch(color=_OTHER, label="other"))
    if refused:
        marks.append(
            Line2D([], [], linestyle="", marker="x", color=_REFUSED, mew=2, label="nothing that could be used")
        )
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8, frameon=False)
    return figure


def _grouped(exchanges: Sequence[Exchange]) -> dict[tuple[str, str], list[Exchange]]:
    found: dict[tuple[str, str], list[Exchange]] = {}
    for exchange in exchanges:
        found.setdefault((exchange.client, _kind(exchange)), []).append(exchange)
    return found


def _kind(exchange: Exchange) -> str:
    return _SUM if exchange.kind in STAGES else exchange.kind
