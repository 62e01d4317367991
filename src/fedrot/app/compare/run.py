"""Run a comparison, or what is left of it, and write its table, figures and page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedrot.app.compare.plan import Planned
from fedrot.app.compare.table import cells, default_target, outcome, rows, to_csv, to_markdown
from fedrot.app.progress import ShownWatcher
from fedrot.core.errors import RunError
from fedrot.core.files import write_atomic
from fedrot.running.folder import RunFolder
from fedrot.running.run import run


@dataclass(frozen=True)
class Compared:
    """What came out of a comparison."""

    table: str  # Markdown
    metric: str
    target: float
    failed: dict[str, str]  # run -> reason
    report: Path


def run_all(
    planned: Sequence[Planned], say: Callable[[str], None], make_watcher: Callable[[], ShownWatcher]
) -> dict[str, str]:
    """Run what has not finished, resuming what had begun. Gives the runs that failed, with the reason.

    A run that cannot go on, e.g. because a method diverged under these settings, does not end the comparison.
    """
    failed: dict[str, str] = {}
    for number, one in enumerate(planned, start=1):
        name = f"{one.variant.label}, seed {one.seed}"
        state = "finished before" if one.done else "goes on" if one.started else "starts"
        say(f"[{number}/{len(planned)}] {name}: {state}")
        if one.done:
            continue
        try:
            with make_watcher() as watcher:
                run(one.recipe, one.folder, watcher, resume=one.started)
        except RunError as problem:
            failed[name] = str(problem)
            say(f"[{number}/{len(planned)}] {name}: failed: {problem}")
    return failed


def summarise(
    planned: Sequence[Planned], baseline: str, target: float | None, failed: dict[str, str], out: Path
) -> Compared:
    """Write runs.csv, table.csv, table.md, figures and report.html below `out`; `RunError` where no run finished."""
    from fedrot.app.report.comparison import build_comparison

    finished = [one for one in planned if one.done]
    if not finished:
        raise RunError(f"{out}: none of the runs finished; " + "; ".join(f"{k}: {v}" for k, v in failed.items()))
    goal = default_target(finished, baseline) if target is None else target
    order = list(dict.fromkeys(one.variant.label for one in planned))
    finished.sort(key=lambda one: order.index(one.variant.label))
    outcomes = [outcome(one, goal) for one in finished]
    table = rows(outcomes, baseline)
    lines = cells(table, baseline, outcomes[0].split)
    write_atomic(out / "runs.csv", to_csv(outcomes).encode())
    write_atomic(out / "table.csv", to_csv(table).encode())
    write_atomic(out / "table.md", to_markdown(lines).encode())
    report = build_comparison(finished, lines, goal, baseline, failed, out)
    return Compared(to_markdown(lines), _rounds_metric(finished[0]), goal, failed, report)


def _rounds_metric(one: Planned) -> str:
    """What the score of a run's rounds is called."""
    return str(RunFolder(one.folder).read_json("result.json")["evaluation"]["metric"]).replace("_", " ")
