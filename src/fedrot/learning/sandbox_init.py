"""The inside of the sandbox: `sandbox` starts `main` in an interpreter of its own, which sees nothing of the package.

Three processes stand one in another:

- the keeper, in a new user namespace, sees the host; it kills when time is up or when standard input ends,
- init, process 1 of a new PID namespace, builds the view of the files and gives up every right; the kernel kills all
  that lives in the namespace when init goes, which nothing inside can prevent,
- the program, in a fresh interpreter: nothing of the two others is in its memory.

Arguments: the interpreter, the fields of `Limits`, the length of the source. Standard input: the source, then
nothing until it is closed. Standard output: one line, '<outcome> <message>', or 'refused <reason>'.
"""

import ctypes
import fcntl
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
)  # fmt: skip
NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE, DETACH = 2, 4, 8, 0x1000, 0x4000, 0x40000, 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY, ATTR_NOSUID = 442, -100, 0x8000, 1, 2
PDEATHSIG, DUMPABLE, SECCOMP, CAPBSET_DROP, NO_NEW_PRIVS = 1, 4, 22, 24, 38
NOBODY = 65534  # whom a program runs as where the caller is root: root's files and limits are not its own
SETUP_SECONDS = 30.0
LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


# Denied, in this order: what holds memory that no limit counts (shmget, semget, msgget, mq_open, add_key, request_key,
# keyctl, memfd_create), other processes' memory (ptrace, process_vm_readv, process_vm_writev, kcmp), and what no
# program needs and kernels had holes in (unshare, setns, mount, umount2, chroot, pivot_root, perf_event_open, bpf,
# userfaultfd). From 424 on all machines agree: io_uring, the new mount calls, pidfd_getfd, memfd_secret.
EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442, 447)
DENIED = {
    "x86_64": (29, 64, 68, 240, 248, 249, 250, 319, 101, 310, 311, 312, 272, 308, 165, 166, 161, 155, 298, 321, 323),
    "aarch64": (194, 190, 186, 180, 217, 218, 219, 279, 117, 270, 271, 272, 97, 268, 40, 39, 51, 41, 241, 280, 282),
}
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SOCKET = {"x86_64": 41, "aarch64": 198}
MACHINE = os.uname().machine

# Runs in the program's process. The token lies on the evaluation stack alone while the program runs: no frame, global
# or object that Python can reach has it, and the functions were taken before the program could replace them.
RUNNER = """
import posix, sys
source = b""
while part := posix.read(0, 1 << 20):
    source += part
posix.lseek(0, 0, 0)
sys.argv = ["main.py"]
sys.orig_argv = ["python", "main.py"]
main = sys.modules["__main__"] = type(sys)("__main__")
main.__builtins__ = __builtins__
posix.unsetenv("LC_CTYPE")
posix.environ.clear()
posix.register_at_fork(after_in_child=lambda close=posix.close: close(3))
code = compile(source[32:].decode("utf-8", "surrogatepass"), "main.py", "exec", dont_inherit=True)
del source, part
posix.write(3, (posix.read(0, 32), posix.dup2(1, 0), exec(code, main.__dict__))[0])
"""

libc = ctypes.CDLL(None, use_errno=True)


def call(what: str, *arguments: object, name: str = "") -> None:
    """A function of the C library; OSError that says which one failed."""
    if getattr(libc, what)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name or what}: {os.strerror(number)}")


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} {error.filename or ''}".strip()
    return " ".join(f"{type(error).__name__}: {error}".split())


def prctl(option: int, value: int) -> None:
    """One process control; the unused arguments must be zeros of full width."""
    call("prctl", option, *(ctypes.c_ulong(number) for number in (value, 0, 0, 0)), name=f"prctl {option}")


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """One mount."""
    texts = [text.encode() if text is not None else None for text in (source, target, kind, data)]
    call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3], name=f"mount {target}")


def unshare(flags: int) -> None:
    """New namespaces for this process; Python has it from 3.12 on."""
    call("unshare", flags, name="unshare of namespaces")


def enter_user_namespace() -> None:
    """A new user namespace, in which this process may do all that the next steps need, and children in a new PID one.

    Users have the numbers they have outside: all of them where the caller is root, the caller alone otherwise. A
    child left outside writes the maps, since only one with rights outside may write root's.
    """
    caller, (wait, go) = os.getpid(), os.pipe()
    helper = os.fork()
    if helper == 0:
        try:
            os.close(go)
            os.read(wait, 1)
            _write_maps(Path(f"/proc/{caller}"))
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    os.close(wait)
    try:
        unshare(NEWUSER | NEWPID)
    finally:
        os.close(go)
        code = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    if code:
        raise OSError(code, f"uid_map: {os.strerror(code)}")


def _write_maps(process: Path) -> None:
    root = os.geteuid() == 0
    if not root:
        (process / "setgroups").write_text("deny")
    for name, number in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
        own = [(line.split()[0], line.split()[2]) for line in Path(f"/proc/self/{name}").read_text().splitlines()]
        ranges = own if root else [(str(number), "1")]
        (process / name).write_text("\n".join(f"{first} {first} {count}" for first, count in ranges))


