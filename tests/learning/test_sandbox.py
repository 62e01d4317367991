"""Programs that mean harm, one by one: each ends as it should, and the host is as it was."""

import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hostile_programs import ABUSE, Hostile
from hostile_reach import REACH
from learning_helpers import refused

from fedrot.learning import sandbox as module
from fedrot.learning.sandbox import Limits, Ran, SandboxUnavailable, available, run_program, run_programs

HOSTILE = {**ABUSE, **REACH}
SECRET = "the-secret-of-the-host"
SUBREAPER = 36


@pytest.fixture(scope="module", autouse=True)
def orphans_come_here() -> Iterator[None]:
    """A process that outlives its sandbox becomes this process's child, so that it can be seen."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(SUBREAPER, *[ctypes.c_ulong(value) for value in (1, 0, 0, 0)]) == 0
    yield
    libc.prctl(SUBREAPER, *[ctypes.c_ulong(0)] * 4)


def descendants() -> set[int]:
    """Processes below this one, the dead that nobody has waited for among them."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {os.getpid()}} - found:
        found |= more
    return found


class Host(NamedTuple):
    """What a program could harm: files below `folder`, and who listens."""

    folder: Path
    tcp: socket.socket
    udp: socket.socket
    local: socket.socket

    def state(self) -> dict[str, Any]:
        """Everything that must be the same afterwards."""
        files = {str(path): (path.stat().st_mode, path.stat().st_uid) for path in self.folder.rglob("*")}
        content = {str(path): path.read_text() for path in self.folder.rglob("*") if path.is_file()}
        interpreter = Path(sys.executable).resolve().stat()
        stdlib = Path(os.__file__).stat()
        outside = {path: sorted(Path(path).glob("sandbox-was-here*")) for path in ("/tmp", "/dev/shm", "/", "/etc")}
        home = sorted(path.name for path in Path.home().iterdir()) if os.access(Path.home(), os.R_OK) else []
        limits = [resource.getrlimit(which) for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)]
        programs = [(stat.st_mode, stat.st_uid, stat.st_size, stat.st_mtime) for stat in (interpreter, stdlib)]
        return {**files, **outside, "content": content, "home": home, "limits": limits, "programs": programs}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """Sentinels, and sockets that wait."""
    (tmp_path / "open.txt").write_text(SECRET)
    (tmp_path / "open.txt").chmod(0o666)
    (tmp_path / "closed.txt").write_text(SECRET)
    (tmp_path / "closed.txt").chmod(0o600)
    (tmp_path / "folder").mkdir(mode=0o777)
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as local,
    ):
        udp.bind(("127.0.0.1", 0))
        local.bind(f"\0fedrot-{os.getpid()}")
        local.listen()
        for each in (tcp, udp, local):
            each.setblocking(False)
        yield Host(tmp_path, tcp, udp, local)


def memory() -> int:
    """The most that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in HOSTILE.items()])
def test_harm_is_contained(host: Host, monkeypatch: pytest.MonkeyPatch, case: Hostile) -> None:
    monkeypatch.setenv("FEDROT_SECRET", SECRET)
    assert available() is None
    values = {
        "FOLDER": str(host.folder),
        "SECRET": SECRET[::-1],  # not in the program, which looks for it
        "REPOSITORY": str(Path(__file__).parents[2]),
        "HOME": str(Path.home()),
        "TCP": host.tcp.getsockname()[1],
        "UDP": host.udp.getsockname()[1],
        "LOCAL": host.local.getsockname(),
        "PARENT": os.getpid(),
    }
    head = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    before, processes, most = host.state(), descendants(), memory()
    ran = run_program(head + case.source, Limits(seconds=case.seconds, memory=192 << 20))
    assert ran.outcome == case.outcome, ran
    assert case.message in ran.message
    assert len(ran.message) <= module.MESSAGE_LENGTH
    assert ran.message.isprintable()
    assert host.state() == before
    assert descendants() == processes
    assert memory() - most < 32 << 20
    for waits in (host.tcp.accept, host.local.accept, lambda: host.udp.recv(1)):
        with pytest.raises(BlockingIOError):
            waits()


def test_there_are_enough_hostile_programs() -> None:
    assert len(HOSTILE) >= 60


FAIR = {
    "empty": "",
    "function": "def f(x):\n    return 2 * x\nassert f(2) == 4",
    "a script as any other": """
