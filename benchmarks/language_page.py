"""GSM8K's part of docs/results.md, and its figure, from docs/results/gsm8k/ alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from table import markdown, read_csv

Rows = Sequence[Mapping[str, str]]
FOLDER = Path(__file__).parents[1] / "docs" / "results" / "gsm8k"


def read(name: str) -> Rows:
    """A file's rows."""
    return read_csv(FOLDER / name)


def methods(rows: Rows) -> list[str]:
    """In the order in which they come, FedIT first."""
    found = dict.fromkeys(row["method"] for row in rows)
    return sorted(found, key=lambda name: (name != "fedit", list(found).index(name)))


def section(rounds: Rows, answers: Rows) -> str:
    """Losses before and after, and exact match with its interval."""
    head = ["method", "training loss, first round", "last", "validation loss", "test loss"]
    lines = [[*head, "exact match, 95 %", "no answer"]]
    for method in methods(rounds):
        mine = [row for row in rounds if row["method"] == method]
        (answered,) = (row for row in answers if row["method"] == method)
        numbers = [float(answered[key]) for key in ("exact_match", "low", "high")]
        lines.append(
            [
                method,
                *(f"{float(row['train_loss']):.3f}" for row in (mine[0], mine[-1])),
                f"{float(mine[-1]['validation_loss']):.3f}",
                f"{float(answered['test_loss']):.3f}",
                "{:.3f} [{:.3f}, {:.3f}]".format(*numbers),
                f"{float(answered['unparsed']):.0%}",
            ]
        )
    return markdown(lines)


def humaneval() -> str:
    """HumanEval's line, from what `fedrot eval --json` printed."""
    found = json.loads((FOLDER.parent / "humaneval.json").read_text())
    passed = round(found["pass_at_1"] * found["examples"])
    ends = sorted(key for key, value in found.items() if isinstance(value, int) and key != "examples")
    others = ", ".join(f"{found[key]} {key.replace('_', ' ')}" for key in ends)
    share, low, high = (found[key] for key in ("pass_at_1", "low", "high"))
    return f"pass@1 {share:.3f} [{low:.3f}, {high:.3f}], {passed} of {found['examples']}; the others: {others}."


def draw(rounds: Rows, out: Path) -> None:
    """Training loss by round, a line a method; validation losses as dots."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    colours = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7")
    for method, colour in zip(methods(rounds), colours, strict=False):
        mine = [row for row in rounds if row["method"] == method]
        places = [int(row["round"]) + 1 for row in mine]
        ax.plot(places, [float(row["train_loss"]) for row in mine], color=colour, label=method)
        scored = [row for row in mine if row["validation_loss"]]
        dots = [float(row["validation_loss"]) for row in scored]
        ax.plot([int(row["round"]) + 1 for row in scored], dots, "o", color=colour, markersize=5)
    ax.set_xticks(sorted({int(row["round"]) + 1 for row in rounds}))
    ax.set_xlabel("rounds")
    ax.set_ylabel("loss of a token (dots: validation)")
    ax.set_title("SmolLM2 on GSM8K, 3 clients", fontsize=11)
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, alpha=0.25)
    figure.savefig(out, dpi=140)
