"""How a run stands, from the files of its folder alone: rounds, scores, clients, what was dropped and why.

What clients wrote (names, reasons) is brought to one line that can be shown; whoever shows it escapes it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from fedrot.core.errors import RunError
from fedrot.running.folder import RunFolder
from fedrot.running.network.journal import NAME as EXCHANGES
from fedrot.running.network.journal import Exchange, read_exchanges
from fedrot.running.network.messages import one_line

SITES = "sites.json"
FILES = ("recipe.yaml", SITES, "metrics.jsonl", EXCHANGES, "result.json")
_LONGEST = 500  # characters of a client's text
_AFTER = ("evaluate", "finish")  # kinds of requests that bring what a round made

State = Literal["heard", "refused", "silent", "never heard"]


@dataclass(frozen=True)
class Traffic:
    """Requests, and bytes of tensors down to clients and back up; headers are counted apart."""

    requests: int
    answered: int
    down: int
    up: int
    headers: int

    @classmethod
    def of(cls, exchanges: Sequence[Exchange]) -> "Traffic":
        """The sums over exchanges."""
        return cls(
            len(exchanges),
            sum(e.answered for e in exchanges),
            sum(e.sent for e in exchanges),
            sum(e.received for e in exchanges),
            sum(e.headers for e in exchanges),
        )


@dataclass(frozen=True)
class Client:
    """A client between sites."""

    name: str
    state: State  # of its last exchange
    reason: str | None  # why there was nothing in it that could be used
    last_heard: float | None  # seconds since 1970
    median: float | None  # seconds from asking to the reply, of requests that were answered
    longest: float | None
    dropped: int  # rounds that its upload was dropped from
    traffic: Traffic


@dataclass(frozen=True)
class Dropped:
    """Something of a client's that was not used."""

    round: int | None  # None: outside of rounds, as joining is
    client: str
    kind: str  # what it was: upload, or the request that it should have answered
    reason: str
    time: float | None  # seconds since 1970; None in a simulation, which keeps none


@dataclass(frozen=True)
class Finished:
    """A finished round. None for a number that is not finite, or is not there."""

    round: int
    used: int
    dropped: int
    loss: float | None  # of local training
    split: str | None  # None where the round was not scored
    metric: str | None
    score: float | None
    worst: float | None
    epsilon: float | None
    seconds: float


@dataclass(frozen=True)
class Summary:
    """How a run stands."""

    name: str
    method: str | None  # None before the run has a recipe
    planned: int | None  # rounds
    finished: bool
    changed: float | None  # when something was last written or heard
    rounds: list[Finished]
    clients: list[Client]  # none in a simulation
    dropped: list[Dropped]  # the last one last


def read_summary(path: Path) -> Summary:
    """The summary of a run folder, also while the run lasts. `RunError` where it is none, or a file is damaged."""
    folder = RunFolder(path)
    sites = expected_sites(folder)
    # A server that waits for its sites has no resolved recipe yet.
    recipe = None if sites is not None and not (path / "recipe.yaml").exists() else folder.recipe()
    metrics, exchanges = folder.metrics(), read_exchanges(path)
    written = [(path / name).stat().st_mtime for name in FILES if (path / name).exists()]
    return Summary(
        name=plain(recipe.name if recipe else path.resolve().name),
        method=recipe.method.name if recipe else None,
        planned=recipe.rounds if recipe else None,
        finished=(path / "result.json").exists(),
        changed=max(written, default=None),
        rounds=[_finished(record) for record in metrics],
        clients=clients(metrics, exchanges, sites or ()),
        dropped=dropped(metrics, exchanges),
    )


def expected_sites(folder: RunFolder) -> list[str] | None:
    """The clients that a run between sites expects; None where nothing says so."""
    if not folder.path.is_dir() or (found := folder.read_json(SITES)) is None:
        return None
    names = found.get("clients") if isinstance(found, Mapping) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RunError(f"{folder.path / SITES}: clients must be a list of names; the file is damaged")
    return names


def _finished(record: Mapping[str, Any]) -> Finished:
    scores, who = record.get("evaluation", {}), record["clients"]
    return Finished(
        round=record["round"],
        used=len(who["used"]),
        dropped=len(who["dropped"]),
        loss=record.get("train", {}).get("loss"),
        split=scores.get("split"),
        metric=scores.get("metric"),
        score=scores.get(scores.get("metric")),
        worst=scores.get("worst"),
        epsilon=record.get("privacy", {}).get("epsilon"),
        seconds=record["seconds"]["round"],
    )


