"""What an interruption or a full disk leaves, and how to go on: a note on the exception, which `main.py` prints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RESUME = "finished rounds are on disk, go on with the same command and --resume"
AGAIN = "finished runs are on disk, the same command goes on"


@contextmanager
def advising(advice: str, begun: Path | None = None) -> Iterator[None]:
    """Add `advice` to what ends the work inside; only once the file `begun` is there, without which it is no use."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as ended:
        if begun is None or begun.exists():
            ended.add_note(advice)
        raise


def advised(ended: BaseException) -> str:
    """The advice that was added, after a semicolon."""
    return "".join(f"; {note}" for note in getattr(ended, "__notes__", ()))
