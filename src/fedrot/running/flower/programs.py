"""Flower's long-lived programs, kept running: a server's SuperLink and a site's SuperNode."""

import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedrot.core.errors import RunError
from fedrot.core.files import write_atomic
from fedrot.running.flower import control
from fedrot.running.flower.keys import AUTHORITY, CERTIFICATE, KEY
from fedrot.running.flower.link import Link
from fedrot.running.flower.tether import command, environment
from fedrot.running.network.channel import WorkerError
from fedrot.running.network.keeper import Keeper, Process, Program

_COMING_UP = 60.0  # seconds until a program listens
# A node that did not say goodbye counts as connected for a minute, and is not let in a second time.
_NODE_PAUSE, _LINK_PAUSE = 5.0, 1.0
_LONGEST_PAUSE = 10.0


@contextmanager
def superlink(folder: Path, host: str, port: int, tls: Path, keys: Mapping[str, bytes]) -> Iterator[Link]:
    """A SuperLink whose state is in `folder`, for as long as this lasts; `tls` holds the server's files. Raises
    `RunError` where the address cannot be used.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_free(host, port)
    secret = _secret(folder / "secret")
    words = ["--host", host, "--port", str(port), "--database", str(folder / "state.db"), "--isolation", "process"]
    words += ["--superexec-auth-secret-file", str(folder / "secret"), "--disable-runtime-dependency-installation"]
    words += ["--ssl-ca-certfile", str(tls / AUTHORITY), "--ssl-certfile", str(tls / CERTIFICATE)]
    words += ["--ssl-keyfile", str(tls / KEY), "--enable-supernode-auth"]
    line = control.command(folder / "secret", *words)
    program = Program("the SuperLink", line, folder / "superlink.log", environment(folder), frozenset())
    here = reachable(host)
    with Keeper(program, _listens(program, here, port), _LINK_PAUSE, None, _LONGEST_PAUSE):
        yield Link(f"{here}:{port}", (tls / AUTHORITY).read_bytes(), secret, keys)


@contextmanager
def supernode(folder: Path, server: str, certificate: Path, key: Path) -> Iterator[tuple[str, bytes]]:
    """A SuperNode that is connected to `server`, host:port: its address on this machine, and the secret by which
    its messages are taken.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret, port = _secret(folder / "secret"), _free_port()
    words = ["--root-certificates", str(certificate), "--superlink", server, "--auth-supernode-private-key", str(key)]
    words += ["--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
    words += ["--superexec-auth-secret-file", str(folder / "secret")]
    program = Program(
        "the SuperNode", command("flower-supernode", *words), folder / "supernode.log", environment(folder), frozenset()
    )
    # A server that is not there yet is waited for.
    with Keeper(program, lambda process: None, _NODE_PAUSE, None, _LONGEST_PAUSE):
        yield f"127.0.0.1:{port}", secret


def reachable(host: str) -> str:
    """The address under which this machine reaches a server that listens at `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)


def _listens(program: Program, host: str, port: int) -> Callable[[Process], None]:
    def ready(process: Process) -> None:
        end = time.monotonic() + _COMING_UP
        while time.monotonic() < end:
            if process.poll() is not None:
                raise WorkerError(program.died(process.returncode))
            try:
                socket.create_connection((host, port), 1.0).close()
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise WorkerError(f"{program.name} did not listen at {host}:{port} within {_COMING_UP:g} s; see {program.log}")

    return ready


def _check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as problem:
            raise RunError(f"{host}:{port}: the server cannot listen there ({problem.strerror}); see --port") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _secret(path: Path) -> bytes:
    """What was drawn for this folder once."""
    if not path.exists():
        write_atomic(path, secrets.token_bytes(32))
        path.chmod(0o600)
    return path.read_bytes()
