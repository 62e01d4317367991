"""The figures of a report, each from plain numbers to a matplotlib figure."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedrot.app.report.load import RunData, last_in_rounds
from fedrot.learning.scores import LOWER_IS_BETTER, main_score

# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
PHASES = ("train", "align", "check", "aggregate", "diagnose", "evaluate")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG. Its words are drawn as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _no_mathematics(figure)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)


def _no_mathematics(figure: Figure) -> None:
    """Names of clients, labels and runs are others', and `$` in them begins no formula; the powers of ten of a
    logarithmic axis are formulas.
    """
    axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) if axis.get_scale() == "log"]
    powers = [label for axis in axes for label in axis.get_ticklabels(which="both")]
    for text in figure.findobj():
        if isinstance(text, Text) and text not in powers:
            text.set_parse_math(False)


def empty_figure(columns: int = 1, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A row of panels in the house's look."""
    figure = Figure(figsize=(5.2 * columns, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, axis="y", alpha=0.25)
    return figure, axes


def by_round(ax: Axes, title: str, ylabel: str) -> None:
    """Labels, whole rounds, and a legend where there is something to name."""
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("round")
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, _ = ax.get_legend_handles_labels()
    if handles:
        ax.legend(fontsize=8, frameon=False)


def _legend_below(ax: Axes, columns: int) -> None:
    """Beside bars a legend would cover one of them."""
    ax.legend(fontsize=8, frameon=False, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _line(ax: Axes, run: RunData, pick: Callable[[dict[str, Any]], Any], label: str, **style: Any) -> None:
    rounds, values = run.series(pick)
    if rounds:
        ax.plot(rounds, values, label=label, marker=style.pop("marker", "o"), markersize=3.5, **style)


def _colours(runs: Sequence[RunData]) -> list[tuple[RunData, str]]:
    return [(run, COLOURS[i % len(COLOURS)]) for i, run in enumerate(runs)]


def learning(runs: Sequence[RunData]) -> Figure:
    """The score of the global model, and losses, by round."""
    figure, (left, right) = empty_figure(2)
    for run, colour in _colours(runs):
        _line(left, run, lambda r: main_score(r["evaluation"]), run.label, color=colour)
        worst = {"color": colour, "linestyle": ":", "alpha": 0.7}
        _line(left, run, lambda r: r["evaluation"]["worst"], f"{run.label}, worst client", **worst)
        _line(right, run, lambda r: r["evaluation"]["loss"], f"{run.label}, evaluation", color=colour)
        _line(right, run, lambda r: r["train"]["loss"], f"{run.label}, local training", color=colour, linestyle=":")
    split = runs[0].recipe.evaluation.split
    name = score_name(last_in_rounds(runs[0].metrics))
    by_round(left, f"{name.capitalize()} on {split}", name)
    by_round(right, "Loss", "cross-entropy")
    return figure


def aggregation(runs: Sequence[RunData]) -> Figure:
    """Relative aggregation error before and after alignment, and the rank-r floor, a panel a run."""
    figure, axes = empty_figure(len(runs))
    for ax, run in zip(axes, runs, strict=True):
        estimated = any(record.get("aggregation", {}).get("estimated") for record in run.metrics)
        _line(ax, run, lambda r: r["aggregation"]["before_relative"], "before alignment", color=COLOURS[1])
        after = {"color": COLOURS[0], "linestyle": "--", "marker": "s"}
        _line(ax, run, lambda r: r["aggregation"]["after_relative"], "after alignment", **after)
        if any(_beyond_alignment(record) for record in run.metrics):
            sent = {"color": COLOURS[2], "marker": "^"}
            _line(ax, run, lambda r: r["aggregation"]["sent_relative"], "what the server sent", **sent)
        best = {"color": COLOURS[3], "linestyle": "-."}
        _line(ax, run, lambda r: r["aggregation"]["best_relative"], "best rotation", **best)
        floor = {"color": COLOURS[6], "linestyle": ":"}
        _line(ax, run, lambda r: r["aggregation"]["floor_relative"], f"rank-{run.recipe.lora.rank} floor", **floor)
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        by_round(ax, f"Aggregation error, {run.label}{' (estimated)' if estimated else ''}", "of the ideal update")
    return figure


def _beyond_alignment(record: Mapping[str, Any]) -> bool:
    """The server made something else of the uploads than their factor-wise average."""
    errors = record.get("aggregation", {})
    after = errors.get("after_relative", 0.0)
    return abs(errors.get("sent_relative", after) - after) > 1e-6 + 1e-3 * float(after)


def gain(runs: Sequence[RunData]) -> Figure:
    """How alignment changed the error, and how much of the drift only turned the frame."""
    figure, (left, right) = empty_figure(2)
    for run, colour in _colours(runs):
        _line(left, run, lambda r: _change(r["aggregation"]), run.label, color=colour)
        _line(right, run, lambda r: r["drift"]["gauge_share"], f"{run.label}, gauge share of drift", color=colour)
        rho = {"color": colour, "linestyle": "--", "marker": "s"}
        _line(right, run, lambda r: r["aggregation"]["rho"], f"{run.label}, rho", **rho)
    left.axhline(0.0, color="#888888", linewidth=0.8)
    for ax in (left, right):
        ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    by_round(left, "Error after alignment against before", "change")
    by_round(right, "Was rotation the problem?", "share")
    return figure


def _change(errors: Mapping[str, float]) -> float | None:
    return errors["after"] / errors["before"] - 1 if errors["before"] > 0 else None


def drift(runs: Sequence[RunData]) -> Figure:
    """How far clients' factors move from the broadcast, and how far they are turned."""
    figure, (left, right) = empty_figure(2)
    for run, colour in _colours(runs):
        _line(left, run, lambda r: r["drift"]["a_min"], f"{run.label}, A", color=colour)
        _line(left, run, lambda r: r["drift"]["b_min"], f"{run.label}, B", color=colour, linestyle="--", marker="s")
        _line(right, run, lambda r: math.degrees(r["drift"]["angle_mean"]), f"{run.label}, mean", color=colour)
        most = {"color": colour, "linestyle": ":"}
        _line(right, run, lambda r: math.degrees(r["drift"]["angle_max"]), f"{run.label}, largest", **most)
    by_round(left, "Least drift over clients", "distance to the broadcast")
    by_round(right, "Rotation applied (largest angle of a layer)", "degrees")
    return figure


def label_shares(counts: Mapping[str, Sequence[int]], labels: Sequence[str]) -> Figure:
    """Who holds what: a bar a client, divided by label."""
    clients = list(counts)
    figure, (ax,) = empty_figure(1, height=max(2.0, 0.8 + 0.28 * len(clients)))
    left = [0] * len(clients)
    many = len(labels) > len(COLOURS)
    for number, label in enumerate(labels):
        values = [counts[client][number] for client in clients]
        colour = COLOURS[number % len(COLOURS)]
        ax.barh(range(len(clients)), values, left=left, color=colour, label=None if many else label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    ax.set_yticks(range(len(clients)), clients)
    ax.invert_yaxis()
    ax.grid(False)
    ax.grid(True, axis="x", alpha=0.25)
    ax.set_title("Training examples by client and label" + (f" ({len(labels)} labels)" if many else ""), fontsize=11)
    if not many:
        _legend_below(ax, 4)
    return figure


def clients(runs: Sequence[RunData]) -> Figure:
    """The score of every client's part of the split."""
    runs = [run for run in runs if last_in_rounds(run.metrics)]
    found = [run.scores for run in runs]
    names = sorted({client for scores in found for client in scores["by_client"]})
    figure, (ax,) = empty_figure(1, height=max(2.0, 0.8 + 0.28 * len(names) * len(runs)))
    step = 0.8 / len(runs)
    for number, ((run, colour), scores) in enumerate(zip(_colours(runs), found, strict=True)):
        places = [i + (number - (len(runs) - 1) / 2) * step for i in range(len(names))]
        ax.barh(places, [scores["by_client"].get(n, 0.0) for n in names], height=step, color=colour, label=run.label)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(False)
    ax.grid(True, axis="x", alpha=0.25)
    name, rounds = score_name(found[0]), {run.round for run in runs}
    if name not in LOWER_IS_BETTER:
        ax.set_xlim(0, 1)
    after = f", after round {rounds.pop()}" if len(rounds) == 1 else ""
    ax.set_title(f"{name.capitalize()} by client on {found[0]['split']}{after}", fontsize=11)
    _legend_below(ax, len(runs))
    return figure


def score_name(scores: Mapping[str, Any]) -> str:
    """What the score that counts is called."""
    return str(scores.get("metric", "score")).replace("_", " ")


def privacy(runs: Sequence[RunData]) -> Figure:
    """Epsilon by round, and the budgets that were given."""
    figure, (ax,) = empty_figure()
    for run, colour in _colours(runs):
        _line(ax, run, lambda r: r["privacy"]["epsilon"], run.label, color=colour)
        if run.recipe.privacy.budget is not None:
            ax.axhline(run.recipe.privacy.budget, color=colour, linestyle=":", label=f"{run.label}, budget")
    ax.set_ylim(bottom=0)
    by_round(ax, "Privacy spent after each round", "epsilon")
    return figure


def cost(runs: Sequence[RunData]) -> Figure:
    """Seconds by phase and bytes by direction, all rounds together."""
    figure, (left, right) = empty_figure(2)
    names, places = [run.label for run in runs], range(len(runs))
    bottom = [0.0] * len(runs)
    for number, phase in enumerate(PHASES):
        values = [sum(record["seconds"].get(phase, 0.0) for record in run.metrics) for run in runs]
        left.bar(places, values, bottom=bottom, color=COLOURS[number], label=phase, width=0.5)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    left.set_xticks(places, names)
    left.set_title("Seconds by phase, workers added up", fontsize=11)
    _legend_below(left, 3)
    for offset, way, colour in ((-0.2, "down", COLOURS[0]), (0.2, "up", COLOURS[1])):
        values = [sum(record["bytes"][way] for record in run.metrics) / 1e6 for run in runs]
        right.bar([i + offset for i in places], values, width=0.4, color=colour, label=way)
    right.set_xticks(places, names)
    right.set_title("Megabytes, server to clients (down) and back (up)", fontsize=11)
    _legend_below(right, 2)
    return figure
