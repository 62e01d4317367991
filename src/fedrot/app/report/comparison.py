"""The page of a comparison: its table, and the paper's figures over seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedrot.app.compare.plan import Planned
from fedrot.app.report.build import draw, page
from fedrot.app.report.figures import score_name
from fedrot.app.report.load import RunData, last_in_rounds, load_runs
from fedrot.core.files import write_atomic
from fedrot.running.recipe_file import to_yaml


def build_comparison(
    planned: Sequence[Planned],
    table: Sequence[Sequence[str]],
    target: float,
    baseline: str,
    failed: Mapping[str, str],
    out: Path,
) -> Path:
    """Write `report.html` and `figures/*.png` below `out` for finished runs; gives the page's path."""
    runs = load_runs([one.folder for one in planned])
    groups: dict[str, list[RunData]] = {}
    for one, run in zip(planned, runs, strict=True):
        groups.setdefault(one.variant.label, []).append(run)
    drawn = draw(_plan(planned, groups), out / "figures", narrow=["scores"])
    text = page(
        "comparison.html.j2",
        title=f"{runs[0].recipe.name}: {len(groups)} rows, {len({one.seed for one in planned})} seeds",
        table=table,
        target=target,
        metric=score_name(last_in_rounds(runs[0].metrics)),
        baseline=baseline,
        failed=dict(failed),
        made_up=runs[0].recipe.data.made_up,
        runs=[str(one.folder.relative_to(out)) for one in planned],
        recipe=to_yaml(runs[0].recipe),
        versions={k: v for k, v in runs[0].versions.items() if isinstance(v, str)},
        figures=drawn,
    )
    write_atomic(out / "report.html", text.encode())
    return out / "report.html"


def _plan(planned: Sequence[Planned], groups: Mapping[str, list[RunData]]) -> list[tuple[str, str, Any]]:
    """(name, caption, figure) for all that the runs have numbers for."""
    from fedrot.app.report import comparison_figures as figures

    plan: list[tuple[str, str, Any]] = [
        (
            "score",
            "Score and loss by round, mean and standard deviation over seeds.",
            lambda: figures.score(groups),
        ),
        ("scores", "The score of every seed, with the mean.", lambda: figures.scores(groups)),
    ]
    if any("aggregation" in record for runs in groups.values() for run in runs for record in run.metrics):
        plan += [
            (
                "error",
                "Left: what the server lost of the ideal update, whatever its method; errors below a millionth are at "
                "the lower edge. Right: what alignment gained on averaging the factors as they were.",
                lambda: figures.error(groups),
            ),
            ("drift", "Least drift of the clients' factors from the broadcast.", lambda: figures.drift(groups)),
            (
                "rotation",
                "The largest rotation of a client over its drift, ||R - I|| / ||A - A_ref||, by round.",
                lambda: figures.rotation(groups),
            ),
        ]
    for key in dict.fromkeys(key for one in planned for key in one.variant.swept):
        points = [
            (_without(one, key), one.variant.swept.get(key), run)
            for one, run in zip(planned, (run for runs in groups.values() for run in runs), strict=True)
        ]
        plan.append(
            (
                f"sweep-{key.replace('.', '-')}",
                f"Score against {key}, mean and standard deviation over seeds; a method that does not have it "
                "is a line across.",
                lambda key=key, points=points: figures.sweep(key, points),
            )
        )
    return plan


def _without(one: Planned, key: str) -> str:
    """The row's label without the value of one swept key."""
    words = {f"{key.removeprefix('method.')}={one.variant.swept.get(key)}", f"{key}={one.variant.swept.get(key)}"}
    return " ".join(word for word in one.variant.label.split() if word not in words)
