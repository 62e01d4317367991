"""docs/results.md and its figure, from the committed result files alone. Run: make results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import language_page
from fedrot.app.compare.table import Outcome, cells, to_markdown
from fedrot.app.compare.table import rows as table_rows
from study import done_before
from study_page import core_hours, section
from study_page import draw as draw_study
from table import markdown, read_csv

DOCS = Path(__file__).parents[1] / "docs"
REPLAY, VADER = DOCS / "results" / "replay.csv", DOCS / "results" / "vader"
Rows = Sequence[Mapping[str, str]]
Column = tuple[str, str, str]  # task, optimizer, rank

COLOURS = {"fedrot_svd": "#009E73", "floor": "#000000", "best rotation": "#CC79A7", "consensus": "#0072B2"}
DRAWN = (
    "A .4",
    "A 1",
    "B 1",
    "joint 1",
    "joint auto",
    "consensus",
    "best rotation",
    "lora_fair",
    "fedask",
    "fedrot_svd",
)


def columns(rows: Rows) -> list[Column]:
    """(task, optimizer, rank) in the order in which they come."""
    return list(dict.fromkeys((row["task"], row["optimizer"], row["rank"]) for row in rows))


def values(rows: Rows, start: str, column: Column, variant: str, key: str = "ratio") -> list[float]:
    """One number a seed and round."""
    return [
        float(row[key])
        for row in rows
        if (row["start"], row["variant"]) == (start, variant) and (row["task"], row["optimizer"], row["rank"]) == column
    ]


def replay_table(rows: Rows, start: str) -> str:
    """Variants by settings: the mean ratio, with least and largest where they differ."""
    where = columns(rows)
    lines = [["variant", *(f"{task} {optimizer} r={rank}" for task, optimizer, rank in where)]]
    before = [mean(values(rows, start, column, "floor", "before")) for column in where]
    lines.append(["error before, of the ideal update", *(f"{value:.2%}" for value in before)])
    for variant in dict.fromkeys(row["variant"] for row in rows if row["round"] != "all"):
        found = [values(rows, start, column, variant) for column in where]
        bold = "**" if variant in ("floor", "best rotation") else ""
        lines.append([bold + variant + bold, *(spread(each) for each in found)])
    return markdown(lines)


def memory_table(rows: Rows) -> str:
    """What is lost of all rounds together, with and without error feedback, over FedIT's."""
    where = columns(rows)
    lines = [["method", *(f"{task} {optimizer} r={rank}" for task, optimizer, rank in where)]]
    for variant in dict.fromkeys(row["variant"] for row in rows if row["round"] == "all"):
        found = [spread(values(rows, "common", column, variant)) for column in where]
        lines.append([variant.removeprefix("sum: "), *found])
    return markdown(lines)


def spread(found: Sequence[float]) -> str:
    """'1.02 (0.98 to 1.1)', or one number where all are alike."""
    middle, low, high = (short(f(found)) for f in (mean, min, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def short(value: float) -> str:
    """Three digits after the point where they matter."""
    return "0" if value < 5e-4 else f"{value:.3f}" if value < 10 else f"{value:.0f}"


def claims(rows: Rows) -> str:
    """What the benchmark is asked: each a line with its figure."""
    groups = [(start, column) for start in ("common", "own") for column in columns(rows)]
    gap = max(
        svd - floor
        for start, column in groups
        for svd, floor in zip(
            values(rows, start, column, "fedrot_svd"), values(rows, start, column, "floor"), strict=True
        )
    )
    lines = [
        ["question", "figure"],
        ["`fedrot_svd` above the floor, largest in all rounds", f"{gap:.1e} of the error before"],
    ]
    for start, column in groups:
        task, optimizer, rank = column
        if start == "common" and rank != "64":
            continue
        pairs = zip(values(rows, start, column, "consensus"), values(rows, start, column, "best rotation"), strict=True)
        shares = [(1 - mine) / (1 - best) for mine, best in pairs if best < 0.99]
        text = spread(shares) if shares else "the best rotation gains less than 1 %: nothing to recover"
        what = "share of the best rotation's gain that `fedrot_consensus` has"
        lines.append([f"{what}, {start} start, {task} {optimizer} r={rank}", text])
    return markdown(lines)


def draw(rows: Rows, out: Path) -> None:
    """A panel a kind of start: error after / before of the variants, a dot a setting (mean over rounds and seeds)."""
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for number, start in enumerate(("common", "own")):
        ax = figure.add_subplot(1, 2, number + 1)
        for place, variant in enumerate(DRAWN):
            for column in columns(rows):
                ratio, floor = (mean(values(rows, start, column, v)) for v in (variant, "floor"))
                marker = {"adamw": "o", "sgd": "s"}[column[1]]
                shade = {"4": "#56B4E9", "64": "#D55E00"}[column[2]]
                ax.plot(ratio, place, marker, color=shade, markersize=5, alpha=0.75)
                ax.plot(floor, place, "|", color=shade, markersize=9, alpha=0.75)
        ax.axvline(1.0, color="#888888", linewidth=0.8)
        ax.set_xscale("log")
        ax.set_yticks(range(len(DRAWN)), DRAWN)
        ax.invert_yaxis()
        ax.set_title(f"{'Common start' if start == 'common' else 'Own starts'}: error after / before", fontsize=11)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, axis="x", alpha=0.25)
    for label, marker, colour in (
        ("AdamW", "o", "#777777"),
        ("SGD", "s", "#777777"),
        ("r = 4", "o", "#56B4E9"),
        ("r = 64", "o", "#D55E00"),
        ("floor of the setting", "|", "#777777"),
    ):
        ax.plot([], [], linestyle="", label=label, marker=marker, color=colour)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(out, dpi=140)


def page(rows: Rows, table: str) -> str:
    """The whole page: the text of results_page.md around the tables."""
    return (
        (Path(__file__).parent / "results_page.md")
        .read_text()
        .format(
            seeds=len({row["seed"] for row in rows}),
            common=replay_table(rows, "common"),
            own=replay_table(rows, "own"),
            claims=claims(rows),
            memory=memory_table(rows),
            vader=table,
            study=section(done_before()),
            gsm8k=language_page.section(language_page.read("rounds.csv"), language_page.read("answers.csv")),
            humaneval=language_page.humaneval(),
            hours=f"{core_hours(done_before()):.1f}",
        )
    )


def vader_table() -> str:
    """The comparison's table from the numbers of its runs, as `fedrot compare` makes it."""
    outcomes = []
    for row in read_csv(VADER / "runs.csv"):
        words = {key: row.pop(key) for key in ("method", "setting", "split", "metric")}
        numbers = {key: float(value) if value else None for key, value in row.items()}
        whole = {key: None if (n := numbers.pop(key)) is None else int(n) for key in ("seed", "rounds_to_target")}
        outcomes.append(Outcome(**words, **whole, **numbers))  # type: ignore[arg-type]
    return to_markdown(cells(table_rows(outcomes, "fedit"), "fedit", outcomes[0].split))


def main() -> None:
    """Write docs/results.md and its figures."""
    rows = read_csv(REPLAY)
    (DOCS / "results.md").write_text(page(rows, vader_table()))
    draw(rows, DOCS / "replay.png")
    draw_study(done_before(), DOCS / "study.png")
    language_page.draw(language_page.read("rounds.csv"), DOCS / "gsm8k.png")


if __name__ == "__main__":
    main()