def clients(
    metrics: Sequence[Mapping[str, Any]], exchanges: Iterable[Exchange], expected: Iterable[str]
) -> list[Client]:
    """Every client that was expected or asked, by name."""
    by_client: dict[str, list[Exchange]] = {name: [] for name in expected}
    for exchange in exchanges:
        by_client.setdefault(exchange.client, []).append(exchange)
    return [_client(name, by_client[name], metrics) for name in sorted(by_client)]


def _client(name: str, exchanges: Sequence[Exchange], metrics: Sequence[Mapping[str, Any]]) -> Client:
    answered = [e for e in exchanges if e.answered]
    seconds = [e.seconds for e in answered]
    state, reason = _state(name, exchanges, metrics)
    return Client(
        name=plain(name),
        state=state,
        reason=None if reason is None else plain(reason),
        last_heard=max((e.time for e in answered), default=None),
        median=median(seconds) if seconds else None,
        longest=max(seconds, default=None),
        dropped=sum(name in record["clients"]["dropped"] for record in metrics),
        traffic=Traffic.of(exchanges),
    )


def _state(name: str, exchanges: Sequence[Exchange], metrics: Sequence[Mapping[str, Any]]) -> tuple[State, str | None]:
    """How a client stands by its last exchange, and by what the last finished round says of its upload."""
    last = exchanges[-1] if exchanges else None
    if last is None or not any(e.answered for e in exchanges):
        return "never heard", None if last is None else last.refused
    if last.refused is not None:
        return ("refused" if last.answered else "silent"), last.refused
    why = metrics[-1]["clients"]["dropped"].get(name) if metrics else None
    if why is not None and ((number := round_of(last)) is None or number <= metrics[-1]["round"]):
        return "refused", why  # the server's own reason, until the client answers in a later round
    return "heard", None


def dropped(metrics: Iterable[Mapping[str, Any]], exchanges: Sequence[Exchange]) -> list[Dropped]:
    """All that was not used, in the order of time: uploads dropped from rounds, and exchanges that gave nothing.

    A dropped upload and the exchange that says why are one.
    """
    places: dict[tuple[int | None, str], list[int]] = {}  # of exchanges that bring an upload or lead to it
    ends: dict[int | None, float] = {}  # of rounds
    for i, exchange in enumerate(exchanges):
        if exchange.kind not in _AFTER:
            places.setdefault((exchange.round, exchange.client), []).append(i)
            ends[exchange.round] = exchange.time
    told: set[int] = set()
    found = []
    for record in metrics:
        number = record["round"]
        for client, reason in record["clients"]["dropped"].items():
            # Where a round was played again, the last try is the one that counted.
            asked = places.get((number, client), [])[::-1]
            joins = places.get((None, client), [])
            twin = next((i for i in [*asked, *joins] if i not in told and _says(exchanges[i].refused, reason)), None)
            told |= set() if twin is None else {twin}
            place = asked[0] if twin is None and asked else twin
            time = ends.get(number) if place is None else exchanges[place].time
            found.append(Dropped(number, plain(client), "upload", plain(reason), time))
    found += [
        Dropped(round_of(e), plain(e.client), e.kind, plain(e.refused), e.time)
        for i, e in enumerate(exchanges)
        if e.refused is not None and i not in told
    ]
    return sorted(found, key=lambda one: (one.time is None, one.time or 0.0))


def _says(refused: str | None, reason: str) -> bool:
    """Whether an exchange's refusal is the reason that the round's record gives, in more words or in the same."""
    return refused is not None and refused in reason


def by_round(exchanges: Iterable[Exchange]) -> list[tuple[int | None, Traffic]]:
    """What went each way in each round; first, under None, outside of rounds."""
    found: dict[int | None, list[Exchange]] = {}
    for exchange in exchanges:
        found.setdefault(round_of(exchange), []).append(exchange)
    rounds = sorted(found, key=lambda number: -1 if number is None else number)
    return [(number, Traffic.of(found[number])) for number in rounds]


def round_of(exchange: Exchange) -> int | None:
    """The round that an exchange belongs to: scores are asked for by what the round made, the next one's broadcast."""
    return exchange.round - 1 if exchange.kind in _AFTER and exchange.round is not None else exchange.round


def plain(text: str) -> str:
    """One line without characters that steer a terminal or turn the direction of writing, and not endless."""
    line = one_line(text[: 4 * _LONGEST])
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
