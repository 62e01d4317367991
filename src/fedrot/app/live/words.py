"""Sizes and times in words."""

from datetime import UTC, datetime


def size(count: float) -> str:
    """Bytes, in three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 999.5 else f"{count:.0f} GB"


def ago(seconds: float) -> str:
    """A time that has passed, in its largest unit."""
    for limit, length, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{max(0, seconds) / length:.0f} {unit} ago"
    return f"{seconds / 86400:.0f} days ago"


def moment(time: float | None) -> str:
    """A time (seconds since 1970) in UTC; empty for none."""
    return "" if time is None else f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S}"
