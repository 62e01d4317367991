"""The figures of a comparison: rows (methods) over seeds, each from run folders' numbers to a matplotlib figure."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fedrot.app.report.figures import COLOURS, by_round, empty_figure, score_name
from fedrot.app.report.load import RunData, last_in_rounds
from fedrot.learning.scores import main_score

Groups = Mapping[str, Sequence[RunData]]  # row -> its runs, a seed each
_STYLES = ("-", "--", ":", "-.")
_SMALLEST = 1e-6  # of an error that is drawn on a logarithmic axis


def style(number: int) -> dict[str, Any]:
    """Colour and line of the n-th row: no two of the first 32 are alike."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": _STYLES[number // len(COLOURS) % len(_STYLES)]}


def _band(ax: Axes, groups: Groups, pick: Callable[[dict[str, Any]], Any]) -> None:
    """A line of means and a band of one standard deviation over seeds, for every row that has values."""
    for number, (label, runs) in enumerate(groups.items()):
        values: dict[int, list[float]] = {}
        for run in runs:
            for round, value in zip(*run.series(pick), strict=True):
                values.setdefault(round, []).append(value)
        if not values:
            continue
        rounds = sorted(values)
        middle = [mean(values[r]) for r in rounds]
        spread = [stdev(values[r]) if len(values[r]) > 1 else 0.0 for r in rounds]
        look = style(number)
        ax.plot(rounds, middle, label=label, marker="o", markersize=3, **look)
        low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
        ax.fill_between(rounds, low, high, color=look["color"], alpha=0.12, linewidth=0)


def _finish(figure: Figure, axes: Sequence[Axes]) -> Figure:
    """One legend for all panels, below them: it would cover lines."""
    found: dict[str, Any] = {}
    for ax in axes:
        found |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        if (legend := ax.get_legend()) is not None:
            legend.remove()
    if found:
        columns = 3 if len(axes) > 1 else 2
        figure.legend(
            list(found.values()), list(found), loc="outside lower center", ncols=columns, fontsize=8, frameon=False
        )
    return figure


def score(groups: Groups) -> Figure:
    """The score that counts and the loss of the evaluation in rounds."""
    figure, axes = empty_figure(2, height=_height(groups))
    _band(axes[0], groups, lambda r: main_score(r["evaluation"]))
    _band(axes[1], groups, lambda r: r["evaluation"]["loss"])
    split = next(iter(groups.values()))[0].recipe.evaluation.split
    name = score_name(last_in_rounds(_first(groups).metrics))
    by_round(axes[0], f"{name.capitalize()} on {split}", name)
    by_round(axes[1], f"Loss on {split}", "cross-entropy")
    return _finish(figure, axes)


def scores(groups: Groups) -> Figure:
    """Every seed's score as a dot, the mean as a line."""
    figure, (ax,) = empty_figure(1, height=max(2.2, 1.0 + 0.3 * len(groups)))
    for number, runs in enumerate(groups.values()):
        values = [main_score(run.scores) for run in runs]
        ax.plot(values, [number] * len(values), "o", markersize=5, alpha=0.7, color=style(number)["color"])
        ax.plot([mean(values)] * 2, [number - 0.35, number + 0.35], color="#333333", linewidth=1.5)
    ax.set_yticks(range(len(groups)), list(groups), fontsize=8)
    first = _first(groups).scores
    name = score_name(first)
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.grid(False)
    ax.grid(True, axis="x", alpha=0.25)
    ax.set_title(f"{name.capitalize()} on {first['split']}, every seed", fontsize=11)
    return figure


def error(groups: Groups) -> Figure:
    """What the server lost of the ideal update, and what alignment gained."""
    figure, axes = empty_figure(2, height=_height(groups))
    _band(axes[0], groups, lambda r: max(r["aggregation"]["sent_relative"], _SMALLEST))
    axes[0].set_yscale("log")
    _band(axes[1], groups, _gain)
    axes[1].axhline(0.0, color="#888888", linewidth=0.8)
    axes[1].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    by_round(axes[0], "Aggregation error", "of the ideal update")
    by_round(axes[1], "Alignment gain", "fall of the error")
    return _finish(figure, axes)


def _gain(record: dict[str, Any]) -> float | None:
    errors = record["aggregation"]
    turned = record["drift"]["turn_mean"] > 0
    return 1 - errors["after"] / errors["before"] if turned and errors["before"] > 0 else None


def drift(groups: Groups) -> Figure:
    """min_i ||A_i - A_ref|| and min_i ||B_i - B_ref|| by round."""
    figure, axes = empty_figure(2, height=_height(groups))
    _band(axes[0], groups, lambda r: r["drift"]["a_min"])
    _band(axes[1], groups, lambda r: r["drift"]["b_min"])
    for ax, side in zip(axes, "AB", strict=True):
        by_round(ax, f"Least drift of {side}", "distance to the broadcast")
    return _finish(figure, axes)


def rotation(groups: Groups) -> Figure:
    """max_i ||R_i - I|| / ||A_i - A_ref|| by round, and the rotation's angle."""
    figure, axes = empty_figure(2, height=_height(groups))
    _band(axes[0], groups, lambda r: r["drift"]["turn_per_drift_max"] or None)
    _band(axes[1], groups, lambda r: math.degrees(r["drift"]["angle_mean"]) or None)
    by_round(axes[0], "Rotation over drift, largest", "||R - I|| / ||A - A_ref||")
    by_round(axes[1], "Largest angle of a layer, mean of clients", "degrees")
    return _finish(figure, axes)


def sweep(key: str, points: Sequence[tuple[str, str | None, RunData]]) -> Figure:
    """Score against a swept key: (row without the key, its value or None, run)."""
    order = list(dict.fromkeys(value for _, value, _ in points if value is not None))
    numbers = [number for value in order if (number := _number(value)) is not None]
    numeric = len(numbers) == len(order)
    places = numbers if numeric else [float(place) for place in range(len(order))]
    figure, (ax,) = empty_figure(1, height=4.0)
    for number, row in enumerate(dict.fromkeys(row for row, _, _ in points)):
        mine = [(value, main_score(run.scores)) for r, value, run in points if r == row]
        if all(value is None for value, _ in mine):
            ax.axhline(mean(a for _, a in mine), label=row, **style(number))
            continue
        values = [[a for v, a in mine if v == value] for value in order]
        known = [(place, v) for place, v in zip(places, values, strict=True) if v]
        spread = [stdev(v) if len(v) > 1 else 0.0 for _, v in known]
        ax.errorbar(
            [p for p, _ in known],
            [mean(v) for _, v in known],
            spread,
            label=row,
            marker="o",
            capsize=3,
            **style(number),
        )
    if not numeric:
        ax.set_xticks(places, order)
    ax.set_xlabel(key)
    name = score_name(points[0][2].scores)
    ax.set_ylabel(name)
    ax.set_title(f"{name.capitalize()} against {key}", fontsize=11)
    return _finish(figure, [ax])


def _first(groups: Groups) -> RunData:
    return next(iter(groups.values()))[0]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _height(groups: Groups) -> float:
    return 3.4 + 0.2 * ((len(groups) + 2) // 3)
