"""The study's part of docs/results.md, and its figure, from docs/results/study.csv alone."""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedrot.app.compare.table import half_width
from study import METHODS, SEEDS, Task, best, search
from table import markdown

Row = Mapping[str, str]
Rows = Mapping[tuple[str, ...], Row]

TITLES = {
    "trec": "TREC-6, 10 clients, Dirichlet 0.5",
    "sst2": "SST-2, 10 clients, Dirichlet 0.5",
    "trec-drift": "TREC-6, 20 clients, Dirichlet 0.1, more local steps",
    "rte": "RTE, 10 clients, Dirichlet 0.5",
}


def chosen(rows: Rows, setting: str) -> dict[str, Task]:
    """What each method's search found, of the methods whose search has ended."""
    found = {method: best(rows, search(setting, method, rows)) for method in METHODS}
    return {method: task for method, task in found.items() if task is not None}


def by_seed(rows: Rows, task: Task) -> dict[int, Row]:
    """The runs with what was chosen, by seed."""
    mine = {key: row for key, row in rows.items() if key[:-1] == task.key[:-1]}
    return {int(row["seed"]): row for row in mine.values()}


def results(rows: Rows, setting: str) -> list[list[str]]:
    """Methods over their seeds, header first."""
    tasks = chosen(rows, setting)
    base = by_seed(rows, tasks["fedit"]) if "fedit" in tasks else {}
    head = ["method", "rate", "strength", "seeds", "test accuracy", "against fedit, 95 %", "worst client"]
    lines = [[*head, "error before", "sent", "floor"]]
    for method, task in tasks.items():
        mine = by_seed(rows, task)
        scores = [float(row["test"]) for row in mine.values()]
        spread = f" ± {stdev(scores):.4f}" if len(scores) > 1 else ""
        lines.append(
            [
                method.split()[0],
                f"{task.lr:g}",
                task.strength or "",
                str(len(mine)),
                f"{mean(scores):.4f}{spread}",
                "" if method == "fedit" else difference(mine, base),
                f"{mean(float(row['worst']) for row in mine.values()):.4f}",
                *(f"{mean(float(row[key]) for row in mine.values()):.2%}" for key in ("before", "sent", "floor")),
            ]
        )
    return lines


def gaps(mine: Mapping[int, Row], base: Mapping[int, Row]) -> list[float]:
    """Test accuracy less the baseline's, for the seeds that both have."""
    return [float(mine[seed]["test"]) - float(base[seed]["test"]) for seed in sorted(mine.keys() & base.keys())]


def difference(mine: Mapping[int, Row], base: Mapping[int, Row]) -> str:
    """'+0.0100 [-0.0100, +0.0300]': paired by seed, with the interval of the mean."""
    pairs = gaps(mine, base)
    half = half_width(pairs)
    if not pairs or half is None:
        return ""
    return f"{mean(pairs):+.4f} [{mean(pairs) - half:+.4f}, {mean(pairs) + half:+.4f}]"


def searches(rows: Rows, setting: str) -> list[list[str]]:
    """Validation accuracy on seed 0 by rate, the chosen one in bold, header first."""
    tasks = {method: search(setting, method, rows) for method in METHODS}
    rates = sorted({task.lr for mine in tasks.values() for task in mine if task.key in rows})
    lines = [["method", *(f"{rate:g}" for rate in rates)]]
    for method, winner in chosen(rows, setting).items():
        line = [method]
        for rate in rates:
            mine = [task for task in tasks[method] if task.lr == rate and task.key in rows]
            texts = []
            for task in mine:
                score = f"{float(rows[task.key]['validation']):.3f}"
                # Of several strengths at one rate, each says its own.
                about = f" ({task.strength})" if len(mine) > 1 else ""
                texts.append(f"**{score}**{about}" if task == winner else score + about)
            line.append(", ".join(texts))
        lines.append(line)
    return lines


def section(rows: Rows) -> str:
    """The tables of every setting that has been run."""
    parts = []
    for setting, seeds in SEEDS.items():
        tasks = chosen(rows, setting)
        if not tasks:
            parts.append(f"### {TITLES[setting]}\n\nNot run yet.\n")
            continue
        left = [method for method in METHODS if method not in tasks or len(by_seed(rows, tasks[method])) < seeds]
        note = f"Not finished yet: {', '.join(left)}.\n\n" if left else ""
        found = "Search, validation accuracy on seed 0 by rate (strengths in brackets):"
        tables = f"{markdown(results(rows, setting))}\n{found}\n\n{markdown(searches(rows, setting))}"
        parts.append(f"### {TITLES[setting]}\n\n{note}{tables}")
    return "\n".join(parts)


def core_hours(rows: Rows) -> float:
    """What all runs took together."""
    return sum(float(row["cpu_seconds"]) for row in rows.values()) / 3600


def draw(rows: Rows, out: Path) -> None:
    """A panel a setting: test accuracy less FedIT's, with its interval, a dot a seed."""
    settings = [setting for setting in SEEDS if len(chosen(rows, setting)) == len(METHODS)]
    figure = Figure(figsize=(3.4 * len(settings) + 1.2, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, setting in enumerate(settings):
        ax = figure.add_subplot(1, len(settings), number + 1)
        tasks = chosen(rows, setting)
        base = by_seed(rows, tasks["fedit"])
        names = [method for method in METHODS if method != "fedit"]
        for place, method in enumerate(names):
            pairs = gaps(by_seed(rows, tasks[method]), base)
            half = half_width(pairs) or 0.0
            ax.errorbar(mean(pairs), place, xerr=half, fmt="o", color="#0072B2", markersize=5, capsize=3)
            ax.plot(pairs, [place] * len(pairs), ".", color="#999999", markersize=4)
        ax.axvline(0.0, color="#888888", linewidth=0.8)
        ax.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
        ax.invert_yaxis()
        ax.set_title(TITLES[setting].replace(", ", "\n", 1), fontsize=9)
        ax.set_xlabel("test accuracy less FedIT's", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, axis="x", alpha=0.25)
    figure.savefig(out, dpi=140)
