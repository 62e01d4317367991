"""Build the report: figures as PNG files, and one HTML page that holds them all."""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedrot.app.live.words import moment, size
from fedrot.app.report.load import RunData, load_runs
from fedrot.app.report.promise import epsilon, promise
from fedrot.app.report.sites import section
from fedrot.app.report.verdict import verdict
from fedrot.core.files import write_atomic
from fedrot.running.recipe_file import to_yaml


def build_report(paths: Sequence[Path], out: Path) -> Path:
    """Write `report.html` and `figures/*.png` below `out` for the runs in `paths`; gives the page's path."""
    runs = load_runs(paths)
    drawn = _draw(runs, out / "figures")
    page = _page(runs, drawn)
    write_atomic(out / "report.html", page.encode())
    return out / "report.html"


def _draw(runs: Sequence[RunData], folder: Path) -> list[dict[str, Any]]:
    """Every figure that the runs have numbers for, as a file and as text to put in the page."""
    from fedrot.app.report import figures
    from fedrot.app.report.timeline import timeline

    measured = any("aggregation" in record for run in runs for record in run.metrics)
    scored = any("evaluation" in record for run in runs for record in run.metrics)
    first = runs[0].partition
    plan: list[tuple[str, str, Any]] = []
    if scored or any("train" in record for run in runs for record in run.metrics):
        plan.append(("learning", "Score and loss by round.", lambda: figures.learning(runs)))
    if measured:
        plan += [
            (
                "aggregation",
                "What averaging factor by factor loses of the ideal update, before and after alignment, and the floor "
                "that no average of this rank can beat.",
                lambda: figures.aggregation(runs),
            ),
            (
                "gain",
                "Left: what alignment did to the error. Right: the share of the clients' drift that only turned their "
                "frames, and rho, the share of the avoidable error that the best rotation would recover.",
                lambda: figures.gain(runs),
            ),
            (
                "drift",
                "How far factors move in local training and how far they are turned.",
                lambda: figures.drift(runs),
            ),
        ]
    if scored:
        plan.append(("clients", "Scores on each client's part of the data.", lambda: figures.clients(runs)))
    if first:
        counts = first["label_counts"]["train"]
        plan.append(("labels", "Who holds what.", lambda: figures.label_shares(counts, first["labels"])))
    if any(epsilon(run) is not None for run in runs):
        plan.append(("privacy", "What the rounds cost in privacy.", lambda: figures.privacy(runs)))
    plan.append(("cost", "What the rounds cost.", lambda: figures.cost(runs)))
    between = [run for run in runs if run.exchanges]
    for number, run in enumerate(between):
        which = f" in {run.label}" if len(between) > 1 else ""
        caption = (
            f"When each client{which} was asked and answered: a bar lasts from asking to the reply, a cross marks what "
            "gave nothing that could be used."
        )
        plan.append((f"timeline-{number}" if number else "timeline", caption, lambda run=run: timeline(run)))
    small = {"clients": True, "privacy": True, "labels": True, "aggregation": len(runs) == 1}
    return draw(plan, folder, narrow=[name for name, is_small in small.items() if is_small])


def draw(
    plan: Sequence[tuple[str, str, Callable[[], Any]]], folder: Path, narrow: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Draw (name, caption, figure) as PNG files below `folder`, and as text to put in a page."""
    from fedrot.app.report import figures

    drawn = []
    for name, caption, make in plan:
        path = folder / f"{name}.png"
        figures.save(make(), path)
        data = base64.b64encode(path.read_bytes()).decode()
        drawn.append({"name": name, "caption": caption, "data": data, "narrow": name in narrow})
    return drawn


def _page(runs: Sequence[RunData], drawn: list[dict[str, Any]]) -> str:
    return page(
        "page.html.j2",
        title=" and ".join(dict.fromkeys(run.recipe.name for run in runs)),
        runs=[_summary(run) for run in runs],
        private=any(run.recipe.privacy.mode != "none" for run in runs),
        figures=drawn,
    )


def page(template: str, **content: Any) -> str:
    """A self-contained HTML page from a template beside this file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fedrot.app.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"score": _score, "size": size, "moment": moment}
    return environment.get_template(template).render(**content)


def _score(value: float | None) -> str:
    """A score in four digits; a loss that is not finite is null in the run's files."""
    return "not finite" if value is None else f"{value:.4f}"


def _limited(run: RunData) -> list[tuple[str, int, int, float, float]]:
    """(client, rounds, rounds in which the rule cut something, kept on average, least kept), the least kept first."""
    kept: dict[str, list[float]] = {}
    for record in run.metrics:
        for client, share in record["clients"].get("kept", {}).items():
            kept.setdefault(client, []).append(share)
    rows = [
        (client, len(shares), sum(share < 1 for share in shares), sum(shares) / len(shares), min(shares))
        for client, shares in kept.items()
        if min(shares) < 1
    ]
    return sorted(rows, key=lambda row: (row[3], row[0]))


def _summary(run: RunData) -> dict[str, Any]:
    """A run's row of the table and its details."""
    chosen = run.result.get("round") if run.recipe.evaluation.choose == "best" else None
    dropped = [
        (record["round"], client, reason)
        for record in run.metrics
        for client, reason in record["clients"]["dropped"].items()
    ]
    return {
        "label": run.label,
        "made_up": run.recipe.data.made_up,
        "path": run.path.name,
        "verdict": verdict(run),
        "promise": promise(run),
        "epsilon": epsilon(run),
        "rounds": len(run.metrics),
        "planned": run.recipe.rounds,
        "scores": run.scores,
        "chosen": chosen,
        "chosen_on": run.recipe.evaluation.split,
        "megabytes_up": sum(record["bytes"]["up"] for record in run.metrics) / 1e6,
        "seconds": sum(record["seconds"]["round"] for record in run.metrics),
        "dropped": dropped,
        "sites": section(run),
        "rule": run.recipe.robust.rule,
        "limited": _limited(run),
        "recipe": to_yaml(run.recipe),
        "versions": {k: v for k, v in run.versions.items() if isinstance(v, str)},
    }
