"""What the diagnostics of a run mean, in one sentence."""

from statistics import mean
from typing import Any

from fedrot.app.report.load import RunData
from fedrot.running.recipe import Recipe

# rho, the share of the avoidable error that the best rotation recovers: below `_LITTLE` rotation is not the problem,
# above `_MOST` it is the main one. The gauge share of the drift stands in where rho was not measured; clients that
# start from different frames show about 8 %, clients from a common start well under 3 %.
_LITTLE, _MOST = 0.1, 0.5
_GAUGE_LITTLE, _GAUGE_MOST = 0.02, 0.06
_NEGLIGIBLE = 0.01  # relative aggregation error
_SAME = 0.005  # relative change of the error that counts as none


def verdict(run: RunData) -> str:
    """One sentence on the later half of the measured rounds: was rotation the problem, did alignment help, how far is
    the floor.
    """
    measured = [record for record in run.metrics if "aggregation" in record]
    if run.recipe.privacy.mode == "local":
        return "What averaging lost is not available: with privacy.mode local clients report nothing to measure it by."
    if run.recipe.secure.aggregation:
        return "What averaging lost is not available: with secure.aggregation nobody sees the uploads."
    if not measured:
        return _unmeasured(run)
    late = measured[len(measured) // 2 :]
    before, after, floor = (_late(late, f"{key}_relative") for key in ("before", "after", "floor"))
    size = (
        f"{_about(late)}averaging factor by factor lost {before:.2%} of the ideal update before alignment, of which "
        f"{floor:.2%} is the floor that no rank-{run.recipe.lora.rank} average can beat"
    )
    return f"{_cause(late, before)}; {_effect(run.recipe, late, before, after, floor)}; {size}."


def _unmeasured(run: RunData) -> str:
    """Why no round says what averaging lost."""
    method = run.recipe.method
    if not run.recipe.diagnostics.every:
        return "Nothing is said about aggregation: diagnostics were off (diagnostics.every)."
    if method.capabilities.second_phase:
        return f"What averaging lost is not available: with {method.name} uploads are sketches, not clients' factors."
    if method.capabilities.personal:
        return f"What averaging lost is not available: with {method.name} every client keeps a model of its own."
    problems = [record["unmeasured"] for record in run.metrics if "unmeasured" in record]
    return f"What averaging lost could not be computed: {problems[-1] if problems else 'nothing was reported'}."


def _late(records: list[dict[str, Any]], key: str) -> float:
    return mean(record["aggregation"][key] for record in records)


def _about(records: list[dict[str, Any]]) -> str:
    return "by estimate, " if any(record["aggregation"]["estimated"] for record in records) else ""


def _cause(late: list[dict[str, Any]], before: float) -> str:
    shares = [record["drift"]["gauge_share"] for record in late if "gauge_share" in record.get("drift", {})]
    rhos = [record["aggregation"]["rho"] for record in late if "rho" in record["aggregation"]]
    if rhos:
        level, low, high = mean(rhos), _LITTLE, _MOST
        why = f"the best possible rotation would recover {level:.1%} of the avoidable error"
    elif shares:
        level, low, high = mean(shares), _GAUGE_LITTLE, _GAUGE_MOST
        why = f"{level:.2%} of the clients' drift only turned their frames"
    else:
        return "Whether rotation was the problem is not known (no drift was reported)"
    small = ", and the aggregation error is small in any case" if before < _NEGLIGIBLE else ""
    if level < low:
        return f"Rotation was not the problem: {why}{small}"
    if level < high:
        return f"Rotation was a part of the problem: {why}{small}"
    return f"Rotation was the main problem: {why}{small}"


def _effect(recipe: Recipe, late: list[dict[str, Any]], before: float, after: float, floor: float) -> str:
    # For a rule the server turns what comes in both factors, whatever its client says that it did.
    by_server = recipe.robust.rule != "none" and any({"a", "b"} <= recipe.method.uploads(r["round"]) for r in late)
    if not by_server and not any(record.get("drift", {}).get("turn_mean") for record in late):
        return "no alignment was made"
    alignment = f"alignment by the server (robust.rule {recipe.robust.rule})" if by_server else "alignment"
    if before <= 0:
        return f"there was no aggregation error for {alignment} to lower"
    change = after / before - 1
    if abs(change) < _SAME:
        return f"{alignment} made no difference to the error ({change:+.2%})"
    avoidable = before - floor
    share = f", {(before - after) / avoidable:.0%} of what is avoidable" if avoidable > 0 and change < 0 else ""
    return f"{alignment} {'lowered' if change < 0 else 'raised'} the error by {abs(change):.1%}{share}"
