"""docs/performance.md and its figure, from the committed figures of `make bench`. Run: make results.

docs/results/performance.json is build/bench.json as `make bench DATA=folder`, with sst2/ and gsm8k/ in it, left it;
network.json is written there by `make bench-network`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
WRITTEN, NETWORK = DOCS / "results" / "performance.json", DOCS / "results" / "network.json"
Found = Mapping[str, Any]
STEPS = "1. of it with "
SHARES = "2. time in "


def read(path: Path = WRITTEN) -> Found:
    """What a benchmark wrote."""
    found: Found = json.loads(path.read_text())
    return found


def lines(found: Found) -> list[Mapping[str, Any]]:
    """All figures, those with a goal first."""
    return [*found["results"], *({**one, "goal": None} for one in found["figures"])]


def table(found: Found, starts: Sequence[str]) -> str:
    """The lines whose names start so, as a table."""
    rows = ["| | figure | goal | holds |", "|---|---|---|---|"]
    for one in lines(found):
        if one["name"].startswith(tuple(starts)):
            unit = one.get("unit") or ""
            goal = "" if one["goal"] is None else f"{'≥' if one['at_least'] else '≤'} {one['goal']:g} {unit}".rstrip()
            holds = "" if one["goal"] is None else ("yes" if one["holds"] else "**no**")
            name = re.sub(r"^(\d\. |threads: |workers: |bytes: |server: |memory: |phases: )", "", one["name"])
            rows.append(f"| {name} | {one['figure']:.3g} {unit} | {goal} | {holds} |")
    return "\n".join(rows)


def page(found: Found) -> str:
    """The whole page: the text of performance_page.md around the tables."""
    network = read(NETWORK)
    return (
        (Path(__file__).parent / "performance_page.md")
        .read_text()
        .format(
            machine=_machine(found),
            rounds=table(found, ["1. "]),
            throughput=table(found, ["2. "]),
            clients=table(found, ["3. "]),
            alignment=table(found, ["4. "]),
            price=table(found, ["5. "]),
            cores=table(found, ["threads: ", "workers: "]),
            others=table(found, ["flexlora", "the same:", "import"]),
            network_machine=_machine(network),
            network_bytes=table(network, ["bytes: "]),
            network_server=table(network, ["server: "]),
            network_memory=table(network, ["memory: "]),
            network_phases=table(network, ["phases: "]),
        )
    )


def _machine(found: Found) -> str:
    return ", ".join(f"{key} {value}" for key, value in found["machine"].items())


def draw(found: Found, out: Path) -> None:
    """What each step brings, and where the time of training goes."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figures = {one["name"]: one["figure"] for one in lines(found)}
    steps = {"published way": 1.0, **{n.removeprefix(STEPS): v for n, v in figures.items() if n.startswith(STEPS)}}
    bars = left.barh(list(steps), list(steps.values()), color="#0072B2")
    left.bar_label(bars, labels=[f"{value:.1f}x" for value in steps.values()], padding=3)
    left.invert_yaxis()
    left.set_xlim(0, 1.15 * max(steps.values()))
    left.set_title("A round with evaluation, times as fast (CPU time)", fontsize=10)
    shares = {n.removeprefix(SHARES): v for n, v in figures.items() if n.startswith(SHARES)}
    bars = right.barh(list(shares), list(shares.values()), color="#009E73")
    right.bar_label(bars, labels=[f"{value:.1f} %" for value in shares.values()], padding=3, fontsize=8)
    right.invert_yaxis()
    right.set_xlim(0, 1.2 * max(shares.values()))
    right.tick_params(axis="y", labelsize=8)
    right.set_title("Where the time of training goes", fontsize=10)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=140)


def main() -> None:
    """Write docs/performance.md and docs/performance.png."""
    found = read()
    (DOCS / "performance.md").write_text(page(found))
    draw(found, DOCS / "performance.png")


if __name__ == "__main__":
    main()
