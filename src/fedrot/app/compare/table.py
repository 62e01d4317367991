"""The numbers of a comparison: by run, and by method with mean, spread and paired differences."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import mean, stdev
from typing import Any

from fedrot.app.compare.plan import Planned
from fedrot.app.report.load import scores_that_count
from fedrot.learning.scores import LOWER_IS_BETTER, main_score
from fedrot.running.folder import RunFolder


@dataclass(frozen=True)
class Outcome:
    """What a finished run gave."""

    method: str
    setting: str  # swept values that are not the method's
    seed: int
    split: str
    metric: str
    score: float
    worst: float
    spread: float  # standard deviation over clients
    rounds_to_target: int | None
    error: float | None  # of what the server sent, relative to the ideal update, mean over the later half
    floor: float | None
    megabytes_up: float
    megabytes_down: float
    seconds: float
    clock_to_target: float | None = None  # simulated seconds, where clients have speeds


@dataclass(frozen=True)
class Row:
    """A method over its seeds. None where a number is not known."""

    method: str
    setting: str
    seeds: int
    metric: str
    score: float
    score_sd: float | None
    difference: float | None  # mean over the seeds that both have, against the baseline
    difference_ci: float | None  # half width of its 95 % interval (paired t)
    rounds_to_target: float | None  # mean over the runs that reached it
    reached: int
    worst: float
    spread: float
    error: float | None
    floor: float | None
    megabytes_up: float
    megabytes_down: float
    seconds: float
    clock_to_target: float | None = None  # mean over the runs that reached it


def curve(folder: RunFolder) -> list[tuple[int, float]]:
    """(rounds run, score) at every scored round."""
    return [(r["round"] + 1, main_score(r["evaluation"])) for r in folder.metrics() if "evaluation" in r]


def default_target(planned: Sequence[Planned], baseline: str) -> float:
    """The baseline's mean score when it was last scored in its rounds."""
    last = [curve(RunFolder(one.folder))[-1][1] for one in planned if one.done and one.variant.method == baseline]
    return mean(last) if last else math.nan


def outcome(one: Planned, target: float) -> Outcome:
    """The numbers of a finished run."""
    folder = RunFolder(one.folder)
    metrics, result = folder.metrics(), folder.read_json("result.json")
    scores = scores_that_count(result, metrics)
    falls = result["evaluation"]["metric"] in LOWER_IS_BETTER

    def reaches(score: float) -> bool:
        return score <= target if falls else score >= target

    reached = next((rounds for rounds, score in curve(folder) if reaches(score)), None)
    return Outcome(
        method=one.variant.method,
        setting=one.variant.setting,
        seed=one.seed,
        split=scores["split"],
        metric=scores["metric"],
        score=main_score(scores),
        worst=scores["worst"],
        spread=scores["spread"],
        rounds_to_target=reached,
        error=_late(metrics, "sent_relative"),
        floor=_late(metrics, "floor_relative"),
        megabytes_up=sum(r["bytes"]["up"] for r in metrics) / 1e6,
        megabytes_down=sum(r["bytes"]["down"] for r in metrics) / 1e6,
        seconds=sum(r["seconds"]["round"] for r in metrics),
        clock_to_target=None if reached is None else metrics[reached - 1].get("clock"),
    )


def _late(metrics: Sequence[dict[str, Any]], key: str) -> float | None:
    found = [r["aggregation"][key] for r in metrics if key in r.get("aggregation", {})]
    return mean(found[len(found) // 2 :]) if found else None


def rows(outcomes: Sequence[Outcome], baseline: str) -> list[Row]:
    """One row a method and setting, in the order in which they come; differences are within a setting."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault((one.method, one.setting), []).append(one)
    base = {(o.setting, o.seed): o.score for o in outcomes if o.method == baseline}
    return [_row(mine, {} if method == baseline else base) for (method, _), mine in groups.items()]


def _row(mine: Sequence[Outcome], base: Mapping[tuple[str, int], float]) -> Row:
    pairs = [o.score - base[o.setting, o.seed] for o in mine if (o.setting, o.seed) in base]
    reached = [o.rounds_to_target for o in mine if o.rounds_to_target is not None]
    return Row(
        method=mine[0].method,
        setting=mine[0].setting,
        seeds=len(mine),
        metric=mine[0].metric,
        score=mean(o.score for o in mine),
        score_sd=stdev(o.score for o in mine) if len(mine) > 1 else None,
        difference=mean(pairs) if pairs else None,
        difference_ci=half_width(pairs),
        rounds_to_target=mean(reached) if reached else None,
        reached=len(reached),
        worst=mean(o.worst for o in mine),
        spread=mean(o.spread for o in mine),
        error=_mean([o.error for o in mine]),
        floor=_mean([o.floor for o in mine]),
        megabytes_up=mean(o.megabytes_up for o in mine),
        megabytes_down=mean(o.megabytes_down for o in mine),
        seconds=mean(o.seconds for o in mine),
        clock_to_target=_mean([o.clock_to_target for o in mine]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % confidence interval of the mean, by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def to_csv(records: Sequence[Outcome] | Sequence[Row]) -> str:
    """The records as CSV, every number in full."""
    kind = type(records[0])
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(record) for record in records)
    return text.getvalue()


def cells(table: Sequence[Row], baseline: str, split: str) -> list[list[str]]:
    """The table in words, header first."""
    name = table[0].metric.replace("_", " ")
    head = ["method", f"{split} {name}", f"against {baseline}", "rounds to target", "worst client", "spread", "error"]
    timed = any(row.clock_to_target is not None for row in table)
    lines = [[*head, "floor", "MB up", "MB down", "seconds", *["simulated seconds to target"] * timed]]
    for row in table:
        sd = "" if row.score_sd is None else f" ± {row.score_sd:.4f}"
        difference = "" if row.difference is None else f"{row.difference:+.4f}"
        if row.difference_ci is not None:
            low, high = (row.difference or 0) - row.difference_ci, (row.difference or 0) + row.difference_ci
            difference += f" [{low:+.4f}, {high:+.4f}]"
        some = f" ({row.reached} of {row.seeds})" if 0 < row.reached < row.seeds else ""
        target = "" if row.rounds_to_target is None else f"{row.rounds_to_target:.1f}{some}"
        errors = ["" if value is None else f"{value:.2%}" for value in (row.error, row.floor)]
        lines.append(
            [
                f"{row.method} {row.setting}".strip(),
                f"{row.score:.4f}{sd}",
                difference,
                target,
                f"{row.worst:.4f}",
                f"{row.spread:.4f}",
                *errors,
                f"{row.megabytes_up:.2f}",
                f"{row.megabytes_down:.2f}",
                f"{row.seconds:.0f}",
                *["" if row.clock_to_target is None else f"{row.clock_to_target:.1f}{some}"] * timed,
            ]
        )
    return lines


def to_markdown(lines: Sequence[Sequence[str]]) -> str:
    """The table as Markdown, in columns that line up where they are read as text."""
    filled = [[cell or "-" for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in filled) for i in range(len(filled[0]))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in filled]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]]) + "\n"