import os, sys
assert __name__ == "__main__" and sys.modules["__main__"].__dict__ is globals()
assert sys.argv == ["main.py"] and not os.environ and sys.stdin.read() == ""
assert os.listdir() == [] and sys.flags.isolated and sys.flags.no_site
try:
    input()
except EOFError:
    pass
""",
    "standard library": """
import bisect, collections, dataclasses, decimal, fractions, functools, hashlib, heapq, itertools, json, math, random
import re, statistics, string, typing
assert hashlib.md5(b"").hexdigest().startswith("d41d8")
assert collections.namedtuple("P", "x")(1).x == 1
assert math.isclose(statistics.mean(random.sample(range(10), 10)), 4.5)
""",
    "small file": "open('a', 'w').write('x' * 1000); assert len(open('a').read()) == 1000",
    "thread": "import threading\nt = threading.Thread(target=print)\nt.start(); t.join()",
    "prints a lot": "for _ in range(20000): print('x' * 100)",
    "not ASCII": "s = 'Größe 🦊'; assert len(s) == 7; print(s)",
    "long source": "x = 0\n" + "x += 1\n" * 40000 + "assert x == 40000",
    "future": "from __future__ import annotations\ndef f(x: undefined): pass\nassert f.__annotations__",
}


@pytest.mark.parametrize("name", FAIR)
def test_a_correct_program_passes(name: str) -> None:
    assert run_program(FAIR[name]) == Ran("passed", "")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("assert 1 == 2, 'one is not two'", "AssertionError: one is not two"),
        ("assert False", "AssertionError"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("print('x' * 99999)\n1 / 0\n", "ZeroDivisionError: division by zero"),
        ("x = '\ud800'", "surrogates not allowed"),
        ("a\0b", "null bytes"),
        ("raise ValueError('\\x1b[31mred\\u202eder\\x07')", "ValueError:  [31mred der"),
        ("import sys; sys.exit('no more')", "no more"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
    ],
)
def test_a_wrong_program_fails_with_its_last_line(source: str, message: str) -> None:
    ran = run_program(source)
    assert ran.outcome == "failed"
    assert message in ran.message
    assert ran.message.isprintable()


def test_of_a_long_message_the_beginning_is_kept() -> None:
    ran = run_program("raise ValueError('x' * 10_000_000)", Limits(output_bytes=50))
    assert ran == Ran("failed", ("ValueError: " + "x" * 50)[:50])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_so_many_processes_can_be_had_and_no_more(processes: int) -> None:
    source = f"""
import os, time
count = 1
try:
    while count < 20:
        if os.fork() == 0:
            time.sleep(60)
        count += 1
except BlockingIOError:
    pass
assert count == {processes}, count
"""
    assert list(run_programs([source] * 2, Limits(processes=processes), workers=2)) == [Ran("passed", "")] * 2


def test_programs_come_back_in_order() -> None:
    sources = [f"import time; time.sleep({(5 - i) / 20}); assert {i} % 2, 'program {i}'" for i in range(6)]
    wanted = [Ran("passed", "") if i % 2 else Ran("failed", f"AssertionError: program {i}") for i in range(6)]
    assert list(run_programs(sources, workers=3)) == wanted
    assert list(run_programs([], workers=3)) == []


def test_programs_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3)

    def meets(source: str, limits: Limits) -> Ran:
        together.wait(30)
        return Ran("passed", source)

    monkeypatch.setattr(module, "run_program", meets)
    assert [ran.message for ran in run_programs("abcdef", workers=3)] == list("abcdef")


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """The probe's answer is not kept from before, nor for later."""
    available.cache_clear()
    yield
    available.cache_clear()


