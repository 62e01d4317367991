"""Between sites: what the page says of what went to each client and came back, and of what was not used and why."""

from typing import Any

from fedrot.app.live.summary import Traffic, by_round, clients, dropped, round_of
from fedrot.app.report.load import RunData


def section(run: RunData) -> dict[str, Any]:
    """What the page says of a run between sites; empty for a run without any."""
    if not run.exchanges:
        return {}
    pairs = {(round_of(e), e.client) for e in run.exchanges if e.round is not None}
    within = Traffic.of([e for e in run.exchanges if e.round is not None])
    return {
        "clients": clients(run.metrics, run.exchanges, run.sites),
        "dropped": dropped(run.metrics, run.exchanges),
        "rounds": by_round(run.exchanges),
        "all": Traffic.of(run.exchanges),
        "down": within.down / max(1, len(pairs)),
        "up": within.up / max(1, len(pairs)),
    }