def build_view(executable: str, scratch: int, user: int, group: int) -> None:
    """A root of its own: the interpreter and its libraries, read only, /proc of this PID namespace, a small /tmp."""
    mount("none", "/", None, REC | PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    os.chdir("/tmp")
    Path("old").mkdir()
    call("syscall", ctypes.c_long(PIVOT_ROOT[MACHINE]), b".", b"old", name="pivot_root")
    os.chdir("/")
    for path in (*LIBRARIES, f"{sys.base_prefix}/lib", f"{sys.base_prefix}/{sys.platlibdir}", executable, *DEVICES):
        _bring(Path(path))
    # No namespaces below this one: nobody inside gets rights in a new one.
    Path("/old/proc/sys/user/max_user_namespaces").write_text("0")
    for folder in ("/proc", "/tmp"):
        Path(folder).mkdir()
    Path("/dev/shm").symlink_to("/tmp")
    mount("proc", "/proc", "proc", NOSUID | NODEV | NOEXEC, "hidepid=2,subset=pid")
    call("umount2", b"/old", DETACH, name="umount of the host")
    Path("/old").rmdir()
    attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY | ATTR_NOSUID, 0, 0, 0)
    where = (ctypes.c_long(MOUNT_SETATTR), ctypes.c_long(AT_FDCWD), b"/", ctypes.c_long(AT_RECURSIVE))
    call("syscall", *where, attributes, ctypes.c_long(ctypes.sizeof(attributes)), name="mount_setattr")
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, f"size={scratch},nr_inodes=512,mode=700,uid={user},gid={group}")
    os.chdir("/tmp")


def _bring(path: Path) -> None:
    """Show a path of the host, at /old, in the new root at its own place."""
    source = Path("/old") / path.relative_to("/")
    if os.path.lexists(path) or not os.path.lexists(source):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        path.symlink_to(source.readlink())
        return
    path.mkdir() if source.is_dir() else path.touch()
    mount(str(source), str(path), None, BIND | REC)


def drop_rights(user: int, group: int) -> None:
    """No capability, none to be had again, and another user than root."""
    prctl(NO_NEW_PRIVS, 1)
    for capability in range(64):
        libc.prctl(CAPBSET_DROP, ctypes.c_ulong(capability), *[ctypes.c_ulong(0)] * 3)  # fails past the last one
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)
    call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    prctl(DUMPABLE, 0)  # the same user's processes may not look into this one


class Instruction(ctypes.Structure):
    """struct sock_filter."""

    _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint32))


class Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction)))


def filter_calls() -> None:
    """Deny the list, other machines' numbers, and sockets that a network namespace does not hold (vsock)."""
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    kill, deny, allow = 0x80000000, 0x00050001, 0x7FFF0000
    steps = [(load, 0, 0, 4), (equal, 1, 0, AUDIT[MACHINE]), (answer, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, deny)]
    for number in (*DENIED[MACHINE], *EVERYWHERE):
        steps += [(equal, 0, 1, number), (answer, 0, 0, deny)]
    steps += [(equal, 0, 5, SOCKET[MACHINE]), (load, 0, 0, 16)]
    steps += [(equal, 3, 0, 1), (equal, 2, 0, 2), (equal, 1, 0, 10), (answer, 0, 0, deny), (answer, 0, 0, allow)]
    program = (Instruction * len(steps))(*(Instruction(*step) for step in steps))
    whole = Filter(len(steps), program)
    call("prctl", SECCOMP, ctypes.c_ulong(2), ctypes.byref(whole), name="seccomp")


def limit(seconds: float, memory: int, processes: int, file_bytes: int) -> None:
    """Hard limits; those of one process hold for all, since the number of processes has one too."""
    values = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 256,
        resource.RLIMIT_STACK: 8 << 20,
    }
    for which, value in values.items():
        resource.setrlimit(which, (value, value))


class Task:
    """What the host asks for."""

    def __init__(self, arguments: list[str]) -> None:
        self.executable, seconds, *numbers = arguments
        self.seconds = float(seconds)
        self.memory, self.processes, self.file_bytes, self.scratch_bytes, self.output_bytes, length = map(int, numbers)
        self.source = b""
        while len(self.source) < length and (piece := os.read(0, length - len(self.source))):
            self.source += piece