def starter(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Start the keeper with this done first, with `s` the module."""
    monkeypatch.setattr(
        module, "STARTER", module.STARTER.replace("main()", f"import sandbox_init as s\n{change}\nmain()")
    )


BROKEN = {
    "no user namespaces": (
        "def unshare(flags): raise PermissionError(1, 'unshare: Operation not permitted')\ns.unshare = unshare",
        "unshare: Operation not permitted",
    ),
    "no mounts": (
        "def mount(*a): raise PermissionError(1, 'mount: not permitted')\ns.mount = mount",
        "mount: not permitted",
    ),
    "no maps": ("def maps(p): raise PermissionError(1, '')\ns._write_maps = maps", "uid_map: Operation not permitted"),
    "another machine": ("s.MACHINE = 'pdp11'", "pdp11"),
    "no filter": ("s.filter_calls = lambda: None", "system calls are not filtered"),
    "rights are kept": ("s.drop_rights = lambda *a: None", ""),
    "processes are not counted": ("s.resource.RLIMIT_NPROC = s.resource.RLIMIT_CORE", "further processes"),
    "a fault": ("s.build_view = None", "TypeError"),
    "nothing is said": ("import os; os._exit(0)", "said nothing"),
    "no such interpreter": (
        "import os\ndef no(*a): raise OSError(8, 'Exec format error')\nos.execve = no",
        "Exec format",
    ),
}


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("name", BROKEN)
def test_without_a_whole_sandbox_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    change, reason = BROKEN[name]
    starter(monkeypatch, change)
    assert available()
    with refused("programs run in a sandbox or not at all", reason, error=SandboxUnavailable):
        run_program(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("asked_anew")
def test_on_another_system_nothing_is_even_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "platform", "darwin")
    monkeypatch.setattr(module.subprocess, "Popen", None)
    with refused("Linux", error=SandboxUnavailable):
        run_program("")
    with refused("Linux", error=SandboxUnavailable):
        list(run_programs(["", ""], workers=2))


def test_a_sandbox_that_is_lost_later_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available() is None
    starter(monkeypatch, BROKEN["no user namespaces"][0])
    with refused("Operation not permitted", error=SandboxUnavailable):
        run_program("pass")


@pytest.mark.usefixtures("asked_anew")
def test_the_machine_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def keeper(source: str, limits: Limits) -> tuple[str, str]:
        asked.append(source)
        return "passed", ""

    monkeypatch.setattr(module, "_keeper", keeper)
    assert [run_program("1"), run_program("2")] == [Ran("passed", "")] * 2
    assert asked == [module.PROBE, "1", "2"]


@pytest.mark.parametrize("who", ["caller", "keeper"])
def test_when_the_caller_or_the_keeper_is_killed_the_program_goes_too(who: str) -> None:
    before = descendants()
    program = (
        "from fedrot.learning.sandbox import _keeper, Limits; _keeper('import time; time.sleep(300)', Limits(300))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ) as caller:
        # caller, keeper, init, program, whose name shows that it has been reached
        while not any(b"posix.register_at_fork" in commands(pid) for pid in descendants() - before):
            assert caller.poll() is None
            time.sleep(0.02)
        killed = caller.pid if who == "caller" else next(p for p in descendants() - before if parent(p) == caller.pid)
        os.kill(killed, signal.SIGKILL)
        caller.wait(60)
        reap_until(before)


def commands(pid: int) -> bytes:
    """The command line of a process, empty when it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def parent(pid: int) -> int:
    """The process that started this one; 0 when it has gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def reap_until(wanted: set[int]) -> None:
    """Take the orphans that have ended, until no others are left; give up after a minute."""
    for _ in range(3000):
        if descendants() == wanted:
            return
        for pid in descendants() - wanted:
            if parent(pid) == os.getpid():
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)
    raise AssertionError(f"{[commands(pid) for pid in descendants() - wanted]} are left")
