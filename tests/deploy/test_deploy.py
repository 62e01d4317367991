"""Real processes over TLS: three clients with keys, ended and started again on the way, and what comes of it."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import go
from fleet import SITES, Fleet, fedrot, fleet
from network_sites import ONE_BY_ONE, values_of

from fedrot.running.network.journal import read_exchanges

LABELS = ["negative", "positive"]


@pytest.fixture
def values(tiny_recipe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Every client's upload is waited for, so that the result is that of the simulation."""
    asked = values_of(
        tiny_recipe(), rounds=5, data={"labels": LABELS}, federation={"quorum": 1.0}, checkpoint={"keep": 9}
    )
    del asked["data"]["path"]
    return asked


def simulated(values: dict[str, Any], data: Path, out: Path) -> bytes:
    """The adapter of the same run in one process."""
    made = go(values_of(values, data={"path": str(data)}), out, *ONE_BY_ONE)
    return adapter(made.path)


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_survives_a_client_and_the_server_and_is_the_simulation_s(
    values: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    with fleet(tmp_path, tiny_data, values) as sites:
        sites.until(lambda: sites.rounds() >= 1)
        sites.kill("films")  # with all that it started
        sites.until(lambda: sites.rounds() >= 3)
        sites.kill("server")
        sites.until(sites.finished)
        assert (sites.starts["films"], sites.starts["server"]) == (2, 2)
        assert adapter(sites.out) == simulated(values, tiny_data, tmp_path / "here")
        (tmp_path / "out" / "report.html").read_text().index("Between sites")
        assert "5 of 5 rounds" in fedrot("status", "out", folder=tmp_path)
        sites.until(lambda: all(sites.running[name].poll() == 0 for name in SITES), 120.0)
        for name in SITES:  # the clients are left the result, and the models were loaded once a process
            (run,) = [path for path in (tmp_path / "sites" / name).iterdir() if (path / "adapter").exists()]
            assert adapter(run) == adapter(sites.out)
            said = (tmp_path / "sites" / name / "worker.log").read_text()
            assert said.count("joined the run") == said.count("listens at") == sites.starts[name]
        assert {e.client for e in read_exchanges(sites.out)} == set(SITES)


def test_a_buffered_run_goes_on_without_a_slow_client_and_hears_it_late(
    values: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    values = values_of(values, rounds=8, federation={"buffer": 2}, evaluation={"every": 0})
    with fleet(tmp_path, tiny_data, values) as sites:
        sites.until(lambda: sites.rounds() >= 1)
        (worker,) = [pid for pid, name in sites.processes().items() if name == "films: worker"]
        os.kill(worker, signal.SIGSTOP)
        sites.until(lambda: sites.rounds() >= 3)
        sites.kill("server")
        sites.until(lambda: sites.starts["server"] == 2)
        time.sleep(5.0)
        os.kill(worker, signal.SIGCONT)
        sites.until(sites.finished)
        records = [json.loads(line) for line in (sites.out / "metrics.jsonl").read_text().splitlines()]
        assert [len(record["clients"]["used"]) for record in records] == [2] * 8
        assert max(record["clients"]["late"].get("films", 0) for record in records) >= 2
        # It trained once from a broadcast, and was asked again only when the server was started again.
        said = (tmp_path / "sites" / "films" / "worker.log").read_text().splitlines()
        trained = [line.split("train of ")[1].split(":")[0] for line in said if "train of " in line and " s" in line]
        assert len(trained) == len(set(trained))
        assert sum("the reply is given again" in line for line in said) <= 2


def test_random_kills_of_any_process_lose_nothing(values: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    """`make soak`: FEDROT_KILLS of them, 3 otherwise; the seed is FEDROT_SEED."""
    kills, rng = int(os.environ.get("FEDROT_KILLS", "3")), random.Random(int(os.environ.get("FEDROT_SEED", "0")))
    values = values_of(values, rounds=max(5, kills))
    done: list[str] = []
    with fleet(tmp_path, tiny_data, values) as sites:
        for kill in range(kills):
            sites.until(lambda kill=kill: sites.rounds() > kill * (values["rounds"] - 1) // kills)  # type: ignore[misc]
            time.sleep(rng.uniform(0.0, 8.0))  # anywhere in a round
            done.append(_kill_one(sites, rng))
            print(f"{time.strftime('%H:%M:%S')} round {sites.rounds()}: ended {done[-1]}", flush=True)
        sites.until(sites.finished, 1800.0)
        assert adapter(sites.out) == simulated(values, tiny_data, tmp_path / "here")
    assert len(done) == kills


def _kill_one(sites: Fleet, rng: random.Random) -> str:
    """End one of the processes that run now: each kind alike, the server as often as all clients together."""
    running: dict[str, list[int]] = {}
    for pid, name in sorted(sites.processes().items()):
        kind = name.partition(": ")[2] or ("server" if name == "server" else "client")
        running.setdefault(kind, []).append(pid)
    pid = rng.choice(running[rng.choice(sorted(running))])
    name = sites.processes().get(pid, "what ended just now")
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return name
