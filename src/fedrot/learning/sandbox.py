"""Programs that nobody has read, such as a model's completions, run so that they can do no harm. Linux only.

Held by the kernel, whoever the caller is, root too: each program runs as an ordinary user without capabilities, in
namespaces of its own (users, processes, files, network, IPC), and is refused the system calls that would get around
these. It sees the interpreter and its libraries, read only, and writes to one small folder in memory. It reaches no
network and no process of the host. Processor time, address space, size and number of files and number of processes
are limited, so that memory is, too: no more than about `memory` times `processes`, and `scratch_bytes`. When time is
up, or this process goes, process 1 of its namespace is killed and with it all that the program started.

A program has passed if it ran to its last line and then ended by itself with exit status 0. It says so with a random
token that lies nowhere Python can look, so leaving early in any way, or patching modules, is no pass. Not guaranteed:
a program that reads its own process's memory could find the token, and one that holds its own tests can always fool
these, for example by objects that equal everything. Kernels have bugs, and other programs on the machine can be slowed
down: this is a sandbox for mistakes and mischief, no substitute for a machine of its own against a determined attack.
"""

import contextlib
import os
import select
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from fedrot.core.errors import FedrotError

Outcome = Literal["passed", "failed", "timeout", "memory"]
"""passed: ran to its end. timeout: stopped, its wall-clock or processor time used up. memory: ended by a MemoryError
that it did not catch, or by the kernel for lack of memory. failed: anything else."""

MESSAGE_LENGTH = 300
GRACE = 60.0  # seconds beyond a program's own until the keeper, which should have ended it, is given up
# Beside this file, and started without the package, whose imports would take longer than the program.
STARTER = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); from sandbox_init import main; main()"

PROBE = """
import os, time
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
assert os.getuid() != 0, "the program is root"
assert all(int(status[name], 16) == 0 for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")), "it has capabilities"
assert status["NoNewPrivs"].strip() == "1" and status["Seccomp"].strip() == "2", "system calls are not filtered"
assert not os.access("/", os.W_OK) and os.access("/tmp", os.W_OK), "the files are not as they should be"
children = 0
try:
    while children < 8:
        if os.fork() == 0:
            time.sleep(60)
        children += 1
except BlockingIOError:
    pass
assert children == 2, f"{children} further processes could be had, not 2: the kernel does not count them by namespace"
"""


class SandboxUnavailable(FedrotError):
    """Programs cannot be contained on this machine, and so are not run; says why."""


@dataclass(frozen=True)
class Limits:
    """What a program may use; beyond it the kernel refuses."""

    seconds: float = 10.0  # from the start of its interpreter to the end; processor time of a process, a second more
    memory: int = 512 << 20  # bytes of address space of each process
    processes: int = 4  # at a time, threads counted
    file_bytes: int = 1 << 20  # of each file
    scratch_bytes: int = 16 << 20  # of all files
    output_bytes: int = 4096  # kept of a line of standard error; all else that it prints is thrown away


@dataclass(frozen=True)
class Ran:
    """How a program ended."""

    outcome: Outcome
    message: str  # one line: the last of what it printed as errors, or the reason; empty when passed


LIMITS = Limits()


@cache
def available() -> str | None:
    """Why programs cannot be contained here, or None: a program that looks around in its sandbox is run, once."""
    if sys.platform != "linux":
        return "it is made of Linux's namespaces"
    outcome, message = _keeper(PROBE, Limits(seconds=30.0, processes=3))
    return None if outcome == "passed" else message


def run_program(source: str, limits: Limits = LIMITS) -> Ran:
    """Run Python source in a fresh interpreter, as a script: `__name__` is '__main__', nothing comes in or goes out.

    It has the standard library alone, no arguments, no environment, standard input at its end, and an empty folder to
    work in. Raises `SandboxUnavailable` where it cannot be contained.
    """
    reason = available()
    if reason is None:
        outcome, message = _keeper(source, limits)
        for known in get_args(Outcome):
            if outcome == known:
                return Ran(known, message)
        reason = message
    raise SandboxUnavailable(
        f"programs run in a sandbox or not at all, and there is none here: {reason} "
        "(it needs Linux 5.14 or later and this user's right to make user namespaces)"
    )


def run_programs(sources: Sequence[str], limits: Limits = LIMITS, workers: int = 1) -> Iterator[Ran]:
    """How each program ended, in their order; `workers` of them run at a time."""
    running: deque[Future[Ran]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="fedrot-sandbox") as pool:
        try:
            for source in sources:
                running.append(pool.submit(run_program, source, limits))
                if len(running) > workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _keeper(source: str, limits: Limits) -> tuple[str, str]:
    """(outcome, message) from `sandbox_init`; the outcome is 'refused' where there is no sandbox to be had."""
    content = source.encode("utf-8", "surrogatepass")
    # Not the virtual environment's: what it links to is all that the sandbox shows.
    executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    numbers = [str(number) for number in (*astuple(limits), len(content))]
    with subprocess.Popen(
        [executable, "-I", "-S", "-c", STARTER, executable, *numbers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={},
        start_new_session=True,  # Ctrl-C is for this process, which then closes the pipe
    ) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            keeper.stdin.write(content)
            keeper.stdin.flush()
        # The pipe stays open: the keeper ends the program when it closes, be it that this process is killed.
        poll = select.poll()
        poll.register(keeper.stdout, select.POLLIN)
        if not poll.poll((limits.seconds + GRACE) * 1000):
            keeper.kill()  # process 1 goes with it
        said = keeper.stdout.read().decode(errors="replace").strip()
    outcome, _, message = said.rpartition("\n")[2].partition(" ")
    if outcome not in (*get_args(Outcome), "refused"):
        outcome, message = "refused", f"{outcome} {message}".strip() or "its keeper said nothing"
    return outcome, "".join(c if c.isprintable() else " " for c in message)[:MESSAGE_LENGTH].strip()
