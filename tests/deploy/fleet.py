"""A server and three clients as real processes on this machine, kept running as a service manager would."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

SITES = ["books", "films", "music"]
_FEDROT = [sys.executable, "-m", "fedrot.app.cli.main"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fedrot(*words: str, folder: Path) -> str:
    """A command that ends by itself; what it prints."""
    done = subprocess.run([*_FEDROT, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def divide(data: Path, out: Path) -> None:
    """A folder for each site, with its rows of each file."""
    for path in sorted(data.glob("*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for site in SITES:
            (out / site).mkdir(parents=True, exist_ok=True)
            with (out / site / path.name).open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(row for row in rows if row["group"] == site)


@dataclass
class Fleet:
    """`start` and `keep` start what is not running; what ends with an error is started again."""

    folder: Path
    values: dict[str, object]  # the recipe
    port: int = field(default_factory=free_port)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)

    def prepare(self, data: Path) -> None:
        """Keys, data and recipe."""
        divide(data, self.folder / "data")
        fedrot("keys", "server", "--out", "tls", folder=self.folder)
        fedrot("keys", "client", *SITES, "--out", "keys", folder=self.folder)
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.values))

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def words(self, name: str) -> list[str]:
        """The command of the server or of a client."""
        if name == "server":
            words = ["server", "recipe.yaml", "--tls", "tls", "--clients", "keys", "--out", "out", "--resume"]
            return [*words, "--port", str(self.port), "--grace", "240"]
        words = ["client", "--server", f"127.0.0.1:{self.port}", "--key", f"keys/{name}.key", "--ca", "tls/ca.crt"]
        return [*words, "--data", f"data/{name}", "--threads", "1", "--once"]

    def start(self, name: str) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.running[name] = subprocess.Popen(
            [*_FEDROT, *self.words(name)], cwd=self.folder, stdout=log, stderr=log, env=environment
        )
        self.starts[name] = self.starts.get(name, 0) + 1
        log.close()

    def keep(self) -> None:
        """Start what is not there; what has ended well stays so."""
        for name in ("server", *SITES):
            process = self.running.get(name)
            if process is None or process.poll() not in (None, 0):
                self.start(name)

    def rounds(self) -> int:
        """How many rounds are finished."""
        path = self.out / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def until(self, over: Callable[[], bool], seconds: float = 900.0) -> None:
        """Keep all running until something holds."""
        end = time.monotonic() + seconds
        while not over():
            assert time.monotonic() < end, self.told()
            self.keep()
            time.sleep(0.5)

    def finished(self) -> bool:
        return (self.out / "result.json").exists() and self.running["server"].poll() == 0

    def processes(self) -> dict[int, str]:
        """What runs now, by process id: 'server', 'books', and what these have started: 'books: flower-supernode'."""
        parents = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
        found = {p.pid: name for name, p in self.running.items() if p.poll() is None}
        for pid, parent in parents.items():
            if parent in list(found):
                words = _arguments(pid)
                kind = next((w for w in words if w.startswith("flower-") or w.endswith("network.worker")), "")
                if kind:
                    found[pid] = f"{found[parent]}: {kind.rpartition('.')[2]}"
        return found

    def kill(self, what: str) -> None:
        """End a process by name as if it had crashed; it must be there."""
        (pid,) = [pid for pid, name in self.processes().items() if name == what]
        os.kill(pid, signal.SIGKILL)

    def told(self) -> str:
        """The last lines of every log."""
        logs = [*self.folder.glob("*.log"), *self.folder.glob("out/**/*.log"), *self.folder.glob("sites/**/*.log")]
        return "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in logs)

    def end(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        for process in self.running.values():
            try:
                process.wait(30.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


@contextmanager
def fleet(folder: Path, data: Path, values: dict[str, object]) -> Iterator[Fleet]:
    """A fleet whose processes are all ended afterwards."""
    made = Fleet(folder, values)
    made.prepare(data)
    try:
        yield made
    finally:
        made.end()