def init(task: Task, status: int, errors: int) -> None:
    """Process 1. Tells the keeper 'ready', then 'ended <wait status> <1 if the program came to its end>'."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # without handlers no signal from inside reaches process 1
    os.setsid()  # and none to the group reaches the keeper
    prctl(PDEATHSIG, signal.SIGKILL)
    unshare(NEWNS | NEWNET | NEWIPC | NEWUTS | NEWCGROUP)
    Path("/proc/self/oom_score_adj").write_text("1000")  # first to go where the host runs out of memory
    root = os.geteuid() == 0
    user, group = (NOBODY, NOBODY) if root else (os.geteuid(), os.getegid())
    build_view(task.executable, task.scratch_bytes, user, group)
    token = os.urandom(16).hex().encode()
    source = os.memfd_create("source")
    for part in (token, task.source):
        with os.fdopen(os.dup(source), "wb") as file:
            file.write(part)
    os.lseek(source, 0, os.SEEK_SET)
    null = os.open("/dev/null", os.O_RDWR)
    end, channel = os.pipe()
    drop_rights(user, group)
    prctl(PDEATHSIG, signal.SIGKILL)  # again: it went with the rights
    os.write(status, b"ready\n")
    program = os.fork()
    if program == 0:
        try:
            for target, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in (source, null, errors)]):
                os.dup2(fd, target)
            os.dup2(fcntl.fcntl(channel, fcntl.F_DUPFD_CLOEXEC, 20), 3)
            # Where the caller is not root, the keeper and init are processes of the same user in the same namespace.
            limit(task.seconds, task.memory, task.processes + (1 if root else 2), task.file_bytes)
            filter_calls()
            os.execve(task.executable, [task.executable, "-I", "-S", "-B", "-X", "utf8", "-c", RUNNER], {})
        except Exception as error:
            os.write(status, f"refused {reason(error)}\n".encode())
        os._exit(1)
    for fd in (0, 1, 2, errors, channel, source):
        os.close(fd)
    ended, code = 0, 0
    while ended != program:
        ended, code = os.waitpid(-1, 0)
    os.set_blocking(end, False)
    try:
        done = os.read(end, 64) == token
    except BlockingIOError:
        done = False
    os.write(status, f"ended {code} {done:d}\n".encode())


class LastLine:
    """The beginning of the last line that is not blank, of text that comes in pieces and may never end."""

    def __init__(self, most: int) -> None:
        self.most, self._line, self._before = most, b"", b""

    def add(self, piece: bytes) -> None:
        """The next piece."""
        first, *others = piece.split(b"\n")
        self._line += first[: self.most - len(self._line)]
        for line in others:
            self._before = self._line if self._line.strip() else self._before
            self._line = line[: self.most]

    def text(self) -> str:
        """As it is so far."""
        return (self._line if self._line.strip() else self._before).decode(errors="replace").strip()


def keep(task: Task, process: int, status: int, errors: int) -> tuple[str, str]:
    """Wait for init, reading what the program prints as errors; kill init when time is up or nobody waits any more."""
    alive = os.pidfd_open(process)
    poll = select.poll()
    for fd in (0, alive, status, errors):
        poll.register(fd, select.POLLIN)
    told, last, killed = b"", LastLine(task.output_bytes), ""
    deadline = time.monotonic() + SETUP_SECONDS
    going = True
    while going:
        ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if alive not in ready and time.monotonic() >= deadline:
            killed = f"timeout not done after {task.seconds:g} s" if b"ready\n" in told else "refused set-up hangs"
        elif 0 in ready:
            killed = "refused nobody waits for the result"
        if killed:
            os.kill(process, signal.SIGKILL)
        going = not killed and alive not in ready
        if status in ready:
            if not told and going:
                deadline = time.monotonic() + task.seconds
            told += _read(poll, status)
        if errors in ready:
            last.add(_read(poll, errors))
    os.waitpid(process, 0)  # comes back when nothing lives in the namespace
    while piece := os.read(errors, 1 << 16):
        last.add(piece)
    while piece := os.read(status, 4096):
        told += piece
    if killed:
        outcome, _, message = killed.partition(" ")
        return outcome, message
    return judge(told.decode().splitlines(), last.text())


def _read(poll: select.poll, fd: int) -> bytes:
    piece = os.read(fd, 1 << 16)
    if not piece:
        poll.unregister(fd)
    return piece


def judge(told: list[str], last: str) -> tuple[str, str]:
    """(outcome, message) by what init told and the last line of the program's errors."""
    if not told:
        return "refused", "the sandbox ended before the program began"
    kind, _, rest = next((line for line in told if line.startswith("refused ")), told[-1]).partition(" ")
    if kind == "refused":
        return kind, rest
    if kind != "ended":
        return "memory", "the kernel killed all of it, most likely for memory"
    status, done = map(int, rest.split())
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        return "timeout", "its processor time is used up"
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return "failed", f"killed by {names.get(-code, f'signal {-code}')}"
    if code == 0:
        return ("passed", "") if done else ("failed", "exit status 0 before the end of the program")
    return ("memory" if last.startswith("MemoryError") else "failed"), last or f"exit status {code}"


def main() -> None:
    """The keeper."""
    os.umask(0o022)
    task = Task(sys.argv[1:])
    (status, status_in), (errors, errors_in) = os.pipe(), os.pipe()
    try:
        if MACHINE not in DENIED:
            raise OSError(0, f"the numbers of {MACHINE}'s system calls are not known")
        enter_user_namespace()
        process = os.fork()
        if process == 0:
            try:
                init(task, status_in, errors_in)
            except Exception as error:
                os.write(status_in, f"refused {reason(error)}\n".encode())
            os._exit(0)
        os.close(status_in)
        os.close(errors_in)
        outcome, message = keep(task, process, status, errors)
    except OSError as error:
        outcome, message = "refused", reason(error)
    os.write(1, f"{outcome} {message}\n".encode())
