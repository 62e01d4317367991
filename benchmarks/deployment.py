"""What a round between real processes waits for: a server and three clients on this machine, over TLS."""

import csv
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import yaml

from fedrot.running.folder import RunFolder
from fedrot.running.network.journal import read_exchanges
from recipes import movies
from table import Result

SITES = ("one", "two", "three")
ROWS = {"train": 240, "validation": 60}  # of all sites together
KINDS = ("train", "evaluate")
_FEDROT = [sys.executable, "-m", "fedrot.app.cli.main"]
_LONGEST = 600.0  # seconds
# What a site's worker writes when its reply is made, with the seconds that this took.
_LINE = re.compile(r"^(\S+ \S+) (train|evaluate) of round (\d+): ([\d.]+) s$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Way:
    """The time of a request, in seconds."""

    round: int
    kind: str
    down: float  # from asking until the site's worker begins
    work: float  # of the worker
    up: float  # from its reply until the server has it

    @property
    def whole(self) -> float:
        """From asking to the reply."""
        return self.down + self.work + self.up


def phases(rounds: int) -> list[Result]:
    """Where the time of rounds goes: medians, the first round left out."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        _prepare(folder, rounds)
        with _running(folder) as server:
            if server.wait(_LONGEST) != 0:
                raise RuntimeError(f"the run failed: {(folder / 'server.log').read_text()[-2000:]}")
        ways = [way for site in SITES for way in _ways(folder, site) if way.round]
        spent = {record["round"]: record["seconds"]["round"] for record in RunFolder(folder / "out").metrics()[1:]}
        loads = [(folder / "sites" / site / "worker.log").read_text().count("joined the run") for site in SITES]
    results = []
    for kind in KINDS:
        mine = [way for way in ways if way.kind == kind]
        results.append(Result(f"phases: {kind}, from asking to the reply", median(w.whole for w in mine), "s"))
        results.append(Result(f"phases: {kind}, until the site's worker begins", median(w.down for w in mine), "s"))
        results.append(Result(f"phases: {kind}, the worker", median(w.work for w in mine), "s"))
        results.append(Result(f"phases: {kind}, from its reply to the server", median(w.up for w in mine), "s"))
    waiting = [1 - _work(ways, number) / seconds for number, seconds in spent.items()]
    results.append(Result("phases: a round", median(spent.values()), "s"))
    results.append(Result("phases: waiting for messages, of a round", 100 * median(waiting), "%"))
    return [*results, Result("phases: loads of the model, a site, most", max(loads), "", 1.0)]


def _work(ways: list[Way], number: int) -> float:
    """The seconds of a round in which the slowest site works."""
    return sum(max(w.work for w in ways if (w.round, w.kind) == (number, kind)) for kind in KINDS)


def _ways(folder: Path, site: str) -> Iterator[Way]:
    """A site's requests, from the server's journal and the worker's log."""
    written = _LINE.findall((folder / "sites" / site / "worker.log").read_text())
    done = {(kind, int(number)): (_seconds(when), float(took)) for when, kind, number, took in written}
    for one in read_exchanges(folder / "out"):
        if one.client == site and one.kind in KINDS and one.round is not None:
            ended, took = done[one.kind, one.round]
            asked = one.time - one.seconds
            yield Way(one.round, one.kind, ended - took - asked, took, one.time - ended)


def _seconds(when: str) -> float:
    return datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").timestamp()


def _prepare(folder: Path, rounds: int) -> None:
    """Keys, a recipe, and a folder of data for each site."""
    source = Path(movies()["path"])
    for name, count in ROWS.items():
        with (source / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            head, *rows = list(csv.reader(file))[: count + 1]
        for place, site in enumerate(SITES):
            (folder / "data" / site).mkdir(parents=True, exist_ok=True)
            with (folder / "data" / site / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([head, *rows[place :: len(SITES)]])
    for words in (["server", "--out", "tls"], ["client", *SITES, "--out", "keys"]):
        subprocess.run([*_FEDROT, "keys", *words], cwd=folder, check=True, capture_output=True)
    values = {
        "rounds": rounds,
        "model": {"path": "fetch:minilm"},
        "data": {
            "source": "files",
            "train": "train.csv",
            "validation": "validation.csv",
            "labels": ["negative", "positive"],
        },
        "partition": {"kind": "iid", "clients": len(SITES)},  # sites have what they have
        "local": {"steps": 2, "batch": 8, "lr": 1e-3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))


@contextmanager
def _running(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server, with the clients beside it; all are ended afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    calls = {"server": ["server", "recipe.yaml", "--tls", "tls", "--clients", "keys", "--out", "out", "--port", port]}
    for site in SITES:
        words = ["client", "--server", f"127.0.0.1:{port}", "--key", f"keys/{site}.key", "--ca", "tls/ca.crt"]
        calls[site] = [*words, "--data", f"data/{site}", "--threads", "1"]
    started: dict[str, subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        for name, words in calls.items():
            with (folder / f"{name}.log").open("wb") as log:
                started[name] = subprocess.Popen(
                    [*_FEDROT, *words], cwd=folder, stdout=log, stderr=log, env=environment
                )
        yield started["server"]
    finally:
        for process in started.values():
            process.terminate()
        for process in started.values():
            process.wait()
