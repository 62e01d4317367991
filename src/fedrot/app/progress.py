"""Progress of a run: a live display on a terminal, plain lines in a log. Both go to stderr."""

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, TextIO

from fedrot.learning.scores import main_score
from fedrot.running.rounds import Watcher


class ShownWatcher(Watcher, Protocol):
    """A watcher that owns the terminal while it is open."""

    def __enter__(self) -> "ShownWatcher": ...

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_watcher(stream: TextIO | None = None) -> ShownWatcher:
    """The display that suits where stderr goes."""
    stream = stream or sys.stderr
    return LiveWatcher() if stream.isatty() else PlainWatcher(stream)


def round_line(record: Mapping[str, Any], rounds: int) -> str:
    """A finished round in one line."""
    width = len(str(rounds))
    words = [f"round {record['round']:>{width}} [{record['round'] + 1:>{width}}/{rounds}]"]
    if "train" in record:
        words.append(f"loss {record['train']['loss']:.4f}")
    if "evaluation" in record:
        scores = record["evaluation"]
        score = f"{scores['metric'].replace('_', ' ')} {main_score(scores):.4f}"
        words.append(f"{scores['split']} {score} (worst client {scores['worst']:.4f})")
    if "aggregation" in record:
        errors = record["aggregation"]
        about = "~" if errors["estimated"] else ""
        # With a server optimizer there is no error in what was sent: it goes elsewhere on purpose.
        last = errors.get("sent_relative", errors["after_relative"])
        words.append(
            f"error {about}{errors['before_relative']:.2%} -> {about}{last:.2%}, "
            f"floor {about}{errors['floor_relative']:.2%}"
        )
    if "privacy" in record:
        words.append(f"epsilon {record['privacy']['epsilon']:.3g}")
    if clipped := record.get("secure", {}).get("clipped"):
        words.append(f"{clipped:.2%} beyond secure.range")
    if record["clients"]["dropped"]:
        words.append(f"dropped {len(record['clients']['dropped'])}")
    words.append(f"{record['seconds']['round']:.1f} s")
    return "  ".join(words)


class PlainWatcher:
    """A line a round, and a line for every upload that was dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rounds = 0

    def __enter__(self) -> "PlainWatcher":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def prepared(self, how: str) -> None:
        """Say how the arithmetic is done."""
        print(how, file=self._stream, flush=True)

    def round_started(self, round: int, rounds: int, clients: Sequence[str]) -> None:
        """Remember how many rounds there are."""
        self._rounds = rounds

    def client_done(self, client: str, reason: str | None) -> None:
        """Say why an upload was dropped."""
        if reason is not None:
            print(f"dropped {client}: {reason}", file=self._stream, flush=True)

    def evaluating(self, split: str) -> None:
        """Nothing to say: the round's line has the scores."""

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """The round's line."""
        print(round_line(record, self._rounds), file=self._stream, flush=True)


class LiveWatcher:
    """A bar over rounds, a bar over the clients of the round, and finished rounds above them."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._all = self._progress.add_task("rounds", total=None)
        self._now = self._progress.add_task("preparing", total=None)
        self._rounds = 0

    def __enter__(self) -> "LiveWatcher":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def prepared(self, how: str) -> None:
        """Say how the arithmetic is done, above the bars."""
        self._progress.console.print(how, markup=False, highlight=False, soft_wrap=True)

    def round_started(self, round: int, rounds: int, clients: Sequence[str]) -> None:
        """Set both bars."""
        self._rounds = rounds
        self._progress.update(self._all, total=rounds, completed=round)
        self._progress.reset(self._now, total=len(clients), description=f"round {round}: clients")

    def client_done(self, client: str, reason: str | None) -> None:
        """Move the client bar; say why an upload was dropped."""
        if reason is not None:
            self._progress.console.print(f"dropped {client}: {reason}", style="yellow", markup=False, highlight=False)
        self._progress.advance(self._now)

    def evaluating(self, split: str) -> None:
        """Name what is being scored."""
        self._progress.update(self._now, description=f"scoring {split}")

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """The round's line above the bars."""
        self._progress.update(self._all, completed=record["round"] + 1)
        self._progress.console.print(round_line(record, self._rounds), markup=False, highlight=False, soft_wrap=True)
